"""The loop over keys of the forward kernel for Hopper: both products of a block are under way during the softmax.

Shah et al. 2024 (FlashAttention-3, section 3.2) with what the compiler offers. A product whose result only the next
iteration reads is not waited for where it is made; all that are under way are waited for at the first product that is
read at once. So the loop has a product for that alone, the smallest there is: of the denominators with zeros, so that
it comes after this block's exponentials. The values of the block before and the logits of the next one run meanwhile.

The last block of keys comes first. Its mask costs nothing there, where nothing is under way, and the loop has none. A
second block with a mask (the diagonal may cross two) has a loop of its own, which is usually empty.

Queries, keys and values come through descriptors: then the loop fits its registers, and waiting for a tile is a branch,
which keeps ptxas from moving the wait before the exponentials, and instructions between those of a product. Tiles that
reach past the end of what is described hold zeros. Packed sequences have descriptors of their own, made in the kernel:
numbers past the end of a sequence, which may be NaN, must not meet its weights of 0.

ptxas gives all this up, and says so in a note (C7510 to C7515), where it takes registers of a product under way for
touched. Hence the first products are in a branch, and BLOCK_N has to be the width of the values.
`tests/test_triton_forward_compile.py` looks at the waits.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.scores import factor, seen

#: Columns of the product that is waited at: the fewest that tensor cores of warpgroups take here.
_ZEROS: tl.constexpr = tl.constexpr(16)


@triton.jit
def rows_of(tiles, b, h, n0, N: tl.constexpr, D: tl.constexpr, VARLEN: tl.constexpr):
    """Load N rows from `n0` on. Descriptors of the launch are (B, heads, S, D), those made in the kernel (S, D)."""
    if VARLEN:
        return tiles.load([n0, 0])
    else:
        return tiles.load([b, h, n0, 0]).reshape(N, D)


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
    acc, m, l, q, k_tiles, v_tiles, b, h, outer, last, rows, len_q, len_k, scale, right,
    D: tl.constexpr, BLOCK_N: tl.constexpr, VARLEN: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Take the keys ``0 .. last`` into the running accumulator, maximum (base 2) and denominator of the rows; from
    `outer` on, a multiple of BLOCK_N, they are masked."""
    multiplier = factor(scale, True)
    cols = tl.arange(0, BLOCK_N)
    final = tl.maximum(last - 1, 0) // BLOCK_N * BLOCK_N
    for n0 in tl.range(outer, final, BLOCK_N, num_stages=1):
        n0 = tl.multiple_of(n0, BLOCK_N)
        s = tl.dot(q, rows_of(k_tiles, b, h, n0, BLOCK_N, D, VARLEN).T)
        inside = seen(rows[:, None], n0 + cols[None, :], len_q, len_k, 0, right, False, RIGHT)
        t, alpha, m = _shifted(tl.where(inside, s, float("-inf")), m, multiplier, True)
        p = tl.exp2(t)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(q.dtype), rows_of(v_tiles, b, h, n0, BLOCK_N, D, VARLEN), acc)

    s = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    t = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    alpha = tl.full([q.shape[0]], 1.0, tl.float32)
    if last > 0:
        s = tl.dot(q, rows_of(k_tiles, b, h, final, BLOCK_N, D, VARLEN).T)
        inside = seen(rows[:, None], final + cols[None, :], len_q, len_k, 0, right, False, RIGHT)
        t, alpha, m = _shifted(tl.where(inside, s, float("-inf")), m, multiplier, True)
        s = tl.dot(q, rows_of(k_tiles, b, h, 0, BLOCK_N, D, VARLEN).T)  # of no use where it is the only block

    zeros = tl.full([_ZEROS, _ZEROS], 0, q.dtype)
    end = tl.minimum(outer, final)
    for n0 in tl.range(0, end, BLOCK_N):  # s are the logits of n0, t those of the block before
        n0 = tl.multiple_of(n0, BLOCK_N)
        p = tl.exp2(t)
        l = l * alpha + tl.sum(p, 1)
        p = p.to(q.dtype)
        sums = tl.broadcast_to(l.to(q.dtype)[:, None], [q.shape[0], _ZEROS])
        alpha += tl.max(tl.dot(sums, zeros), 1)  # here is waited; adds 0
        acc = acc * alpha[:, None]
        before = tl.where(n0 == 0, final, n0 - BLOCK_N)
        acc = tl.dot(p, rows_of(v_tiles, b, h, before, BLOCK_N, D, VARLEN), acc)
        k_tile = rows_of(k_tiles, b, h, n0 + BLOCK_N, BLOCK_N, D, VARLEN)  # of no use in the last turn
        t, alpha, m = _shifted(s, m, multiplier, False)
        s = tl.dot(q, k_tile.T)
    if last > 0:
        p = tl.exp2(t)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        before = tl.where(end > 0, end - BLOCK_N, final)
        acc = tl.dot(p.to(q.dtype), rows_of(v_tiles, b, h, before, BLOCK_N, D, VARLEN), acc)
    return acc, m, l
