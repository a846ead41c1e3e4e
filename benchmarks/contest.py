"""Contests of single calls, for differences of a fraction of a microsecond.

Every contestant is one statement, timed by `timeit` in short slices; contestants take turns within a round, in another
order each round, so that a machine that slows down or another program that wakes up hits all of them alike. What
counts is the median over rounds, and for a difference the median of the differences within rounds.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Contestant:
    """One statement that uses q, k, v (or whatever `each` names) of every element of a rotation.

    Attributes:
        statement: source text. over: name of the rotation in the contest's names. each: loop variables.
        passes: passes over the rotation in one slice; 0 to fill `SLICE_SECONDS`.
    """

    statement: str
    over: str = "rotation"
    each: str = "q, k, v"
    passes: int = 0


@dataclass(slots=True)
class Contest:
    """Contestants that are compared with each other.

    Attributes:
        names: what the statements may use, rotations included. contestants: by name.
        before_slice: called before each timed slice, outside the time.
        grad: time with gradients enabled.
    """

    names: dict[str, Any]
    contestants: dict[str, Contestant]
    before_slice: Callable[[], None] | None = None
    grad: bool = False
    microseconds: dict[str, list[float]] = field(default_factory=dict)


#: Long enough that the two clock readings cost nothing, short enough that most slices are not interrupted.
SLICE_SECONDS = 0.001


def run(contest: Contest, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Run a contest and return the microseconds per call of each contestant in each round."""
    with torch.enable_grad() if contest.grad else torch.no_grad():
        slices = {name: _Slice(c, contest, device) for name, c in contest.contestants.items()}
        taken: dict[str, list[float]] = {name: [] for name in slices}
        order, shuffle = list(slices), random.Random(0).shuffle
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                taken[name].append(slices[name].microseconds())
    return taken


def clock() -> Callable[[], float]:
    """Return this thread's processor time, to which other programs add nothing; else the wall clock.

    Wall clock where torch has several threads, and where processor time advances in coarse steps (gVisor: 10 ms).
    """
    if torch.get_num_threads() == 1 and is_fine(time.thread_time):
        return time.thread_time
    return time.perf_counter


def is_fine(clock: Callable[[], float]) -> bool:
    """Tell whether a clock shows a new value at least every tenth of a slice."""
    seen, start = set(), time.perf_counter()
    while time.perf_counter() - start < 2 * SLICE_SECONDS:
        seen.add(clock())
    return len(seen) >= 20


class _Slice:
    """A contestant with the number of passes that fill a slice."""

    def __init__(self, contestant: Contestant, contest: Contest, device: torch.device) -> None:
        source = f"for {contestant.each} in {contestant.over}:\n    {contestant.statement}"
        self._timer = timeit.Timer(source, timer=clock(), globals=contest.names)
        self._calls = len(contest.names[contestant.over])
        self._before = contest.before_slice
        self._device = device
        self._passes = 1
        self.microseconds()  # the first call chooses, binds and may build
        self._passes = contestant.passes or max(1, int(SLICE_SECONDS / (self.microseconds() * 1e-6 * self._calls)))

    def microseconds(self) -> float:
        if self._before is not None:
            self._before()
        if self._device.type == "cuda":  # an empty queue, so that a launch never waits for room in it
            torch.cuda.synchronize(self._device)
        return self._timer.timeit(self._passes) / (self._passes * self._calls) * 1e6


@dataclass(frozen=True, slots=True)
class Comparison:
    """One contestant over another.

    Attributes:
        ours, base: median microseconds. over: median of the differences within rounds. over_min: difference of the
            fastest rounds. spread: half of the interquartile range of the differences. ratio: median of the ratios.
        base_disturbed: the base's median is a quarter above its fastest round, and that matters beside `ours`.
    """

    ours: float
    base: float
    over: float
    over_min: float
    spread: float
    ratio: float
    base_disturbed: bool


def compare(ours: list[float], base: list[float]) -> Comparison:
    """Compare two contestants of one contest."""
    differences = [a - b for a, b in zip(ours, base, strict=True)]
    return Comparison(
        ours=statistics.median(ours),
        base=statistics.median(base),
        over=statistics.median(differences),
        over_min=min(ours) - min(base),
        spread=spread(differences),
        ratio=statistics.median(a / b for a, b in zip(ours, base, strict=True)),
        base_disturbed=statistics.median(base) - min(base) > max(0.25 * min(base), 0.05 * min(ours)),
    )


def spread(values: list[float]) -> float:
    """Return half of the interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Use this many threads inside, if not 0. Tiny calls measure the scheduler where a pool has to wake up."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
