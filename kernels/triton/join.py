"""Join partial results in the kernel that makes them: whoever comes last, and nobody waits.

Another launch to join them takes 4 us on an H200 where there is nothing to join, and 6 to 10 where there is; decodes of
few keys take 20 in all. So every team counts itself when its part of a sequence is written, and the one that finds all
others counted joins them (as Stream-K's fix-up, https://arxiv.org/abs/2301.03598, but without waiting).

Nobody clears the counters: that would be a launch as well. A counter is 64 bits, of which 48 say that it is one: four
float16 or bfloat16 of which three are NaN with bits that no arithmetic makes, so that memory that held something else
does not look so. The last to count puts it back to 0, so no launch leaves one behind.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.pages import within
from vllm_accel.kernels.triton.scores import LN2, LOG2E

#: What the upper 48 bits of a counter are.
COUNTER: tl.constexpr = tl.constexpr(0x7FD3FFB67FE90000)


@triton.jit
def arrive(counter, members):
    """Count one more of so many members: return whether it is the last. What all wrote before is then visible to it.

    Args:
        counter: pointer to an int64 with any content that is no counter.
    """
    tl.debug_barrier()  # all threads have written what the one that counts is to publish
    count = members * 0 + 1
    value = tl.zeros_like(count).to(tl.int64)  # a guess; all threads have the same, and then what one of them saw
    seen = tl.atomic_cas(counter, value, _counted(count, members), sem="acq_rel", scope="gpu")
    while seen != value:
        value = seen
        count = tl.where((value & -65536) == COUNTER, (value & 65535).to(tl.int32), 0) + 1
        seen = tl.atomic_cas(counter, value, _counted(count, members), sem="acq_rel", scope="gpu")
    return count == members


@triton.jit
def _counted(count, members):
    return tl.where(count == members, 0, COUNTER + count.to(tl.int64))


@triton.jit
def join_rows(
    part_ptr, part_lse, sinks, out_ptr, lse_ptr, team, last, token, tokens, kv_head, num_heads, high_q, row, end,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SINKS: tl.constexpr,
    JOIN_S: tl.constexpr, JOIN_R: tl.constexpr,
):  # fmt: skip
    """Write the rows [row, end) of a sequence and key head, whose partial results the teams `team` to `last` have.

    Args:
        part_ptr, part_lse, sinks, out_ptr, lse_ptr: see `stream.stream_attention`. token: the sequence's first.
    """
    columns = tl.arange(0, BLOCK_DV)
    for r0 in range(row, end, JOIN_R):
        r = r0 + tl.arange(0, JOIN_R)
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
