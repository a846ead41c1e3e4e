"""Zeros in what a grouped product of others leaves unwritten: rows past the last group, gradients of empty groups.

Where nothing is unwritten, each program reads an end or two and leaves; a mask over the result would read and write all
of it. Ends are int32, in order, within the rows.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from vllm_accel.kernels.triton.launch import Launch

_BLOCK = 4096
_PROGRAMS = 512


@triton.jit(do_not_specialize=["rows", "last"])
def clear_rows(out, ends, rows, n, last, BLOCK: tl.constexpr):
    """Write zeros to rows ends[last] .. rows of out (rows, n), contiguous."""
    begin = tl.load(ends + last).to(tl.int64) * n
    end = rows.to(tl.int64) * n
    first = begin + tl.program_id(0).to(tl.int64) * BLOCK
    for at in tl.range(first, end, tl.num_programs(0) * BLOCK):
        where = at + tl.arange(0, BLOCK)
        tl.store(out + where, tl.zeros([BLOCK], out.dtype.element_ty), mask=where < end)


@triton.jit(do_not_specialize=["size"])
def clear_groups(out, ends, size, BLOCK: tl.constexpr):
    """Write zeros to out[e], of `size` elements, for each group e without rows; contiguous."""
    group = tl.program_id(1)
    before = tl.load(ends + group - 1, mask=group > 0, other=0)
    if tl.load(ends + group) == before:
        base = out + group.to(tl.int64) * size
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for at in tl.range(first, size.to(tl.int64), tl.num_programs(0) * BLOCK):
            where = at + tl.arange(0, BLOCK)
            tl.store(base + where, tl.zeros([BLOCK], out.dtype.element_ty), mask=where < size)


def clear_launch(out: Tensor, ends: Tensor) -> Launch:
    """Return the launch that clears out: (T, N) past the last of `ends`, or (E, M, N) where a group is empty."""
    constexprs = {"BLOCK": _BLOCK}
    if out.dim() == 2:
        programs = max(1, min(_PROGRAMS, -(-out.numel() // _BLOCK)))
        args = (out, ends, out.shape[0], out.shape[1], ends.shape[0] - 1)
        return Launch(clear_rows, (programs, 1, 1), args, constexprs, num_warps=4, num_stages=1)
    size = out.shape[1] * out.shape[2]
    programs = max(1, min(_PROGRAMS // 8, -(-size // _BLOCK)))
    return Launch(
        clear_groups, (programs, out.shape[0], 1), (out, ends, size), constexprs, num_warps=4, num_stages=1
    )  # fmt: skip
