"""Where the host's part of a time is taken: on the core that is fastest at the moment.

On a shared machine a core whose other half runs something else takes up to twice as long for the same Python (16 cores
beside an H200, 2026-12-01: 0.97 to 1.99 ms for one loop, other cores a second later), and a thread that moves from one
to the other makes two calls look different that are not.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

#: Cores to look at, at most: each takes about a millisecond.
MOST = 32
_TURNS, _STEPS = 3, 4000


@contextlib.contextmanager
def fastest_core() -> Iterator[None]:
    """Keep this thread on the core, of those that it may use, that is fastest now; afterwards it may use all again.

    Threads that start meanwhile stay on that core. Where a system has no affinity nothing happens.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    try:
        with contextlib.suppress(OSError):  # a container may forbid it
            _settle(sorted(allowed)[:MOST])
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, allowed)


def _settle(cores: list[int]) -> None:
    taken = {}
    for core in cores:
        os.sched_setaffinity(0, {core})
        taken[core] = _loop()
    os.sched_setaffinity(0, {min(cores, key=lambda core: taken[core])})


def _loop() -> float:
    """Return the seconds of a loop of Python, the best of a few."""
    best = float("inf")
    for _ in range(_TURNS):
        start, total = time.perf_counter(), 0
        for step in range(_STEPS):
            total += step * step % 7
        best = min(best, time.perf_counter() - start)
    return best
