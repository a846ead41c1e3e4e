"""``python -m benchmarks.selection``: how much longer the chosen backend takes than the best one (the regret).

Calls that are not in the tuned grid are drawn by a committed seed. On each, every backend that automatic choice may
take is checked and timed; the regret is the time of the chosen one over that of the fastest, 1 within the noise of the
two. Beside it: the regret of the shipped order. Calls are contested where the fastest is not the first of that order.
Where lengths change from call to call, what a new length costs a backend counts, shared by the layers of one step. A
call where either regret is over the bound of the worst is measured again, twice as long: that counts, both are told.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, selection_shapes
from vllm_accel import State, reload_settings
from vllm_accel.cli.tune import BROKEN_CONTEXT, budget
from vllm_accel.dispatch import measured
from vllm_accel.dispatch.device import Device, detect
from vllm_accel.dispatch.preference import shipped_order
from vllm_accel.dispatch.selection import Selection
from vllm_accel.dispatch.table_file import Timing
from vllm_accel.tuning import build, tune
from vllm_accel.tuning.attention import AttentionProblem
from vllm_accel.tuning.timing import text_of
from vllm_accel.tuning.trial import measure

#: Layers that meet a new length together: the cost of one is shared by them.
LAYERS = 32
#: Compiling for the calls of a run, by several processes, may take this long.
BUILD_SECONDS = 120.0
MOST_MEAN, MOST_WORST, LEAST_CONTESTED = 1.02, 1.15, 0.25


@dataclass(slots=True)
class Case:
    """What was found on one call.

    Attributes:
        name, call: of the problem. chosen, fixed, best: automatic choice, the shipped order's first, the fastest.
        decided_by: what made the choice. costs: seconds of every eligible backend, a new length included.
        estimates: what the table expected. noise: of the measurements. warmed: held back until built here.
        device, host: seconds of the two parts of `costs`, where they were timed apart.
        regret, fixed_regret: over the best, 1 within the noise. error: why there is nothing.
        before: the regret of a first measurement, if that was over the bound of the worst and all was measured again.
    """

    name: str
    call: str = ""
    chosen: str = ""
    fixed: str = ""
    best: str = ""
    decided_by: str = ""
    costs: dict[str, float] = field(default_factory=dict)
    estimates: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    device: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    held_back: dict[str, float] = field(default_factory=dict)
    warmed: tuple[str, ...] = ()
    regret: float = math.nan
    fixed_regret: float = math.nan
    before: float | None = None
    error: str = ""

    @property
    def contested(self) -> bool:
        """Tell whether the fastest is not the first of the shipped order, beyond the noise."""
        return self.best != self.fixed and self.fixed_regret > 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The regret over all calls, and what is against it."""

    calls: int
    mean: float
    worst: float
    fixed_mean: float
    fixed_worst: float
    contested: float
    measured: float
    complaints: tuple[str, ...]


def examine(problem: AttentionProblem, device: torch.device, rounds: int) -> Case:
    """Choose for a call, then measure who could have been chosen."""
    case = Case(problem.name)
    try:
        inputs = problem.make(device)
        case.warmed = problem.warm_up(inputs)
        selection = problem.explain(inputs)
        del inputs
        # Seconds a call on a GPU, and never the fastest of several.
        skip = () if selection.chosen == "reference" else ("reference",)
        _compare(case, selection, measure(problem, device, rounds=rounds, skip=skip).row.times, problem.varies)
        if max(case.regret, case.fixed_regret) > MOST_WORST:  # of either, so that neither is favoured
            case.before = case.regret
            again = measure(problem, device, rounds=2 * rounds, skip=skip)
            _compare(case, selection, again.row.times, problem.varies)
    except Exception as error:  # out of memory, say: the others go on
        case.error = text_of(error)
    return case


def _compare(case: Case, selection: Selection, times: Any, varies: bool) -> None:
    eligible = [c.name for c in selection.candidates if c.state in (State.CHOSEN, State.ABLE)]
    found = {name: times[name] for name in eligible if name in times}
    order = [name for name in shipped_order(selection.op, selection.device, selection.spec) if name in eligible]
    case.call, case.chosen, case.decided_by = str(selection.spec), selection.chosen or "", selection.decided_by
    case.costs = {name: cost(timing, varies) for name, timing in found.items()}
    case.held_back = {name: cost(timing, varies) for name, timing in times.items() if name not in found}
    case.estimates = {c.name: c.estimate.seconds for c in selection.candidates if c.estimate and c.estimate.rows}
    case.noise = {name: timing.noise for name, timing in found.items()}
    case.device = {name: timing.cold for name, timing in found.items() if timing.cold is not None}
    case.host = {name: timing.host for name, timing in found.items() if timing.host is not None}
    case.fixed, case.best = order[0], min(case.costs, key=lambda name: case.costs[name])
    case.regret, case.fixed_regret = (_regret(case, name) for name in (case.chosen, case.fixed))


def cost(timing: Timing, varies: bool) -> float:
    """Return what one of the layers pays for a call: its seconds, and its share of what a new length costs."""
    # A first call is timed once: what is small beside the call itself is its jitter.
    extra = timing.new_length if varies and timing.new_length and timing.new_length > timing.seconds else 0.0
    return timing.seconds + extra / LAYERS


def _regret(case: Case, name: str) -> float:
    if name not in case.costs:
        return math.inf  # it failed
    ratio = case.costs[name] / case.costs[case.best]
    return 1.0 if ratio <= 1.0 + case.noise[name] + case.noise[case.best] else ratio


def judge(cases: Sequence[Case]) -> Verdict:
    """Return the regret over all calls that could be measured, and which of the bounds it misses."""
    counted = [case for case in cases if not case.error]
    if not counted:
        return Verdict(0, math.nan, math.nan, math.nan, math.nan, 0.0, 0.0, ("nothing was measured",))
    mean, fixed_mean = (
        math.exp(math.fsum(math.log(getattr(case, name)) for case in counted) / len(counted))
        for name in ("regret", "fixed_regret")
    )
    worst, fixed_worst = (max(getattr(case, name) for case in counted) for name in ("regret", "fixed_regret"))
    contested = sum(case.contested for case in counted) / len(counted)
    complaints = []
    if mean > MOST_MEAN:
        complaints.append(f"the geometric mean is {mean:.3f}, more than {MOST_MEAN}")
    if worst > MOST_WORST:
        complaints.append(f"the worst is {worst:.2f}, more than {MOST_WORST}")
    share = sum(case.decided_by.startswith("measured") for case in counted) / len(counted)
    return Verdict(len(counted), mean, worst, fixed_mean, fixed_worst, contested, share, tuple(complaints))


def say(case: Case) -> str:
    """Return one call on one line."""
    if case.error:
        return f"{case.name}: {case.error}"
    times = ", ".join(f"{name} {seconds * 1e6:.4g}" for name, seconds in sorted(case.costs.items(), key=lambda i: i[1]))
    first = "" if case.before is None else f", first measured {case.before:.3f}"
    return f"{case.regret:5.3f}{first} (order {case.fixed_regret:5.3f})  {case.name}: {case.chosen} of {times} us"


def conclude(verdict: Verdict) -> str:
    """Return the result in words."""
    lines = [
        f"{verdict.calls} calls: regret {verdict.mean:.3f} (worst {verdict.worst:.2f}), of the shipped order "
        f"{verdict.fixed_mean:.3f} (worst {verdict.fixed_worst:.2f}); {verdict.contested:.0%} contested, "
        f"{verdict.measured:.0%} decided by the table"
    ]
    if verdict.contested < LEAST_CONTESTED:
        lines.append(f"fewer than {LEAST_CONTESTED:.0%} of the calls are contested: the shipped order is right here, "
                     "and this regret says little about the table")  # fmt: skip
    return "\n".join([*lines, *verdict.complaints])


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, measure and print; return 1 if the regret is over its bounds.

    Raises:
        SystemExit: from argparse, for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything that was measured here, after every call")
    parser.add_argument("--gpu", action="store_true", help="on the current CUDA device; default: the CPU")
    parser.add_argument("--count", type=int, default=48, help="calls to draw")
    parser.add_argument("--budget", default="10m", metavar="TIME", help="end after this time, such as 65s")
    parser.add_argument("--seed", type=int, default=selection_shapes.SEED)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--tune", metavar="TIME", help="first `vllm-accel tune` these kinds of work, in another process"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="tables are read from here; with --tune written too")
    given = parser.parse_args(argv)
    try:
        seconds = budget(given.budget)
        if given.tune is not None:
            budget(given.tune)
    except ValueError as error:
        parser.error(str(error))
    if given.count < 1:
        parser.error(f"--count takes at least 1, not {given.count}")
    if given.tune is not None and given.out is None:
        parser.error("--tune needs --out")
    device = machine.device(parser, "cuda" if given.gpu else "cpu")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        os.environ["VLLM_ACCEL_TABLES"] = str(given.out.resolve())
        reload_settings()
        given.json = given.json or given.out / "selection.json"
    if given.tune is not None:
        _tune(given.out, device, given.tune)
        measured.forget()
    return _run(given, device, seconds)


def _tune(out: Path, device: torch.device, seconds: str) -> None:
    """Tune in a process of its own, so that what is chosen here rests on what is on disk alone."""
    shapes = out / "tuned_shapes.json"
    selection_shapes.write(shapes, detect(device))
    name = "cpu" if device.type == "cpu" else f"cuda:{torch.cuda.current_device()}"
    command = [sys.executable, "-m", "vllm_accel.cli", "tune", "--device", name]
    end, left = time.monotonic() + budget(seconds), budget(seconds)
    while left > 0:
        done = subprocess.run([*command, "--shapes", str(shapes), "--budget", f"{left:.0f}s"], check=False)
        left = end - time.monotonic() if done.returncode == BROKEN_CONTEXT else 0.0


def _run(given: argparse.Namespace, device: torch.device, seconds: float) -> int:
    where, before = detect(device), machine.load()
    facts = machine.about("benchmarks.selection", device)
    sources = [str(source) for source in measured.sources(where)]
    print(machine.describe(facts), f"tables: {', '.join(sources) or 'none'}", "", sep="\n", flush=True)
    problems = list(itertools.islice(selection_shapes.unseen(where, given.seed), given.count))
    _build(problems, device, where)
    end, cases = time.monotonic() + seconds, list[Case]()
    for problem in problems:
        if cases and time.monotonic() > end:
            break
        cases.append(examine(problem, device, given.rounds))
        print(say(cases[-1]), flush=True)
        if given.json:
            _write(given.json, facts, given.seed, sources, cases)
    verdict = judge(cases)
    print("", conclude(verdict), sep="\n")
    if warning := machine.busy(before, torch.get_num_threads()):
        print(f"warning: {warning}")
    return 1 if verdict.complaints else 0


def _build(problems: Sequence[AttentionProblem], device: torch.device, where: Device) -> None:
    """Compile what the calls need by several processes at once; what fails here fails again where it is measured."""
    tasks = tune.compiling((("attention", problem) for problem in problems), where)
    if tasks:
        print(f"compiling {len(tasks)} kinds of kernels", flush=True)
        build.run(tasks, device, BUILD_SECONDS)


def _write(path: Path, facts: dict[str, Any], seed: int, sources: list[str], cases: list[Case]) -> None:
    data = {
        "about": facts,
        "seed": seed,
        "layers": LAYERS,
        "tables": sources,
        "verdict": asdict(judge(cases)),
        "calls": [asdict(case) for case in cases],
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
