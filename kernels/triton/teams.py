"""Which keys each team of a decode has, found on the device: equal ranges of the keys of a batch laid end to end.

A launch has as many teams as the GPU keeps busy, whatever the batch (a team is one program for each key head and tile
of rows). Keys count in blocks of UNIT; n blocks of a sequence follow those of the sequence before it, and team t has
the blocks from ``t * share`` on, share of them. So a team has the end of one sequence, whole ones, and the beginning of
another: at most two partial results, which are joined with those of other teams (`join.py`). With `per` each
sequence has so many teams of its own instead. Lengths are read here only, so a captured graph stays valid; those
of dense calls nowhere.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.pages import DENSE, MIN_SPLIT, keys_of, query_span


@triton.jit
def count_blocks(used, len_q, most, high_q, UNIT: tl.constexpr):
    """Return how many blocks sequences have: at least one where there is something to compute, else none.

    Args:
        used: keys of each. most: of which so many count, at most. high_q: query tokens of those that are computed.
    """
    keys = tl.minimum(tl.maximum(used, 0), most)
    return tl.where((len_q > 0) & (len_q <= high_q), tl.maximum(tl.cdiv(keys, UNIT), 1), 0)


@triton.jit
def blocks_of(
    sequence, cu_seqlens, seqused_k, batch, tokens, limit, num_blocks, most, high_q, PAGE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Return how many blocks sequences of these numbers have; none from `batch` on."""
    _, used = keys_of(seqused_k, sequence, batch, limit, num_blocks, PAGE)
    _, len_q = query_span(cu_seqlens, sequence, batch, tokens)
    return tl.where(sequence < batch, count_blocks(used, len_q, most, high_q, UNIT), 0)


@triton.jit
def _largest(a0, a1, a2, b0, b1, b2):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2)


@triton.jit
def find_block(
    block, cu_seqlens, seqused_k, batch, tokens, limit, num_blocks, most, high_q, PAGE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Return the sequence that a block belongs to, `batch` past the last one, and how many blocks are before its own.

    All is reduced at a time, because warps wait for each other each time.
    """
    sequence, before, counted = 0, 0, 0
    for b in range(0, batch, 128):
        others = b + tl.arange(0, 128)
        n = blocks_of(others, cu_seqlens, seqused_k, batch, tokens, limit, num_blocks, most, high_q, PAGE, UNIT)
        ends = counted + tl.cumsum(n, 0)
        done = (others < batch) & (ends <= block)
        found = tl.where(done, others + 1, 0), tl.where(done, ends, 0), ends
        following, ended, counted = tl.reduce(found, 0, _largest)
        sequence, before = tl.maximum(sequence, following), tl.maximum(before, ended)
    return sequence, before


@triton.jit
def range_of_team(
    team, cu_seqlens, seqused_k, batch, tokens, limit, num_blocks, teams, per, most, high_q, PAGE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Return (share, start, stop, sequence, before): a team has the blocks [start, stop), from this sequence on.

    So many blocks are before those of that sequence, which may be `batch`, past the last one. With `per` blocks are
    those of one sequence. Each team has `share` blocks, but for the last that have some.
    """
    if per > 0:
        sequence, before = team // per, 0
        n = blocks_of(sequence, cu_seqlens, seqused_k, batch, tokens, limit, num_blocks, most, high_q, PAGE, UNIT)
        share = tl.maximum(tl.cdiv(n, per), MIN_SPLIT // UNIT)
        start = team % per * share
        stop = tl.minimum(start + share, n)
    elif PAGE == DENSE:  # nothing has to be looked for
        n = blocks_of(0, cu_seqlens, seqused_k, batch, tokens, limit, num_blocks, most, high_q, PAGE, UNIT)
        share = tl.maximum(tl.cdiv(n * batch, teams), MIN_SPLIT // UNIT)
        start = team * share
        stop = tl.minimum(start + share, n * batch)
        sequence = start // tl.maximum(n, 1)
        before = sequence * n
    else:
        total = 0
        for b in range(0, batch, 128):
            others = b + tl.arange(0, 128)
            n = blocks_of(others, cu_seqlens, seqused_k, batch, tokens, limit, num_blocks, most, high_q, PAGE, UNIT)
            total += tl.sum(n, 0)
        share = tl.maximum(tl.cdiv(total, teams), MIN_SPLIT // UNIT)
        start = team * share
        stop = tl.minimum(start + share, total)
        sequence, before = find_block(
            start, cu_seqlens, seqused_k, batch, tokens, limit, num_blocks, most, high_q, PAGE, UNIT
        )
    return share, start, stop, sequence, before
