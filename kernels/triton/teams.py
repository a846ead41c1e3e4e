"""Which keys each team of a decode has, found on the device: equal ranges of the keys of a batch laid end to end.

A launch has as many teams as the GPU keeps busy, whatever the batch (a team is one program for each key head and tile
of rows). Keys count in blocks of UNIT; n blocks of a sequence follow those of the sequence before it, and team t has
the blocks from ``t * share`` on, share of them. So a team has the end of one sequence, whole ones, and the beginning of
another: at most two partial results, which are joined with those of other teams (`join.py`). With `per` each
sequence has so many teams of its own instead. Lengths are read here only, so a captured graph stays valid.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.pages import MIN_SPLIT, query_span


@triton.jit
def count_blocks(used, len_q, most, high_q, UNIT: tl.constexpr):
    """Return how many blocks sequences have: at least one where there is something to compute, else none.

    Args:
        used: keys of each. most: of which so many count, at most. high_q: query tokens of those that are computed.
    """
    keys = tl.minimum(tl.maximum(used, 0), most)
    return tl.where((len_q > 0) & (len_q <= high_q), tl.maximum(tl.cdiv(keys, UNIT), 1), 0)


@triton.jit
def blocks_of(sequence, cu_seqlens, seqused_k, batch, tokens, most, high_q, UNIT: tl.constexpr):
    """Return how many blocks sequences of these numbers have; none from `batch` on."""
    used = tl.load(seqused_k + sequence, mask=sequence < batch, other=0)
    _, len_q = query_span(cu_seqlens, sequence, batch, tokens)
    return tl.where(sequence < batch, count_blocks(used, len_q, most, high_q, UNIT), 0)


@triton.jit
def _largest(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3), tl.maximum(a4, b4)


@triton.jit
def find_blocks(start, end, cu_seqlens, seqused_k, batch, tokens, most, high_q, UNIT: tl.constexpr):
    """Return the sequence that block `start` belongs to and how many blocks are before that sequence's; so for `end`.

    The sequence is `batch` past the last one. All is reduced at a time, because warps wait for each other each time.
    """
    first, before, last, before_last, counted = 0, 0, 0, 0, 0
    for b in range(0, batch, 128):
        others = b + tl.arange(0, 128)
        n = blocks_of(others, cu_seqlens, seqused_k, batch, tokens, most, high_q, UNIT)
        ends = counted + tl.cumsum(n, 0)
        done, done_last = (others < batch) & (ends <= start), (others < batch) & (ends <= end)
        found = (
            tl.where(done, others + 1, 0), tl.where(done, ends, 0),
            tl.where(done_last, others + 1, 0), tl.where(done_last, ends, 0), ends,
        )  # fmt: skip
        f, f_before, l, l_before, counted = tl.reduce(found, 0, _largest)
        first, before = tl.maximum(first, f), tl.maximum(before, f_before)
        last, before_last = tl.maximum(last, l), tl.maximum(before_last, l_before)
    return first, before, last, before_last


@triton.jit
def range_of_team(team, cu_seqlens, seqused_k, batch, tokens, teams, per, most, high_q, UNIT: tl.constexpr):
    """Return (start, stop, first, before, last, before_last): blocks [start, stop) of sequences first to last.

    So many blocks are before those of the first and of the last sequence; either may be `batch`, past the last one.
    With `per` blocks are those of one sequence.
    """
    if per > 0:
        first = team // per
        n = blocks_of(first, cu_seqlens, seqused_k, batch, tokens, most, high_q, UNIT)
        share = tl.maximum(tl.cdiv(n, per), MIN_SPLIT // UNIT)
        start = team % per * share
        before, last, before_last = 0, first, 0
    else:
        total = 0
        for b in range(0, batch, 128):
            others = b + tl.arange(0, 128)
            total += tl.sum(blocks_of(others, cu_seqlens, seqused_k, batch, tokens, most, high_q, UNIT), 0)
        share = tl.maximum(tl.cdiv(total, teams), MIN_SPLIT // UNIT)
        start = team * share
        first, before, last, before_last = find_blocks(
            start, start + share - 1, cu_seqlens, seqused_k, batch, tokens, most, high_q, UNIT
        )
    return start, start + share, first, before, last, before_last
