"""What a tile search is told of one entry of a table: candidates, a call to check, calls to time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_accel.kernels.triton.launch import Launch
from vllm_accel.kernels.triton.tiles import Tile


class Where(NamedTuple):
    """A device (``meta`` to compile only), its architecture and its multiprocessors."""

    device: torch.device
    arch: str
    sm_count: int = 132


class Data(NamedTuple):
    """Tensors of one call: `launches` of a tile write the results that `verify` compares with the oracle."""

    launches: Callable[[Tile], tuple[Launch, ...]]
    verify: Callable[[], None]


class Entry(NamedTuple):
    """One entry of a table.

    Attributes:
        kernel, key: its place. candidates: tiles to try.
        check: a small call with odd lengths, on a device. timed: the calls whose times decide.
        archs: where calls are made that read it; empty for everywhere.
    """

    kernel: str
    key: str
    candidates: tuple[Tile, ...]
    check: Callable[[Where], Data]
    timed: Callable[[Where], list[Data]]
    archs: tuple[str, ...] = ()


def tiles(
    block_m: Iterable[int], block_n: Iterable[int], warps: Iterable[int], stages: Iterable[int], maxnreg: Iterable[int]
) -> tuple[Tile, ...]:
    """Return all combinations, less those of 8 warps with fewer than 1024 elements of the product for each."""
    made = itertools.starmap(Tile, itertools.product(block_m, block_n, warps, stages, maxnreg))
    return tuple(t for t in made if t.block_m * t.block_n >= 1024 * t.num_warps or t.num_warps == 4)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, where: Where, seed: int) -> Tensor:
    """Return normal numbers of a seed; on ``meta`` none."""
    if where.device.type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    generator = torch.Generator(where.device).manual_seed(seed)
    return torch.randn(shape, device=where.device, generator=generator).to(dtype)


def unwritten(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a result that nobody wrote: NaN, because empty memory may hold the right numbers of an earlier run."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)
