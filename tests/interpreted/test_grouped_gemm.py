"""The grouped product kernel, as the interpreter runs it: every form, layout, scaling and way to load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_accel.kernels.triton import launch as launches
from vllm_accel.kernels.triton.grouped_gemm_launch import Scale, gemm_launch
from vllm_accel.kernels.triton.tiles import Tile

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TILE = Tile(16, 32, 4, 2)
#: Ends of groups: an empty one first, between and last, one of a single row, one that fills whole blocks; 5 rows past.
OFFS = [0, 7, 7, 8, 40, 61, 61]
ROWS = 66


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (made * 20).round().to(dtype) if dtype is torch.int8 else made.to(dtype)


def product(a: Tensor, b: Tensor, out_shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Tensor:
    """Run the kernel into an output full of 7, by three programs."""
    out = torch.full(out_shape, 7.0).to(dtype)
    launches.run(gemm_launch(a, b, out, tile=options.pop("tile", TILE), programs=3, **options))
    return out


def by_rows(a: Tensor, b: Tensor, offs: list[int]) -> Tensor:
    """Return the tokens by expert product in float64; rows past the last group are 0."""
    made = torch.zeros(a.shape[0], b.shape[-1], dtype=torch.float64)
    for e, (start, end) in enumerate(zip([0, *offs], offs, strict=False)):
        made[start:end] = a[start:end].double() @ b[e].double()
    return made


def by_depth(a: Tensor, b: Tensor, offs: list[int]) -> Tensor:
    return torch.stack(
        [a[:, s:e].double() @ b[s:e].double() for s, e in zip([0, *offs], offs, strict=False)]
    )  # an empty group gives zeros


def assert_near(made: Tensor, wanted: Tensor, relative: float) -> None:
    error = (made.double() - wanted).abs().max().item()
    assert error <= relative * wanted.abs().max().item(), error


NEAR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (37, 45)])
def test_tokens_by_expert(dtype: torch.dtype, tma: bool, n: int, k: int) -> None:
    wide = 48 if n == 37 else n  # rows of 16 bytes, of which n are columns of the product
    a = drawn(ROWS, 48 if k == 45 else k, dtype=dtype, seed=0)[:, :k]
    b = drawn(len(OFFS), k, wide, dtype=dtype, seed=1)[..., :n]
    bias = drawn(len(OFFS), n, dtype=dtype, seed=2)
    a[61:] = float("nan")  # of no group
    offs = torch.tensor(OFFS, dtype=torch.int32)
    made = product(a, b, (ROWS, n), dtype, offs=offs, bias=bias, tma=tma)
    of_row = torch.bucketize(torch.arange(61), offs, right=True)
    wanted = by_rows(a, b, OFFS)
    wanted[:61] += bias.double()[of_row]
    assert_near(made, wanted, NEAR[dtype])
    assert not made[61:].any()


@pytest.mark.parametrize("tma", [False, True])
def test_weights_that_are_contiguous_along_k_and_a_shared_bias(tma: bool) -> None:
    a = drawn(40, 64, dtype=torch.float16, seed=0)
    b = drawn(2, 48, 64, dtype=torch.float16, seed=1).transpose(1, 2)
    bias = drawn(48, dtype=torch.float16, seed=2)
    made = product(a, b, (40, 48), torch.float16, offs=torch.tensor([17, 40], dtype=torch.int32), bias=bias, tma=tma)
    assert_near(made, by_rows(a, b, [17, 40]) + bias.double(), NEAR[torch.float16])


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient(dtype: torch.dtype, tma: bool) -> None:
    """Groups along K: a is a transposed view, as in da^T @ dout; an empty group gives zeros."""
    x, dout = drawn(ROWS, 48, dtype=dtype, seed=0), drawn(ROWS, 40, dtype=dtype, seed=1)
    x[61:], dout[61:] = float("nan"), float("nan")
    offs = torch.tensor(OFFS, dtype=torch.int32)
    made = product(x.t(), dout, (len(OFFS), 48, 40), dtype, offs=offs, tma=tma)
    assert_near(made, by_depth(x.t(), dout, OFFS), NEAR[dtype])
    assert not made[0].any()


@pytest.mark.parametrize("tma", [False, True])
def test_a_batch_with_every_layout(tma: bool) -> None:
    for a_along_m in (False, True):
        for b_along_k in (False, True):
            a = drawn(2, 24, 40, dtype=torch.float16, seed=0)
            b = drawn(2, 40, 56, dtype=torch.float16, seed=1)
            a = a.transpose(1, 2).contiguous().transpose(1, 2) if a_along_m else a
            b = b.transpose(1, 2).contiguous().transpose(1, 2) if b_along_k else b
            out = torch.empty(2, 56, 24, dtype=torch.float16).transpose(1, 2)
            launches.run(gemm_launch(a, b, out, tile=TILE, programs=2, tma=tma))
            assert_near(out, a.double() @ b.double(), NEAR[torch.float16])


def test_strides_of_any_kind() -> None:
    a = drawn(ROWS, 60, dtype=torch.float32, seed=0)[:, ::3]
    b = drawn(len(OFFS), 40, 66, dtype=torch.float32, seed=1)[:, ::2, ::2]
    out = torch.full((33, ROWS), 7.0).t()
    launches.run(gemm_launch(a, b, out, tile=TILE, programs=2, offs=torch.tensor(OFFS, dtype=torch.int32)))
    assert_near(out, by_rows(a, b, OFFS), 1e-6)


@pytest.mark.parametrize("offs", [[90, 20, -5, 2**31 - 1], [-7, -7, -7, -7], [5, 3, 4, 70]])
def test_wrong_ends_of_groups_touch_nothing_outside(offs: list[int]) -> None:
    """Every row is written once: the ends count as if they rose, within the rows that exist."""
    a, b = drawn(20, 16, dtype=torch.float32, seed=0), drawn(4, 16, 16, dtype=torch.float32, seed=1)
    guarded = torch.full((40, 16), 7.0)
    launches.run(gemm_launch(a, b, guarded[10:30], tile=TILE, programs=2, offs=torch.tensor(offs, dtype=torch.int32)))
    ends = torch.tensor(offs).clamp(0, 20).cummax(0).values.tolist()
    assert_near(guarded[10:30], by_rows(a, b, ends), 1e-6)
    assert bool((guarded[:10] == 7).all()) and bool((guarded[30:] == 7).all())


def test_rows_of_a_are_gathered_by_their_ids() -> None:
    a, b = drawn(9, 40, dtype=torch.bfloat16, seed=0), drawn(3, 40, 33, dtype=torch.bfloat16, seed=1)
    ids = torch.randint(9, (30,), generator=torch.Generator().manual_seed(2))
    scale = torch.rand(1, 9, 1, generator=torch.Generator().manual_seed(3))
    offs = torch.tensor([11, 11, 30], dtype=torch.int32)
    made = product(a, b, (30, 33), torch.bfloat16, offs=offs, gather=ids, a_scale=Scale(scale))
    assert_near(made, by_rows((a.double() * scale[0])[ids], b, [11, 11, 30]), NEAR[torch.bfloat16])
    wrong = torch.tensor([-1, 400])
    made = product(a, b, (2, 33), torch.bfloat16, offs=torch.tensor([2, 2, 2], dtype=torch.int32), gather=wrong)
    assert_near(made, by_rows(a[[0, 8]], b, [2, 2, 2]), NEAR[torch.bfloat16])


def block_scales(rows: int, k: int, n: int, groups: int) -> tuple[Scale, Scale, Tensor, Tensor]:
    """Return factors of 1 x 128 and 128 x 128 blocks, and the same expanded."""
    g = torch.Generator().manual_seed(5)
    blocks = -(-k // 128)
    of_a = torch.rand(blocks, rows, generator=g).t() + 0.5  # stored as the kernels of others want it
    of_b = torch.rand(groups, blocks, -(-n // 128), generator=g) + 0.5
    wide_a = of_a.repeat_interleave(128, 1)[:, :k]
    wide_b = of_b.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :k, :n]
    return Scale(of_a[None]), Scale(of_b, 128), wide_a, wide_b


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("k", "tile"), [(256, TILE), (200, Tile(16, 256, 4, 1))])
def test_fp8_by_blocks(native: bool, tma: bool, k: int, tile: Tile) -> None:
    n, groups, offs = 144, 2, [13, 20]
    a = drawn(24, 256, dtype=torch.float32, seed=0).to(E4M3)[:, :k]
    b = drawn(groups, n, 256, dtype=torch.float32, seed=1).to(E4M3)[..., :k].transpose(1, 2)
    a_scale, b_scale, wide_a, wide_b = block_scales(24, k, n, groups)
    made = product(
        a, b, (24, n), torch.float32, tile=tile, offs=torch.tensor(offs, dtype=torch.int32), a_scale=a_scale,
        b_scale=b_scale, tma=tma, native_fp8=native,
    )  # fmt: skip
    assert_near(made, by_rows(a.double() * wide_a, b.double() * wide_b, offs), 1e-5)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("types", [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)])
@pytest.mark.parametrize("by_row", [False, True])
def test_fp8_by_row_and_by_tensor(native: bool, types: tuple[torch.dtype, torch.dtype], by_row: bool) -> None:
    a = drawn(24, 144, dtype=torch.float32, seed=0).to(types[0])
    b = drawn(1, 144, 40, dtype=torch.float32, seed=1).to(types[1])
    g = torch.Generator().manual_seed(4)
    of_a, of_b = (torch.rand(s, generator=g) + 0.5 for s in ((1, 24, 1), (1, 1, 40)))
    if not by_row:
        of_a, of_b = of_a[:, :1], of_b[..., :1]
    made = product(
        a[None], b, (1, 24, 40), torch.float32, a_scale=Scale(of_a), b_scale=Scale(of_b), native_fp8=native
    )  # fmt: skip
    assert_near(made, (a.double()[None] * of_a) @ (b.double() * of_b), 1e-5)


def test_every_e4m3_number_is_widened_exactly() -> None:
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(E4M3)
    one = torch.eye(16).to(E4M3)
    a = values.reshape(16, 16)
    finite = torch.where(a.float().isnan(), torch.zeros(()), a.float())
    made = product(finite.to(E4M3)[None], one[None], (1, 16, 16), torch.float32, native_fp8=False)
    assert torch.equal(made[0], finite)
    nan = torch.full((1, 1, 16), float("nan")).to(E4M3)
    assert bool(product(nan, one[None], (1, 1, 16), torch.float32, native_fp8=False).isnan().all())


@pytest.mark.parametrize("scaled", [False, True])
def test_int8(scaled: bool) -> None:
    a, b = drawn(24, 72, dtype=torch.int8, seed=0), drawn(2, 72, 40, dtype=torch.int8, seed=1)
    offs = [10, 24]
    given = {"offs": torch.tensor(offs, dtype=torch.int32)}
    if not scaled:
        made = product(a, b, (24, 40), torch.int32, **given)
        assert torch.equal(made.double(), by_rows(a, b, offs))
        return
    of_a, of_b = torch.rand(1, 24, 1) + 0.5, torch.rand(2, 1, 40) + 0.5
    made = product(a, b, (24, 40), torch.float32, **given, a_scale=Scale(of_a), b_scale=Scale(of_b))
    assert_near(made, by_rows(a.double() * of_a[0], b.double() * of_b, offs), 1e-5)
