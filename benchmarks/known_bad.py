"""``python -m benchmarks.known_bad``: reproduce the public reports of wrong kernels on this machine.

Each report is one function of `known_bad_cases`: it builds inputs as the thread describes them, runs the kernel in
question and the same call through `vllm_accel.attention`, and compares both with float64. "reproduced" means that the
kernel is wrong here; "ours" says which backend the library took and whether it was right. Every report has a child
process of its own, with a time limit: some of these kernels end the process or poison the GPU's context.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.known_bad_cases import CASES, Case, Finding


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one report.

    Attributes:
        name, link, backend: of the report. reproduced: None where it could not be tried.
        detail: what was seen, or why it was not tried. ours: the library's own answer to the same call.
    """

    name: str
    link: str
    backend: str
    reproduced: bool | None
    detail: str
    ours: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Try every report and print what was seen; return 1 if the library itself gave a wrong answer somewhere.

    Raises:
        SystemExit: from argparse, for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.known_bad", description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything that was seen here")
    parser.add_argument("--only", default="", metavar="NAME", help="only reports whose name contains this")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of one report")
    parser.add_argument("--jobs", type=int, default=4, help="child processes at once")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    wanted = [case for case in CASES if given.only == case.name] or [c for c in CASES if given.only in c.name]
    if not wanted:
        parser.error(f"no report matches {given.only!r}; there are {', '.join(case.name for case in CASES)}")
    if given.child is not None:
        given.child.write_text(json.dumps(asdict(_here(wanted[0]))))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = machine.about("benchmarks.known_bad", device)
    facts["cudnn"] = torch.backends.cudnn.version() if device.type == "cuda" else None
    print(machine.describe(facts), flush=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        rows = list(pool.map(lambda case: _in_child(case, given.seconds), wanted))
    _show(rows)
    if given.json:
        given.json.write_text(json.dumps({"about": facts, "known_bad": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 1 if any(row.ours.startswith("WRONG") for row in rows) else 0


def _here(case: Case) -> Row:
    """Try a report in this process."""
    found: Finding = case.run(torch.device(case.device))
    return Row(case.name, case.link, case.backend, found.wrong, found.detail, found.ours)


def _in_child(case: Case, seconds: float) -> Row:
    """Try a report in a process of its own; how that ends is an answer too."""

    def row(reproduced: bool | None, detail: str) -> Row:
        return Row(case.name, case.link, case.backend, reproduced, detail)

    if case.device == "cuda" and not torch.cuda.is_available():
        return row(None, "needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.known_bad", "--only", case.name]
        try:
            done = subprocess.run(
                [*command, "--child", str(answer)], capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return row(None, f"no answer within {seconds:g} s")
        if answer.exists():
            told: dict[str, Any] = json.loads(answer.read_text())
            return Row(**told)
        last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
        return row(None, f"the process ended with {done.returncode}: {last[:300]}")


def _show(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("report", "reproduced", "seen", "vllm_accel on the same call"):
        table.add_column(name, overflow="fold")
    words = {True: "YES", False: "no", None: "not tried"}
    for row in rows:
        table.add_row(row.name, words[row.reproduced], row.detail, row.ours)
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
