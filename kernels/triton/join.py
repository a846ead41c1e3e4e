"""Join partial results in the kernel that makes them: whoever comes last, and nobody waits.

Another launch to join them takes 4 us on an H200 where there is nothing to join, and 6 to 10 where there is; decodes of
few keys take 20 in all. So every team counts itself when its part of a sequence is written, and the one that finds all
others counted joins them (as Stream-K's fix-up, https://arxiv.org/abs/2301.03598, but without waiting).

Nobody clears the counters: that would be a launch as well. The upper 48 bits of a counter are a key, drawn at random
once for all, and what has not this key is made a counter before anybody counts. Whoever joins puts it back to a count
of 0, so no launch leaves one behind that has counted (a kernel that dies in the middle takes its process with it), and
memory that held anything else looks like one with a chance of 2^-48.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.pages import within
from vllm_accel.kernels.triton.scores import LN2, LOG2E

#: A counter that has counted nobody; the lower 16 bits count.
KEY: tl.constexpr = tl.constexpr(0x5D3B51C7E26A0000)


@triton.jit
def prepare(counter, held):
    """Make an int64 that holds anything a counter. To be done by each that will count, before it does.

    Args:
        held: what `counter` was seen to hold. If that has changed, somebody else has prepared it.
    """
    # Without a branch: threads may have seen different values, and one of them acts for all.
    tl.atomic_cas(counter, held, tl.where((held & -65536) == KEY, held, KEY), sem="relaxed")


@triton.jit
def arrive(counter, members):
    """Count one more of so many members: return whether it is the last, who then sees what all of them wrote before."""
    tl.debug_barrier()  # all threads have written what the one that counts is to publish
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == members.to(tl.int64) + (KEY - 1)
    if last:
        tl.store(counter, KEY)
    return last


@triton.jit
def join_sequence(
    team, last, counter, held, part_ptr, part_lse, sinks, out_ptr, lse_ptr, token, len_q, tokens, high_q, kv_head,
    num_heads, tile,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    SINKS: tl.constexpr, JOIN_S: tl.constexpr, JOIN_R: tl.constexpr,
):  # fmt: skip
    """Count a team as done with its part of a sequence, and join the sequence's tile of rows if all others are.

    Args:
        team, last: the first team and the last that have blocks of the sequence.
        counter, held: of the sequence, and what it was seen to hold. The others: see `stream.stream_attention`.
    """
    prepare(counter, held)
    if arrive(counter, last - team + 1):
        end = tl.minimum((tile + 1) * BLOCK_M, len_q * GROUP)
        for row in range(tile * BLOCK_M, end, JOIN_R):
            _join_rows(
                part_ptr, part_lse, sinks, out_ptr, lse_ptr, team, last, token, tokens, kv_head, num_heads, high_q,
                row, end, GROUP, DV, BLOCK_DV, SINKS, JOIN_S, JOIN_R,
            )  # fmt: skip


@triton.jit
def _join_rows(
    part_ptr, part_lse, sinks, out_ptr, lse_ptr, team, last, token, tokens, kv_head, num_heads, high_q, row, end,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SINKS: tl.constexpr,
    JOIN_S: tl.constexpr, JOIN_R: tl.constexpr,
):  # fmt: skip
    """Write JOIN_R rows, those below `end`, of what the teams `team` to `last` have; token: the sequence's first."""
    columns = tl.arange(0, BLOCK_DV)
    r = row + tl.arange(0, JOIN_R)
    live, t, head = r < end, r // GROUP, kv_head * GROUP + r % GROUP
    acc = tl.zeros([JOIN_R, BLOCK_DV], tl.float32)
    top, total = tl.full([JOIN_R], float("-inf"), tl.float32), tl.zeros([JOIN_R], tl.float32)
    if SINKS:
        top = tl.load(sinks + head, mask=live, other=float("-inf")).to(tl.float32) * LOG2E
        total = tl.where(top > float("-inf"), 1.0, 0.0)
    for first in range(team, last + 1, JOIN_S):
        member = first + tl.arange(0, JOIN_S)
        inside = (member <= last)[:, None] & live[None, :]
        slot = (2 * member + (member < last).to(tl.int32)).to(tl.int64)
        at = (slot[:, None] * high_q + t[None, :]) * num_heads + head[None, :]
        # Past the L1 cache, which may hold what was there before.
        value = tl.load(part_lse + at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            part_ptr + at[:, :, None] * DV + columns[None, None, :],
            mask=inside[:, :, None] & (columns < DV)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(value, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight, rescale = tl.exp2(value - shift[None, :]), tl.exp2(top - shift)
        acc = acc * rescale[:, None] + tl.sum(part * weight[:, :, None], 0)
        total = total * rescale + tl.sum(weight, 0)
        top = higher
    some = tl.where(total == 0.0, 1.0, total)
    at = (token + t).to(tl.int64) * num_heads + head
    value = (acc / some[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] * DV + columns[None, :], value, mask=within(live, columns, DV, BLOCK_DV))
    if lse_ptr is not None:
        joined = tl.where(total == 0.0, float("-inf"), top + tl.log2(some))
        tl.store(lse_ptr + head.to(tl.int64) * tokens + (token + t), joined * LN2, mask=live)
