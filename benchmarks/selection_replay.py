"""``python -m benchmarks.selection_replay RESULT --table TABLE``: the regret of today's rule on recorded times.

RESULT is a file of `benchmarks.selection`, where every backend that could be chosen was timed on every call. The calls
are drawn again by its seed for the device that it names, which need not be here; the choice is made again, by TABLE and
the rules as they are now; the recorded times judge it. So a change of the rules can be looked at without the device. A
rule that was changed after a look at these times is better on them than on new ones: say so beside the result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from benchmarks import selection_shapes
from benchmarks.selection import Case, _regret, conclude, judge, say
from vllm_accel.dispatch import measured, ranking
from vllm_accel.dispatch.device import PRESETS, Device
from vllm_accel.dispatch.preference import shipped_order
from vllm_accel.dispatch.table_file import parse
from vllm_accel.tuning.attention import AttentionProblem

#: Calls to draw at most before a recorded one is taken not to come: the seed or the kinds of work are others now.
_PATIENCE = 2_000


def replay(result: Path, table: Path) -> list[Case]:
    """Choose again for every recorded call.

    Raises:
        ValueError: the device is not a described one, or the calls cannot be drawn any more.
    """
    data = json.loads(result.read_text())
    name = data["about"].get("gpu") or "cpu"
    device = next((preset for preset in PRESETS.values() if preset.name == name), None)
    if device is None:
        raise ValueError(f"{name} is none of the described devices: {', '.join(d.name for d in PRESETS.values())}")
    source = measured.Source.made(table, parse(table.read_bytes()))
    known = {field.name for field in fields(Case)}
    waiting = {call["name"]: Case(**{k: v for k, v in call.items() if k in known}) for call in data["calls"]}
    cases = []
    for count, problem in enumerate(selection_shapes.unseen(device, data["seed"])):
        if not waiting:
            return cases
        if count > _PATIENCE:
            break
        if (case := waiting.pop(problem.name, None)) is not None:
            cases.append(case if case.error else _again(case, problem, device, source))
    raise ValueError(f"not drawn any more: {', '.join(waiting)}")


def _again(case: Case, problem: AttentionProblem, device: Device, source: measured.Source) -> Case:
    selection = problem.explain(problem.make(torch.device("meta")), device)
    op, spec = selection.op, selection.spec
    order = shipped_order(op, device, spec)
    versions = {name: source.table.versions.get(f"{op}:{name}") for name in order}
    ranked = ranking.rank(
        op, spec, device, order, takes=case.costs.__contains__, version_of=versions.get, sources=(source,)
    )
    case.chosen = next(name for name in ranked.order if name in case.costs)
    case.fixed = next(name for name in order if name in case.costs)
    case.decided_by = f"measured table: {source}" if ranked.source else "shipped order"
    case.before = None
    case.regret, case.fixed_regret = _regret(case, case.chosen), _regret(case, case.fixed)
    return case


def main(argv: Sequence[str] | None = None) -> int:
    """Print every call and the verdict; return 1 if the regret is over its bounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection_replay", description=__doc__)
    parser.add_argument("result", type=Path, help="selection.json of a run of benchmarks.selection")
    parser.add_argument("--table", type=Path, required=True, help="the table that decides")
    given = parser.parse_args(argv)
    try:
        cases = replay(given.result, given.table)
    except ValueError as error:
        parser.error(str(error))
    for case in cases:
        print(say(case))
    verdict = judge(cases)
    print("", conclude(verdict), sep="\n")
    return 1 if verdict.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
