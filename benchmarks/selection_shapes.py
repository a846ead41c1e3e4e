"""Calls for `python -m benchmarks.selection`: the work of the tuned grid, at lengths and heads that it has not."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from vllm_accel.dispatch.device import Device
from vllm_accel.tuning import grid
from vllm_accel.tuning.attention import AttentionProblem
from vllm_accel.tuning.grid import Work

SEED = 20261127
#: (heads, key heads) that stand for a ratio other than the grid's; those with one key head a head stay as they are.
_GROUPED = ((32, 8), (24, 8), (40, 8), (28, 4), (64, 8), (16, 4), (12, 4))
_GROUPED_SMALL = ((8, 2), (6, 2), (12, 4), (16, 4))
#: Of the grid for GPUs, the kinds of work that are drawn from: what models of a few years spend their time on.
_GPU_ATTENTION, _GPU_PAGED = 6, 2


def works(device: Device) -> tuple[Work, ...]:
    """Return the kinds of work to draw from."""
    if device.type == "cpu":
        return grid.works(device)
    chosen = (*grid.gpu_attention()[:_GPU_ATTENTION], *grid.gpu_paged()[:_GPU_PAGED])
    return tuple(replace(work, dtypes=(torch.bfloat16,)) for work in chosen)


def tuned(device: Device) -> tuple[AttentionProblem, ...]:
    """Return the points of the grid for these kinds of work, the middle ones first."""
    columns = [work.grid(work.dtypes) for work in works(device)]
    flat = (problem for column in itertools.zip_longest(*columns) for problem in column if problem is not None)
    return tuple(problem for problem in flat if _fits(problem, device))


def write(path: Path, device: Device) -> None:
    """Write the points as a file for ``vllm-accel tune --shapes``."""
    path.write_text(json.dumps([problem.to_json() for problem in tuned(device)], indent=1) + "\n")


def unseen(device: Device, seed: int = SEED) -> Iterator[AttentionProblem]:
    """Draw calls for ever, the kinds of work by turns; none is a point of the grid."""
    dice = random.Random(seed)
    points = {_sizes(problem) for problem in grid.attention_grid(device) + grid.paged_grid(device)}
    for index in itertools.count():
        for work in works(device):
            for dtype in work.dtypes[index % len(work.dtypes) :][:1]:
                problem = _drawn(work, dtype, dice, device)
                if _fits(problem, device) and _sizes(problem) not in points:
                    yield problem


def _fits(problem: AttentionProblem, device: Device) -> bool:
    """Tell whether a call is short enough for a session of two minutes: 10 ms at half of a data-centre GPU's rate."""
    return grid.fits(problem, device) and (device.type == "cpu" or problem.work <= 5e12)


def _drawn(work: Work, dtype: torch.dtype, dice: random.Random, device: Device) -> AttentionProblem:
    batches, queries, keys = (sorted(column) for column in zip(*work.points, strict=True))
    batch, n_q, n_k = (_between(column, dice) for column in (batches, queries, keys))
    if all(q == k for _, q, k in work.points):
        n_k = n_q
    n_q = min(n_q, n_k)
    if work.heads != work.kv_heads:
        choices = _GROUPED_SMALL if device.type == "cpu" else _GROUPED
        heads, kv_heads = dice.choice(choices)
        work = replace(work, heads=heads, kv_heads=kv_heads)
    return work.problem((batch, n_q, n_k), dtype, lengths_seed=dice.randrange(1 << 16))


def _between(values: list[int], dice: random.Random) -> int:
    """Draw from the range of the values, evenly by octave: a measured point speaks for calls beyond the ends too."""
    low, high = math.log2(values[0]) - 0.5, math.log2(values[-1]) + 0.5
    return max(1, round(2 ** dice.uniform(low, high)))


def _sizes(problem: AttentionProblem) -> tuple[object, ...]:
    shape = problem.shape
    return (*(getattr(shape, name) for name in shape.__dataclass_fields__ if name != "name"), problem.dtype)
