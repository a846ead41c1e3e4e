"""Timing of whole kernels: contestants take turns, on a GPU between two events with a cold L2 cache."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

#: One contestant may take this long in all, so that the slowest do not eat the time of a run.
BUDGET_SECONDS = 2.0
#: Calls of a round go on until this much time has passed.
ROUND_SECONDS = 0.02


#: What overwriting 128 MiB takes on an H200, rounded down: the launch of a call hides behind it.
_FLUSH_SECONDS, _MOST_PASSES = 3e-5, 30
#: Calls in a graph, so that the time between two replays does not count.
_GRAPH_CALLS = 10


class Clock(Protocol):
    """Measures calls on one kind of device."""

    def seconds(self, call: Call, times: int) -> float:
        """Return the seconds of one call, of `times` calls in a row."""
        ...

    def peak(self, call: Call) -> int | None:
        """Run a call and return the bytes that it took beyond what was there, None where that is not known."""
        ...


class CpuClock:
    """Wall-clock time, mean of calls in a row."""

    def seconds(self, call: Call, times: int) -> float:
        """Return the mean over `times` calls."""
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    def peak(self, call: Call) -> int | None:
        """Run the call; a CPU process has no counter of its own tensors (see `benchmarks.memory`)."""
        call()
        return None


class CudaClock:
    """Time between two events on the current stream, median of calls, each after the L2 cache was overwritten."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        properties = torch.cuda.get_device_properties(device)
        size = max(2 * int(getattr(properties, "L2_cache_size", 0)), 128 << 20)
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)
        self._host: dict[int, list[float]] = {}

    def seconds(self, call: Call, times: int) -> float:
        """Return the median over `times` calls, launch included only where the GPU waits for it."""
        # Overwriting the cache also keeps the GPU busy while the call is launched, once as a rule, and more often for
        # calls whose Python takes longer: kernels are timed without their launch.
        host = self._host.setdefault(id(call), [])
        passes = 1 + min(int(host[-1] / _FLUSH_SECONDS) if host else 0, _MOST_PASSES)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        taken = []
        for start, end in events:
            for _ in range(passes):
                self._flush.zero_()
            start.record()
            before = time.perf_counter()
            call()
            taken.append(time.perf_counter() - before)
            end.record()
        torch.cuda.synchronize(self._device)
        host.append(statistics.median(taken))
        return float(statistics.median(start.elapsed_time(end) for start, end in events)) * 1e-3

    def host(self, call: Call, rounds: int) -> list[float]:
        """Return what a call took on the host in each of the last rounds that it was timed in.

        As many as those of the device: the host's speed drifts, so that one round says little.
        """
        return self._host.get(id(call), [])[-rounds:]

    def warm(self, call: Call) -> float | None:
        """Return the seconds of a call in a CUDA graph, its data in the L2 cache as far as it fits; else None."""
        try:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream(self._device).wait_stream(stream)
            with torch.cuda.graph(graph):
                for _ in range(_GRAPH_CALLS):
                    call()
            return self.seconds_of_replay(graph)
        except Exception:  # not what can be captured
            torch.cuda.synchronize(self._device)
            return None

    def seconds_of_replay(self, graph: torch.cuda.CUDAGraph) -> float:
        """Return the seconds of one of the calls in a graph, median of replays."""
        graph.replay()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(5)]
        for start, end in events:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize(self._device)
        return float(statistics.median(start.elapsed_time(end) for start, end in events)) * 1e-3 / _GRAPH_CALLS

    def peak(self, call: Call) -> int | None:
        """Run a call and return the bytes of the caching allocator that it took at most, its result included."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        kept = call()
        torch.cuda.synchronize(self._device)
        del kept
        return torch.cuda.max_memory_allocated(self._device) - before


@dataclass(slots=True)
class Timed:
    """What was measured of one contestant: seconds of each round, peak bytes, or the error that ended it."""

    rounds: list[float] = field(default_factory=list)
    peak: int | None = None
    error: str = ""

    @property
    def seconds(self) -> float | None:
        """Return the median over rounds, None if there was none."""
        return statistics.median(self.rounds) if self.rounds and not self.error else None


def clock(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def in_turns(
    calls: Mapping[str, Call],
    timer: Clock,
    rounds: int,
    round_seconds: float = ROUND_SECONDS,
    budget_seconds: float = BUDGET_SECONDS,
) -> dict[str, Timed]:
    """Time every call `rounds` times (slow ones less often) in turns; an exception ends that contestant only.

    The order of each round is drawn anew, the same in every run: what a GPU's power limit leaves a call depends on what
    ran just before it (on an H200 one kernel differed by a tenth), so nobody always follows the same other.
    """
    found = {name: Timed() for name in calls}
    times: dict[str, int] = {}
    limit: dict[str, int] = {}
    for name, call in calls.items():

        def first(name: str = name, call: Call = call) -> None:
            found[name].peak = timer.peak(call)
            once = max(timer.seconds(call, 1), 1e-7)
            times[name] = max(1, min(50, int(round_seconds / once)))
            limit[name] = max(2, min(rounds, int(budget_seconds / (once * times[name]))))

        _guarded(found[name], first)
    names = list(calls)
    for index in range(rounds):
        for name in random.Random(index).sample(names, len(names)):
            if not found[name].error and index < limit[name]:
                _guarded(found[name], lambda name=name: _add(found[name], timer.seconds(calls[name], times[name])))  # type: ignore[misc]
    return found


def _add(timed: Timed, seconds: float) -> None:
    timed.rounds.append(seconds)


def _guarded(timed: Timed, step: Call) -> None:
    try:
        step()
    except Exception as error:  # a benchmark reports what fails and goes on
        timed.error = text_of(error)


def text_of(error: BaseException) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
