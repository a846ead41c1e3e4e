"""The loop over keys of the forward kernel for Hopper: both products of a block are under way during the softmax.

Shah et al. 2024 (FlashAttention-3, section 3.2) with what the compiler offers. A product whose result only the next
iteration reads is not waited for where it is made; all that are under way are waited for at the first product that is
read at once. So the loop has a product of its own for that, of the weights with sixteen columns of zeros, just before
it needs the others: the values of the block before and the logits of the next one run while this block's exponentials
are taken.

Queries, keys and values come through descriptors made in the kernel: then the loop fits its registers, and waiting for
a tile is a branch, which keeps ptxas from moving the wait before the exponentials. A descriptor ends with its sequence,
so tiles that reach further hold zeros.

ptxas gives all this up, and says so in a note (C7510 to C7515), where it takes registers of a product under way for
touched. Hence the blocks with a mask have a loop of their own that keeps nothing under way, and the first products are
in a branch. `tests/test_triton_forward_compile.py` looks at the waits.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.scores import factor, seen

#: Columns of the product that is waited at: the fewest that tensor cores of warpgroups take here.
_ZEROS: tl.constexpr = tl.constexpr(16)


@triton.jit
def _shifted(s, m, multiplier, EMPTY: tl.constexpr):
    """Return (t, alpha, m): exponents of the weights, the factor of what was summed before, the new maximum (base 2).
    EMPTY: a row may have met no key yet."""
    m_new = tl.maximum(m, tl.max(s, 1) * multiplier)
    if EMPTY:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        shift = m_new
    return s * multiplier - shift[:, None], tl.exp2(m - shift), m_new


@triton.jit
def attend_hopper(
    acc, m, l, q, k, v, k_stride_t, v_stride_t, outer, last, rows, len_q, len_k, scale, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Take the keys ``0 .. last`` into the running accumulator, maximum (base 2) and denominator of the rows; from
    `outer` on, a multiple of BLOCK_N, they are masked."""
    k_tiles = tl.make_tensor_descriptor(k, [tl.maximum(len_k, 1), D], [k_stride_t, 1], [BLOCK_N, D])
    v_tiles = tl.make_tensor_descriptor(v, [tl.maximum(len_k, 1), DV], [v_stride_t, 1], [BLOCK_N, DV])
    multiplier = factor(scale, True)
    zeros = tl.full([BLOCK_N, _ZEROS], 0, q.dtype)
    final = outer - BLOCK_N
    s = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    t = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    alpha = tl.full([q.shape[0]], 1.0, tl.float32)
    if outer > 0:
        s = tl.dot(q, k_tiles.load([0, 0]).T)
        t, alpha, m = _shifted(s, m, multiplier, False)
        s = tl.dot(q, k_tiles.load([tl.minimum(BLOCK_N, final), 0]).T)
    for n0 in tl.range(BLOCK_N, outer, BLOCK_N):
        n0 = tl.multiple_of(n0, BLOCK_N)
        p = tl.exp2(t)
        l = l * alpha + tl.sum(p, 1)
        p = p.to(q.dtype)
        alpha += tl.max(tl.dot(p, zeros), 1)  # here is waited; adds 0
        acc = acc * alpha[:, None]
        acc = tl.dot(p, v_tiles.load([n0 - BLOCK_N, 0]), acc)
        t, alpha, m = _shifted(s, m, multiplier, False)
        s = tl.dot(q, k_tiles.load([n0 + BLOCK_N, 0]).T)  # of no use in the last turn
    if outer > 0:
        p = tl.exp2(t)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(q.dtype), v_tiles.load([final, 0]), acc)

    cols = tl.arange(0, BLOCK_N)
    for n0 in tl.range(outer, last, BLOCK_N, num_stages=1):
        n0 = tl.multiple_of(n0, BLOCK_N)
        s = tl.dot(q, k_tiles.load([n0, 0]).T)
        inside = seen(rows[:, None], n0 + cols[None, :], len_q, len_k, 0, right, False, RIGHT)
        t, alpha, m = _shifted(tl.where(inside, s, float("-inf")), m, multiplier, True)
        p = tl.exp2(t)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(q.dtype), v_tiles.load([n0, 0]), acc)
    return acc, m, l
