"""A stand-in for DeepGEMM 2.8.0 on CPU tensors, as it behaves on sm_90, with what it refuses.

Read in csrc/apis/gemm.hpp (shapes, dtypes, which operands have to be K-major), csrc/apis/layout.hpp and
csrc/utils/layout.hpp (`check_sf_layout`: shapes and strides of factors; batches one after the other),
deep_gemm/include/deep_gemm/scheduler (a tile takes the group of its first row, and is skipped where that is negative),
and tests/generators.py (groups start at the alignment, -1 in the rows that fill them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fakes.kernel import check

__version__ = "2.8.0"
ALIGNMENT = 128
_E4M3 = torch.float8_e4m3fn
Pair = tuple[Tensor, Tensor]


def get_mk_alignment_for_contiguous_layout() -> int:
    return ALIGNMENT


def fp8_gemm_nt(
    a: Pair, b: Pair, d: Tensor, c: Tensor | None = None, recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None, recipe_b: tuple[int, int] | None = None, compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False, alpha: float | None = None,
) -> None:  # fmt: skip
    """D (M, N) = A (M, K) @ B (N, K)^T with factors of 1 x 128 and 128 x 128."""
    check(c is None and recipe is None and alpha is None, "not in this stand-in")
    _operands(a[0], b[0], d, _E4M3)
    d.copy_(_wide(*a, 1) @ _wide(*b, 128).t())


def m_grouped_fp8_gemm_nt_contiguous(
    a: Pair, b: Pair, d: Tensor, grouped_layout: Tensor, recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None, recipe_b: tuple[int, int] | None = None, compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False, use_psum_layout: bool = False, ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:  # fmt: skip
    """D (M, N) = A (M, K) @ B (E, N, K)^T, by groups of rows."""
    check(not use_psum_layout and recipe is None, "not in this stand-in")
    _operands(a[0], b[0], d, _E4M3)
    _by_tiles(_wide(*a, 1), _wide(*b, 128), d, grouped_layout)


def m_grouped_bf16_gemm_nt_contiguous(
    a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor, compiled_dims: str = "nk", use_psum_layout: bool = False,
    ensure_zero_padding: bool = True, expected_m_for_psum_layout: int | None = None,
) -> None:  # fmt: skip
    """The same without factors."""
    check(not use_psum_layout, "not in this stand-in")
    _operands(a, b, d, torch.bfloat16)
    _by_tiles(a.float(), b.float(), d, grouped_layout)


def _operands(a: Tensor, b: Tensor, d: Tensor, dtype: torch.dtype) -> None:
    check(a.dtype is dtype and b.dtype is dtype and d.dtype is torch.bfloat16, f"dtypes {a.dtype} {b.dtype} {d.dtype}")
    check(b.dim() == 2 or b.stride(0) == b.shape[1] * b.shape[2], "t.stride(0) == t.size(-2) * t.size(-1)")
    check(a.stride(-1) == 1 and b.stride(-1) == 1 and d.stride(-1) == 1, "operands have to be K-major")
    check(a.shape[-1] == b.shape[-1] and tuple(d.shape) == (a.shape[0], b.shape[-2]), f"{a.shape} {b.shape} {d.shape}")
    for t in (a, b, d):  # cuTensorMapEncodeTiled
        check(t.stride(-2) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0, "TMA: strides off 16 bytes")
    check(a.shape[-1] % 128 == 0 and b.shape[-2] % 64 == 0, "sizes that its tests do not have")


def _wide(values: Tensor, factors: Tensor, rows: int) -> Tensor:
    """Return values times factors of `rows` x 128, after the checks of `check_sf_layout`."""
    *lead, mn, k = values.shape
    check(factors.dtype is torch.float32 and factors.dim() == values.dim(), "dtype or dimensions of factors")
    check(tuple(factors.shape) == (*lead, -(-mn // rows), -(-k // 128)), f"factors {tuple(factors.shape)}")
    if rows == 128:
        whole = factors.shape[-2] * factors.shape[-1]
        check(not lead or factors.stride(-3) == whole, "sf.stride(-3) == sf.size(-2) * sf.size(-1)")
        along_k = factors.stride(-1) == 1 and factors.stride(-2) == factors.shape[-1]
        along_n = factors.stride(-1) == factors.shape[-2] and factors.stride(-2) == 1
        check(along_k or along_n, f"strides of factors {factors.stride()}")
    spread = factors.repeat_interleave(rows, -2)[..., :mn, :].repeat_interleave(128, -1)[..., :k]
    return values.float() * spread


def _by_tiles(a: Tensor, b: Tensor, d: Tensor, layout: Tensor) -> None:
    check(layout.dtype is torch.int32 and layout.is_contiguous() and tuple(layout.shape) == (a.shape[0],), "layout")
    check(a.shape[0] % ALIGNMENT == 0, "rows off the alignment")
    d.fill_(float("nan"))
    for start in range(0, a.shape[0], ALIGNMENT):
        rows = slice(start, start + ALIGNMENT)
        group = int(layout[start])
        check(set(layout[rows].tolist()) <= {group, -1}, "two groups in one tile")
        if group >= 0:
            d[rows] = (a[rows] @ b[group].t()).to(d.dtype)
