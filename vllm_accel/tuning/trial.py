"""One problem, every backend: a first call that is checked, then timing in turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_accel.dispatch import registry, warm
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.selection import Selection
from vllm_accel.dispatch.selector import MAX_FIRST_CALL_SECONDS
from vllm_accel.dispatch.table_file import Row, Timing
from vllm_accel.tuning import timing
from vllm_accel.tuning.core import fastest_core
from vllm_accel.tuning.problem import Problem, contestants

#: A backend that is so many times slower than the fastest is timed once, and not again for calls of that kind.
HOPELESS = 20.0
#: Noise that one single time is taken to have.
_SINGLE_NOISE = 0.25
#: Kernels shorter than this are timed in a CUDA graph too: elsewhere launches hide them.
_SHORT = 5e-4
#: A round of one backend; the median of the rounds counts.
_ROUND_SECONDS = 0.01
#: What one backend may take in all, at one shape.
_BUDGET_SECONDS = 0.4
ROUNDS = 7


class PoisonedError(RuntimeError):
    """A kernel has broken the CUDA context: this process can measure no more. Carries the row with the failure."""

    def __init__(self, text: str, row: Row) -> None:
        super().__init__(text)
        self.row = row


@dataclass(slots=True)
class Measured:
    """What was found of one problem.

    Attributes:
        row: times and failures. selection: who could run it, before. versions: of the backends' libraries.
        first: seconds of the first call of a backend that compiles, where it was the first of its kind in this process.
    """

    row: Row
    selection: Selection
    versions: dict[str, str] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)


def measure(
    problem: Problem,
    device: torch.device,
    *,
    skip: Iterable[str] = (),
    rounds: int = ROUNDS,
    round_seconds: float = _ROUND_SECONDS,
    new_length: bool = True,
) -> Measured:
    """Check and time every backend that can run a problem.

    Args:
        problem, device: what and where. skip: backends to leave out. rounds, round_seconds: of the timing in turns.
        new_length: measure what the first call at a new length costs.

    Raises:
        PoisonedError: the CUDA context is broken. torch.OutOfMemoryError: the tensors do not fit.
    """
    inputs = problem.make(device)
    selection = problem.explain(inputs)
    names = [name for name in contestants(selection) if name not in set(skip)]
    truth = problem.truth(inputs) if names else None
    row = Row(selection.op, selection.spec, {}, {})
    found = Measured(row, selection)
    calls: dict[str, timing.Call] = {}
    once: dict[str, tuple[float, float | None]] = {}
    for name in names:
        call = problem.step(inputs, name)
        try:
            once[name] = _checked(problem, call, truth, device, found, name, new_length)
        except (torch.OutOfMemoryError, MemoryError):
            continue  # says nothing about another day
        except Exception as error:  # wrong, or it raised: no time for it, and the others go on
            row.failed[name] = timing.text_of(error)  # type: ignore[index]
            _assert_alive(device, row, name)
        else:
            calls[name] = call
    found.versions = {name: version for name in (*calls, *row.failed) if (version := selection[name].version)}
    fastest = min((seconds for seconds, _ in once.values()), default=0.0)
    for name, (seconds, extra) in once.items():
        if seconds > HOPELESS * fastest:  # once more: another program may have been in the way
            once[name] = (min(seconds, _wall(calls[name], device)[0]), extra)
    slow = {name for name in calls if once[name][0] > HOPELESS * fastest}
    times = {name: Timing(once[name][0], _SINGLE_NOISE, once[name][1], at=problem.at) for name in slow}
    timed = {name: call for name, call in calls.items() if name not in slow}
    # A CPU's threads need all cores, and so does the thread that autograd may start.
    with fastest_core() if device.type == "cuda" and not problem.grad else contextlib.nullcontext():
        times |= _timed(timed, device, found, rounds, round_seconds, {n: once[n][1] for n in timed}, problem)
    row.times.update(times)  # type: ignore[attr-defined]
    return found


def _checked(
    problem: Problem,
    call: timing.Call,
    truth: Any,
    device: torch.device,
    found: Measured,
    name: str,
    new_length: bool,
) -> tuple[float, float | None]:
    """Call twice and check the result; return the second call's seconds, and what the first one took beyond."""
    op, spec, where = found.selection.op, found.selection.spec, found.selection.device
    is_first = (op, name, spec.compile_kind(), where) not in _called
    first, result = _wall(call, device)
    problem.verify(result, truth)
    del result
    if any(reason.code == "first_call" for reason in found.selection[name].reasons):
        warm.mark_warm(op, name, spec, where)
    if is_first and registry.get(op, name).capability.compile_seconds(spec) > MAX_FIRST_CALL_SECONDS:
        found.first[name] = first
    _called.add((op, name, spec.compile_kind(), where))
    second, _ = _wall(call, device)
    # The first call of a kind loads libraries and compiles, which is another cost than that of a length.
    extra = None if is_first or not new_length else max(0.0, first - second)
    return second, extra


#: What this process has run: (op, backend, compile kind, device).
_called: set[tuple[str, str, Any, Device]] = set()


def _wall(call: timing.Call, device: torch.device) -> tuple[float, Any]:
    wait(device)
    start = time.perf_counter()
    result = call()
    wait(device)
    return time.perf_counter() - start, result


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(
    calls: Mapping[str, timing.Call],
    device: torch.device,
    found: Measured,
    rounds: int,
    round_seconds: float,
    new_length: Mapping[str, float | None],
    problem: Problem,
) -> dict[str, Timing]:
    clock = timing.clock(device)
    times = {}
    for name, timed in timing.in_turns(calls, clock, rounds, round_seconds, _BUDGET_SECONDS).items():
        if timed.seconds is None:
            found.row.failed[name] = timed.error  # type: ignore[index]
            _assert_alive(device, found.row, name)
            continue
        cold = host = graph = None
        seconds, noise = timed.seconds, noise_of(timed.rounds)
        if isinstance(clock, timing.CudaClock):
            on_host = clock.host(calls[name], len(timed.rounds))
            cold, host = seconds, statistics.median(on_host)
            if host > cold:
                seconds, noise = host, noise_of(on_host)
            safe = registry.get(found.row.op, name).capability.capture_safe
            graph = clock.warm(calls[name]) if safe and not problem.grad and cold < _SHORT else None
            _assert_alive(device, found.row, name)
        times[name] = Timing(seconds, noise, new_length[name], cold, graph, host, problem.at)
    return times


def noise_of(rounds: list[float]) -> float:
    """Return half of the interquartile range over the median."""
    if len(rounds) < 3:
        return _SINGLE_NOISE
    low, middle, high = statistics.quantiles(rounds, n=4)
    return min((high - low) / 2 / middle, 10.0)


def _assert_alive(device: torch.device, row: Row, name: str) -> None:
    try:
        wait(device)
    except Exception as error:
        text = timing.text_of(error)
        row.failed[name] = text  # type: ignore[index]
        raise PoisonedError(f"{name} broke the CUDA context: {text}", row) from error
