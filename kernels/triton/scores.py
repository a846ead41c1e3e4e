"""What the forward and the backward kernels must compute alike: which rows and keys meet, and with which logit.

Order, as everywhere in the library: ``q @ k^T * scale`` -> softcap -> ALiBi and bias -> mask. Logits are in base 2
(times log2 e), so that ``exp2`` is one instruction. Row i of a sequence stands on the diagonal at key
``i + len_k - len_q`` (bottom-right); a window counts keys to the left and right of it, causal is ``right = 0``.

Positions (`rows`, `cols`) are int32 tensors that broadcast against the tile: ``(BM, 1)`` and ``(1, BN)``, or
``(1, BM)`` and ``(BN, 1)`` for a transposed tile. Flags in capitals are constexpr.
"""

# Device code: annotations other than constexpr mean something else to Triton.
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # of fp32

#: Values of the constexpr BIAS.
NO_BIAS, ADDITIVE, BOOLEAN = 0, 1, 2


# --- where a sequence lies, and which tiles meet ---------------------------------------------------------------------


@triton.jit
def sequence(cu_seqlens, batch, tokens, VARLEN: tl.constexpr):
    """Return (first row, length) of a sequence, int64 and int32.

    `tokens` is the length of every sequence, or with VARLEN the rows of the packed tensor: what cu_seqlens says is
    clamped to them, so that wrong values touch no memory outside. Without VARLEN the first row is 0 (batches have a
    stride).
    """
    if VARLEN:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch), 0), tokens)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens + batch + 1), first), tokens)
        return first.to(tl.int64), last - first
    else:
        return tl.full([], 0, tl.int64), tokens


@triton.jit
def keys_of_rows(
    m0, len_q, len_k, left, right, BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """Return (first, inner, outer, last): the keys that the rows ``m0 .. m0 + BM`` meet.

    Blocks of BN keys start at `first` (a multiple of BN); those in ``[inner, outer)`` lie within the sequence and are
    seen by every row, so they need no mask; `last` is the end (not a multiple). first <= inner <= outer, and outer <=
    last unless no key is met at all (then last <= first).
    """
    shift = len_k - len_q
    bottom = tl.minimum(m0 + BM, len_q) - 1  # the lowest row that exists
    first, inner, outer, last = 0, 0, len_k, len_k
    if LEFT:
        first = tl.maximum(m0 + shift - left, 0) // BN * BN
        inner = tl.cdiv(tl.maximum(bottom + shift - left, 0), BN) * BN
    if RIGHT:
        last = tl.minimum(len_k, bottom + shift + right + 1)
        outer = tl.minimum(len_k, m0 + shift + right + 1)
    outer = tl.maximum(outer, 0) // BN * BN
    # With a narrow window no block is seen by every row: an empty interior anywhere between the two edges will do.
    inner = tl.maximum(tl.minimum(inner, tl.maximum(last, first)), first) // BN * BN
    outer = tl.maximum(outer, inner)
    return first, inner, outer, last


@triton.jit
def rows_of_keys(
    n0, len_q, len_k, left, right, BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """Return (first, inner, outer, last): the rows that meet the keys ``n0 .. n0 + BN``, in blocks of BM rows.

    The mirror image of `keys_of_rows`: in ``[inner, outer)`` every row exists and sees every key of the tile that
    exists.
    """
    shift = len_k - len_q
    end = tl.minimum(n0 + BN, len_k) - 1  # the last key that exists
    first, inner, outer, last = 0, 0, len_q, len_q
    if RIGHT:
        first = tl.maximum(n0 - shift - right, 0) // BM * BM
        inner = tl.cdiv(tl.maximum(end - shift - right, 0), BM) * BM
    if LEFT:
        last = tl.minimum(len_q, end - shift + left + 1)
        outer = tl.minimum(len_q, n0 - shift + left + 1)
    outer = tl.maximum(outer, 0) // BM * BM
    inner = tl.maximum(tl.minimum(inner, tl.maximum(last, first)), first) // BM * BM
    outer = tl.maximum(outer, inner)
    return first, inner, outer, last


# --- the logit -------------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """Return tanh without a library call: the interpreter and AMD have to do it too.

    ``1 - 2 / (e^2x + 1)`` saturates at both ends and is off by up to 1.2e-7 absolutely, which for 16-bit inputs is
    nothing. With PRECISE, small arguments take an odd polynomial (own fit on [0, 0.6], relative error 8e-8), as fp32
    needs.
    """
    large = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    if PRECISE:
        z = x * x
        series = (((-0.00627639 * z + 0.02111622) * z - 0.05387514) * z + 0.13332924) * z - 0.3333333
        return tl.where(z < 0.36, x + x * z * series, large)
    else:
        return large


def folds(softcap: bool, alibi: bool, bias: int, descale: bool) -> bool:
    """Tell the host whether the scale may be applied after the maximum (FOLD): ``exp2(s * factor - m)`` is one FFMA.

    Then `logits` returns raw products and `factor` is ``scale * log2 e``; otherwise base-2 logits and 1. (A descale may
    be anything, and the trick needs a positive factor.)
    """
    return not (softcap or alibi or descale or bias == ADDITIVE)


@triton.jit
def capped(qk, scale, softcap, PRECISE: tl.constexpr):
    """Return t = tanh(qk * scale / softcap): the capped logit is ``softcap * t``, its slope ``scale * (1 - t^2)``."""
    return tanh(qk * (scale / softcap), PRECISE)


@triton.jit
def seen(rows, cols, len_q, len_k, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Return where a row sees a key: the key exists, and lies within the causal diagonal or the window."""
    shift = len_k - len_q
    end = len_k - 1
    if RIGHT:  # one bound for each row instead of two comparisons for each element
        end = tl.minimum(rows + (shift + right), end)
    inside = cols <= end
    if LEFT:
        inside = inside & (cols >= rows + (shift - left))
    return inside


@triton.jit
def biased(
    s, rows, cols, len_q, len_k, slope, bias, bias_stride_q, bias_stride_k, left, right,
    ALIBI: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add ALiBi and the bias to base-2 logits (or raw products, where `folds`), and mask with -inf.

    Args:
        slope: ALiBi slope of the head (fp32). bias: pointer to the (Sq, Sk) bias of this sequence and head; strides in
        elements.
        BIAS: 0 none, 1 additive, 2 boolean (True = may attend). WIDE: offsets within the bias need 64 bits.
        MASKED: the tile may cross the end of the keys, the diagonal or an edge of the window. Rows past
            the end are the caller's affair (they are not stored), but nothing is read for them.
    """
    if ALIBI:
        s -= (slope * LOG2E) * tl.abs(rows + (len_k - len_q) - cols).to(tl.float32)
    if BIAS != 0:
        inside = (rows < len_q) & (cols < len_k)
        if WIDE:
            offsets = rows.to(tl.int64) * bias_stride_q + cols.to(tl.int64) * bias_stride_k
        else:
            offsets = rows * bias_stride_q + cols * bias_stride_k
        if BIAS == 1:
            # A finite bias stays finite in base 2: masks are often filled with the lowest number of a dtype.
            value = tl.load(bias + offsets, mask=inside, other=0.0).to(tl.float32)
            s += tl.where((value < LOWEST / LOG2E) & (value > float("-inf")), LOWEST, value * LOG2E)
        else:
            s = tl.where(tl.load(bias + offsets, mask=inside, other=0) != 0, s, float("-inf"))
    if MASKED:
        s = tl.where(seen(rows, cols, len_q, len_k, left, right, LEFT, RIGHT), s, float("-inf"))
    return s


@triton.jit
def logits(
    qk, rows, cols, len_q, len_k, scale, softcap, slope, bias, bias_stride_q, bias_stride_k, left, right,
    FOLD: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    WIDE: tl.constexpr, PRECISE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return s with ``s * factor`` = masked base-2 logits of a tile of products q k^T (fp32); see `factor`.

    `scale` includes the descales of q and k. FOLD: what `folds` says. The rest as in `biased` and `capped`.
    """
    s = qk
    if SOFTCAP:
        s = capped(qk, scale, softcap, PRECISE) * (softcap * LOG2E)
    elif not FOLD:
        s = qk * (scale * LOG2E)
    return biased(
        s, rows, cols, len_q, len_k, slope, bias, bias_stride_q, bias_stride_k, left, right,
        ALIBI, BIAS, WIDE, LEFT, RIGHT, MASKED,
    )  # fmt: skip


@triton.jit
def factor(scale, FOLD: tl.constexpr):
    """Return what `logits` has left to multiply by: a number, or the constant 1 (which costs nothing)."""
    if FOLD:
        return scale * LOG2E
    else:
        return 1.0


# --- factors and dropout ---------------------------------------------------------------------------------------------


@triton.jit
def per_head(pointer, batch, head, heads, DIMS: tl.constexpr):
    """Load one fp32 number from a contiguous tensor () (DIMS 0), (heads,) (1) or (batch, heads) (2)."""
    if DIMS == 0:
        return tl.load(pointer)
    elif DIMS == 1:
        return tl.load(pointer + head)
    else:
        return tl.load(pointer + batch * heads + head)


@triton.jit
def kept(rng, sequence_head, rows, cols, dropout_p):
    """Return the dropout mask of a tile: True is kept, with probability ``1 - dropout_p``.

    Philox 4x32 under the key ``rng[0]`` at the counter (key position, row, sequence_head, rng[1]): the same bits in
    forward and backward, whatever their tiles. `rng` points to two int64 on the device; sequence_head is ``batch *
    num_heads + head``.
    """
    seed = tl.load(rng)
    stream = tl.load(rng + 1)
    zero = rows * 0 + cols * 0
    c0 = (zero + cols).to(tl.uint32)
    c1 = (zero + rows).to(tl.uint32)
    c2 = (zero + sequence_head).to(tl.uint32)
    c3 = (zero + (stream & 0x7FFFFFFF).to(tl.int32)).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, c0, c1, c2, c3)
    return tl.uint_to_uniform_float(bits) >= dropout_p
