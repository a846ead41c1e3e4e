"""Join attention over disjoint sets of keys by its log-sum-exp: splits of one launch, or anybody's partial results.

With m the largest lse of the parts: out = sum 2^(lse - m) out_part / sum 2^(lse - m) (FlashDecoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). A part without keys has -inf and weighs nothing; a sink is one
more term of the denominator.

Layouts: partial results as `paged` writes them; outs to merge contiguous (B, S, H, Dv), lses (B, H, S).
Tiles: a program joins one row of one head, BLOCK_S splits at a time, or merges BLOCK_R rows; `paged_launch` and
`merge_launch` choose them by the head size, no table.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.pages import first_token, query_span, shares_of
from vllm_accel.kernels.triton.scores import LN2, LOG2E


@triton.jit(do_not_specialize=["tokens", "batch", "num_splits", "goal", "most", "low_q", "high_q", "part_rows"])
def combine_splits(
    part_ptr, cu_seqlens, seqused_k, sinks, out_ptr, lse_ptr,
    tokens, batch, num_heads, num_splits, goal, most, low_q, high_q, part_rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, SEARCH: tl.constexpr, SPREAD: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Join the splits of one row of `paged_attention` (arguments as there).

    A split without keys has -inf, and sums that nobody wrote and nobody reads. One split joins to itself bit for bit,
    and with one BLOCK_S, so many of which are summed at a time, the number of empty ones that follow changes nothing.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    at = row.to(tl.int64) * num_heads + head
    stride = part_rows.to(tl.int64) * num_heads
    if SEARCH:
        token = row
        mine = token < first_token(cu_seqlens, batch, batch, tokens)
    else:
        sequence = row // high_q
        first, len_q = query_span(cu_seqlens, sequence, batch, tokens)
        t = row % high_q
        mine = (t < len_q) & (len_q >= low_q) & (len_q <= high_q)
        token = first + t
    part_lse = part_ptr + num_splits * stride * DV
    if SPREAD:
        share, num_splits = shares_of(sequence, seqused_k, batch, most, goal)
        mine = mine & (num_splits > 1)  # of one share, whoever computed it wrote the result
        at = share * stride + t * num_heads + head
    if not mine:
        return
    columns = tl.arange(0, BLOCK_DV)
    splits = tl.arange(0, BLOCK_S)
    top = float("-inf")
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = sink
    for s in range(0, num_splits, BLOCK_S):
        value = tl.load(part_lse + (s + splits) * stride + at, mask=s + splits < num_splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(value, 0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    total = 0.0
    if SINKS:
        total = tl.exp2(sink - shift)
    for s in range(0, num_splits, BLOCK_S):
        where = (s + splits) * stride + at
        value = tl.load(part_lse + where, mask=s + splits < num_splits, other=float("-inf"))
        weight = tl.exp2(value - shift)
        seen = value > float("-inf")
        part = tl.load(
            part_ptr + where[:, None] * DV + columns[None, :], mask=seen[:, None] & (columns < DV)[None, :], other=0.0
        )
        acc += tl.sum(part * weight[:, None], 0)
        total += tl.sum(weight, 0)
    some = tl.where(total == 0.0, 1.0, total)
    where = token.to(tl.int64) * num_heads + head
    tl.store(out_ptr + where * DV + columns, (acc / some).to(out_ptr.dtype.element_ty), mask=columns < DV)
    if lse_ptr is not None:
        joined = tl.where(total == 0.0, float("-inf"), top + tl.log2(some))
        tl.store(lse_ptr + head.to(tl.int64) * tokens + token, joined * LN2)


@triton.jit(do_not_specialize=["rows", "seqlen"])
def merge_parts(
    out0, out1, out2, out3, lse0, lse1, lse2, lse3, sinks, out_ptr, lse_ptr,
    rows, seqlen, num_heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merge up to four partial results (None for those there are not), BLOCK_R rows (sequence, token, head) at a time.

    Everything is contiguous: outs (B, seqlen, num_heads, DV), lses (B, num_heads, seqlen); rows B * seqlen * num_heads.
    A part whose lse is not finite has no key, and its out is not read.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = r < rows
    head = r % num_heads
    token = r // num_heads
    at = ((token // seqlen) * num_heads + head) * seqlen + token % seqlen
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        top = sink
    top = tl.maximum(top, _base2(lse0, at, live))
    if lse1 is not None:
        top = tl.maximum(top, _base2(lse1, at, live))
    if lse2 is not None:
        top = tl.maximum(top, _base2(lse2, at, live))
    if lse3 is not None:
        top = tl.maximum(top, _base2(lse3, at, live))
    shift = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    if SINKS:
        total += tl.exp2(sink - shift)
    acc, total = _add_part(out0, lse0, at, r, live, shift, acc, total, DV, BLOCK_DV)
    if lse1 is not None:
        acc, total = _add_part(out1, lse1, at, r, live, shift, acc, total, DV, BLOCK_DV)
    if lse2 is not None:
        acc, total = _add_part(out2, lse2, at, r, live, shift, acc, total, DV, BLOCK_DV)
    if lse3 is not None:
        acc, total = _add_part(out3, lse3, at, r, live, shift, acc, total, DV, BLOCK_DV)
    some = tl.where(total == 0.0, 1.0, total)
    columns = tl.arange(0, BLOCK_DV)
    inside = live[:, None] & (columns < DV)[None, :]
    merged = (acc / some[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + r[:, None] * DV + columns[None, :], merged, mask=inside)
    tl.store(lse_ptr + at, tl.where(total == 0.0, float("-inf"), (top + tl.log2(some)) * LN2), mask=live)


@triton.jit
def _base2(lse, at, live):
    """Load log-sum-exps; what is not finite counts as no key."""
    value = tl.load(lse + at, mask=live, other=float("-inf")).to(tl.float32)
    return tl.where(tl.abs(value) < float("inf"), value * LOG2E, float("-inf"))


@triton.jit
def _add_part(out, lse, at, r, live, shift, acc, total, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Add one part, weighted by its share of the denominator."""
    value = _base2(lse, at, live)
    weight = tl.exp2(value - shift)
    columns = tl.arange(0, BLOCK_DV)
    seen = (value > float("-inf"))[:, None] & (columns < DV)[None, :]
    part = tl.load(out + r[:, None] * DV + columns[None, :], mask=seen, other=0.0).to(tl.float32)
    return acc + part * weight[:, None], total + weight


@triton.jit(do_not_specialize=["rows", "seqlen", "num_splits"])
def join_parts(
    part_ptr, part_lse, out_ptr, lse_ptr,
    rows, seqlen, num_heads, num_splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Join any number of fp32 parts of one tensor, BLOCK_R rows (sequence, token, head) at a time.

    Layouts: as `merge_parts`, parts with `num_splits` before everything else, lse as a natural logarithm.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = r < rows
    token = r // num_heads
    at = ((token // seqlen) * num_heads + r % num_heads) * seqlen + token % seqlen
    columns = tl.arange(0, BLOCK_DV)
    stride = tl.cast(rows, tl.int64)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for s in tl.range(0, num_splits, loop_unroll_factor=4):
        top = tl.maximum(top, _base2(part_lse + s * stride, at, live))
    shift = tl.where(top == float("-inf"), 0.0, top)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for s in tl.range(0, num_splits, loop_unroll_factor=4):
        acc, total = _add_part(
            part_ptr + s * stride * DV, part_lse + s * stride, at, r, live, shift, acc, total, DV, BLOCK_DV
        )
    some = tl.where(total == 0.0, 1.0, total)
    inside = live[:, None] & (columns < DV)[None, :]
    joined = (acc / some[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + r[:, None] * DV + columns[None, :], joined, mask=inside)
    tl.store(lse_ptr + at, tl.where(total == 0.0, float("-inf"), (top + tl.log2(some)) * LN2), mask=live)
