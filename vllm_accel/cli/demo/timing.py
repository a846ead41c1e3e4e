"""Medians of calls that take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: Rounds that are made however long they take.
LEAST_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Timed:
    """Median seconds of each call, and of how many rounds."""

    seconds: dict[str, float]
    rounds: int


def medians(
    calls: Mapping[str, Callable[[], Any]], device: str, rounds: int, budget: float, warm: bool = False
) -> Timed:
    """Return the median seconds of each call, in turns after one warm-up; a GPU is waited for around each call.

    On a slow machine the rounds end early, once they have taken `budget` seconds. `warm`: each was called before.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in () if warm else calls.values():
        once(call, device)
    start = time.perf_counter()
    made = 0
    while made < min(rounds, LEAST_ROUNDS) or (made < rounds and time.perf_counter() - start < budget):
        for name, call in calls.items():
            taken[name].append(once(call, device))
        made += 1
    return Timed({name: statistics.median(seconds) for name, seconds in taken.items()}, made)


def once(call: Callable[[], Any], device: str) -> float:
    """Return the seconds of one call, until the device has finished it."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
