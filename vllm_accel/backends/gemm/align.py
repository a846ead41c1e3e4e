"""Strides that kernels with 16-byte loads take: look first, copy only what does not fit, and say what a copy costs."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_accel.backends.convert import round_up
from vllm_accel.dispatch.gemm_spec import GemmSizes, GemmSpec

BYTES = 16


def is_row_major(t: Tensor) -> bool:
    """Tell whether the last dimension is contiguous and rows start at multiples of 16 bytes."""
    return not _row_problem(tuple(t.shape), t.stride(), t.element_size()) and t.data_ptr() % BYTES == 0


def row_major(t: Tensor) -> Tensor:
    """Return the tensor with contiguous rows that start at multiples of 16 bytes, copied only if needed."""
    if is_row_major(t):
        return t
    *lead, columns = t.shape
    wide = t.new_empty((*lead, round_up(columns, BYTES // t.element_size())))
    rows = wide[..., :columns]
    rows.copy_(t)
    return rows


def column_major(t: Tensor) -> Tensor:
    """Return the tensor with contiguous columns that start at multiples of 16 bytes, copied only if needed."""
    return row_major(t.transpose(-1, -2)).transpose(-1, -2)


def either_major(t: Tensor) -> Tensor:
    """Return the tensor with contiguous rows or columns that start at multiples of 16 bytes, copied only if needed."""
    if is_row_major(t) or is_row_major(t.transpose(-1, -2)):
        return t
    return column_major(t) if t.stride(-2) == 1 and t.stride(-1) != 1 else row_major(t)


def padded(t: Tensor, rows: int, columns: int) -> Tensor:
    """Return the last two dimensions filled up with zeros to multiples of `rows` and `columns`."""
    add = (-t.shape[-1] % columns, -t.shape[-2] % rows)
    if not any(add):
        return t
    if t.element_size() == 1 and t.is_floating_point():  # no padding kernel for FP8: zero is all bits zero
        return torch.nn.functional.pad(t.view(torch.uint8), (0, add[0], 0, add[1])).view(t.dtype)
    return torch.nn.functional.pad(t, (0, add[0], 0, add[1]))


#: Numbers of 16 bits in one row of an AMX tile.
_TILE_ROW = 32


def whole_k(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Fill K up with zeros to whole rows of AMX tiles, for 16-bit products on a CPU.

    With AMX oneDNN reads past the end of a row of a where K is no multiple of 32 (not in every such case), and
    multiplies what it finds by zero: a NaN there, of the next row, of what a view leaves out or of memory that nobody
    wrote, becomes a NaN of this row (torch 2.13, bf16, 17 rows and more, K = 17 and 34 among others, 2026-11-30).
    """
    return (padded(a, 1, _TILE_ROW), padded(b, _TILE_ROW, 1)) if a.shape[-1] % _TILE_ROW else (a, b)


def copies(spec: GemmSpec, sizes: GemmSizes, *, a_rows: bool | None = None, b_rows: bool | None = None) -> str | None:
    """Say what `row_major` and the others will copy, and how to avoid it; None for nothing.

    Args:
        a_rows, b_rows: True where rows have to be contiguous, False where columns have to, None where either will do.
    """
    said = []
    operands = (
        ("a", sizes.a_shape, sizes.a_stride, spec.dtype.itemsize, a_rows),
        ("b", sizes.b_shape, sizes.b_stride, spec.b_dtype.itemsize, b_rows),
    )
    for name, shape, stride, size, rows in operands:
        flipped = (*shape[:-2], shape[-1], shape[-2]), (*stride[:-2], stride[-1], stride[-2])
        wanted = {True: [(shape, stride)], False: [flipped], None: [(shape, stride), flipped]}[rows]
        problems = [_row_problem(*one, size) for one in wanted]
        if all(problems):
            cost = torch.Size(shape).numel() * size / 2**20
            why = min(problems, key=lambda text: text.startswith("strides"))
            said.append(f"copies {name} {shape}, {cost:.3g} MiB a call: {why}")
    return "; ".join(said) or None


def _row_problem(shape: tuple[int, ...], stride: tuple[int, ...], size: int) -> str:
    """Return what is wrong with a row-major reading of a tensor, empty for nothing."""
    if stride[-1] != 1:
        return f"strides {stride} are not contiguous in the dimension that has to be"
    for step, count in zip(stride[:-1], shape[:-1], strict=True):
        if step * size % BYTES and count > 1:
            return f"a stride of {step * size} bytes is not a multiple of 16; {BYTES // size} elements are"
    if stride[-2] < shape[-1] or stride[-2] * size % BYTES:
        return "rows overlap or start off 16-byte multiples"
    return ""
