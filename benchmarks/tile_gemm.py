"""Entries of the grouped product's tile table: every key that `choose_tile` asks for, on Mixtral's and DeepSeek-V3's
shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.tile_problem import Data, Entry, Where, random_tensor, tiles, unwritten
from vllm_accel.kernels.triton.grouped_gemm import BATCH, DEPTH, ROWS
from vllm_accel.kernels.triton.grouped_gemm_launch import Scale, gemm_launches, natively_fp8
from vllm_accel.kernels.triton.launch import Launch
from vllm_accel.kernels.triton.tiles import Tile
from vllm_accel.testing.oracle_gemm import product_oracle
from vllm_accel.testing.tolerance import assert_close


class Shape(NamedTuple):
    """A product of `rows` in `groups`, equal ones or falling as 1 / rank; k and n are m and n of a weight gradient."""

    rows: int
    groups: int
    k: int
    n: int
    skewed: bool = False

    def counts(self) -> list[int]:
        """Return the rows of each group."""
        shares = [1 / (e + 1) if self.skewed else 1.0 for e in range(self.groups)]
        counts = [int(self.rows * share / sum(shares)) for share in shares]
        return [counts[0] + self.rows - sum(counts), *counts[1:]]


class Kind(NamedTuple):
    """What a key stands for. elements: "16bit", "8bit", "widened" or "fp32"; form, pointers: as the kernel has them."""

    elements: str
    scaling: str = ""
    form: int = ROWS
    pointers: bool = False


#: Mixtral 8x7B (hidden 4096, expert 14336, 8 experts), DeepSeek-V3 (7168, 2048; 64 of its experts): gate_up and down.
_MIXTRAL_UP, _MIXTRAL_DOWN = (8, 4096, 28672), (8, 14336, 4096)
_DEEPSEEK_UP, _DEEPSEEK_DOWN = (64, 7168, 4096), (64, 2048, 7168)
_LARGE = (
    Shape(8192, *_MIXTRAL_UP), Shape(32768, *_MIXTRAL_DOWN, skewed=True), Shape(32768, *_DEEPSEEK_UP),
    Shape(32768, *_DEEPSEEK_DOWN, skewed=True),
)  # fmt: skip
_M64 = (Shape(4096, *_DEEPSEEK_UP), Shape(4096, *_DEEPSEEK_DOWN))
_M16 = (Shape(512, *_DEEPSEEK_UP), Shape(64, *_MIXTRAL_UP))
_DEPTH = (Shape(8192, 8, 4096, 14336), Shape(32768, 64, 2048, 7168))
_BLOCKS = (Shape(32768, *_DEEPSEEK_UP), Shape(32768, *_DEEPSEEK_DOWN, skewed=True), Shape(8192, *_MIXTRAL_UP))
_DENSE = Shape(4096, 1, 7168, 16384)
_SMALL = (Shape(2048, 8, 2048, 2048),)

_WIDE = tuple(t for t in tiles((64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4), (0,)) if t[0] * t[1] <= 1 << 15)
#: A product that leaves the tensor cores every 128 steps takes twice the registers: wider tiles spill.
_NARROW = tiles((64, 128), (64, 128), (4, 8), (2, 3, 4, 5), (0,))
_FEW = tiles((64,), (64, 128, 256), (4, 8), (2, 3, 4, 6), (0,))
_LEAST = tiles((16, 64), (64, 128, 256), (4,), (2, 3, 4, 5), (0,))
_UNROLLED = tiles((32, 64), (32, 64), (4, 8), (1, 2), (0,))


def grouped_gemm() -> Iterator[Entry]:
    """Return an entry for each key."""
    sixteen, eight, wide = Kind("16bit"), Kind("8bit", "rows"), Kind("widened", "rows")
    yield _entry("16bit", sixteen, _WIDE, _LARGE)
    yield _entry("16bit_m64", sixteen, _FEW, _M64)
    yield _entry("16bit_m16", sixteen, _LEAST, _M16)
    yield _entry("16bit_depth", sixteen._replace(form=DEPTH), _WIDE, _DEPTH)
    yield _entry("16bit_pointers", sixteen._replace(pointers=True), _WIDE, _LARGE[:2])
    for name, kind in (("8bit", eight), ("widened", wide)):
        blocks = kind._replace(scaling="blocks")
        yield _entry(name, kind, _NARROW, _BLOCKS)
        yield _entry(f"{name}_m64", kind, _FEW, _M64)
        yield _entry(f"{name}_m16", kind, _LEAST, _M16)
        yield _entry(f"{name}_blocks", blocks, _NARROW, _BLOCKS, dense=True)
        yield _entry(f"{name}_blocks_m64", blocks, _FEW, _M64)
        yield _entry(f"{name}_blocks_m16", blocks, _LEAST, _M16)
    yield _entry("fp32", Kind("fp32"), _UNROLLED, _SMALL)


def _entry(key: str, kind: Kind, candidates: Sequence[Tile], shapes: Sequence[Shape], dense: bool = False) -> Entry:
    # Sizes that no tile divides, groups that are empty, of one row, and of a few tiles.
    small = Shape(0, 4, 144, 80) if kind.form == DEPTH else Shape(0, 4, 272, 176)
    timed = [(kind, shape) for shape in shapes] + ([(kind._replace(form=BATCH), _DENSE)] if dense else [])
    return Entry(
        kernel="grouped_gemm",
        key=key,
        candidates=tuple(candidates),
        check=lambda where: gemm_data(where, kind, small, counts=(37, 0, 1, 70)),
        timed=lambda where: [gemm_data(where, *call) for call in timed],
    )


def gemm_data(where: Where, kind: Kind, shape: Shape, counts: Sequence[int] | None = None) -> Data:
    """Return a product with weights stored as (E, N, K); rows of given `counts` have three more that are nobody's."""
    counts, past = (shape.counts(), 0) if counts is None else (counts, 3)
    rows, (k, n), groups = sum(counts) + past, shape[2:4], len(counts)
    native = natively_fp8(where.arch) and kind.elements != "widened"
    dtype = {"16bit": torch.bfloat16, "fp32": torch.float32}.get(kind.elements, torch.float8_e4m3fn)
    if kind.elements == "8bit" and not natively_fp8(where.arch):
        dtype = torch.int8  # what takes these tiles there
    out_dtype = torch.float32 if kind.elements == "fp32" else torch.bfloat16
    ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)
    offs = None if kind.form == BATCH else ends.to(where.device)
    if kind.form == DEPTH:
        a = random_tensor((rows, k), dtype, where, 0).t()
        b = random_tensor((rows, n), dtype, where, 1)
        out = unwritten((groups, k, n), out_dtype, where.device)
    else:
        lead = (groups,) if kind.form == BATCH else ()
        a = random_tensor((*lead, rows // groups if lead else rows, k), dtype, where, 0)
        b = random_tensor((groups, n, k), dtype, where, 1).mT
        out = unwritten((*a.shape[:-1], n), out_dtype, where.device)
    scales, oracle = _factors(where, kind, a, b)

    def launches(tile: Tile) -> tuple[Launch, ...]:
        plain, described = gemm_launches(
            a, b, out, arch=where.arch, sm_count=where.sm_count, rows=1, tile=tile, allow_tma=not kind.pointers,
            native_fp8=native, offs=offs, **scales,
        )  # fmt: skip
        return (described or plain,)

    def verify() -> None:
        given = {**oracle, "offs": ends if offs is not None else None}
        want, plain = (product_oracle(a, b, **given, dtype=t) for t in (torch.float64, torch.float32))
        assert_close(out, want, plain.to(out_dtype), what="out")

    return Data(launches, verify)


def _factors(where: Where, kind: Kind, a: torch.Tensor, b: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the factors as the launcher takes them, and as the oracle does."""
    if not kind.scaling:
        return {}, {}
    (rows, k), (groups, n) = a.shape[-2:], (b.shape[0], b.shape[-1])
    blocks = kind.scaling == "blocks"
    steps, columns = (-(-k // 128), -(-n // 128)) if blocks else (1, n)
    lead = a.shape[:-2]
    of_a = random_tensor((*(lead or (1,)), rows, steps), torch.float32, where, 2).abs() + 0.5
    of_b = random_tensor((groups, steps, columns), torch.float32, where, 3).abs() + 0.5
    names = ("1x128", "128x128") if blocks else ("row", "row")
    oracle = {
        "scale_a": of_a if lead else of_a[0], "scale_recipe_a": names[0], "scale_b": of_b, "scale_recipe_b": names[1],
    }  # fmt: skip
    return {"a_scale": Scale(of_a), "b_scale": Scale(of_b, 128 if blocks else 1)}, oracle
