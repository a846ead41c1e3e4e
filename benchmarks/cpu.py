"""``python -m benchmarks.cpu [--json FILE]``: the C++ CPU kernels beside PyTorch's and beside what the machine gives.

Every row is a ratio of one run: contestants take turns (`vllm_accel.tuning.timing`), and the yardstick (a matrix
product, a loop of multiply-adds, a read of the same bytes in the same order) is one of them. A row whose yardstick
varies between rounds says so: a neighbour was at work, and the row is worth nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cpu_rows import CPU, Row, cases
from vllm_accel.kernels.cpu import load
from vllm_accel.tuning import timing

#: The slowest quarter of a yardstick's rounds may be this much above the fastest before the row counts as disturbed.
BUSY = 1.15


class OneThread(timing.CpuClock):
    """Processor time of this thread, to which neighbours add little; for one thread only."""

    def seconds(self, call: timing.Call, times: int) -> float:
        """Return the mean over `times` calls."""
        start = time.thread_time()
        for _ in range(times):
            call()
        return (time.thread_time() - start) / times


def measure(row: Row, rounds: int) -> None:
    """Time the contestants of a row in turns."""
    clock = OneThread() if torch.get_num_threads() == 1 else timing.clock(CPU)
    with torch.set_grad_enabled(row.grad):
        found = timing.in_turns(row.calls, clock, rounds)
    for name, timed in found.items():
        if timed.seconds is None:
            row.errors[name] = timed.error
        else:
            row.seconds[name] = timed.seconds
    watched = found[next(iter(row.machine), "ours")].rounds
    if len(watched) > 2:
        row.disturbed = statistics.quantiles(watched, n=4)[2] > BUSY * min(watched)


def line(row: Row) -> str:
    """Return a row as text: ratios with what is wanted of them."""
    if "ours" in row.errors:
        return f"{row.name}: {row.errors['ours']}"
    parts = [f"{row.seconds['ours'] * 1e3:9.3f} ms"]
    for other, wanted in row.over.items():
        if other in row.seconds:
            parts.append(f"{row.ratio(other):5.2f} x {other}" + (f" (want {wanted:g})" if wanted else ""))
    for other, stick in row.machine.items():
        if other in row.seconds:
            parts.append(f"{row.share(other):4.0%} of {other}" + (f" (want {stick.share:.0%})" if stick.share else ""))
    notes = [f"\n    {name}: {error}" for name, error in row.errors.items()]
    return f"{row.name:52s} " + "   ".join(parts) + ("   DISTURBED" if row.disturbed else "") + "".join(notes)


def result(row: Row) -> dict[str, Any]:
    """Return a measured row as plain data."""
    good = "ours" not in row.errors
    return {
        "name": row.name,
        "seconds": row.seconds,
        "over": {n: row.ratio(n) for n in row.over if good and n in row.seconds},
        "over_wanted": {n: wanted for n, wanted in row.over.items() if wanted},
        "of_machine": {n: row.share(n) for n in row.machine if good and n in row.seconds},
        "of_machine_wanted": {n: stick.share for n, stick in row.machine.items() if stick.share},
        "disturbed": row.disturbed,
        "errors": row.errors,
    }


def save(path: Path, about: dict[str, Any], results: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> None:
    """Write the rows; those of earlier runs that were not measured again stay."""
    new = {row["name"] for row in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for row in earlier if row["name"] not in new] + results
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; exit status 1 where the kernels are not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--json", metavar="FILE", type=Path, help="save every figure, after each row")
    parser.add_argument("--keep", action="store_true", help="keep the other rows of FILE: a run in several parts")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the main shapes only")
    parser.add_argument("--threads", type=int, default=0, help="1 also takes processor time instead of wall-clock time")
    parser.add_argument("--only", default="", help="rows whose name contains one of these, separated by |")
    parser.add_argument("--budget", metavar="SECONDS", type=float, default=float("inf"), help="begin no row after that")
    options = parser.parse_args(argv)
    if (reason := load().reason) is not None:
        print(f"no CPU kernels: {reason}")
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = machine.about("benchmarks.cpu", CPU) | {"instruction_sets": load().module.instruction_sets()}
    print(machine.describe(facts), f"instruction sets: {', '.join(facts['instruction_sets'])}", sep="\n", flush=True)
    earlier = json.loads(options.json.read_text())["rows"] if options.keep and options.json.exists() else []
    results: list[dict[str, Any]] = []
    start = time.monotonic()
    for name, make in cases(options.quick):
        if not any(word in name for word in options.only.split("|")):
            continue
        if time.monotonic() - start > options.budget:
            print(f"{name}: not measured, {options.budget:g} s are over")
            continue
        row = make()
        measure(row, options.rounds)
        print(line(row), flush=True)
        results.append(result(row) | {"date": facts["date"]})
        del row
        if options.json:
            save(options.json, facts, results, earlier)
    return 0


if __name__ == "__main__":
    sys.exit(main())
