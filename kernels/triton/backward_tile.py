"""What the backward kernels do alike within one tile: load rows, compute probabilities again, differentiate them.

A tile is rows x keys, or transposed keys x rows; positions broadcast as in `scores`. With s the capped and biased
logit, P = exp(s - lse) and delta_i = sum_d dO_id O_id - dlse_i, the gradient of the products q k^T is (but for the
scale)

    dS = P * (dO V^T - delta) * (1 - tanh^2)

(Dao et al. 2022, appendix B.2; the last factor is the softcap's). A row whose lse is -inf has no key; it is loaded as
+inf, and so is a row past the end, so that P is 0 there without a mask on the tile.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton import scores


@triton.jit
def program(tiles, heads, REVERSE: tl.constexpr):
    """Return (tile, head, batch int64): tiles of one head next to each other, so that what they share stays in L2.

    The first of them does the most work under causal masking; `REVERSE` where that is the last tile.
    """
    index = tl.program_id(0)
    tile = index % tiles
    if REVERSE:
        tile = tiles - 1 - tile
    rest = index // tiles
    return tile, rest % heads, (rest // heads).to(tl.int64)


@triton.jit
def load_rows(pointer, rows, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Load rows `rows` (n, 1), counted from `pointer`, of BLOCK_D numbers each; 0 past the length and past D.

    WIDE: offsets within the tile need 64 bits.
    """
    dims = tl.arange(0, BLOCK_D)[None, :]
    if WIDE:
        offsets = rows.to(tl.int64) * stride + dims
    else:
        offsets = rows * stride + dims
    if D == BLOCK_D:
        return tl.load(pointer + offsets, mask=rows < length, other=0.0)
    else:
        return tl.load(pointer + offsets, mask=(rows < length) & (dims < D), other=0.0)


@triton.jit
def load_clamped(pointer, rows, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Load rows as `load_rows` does, but past the length (which is above 0) the last row again, where P is 0 anyway.

    Inside a loop, predicates and the addresses they guard have to live through the products: with them dk, dv at D =
    128 on sm_90 spilled 62 registers, 12 times in the inner loop; with clamped rows none there (compiled, Triton
    3.7.1).
    """
    dims = tl.arange(0, BLOCK_D)[None, :]
    rows = tl.minimum(rows, length - 1)
    if WIDE:
        offsets = rows.to(tl.int64) * stride + dims
    else:
        offsets = rows * stride + dims
    if D == BLOCK_D:
        return tl.load(pointer + offsets)
    else:
        return tl.load(pointer + offsets, mask=dims < D, other=0.0)


@triton.jit
def store_rows(pointer, rows, length, stride, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store what `load_rows` would load, in the pointer's dtype."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = rows < length
    if D != BLOCK_D:
        mask = mask & (dims < D)
    tl.store(pointer + rows * stride + dims, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_statistics(lse, delta, rows, length):
    """Load lse in base 2, +inf for a row that has no key or does not exist, and delta."""
    m = tl.load(lse + rows, mask=rows < length, other=float("inf")) * scores.LOG2E
    d = tl.load(delta + rows, mask=rows < length, other=0.0)
    return tl.where(m == float("-inf"), float("inf"), m), d


@triton.jit
def probabilities(
    qk, lse, rows, cols, len_q, len_k, scale, softcap, slope, bias, bias_stride_q, bias_stride_k, left, right, masked,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return (P, derivative of the softcap or 1) of a tile of products.

    `masked` is a run-time value, the same for all threads: a tile inside the diagonal and the window jumps over the
    masking. (Separate loops, as in the forward kernel, spilled: 27 stores against 10 for dk, dv at D = 128 on sm_90,
    compiled with Triton 3.7.1.) MASK False says at compile time that no tile needs one.
    """
    slope_of_cap = 1.0
    if SOFTCAP:
        t = scores.capped(qk, scale, softcap, PRECISE)
        slope_of_cap = 1.0 - t * t
        s = t * (softcap * scores.LOG2E)
    else:
        s = qk * (scale * scores.LOG2E)
    s = scores.biased(
        s, rows, cols, len_q, len_k, slope, bias, bias_stride_q, bias_stride_k, left, right,
        ALIBI, BIAS, WIDE, LEFT, RIGHT, False,
    )  # fmt: skip
    if BIAS == 1:
        s = tl.minimum(s, lse)  # rounding of two huge numbers must not carry p beyond 1
    p = tl.exp2(s - lse)
    if MASK:  # noqa: SIM102 - the one is decided by the compiler, the other by the GPU
        if masked:
            p = tl.where(scores.seen(rows, cols, len_q, len_k, left, right, LEFT, RIGHT), p, 0.0)
    return p, slope_of_cap


@triton.jit
def dropped(values, keep, kept_scale, DROPOUT: tl.constexpr):
    """Apply the dropout mask, if there is one."""
    if DROPOUT:
        return tl.where(keep, values * kept_scale, 0.0)
    else:
        return values


@triton.jit
def add_rows(pointer, rows, length, stride, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add to fp32 rows what other programs add to as well; nothing else is ordered by it."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = rows < length
    if D != BLOCK_D:
        mask = mask & (dims < D)
    tl.atomic_add(pointer + rows * stride + dims, values, mask=mask, sem="relaxed")


@triton.jit
def descaled(scale, descale, batch, kv_head, kv_heads, DIMS: tl.constexpr):
    """Multiply by a descale of DIMS dimensions, -1 for none."""
    if DIMS >= 0:
        return scale * scores.per_head(descale, batch, kv_head, kv_heads, DIMS)
    else:
        return scale


@triton.jit
def token_start(batch, first, tokens, VARLEN: tl.constexpr):
    """Return the row of a contiguous tensor (B, S, ...) or (T, ...) at which a sequence starts."""
    if VARLEN:
        return first
    else:
        return batch * tokens


@triton.jit
def row_start(batch, head, heads, first, tokens, VARLEN: tl.constexpr):
    """Return where the rows of a sequence and head start in (B, H, S) or (H, T)."""
    if VARLEN:
        return head * tokens + first
    else:
        return (batch * heads + head) * tokens
