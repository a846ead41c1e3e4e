"""Measure problems one after another and keep what was found in the table of the device, after every one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_accel.dispatch import built, measured, registry
from vllm_accel.dispatch.device import Device, detect
from vllm_accel.dispatch.estimate import class_of
from vllm_accel.dispatch.selection import Selection
from vllm_accel.dispatch.selector import MAX_FIRST_CALL_SECONDS
from vllm_accel.dispatch.table_file import Row, Table, is_current, parse, update
from vllm_accel.tuning import build, timing
from vllm_accel.tuning.problem import Problem, contestants
from vllm_accel.tuning.trial import HOPELESS, ROUNDS, Measured, PoisonedError, measure

#: The share of the time that compiling may take, and the seconds that loading compiled kernels may take at the end.
_BUILD_SHARE, _LOAD_SECONDS = 0.4, 15.0


@dataclass(frozen=True, slots=True)
class Job:
    """What to measure and where to keep it.

    Attributes:
        problems: with their operations, most important first. device: where. path: the table's file.
        seconds: for all of it. again: measure what the table already has. provenance: date, command and machine.
    """

    problems: tuple[tuple[str, Problem], ...]
    device: torch.device
    path: Path
    seconds: float
    again: bool = False
    rounds: int = ROUNDS
    driver: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Done:
    """How many problems were measured, how many the time did not suffice for, how many kinds of kernels were built."""

    measured: int
    left: int
    built: int = 0


def known_table(path: Path, device: Device, driver: str) -> Table:
    """Return what the file already holds that still counts, else an empty table."""
    empty = Table(measured.table_name(device), str(torch.__version__), driver=driver)
    try:
        table = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return empty
    same = (table.device, table.policy, table.driver) == (empty.device, empty.policy, empty.driver)
    return table if same and table.torch == empty.torch else empty


def missing(problem: Problem, device: torch.device, table: Table) -> bool:
    """Tell whether a table lacks a time, or the failure, of a backend that can run a problem."""
    selection = _explained(problem, detect(device))
    row = next((row for row in table.rows if row.spec == selection.spec), None)
    if row is None:
        return True
    known = {
        name
        for name in (*row.times, *row.failed)
        if is_current(table, row.op, name, registry.get(row.op, name).version())
    }
    return bool(set(contestants(selection)) - known - hopeless(table, selection.spec))


def hopeless(table: Table, spec: Any) -> frozenset[str]:
    """Return the backends that were far behind in calls of this kind: they are not timed again."""
    found = set()
    for row in table.rows:
        if type(row.spec) is type(spec) and class_of(row.spec) == class_of(spec) and row.times:
            fastest = min(taken.seconds for taken in row.times.values())
            slow = {name for name, taken in row.times.items() if taken.seconds > HOPELESS * fastest}
            found |= {n for n in slow if is_current(table, row.op, n, registry.get(row.op, n).version())}
    return frozenset(found)


Report = Callable[[Problem | None, Measured | None, str], None]


def tune(job: Job, report: Report) -> Done:
    """Measure until everything is known or the time is over; what is known is in the file after every problem.

    Args:
        job: what to measure. report: told of every problem: what was found, or None and why not.

    Raises:
        OSError: the file cannot be written. PinnedError: nor may it be. PoisonedError: the rest needs another process.
    """
    where = detect(job.device)
    table = known_table(job.path, where, job.driver)
    _, remark = update(job.path, replace(table, rows=()))  # what cannot be written is not worth measuring
    if remark:
        report(None, None, remark)
    end = time.monotonic() + job.seconds
    todo = [p for p in job.problems if job.again or missing(p[1], job.device, table)]
    tasks = compiling(todo[: max(1, int(job.seconds))], where)
    if tasks:
        report(None, None, f"compiling {len(tasks)} kinds of kernels")
        build.run(tasks, job.device, job.seconds * _BUILD_SHARE)
    done, left, late, longest = 0, 0, [], 0.0
    for index, (op, problem) in enumerate(todo):
        start = time.monotonic()
        if start + longest / 2 > end and done:
            left = len(todo) - index
            break
        try:
            skip = () if job.again else hopeless(table, _explained(problem, where).spec)
            found = measure(problem, job.device, skip=skip, rounds=job.rounds)
        except (torch.OutOfMemoryError, MemoryError) as error:
            report(problem, None, timing.text_of(error))
            continue
        except PoisonedError as error:
            _keep(job, where, error.row, {n: registry.get(op, n).version() for n in error.row.failed})
            raise
        table = _keep(job, where, found.row, found.versions)
        late += [build.Task(op, name, problem, found.row.spec) for name in _remember(found)]
        done += 1
        longest = max(longest, time.monotonic() - start) if done > 1 else 0.0
        report(problem, found, "")
    if late:
        report(None, None, f"looking how fast {len(late)} kinds of kernels load from disk")
        _load(late, job.device, where, max(_LOAD_SECONDS, end - time.monotonic()))
    return Done(done, left, len(tasks))


def compiling(problems: Iterable[tuple[str, Problem]], where: Device) -> list[build.Task]:
    """Return the first calls that would compile something which a later process can load from disk."""
    tasks: dict[tuple[str, Any], build.Task] = {}
    for op, problem in problems:
        selection = _explained(problem, where)
        for candidate in selection.candidates:
            held = any(reason.code == "first_call" for reason in candidate.reasons)
            if held and built.cache_of(registry.get(op, candidate.name)) is not None:
                key = (candidate.name, selection.spec.compile_kind())
                tasks.setdefault(key, build.Task(op, candidate.name, problem, selection.spec))
    return list(tasks.values())


def _explained(problem: Problem, where: Device) -> Selection:
    return problem.explain(problem.make(torch.device("meta")), where)


def _keep(job: Job, where: Device, row: Row, versions: Mapping[str, str | None]) -> Table:
    named = {f"{row.op}:{name}": version for name, version in versions.items() if version is not None}
    new = Table(
        measured.table_name(where), str(torch.__version__), named, driver=job.driver, provenance=job.provenance,
        rows=(row,),
    )  # fmt: skip
    table, _ = update(job.path, new)
    return table


def _remember(found: Measured) -> list[str]:
    """Record the kernels whose first call was short: they were on disk, so a later process finds them there too.

    Returns:
        The backends whose first call was long: this process has compiled them, and another one has to look.
    """
    op, spec, where = found.row.op, found.row.spec, found.selection.device
    for name, seconds in found.first.items():
        if seconds <= MAX_FIRST_CALL_SECONDS:
            built.record(op, name, spec, where, seconds)
    slow = [name for name, seconds in found.first.items() if seconds > MAX_FIRST_CALL_SECONDS]
    return [name for name in slow if built.cache_of(registry.get(op, name)) is not None]


def _load(tasks: list[build.Task], device: torch.device, where: Device, seconds: float) -> None:
    for outcome in build.run(tasks, device, seconds):
        if outcome.seconds is not None and outcome.seconds <= MAX_FIRST_CALL_SECONDS:
            task = outcome.task
            built.record(task.op, task.backend, task.spec, where, outcome.seconds)
