"""The forward pass of attention, dense and packed: one kernel, an online softmax over blocks of keys.

Milakov and Gimelshein 2018 (online softmax), Dao 2023 (FlashAttention-2: one program per block of rows). A program
walks the keys that its rows see in up to three loops: the left edge of a window, the interior, where nothing is masked,
and the right edge (the diagonal, or the end of the keys). See `scores` for the logits.

With TMA, on Hopper, tiles of dense calls come through descriptors that the launch made: that takes no registers for
pointers, and one thread asks for a whole tile. A descriptor ends with the tensor and gives zeros past it; past the end
of a packed sequence is the next one, or what was never written, so packed calls read by pointers.

HELD keeps q in registers, and waits for each product with v. So q takes no shared memory that keys could have, and
the weights may take the registers of the logits: on Hopper a multiprocessor has place for one more program, three at
D = 128 and two at 256, and while one computes weights, the others multiply (docs/triton.md).

Layouts: q, k, v (B, S, heads, D) or packed (T, heads, D) with cu_seqlens, any strides with the innermost 1; out and lse
contiguous. Tiles: `tiles/forward.json`, keys `d<block>`, with `_causal`, `_heavy` or `_tma` where those differ.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.scores import LN2, LOG2E, factor, kept, keys_of_rows, logits, per_head, sequence


@triton.jit
def _tile(pointer, stride, count, SIZE: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr,
          CHECK: tl.constexpr):  # fmt: skip
    """Load N rows of SIZE numbers, padded with zeros to WIDTH; with CHECK only the first `count` rows exist."""
    rows = tl.arange(0, N)
    if WIDE:
        rows = rows.to(tl.int64)
    offs = tl.arange(0, WIDTH)
    pointers = pointer + rows[:, None] * stride + offs[None, :]
    if CHECK:
        if SIZE == WIDTH:
            return tl.load(pointers, mask=rows[:, None] < count, other=0.0)
        else:
            return tl.load(pointers, mask=(rows[:, None] < count) & (offs[None, :] < SIZE), other=0.0)
    else:
        if SIZE == WIDTH:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=offs[None, :] < SIZE, other=0.0)


@triton.jit
def _block(tiles, pointer, stride, b, h, n0, count, SIZE: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
           WIDE: tl.constexpr, CHECK: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Load N rows of a sequence from `n0` on, of `count` that exist; with TMA by a descriptor (B, heads, S, D)."""
    if TMA:
        return tiles.load([b, h, n0, 0]).reshape(N, SIZE)
    else:
        return _tile(pointer + n0.to(tl.int64) * stride, stride, count - n0, SIZE, WIDTH, N, WIDE, CHECK)


@triton.jit
def _in_registers(x):
    """Return x (16 bits). Triton leaves what comes straight from a load in shared memory, as the left of a product."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


@triton.jit
def _finished(acc):
    """Return acc (fp32), read here by no instruction: Triton waits for the product that makes it."""
    return tl.inline_asm_elementwise("// $0", "=f,0", [acc], dtype=acc.dtype, is_pure=True, pack=1)


@triton.jit
def _attend(
    acc, m, l, q, k_tiles, v_tiles, k, v, k_stride_t, v_stride_t, b, h, begin, end, rows, len_q, len_k, scale, softcap,
    slope, bias, bias_stride_q, bias_stride_k, left, right, rng, sequence_head, dropout_p,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    FOLD: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    WIDE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Take the keys ``begin .. end`` into the running accumulator, maximum (base 2) and denominator of the rows."""
    cols = tl.arange(0, BLOCK_N)
    multiplier = factor(scale, FOLD)
    for n0 in range(begin, end, BLOCK_N):
        n0 = tl.multiple_of(n0, BLOCK_N)
        k_tile = _block(k_tiles, k, k_stride_t, b, h, n0, len_k, D, BLOCK_D, BLOCK_N, WIDE, MASKED, TMA)
        s = tl.dot(q, k_tile.T, input_precision=PRECISION)
        s = logits(
            s, rows[:, None], n0 + cols[None, :], len_q, len_k, scale, softcap, slope, bias, bias_stride_q,
            bias_stride_k, left, right, FOLD, SOFTCAP, ALIBI, BIAS, WIDE, PRECISE, LEFT, RIGHT, MASKED,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(s, 1) * multiplier)
        if MASKED or BIAS != 0:  # a row may have met no key yet
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        else:
            shift = m_new
        p = tl.exp2(s * multiplier - shift[:, None])
        alpha = tl.exp2(m - shift)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if rng is not None:
            p = tl.where(kept(rng, sequence_head, rows[:, None], n0 + cols[None, :], dropout_p), p, 0.0)
        v_tile = _block(v_tiles, v, v_stride_t, b, h, n0, len_k, DV, BLOCK_DV, BLOCK_N, WIDE, MASKED, TMA)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        if HELD:
            acc = _finished(acc)
        m = m_new
    return acc, m, l


@triton.jit
def _clear(
    out, lse, out_stride_t, begin, tokens, step, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Write what rows of no sequence get, 0 and -inf, from row `begin` on, a block every `step` rows."""
    offs = tl.arange(0, BLOCK_DV)
    for m0 in range(begin, tokens, step):
        rows = m0 + tl.arange(0, BLOCK_M)
        inside = rows < tokens
        zeros = tl.zeros([BLOCK_M, BLOCK_DV], out.dtype.element_ty)
        pointers = out + rows.to(tl.int64)[:, None] * out_stride_t + offs[None, :]
        tl.store(pointers, zeros, mask=inside[:, None] & (offs[None, :] < DV))
        if lse is not None:
            tl.store(lse + rows, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=inside)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "batch", "tiles", "together", "left", "right"])
def attention_forward(
    q_tiles, k_tiles, v_tiles, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, attn_bias, sinks,
    q_descale, k_descale, v_descale, rng,
    softmax_scale, softcap, dropout_p,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,
    seqlen_q, seqlen_k, batch, num_heads, num_kv_heads, tiles, together, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VARLEN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    FOLD: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
    Q_DESCALE: tl.constexpr, K_DESCALE: tl.constexpr, V_DESCALE: tl.constexpr,
    WIDE: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Write out, contiguous (B, Sq, H, DV) or (T, H, DV), and lse (fp32, natural, (B, H, Sq) or (H, T)) unless it is
    None.

    Args:
        *_tiles: descriptors of (B, heads, S, D) in tiles of BLOCK_M or BLOCK_N rows, with TMA; else None.
        tensors: None where not given. rng: two int64, given with dropout.
        seqlen_q, seqlen_k: lengths, or with VARLEN the rows of the packed tensors.
        tiles: blocks of BLOCK_M rows in the longest sequence. together: heads that are scheduled side by side.
        left, right: window, read only with LEFT and RIGHT. ALIBI: 0, or dimensions of the slopes.
        *_DESCALE: dimensions of the factor (0, 1, 2). WIDE: offsets within a tile need 64 bits.
        PRECISION: of fp32 products. PRECISE: see `scores.tanh`. TMA: for dense calls of 16-bit numbers with heads that
            fill their tiles, FOLD, no option but RIGHT, sinks and the descale of v, and q, k and v that it can read
            (`forward_launch.describable`). HELD: with TMA, on NVIDIA GPUs: see above.
    """
    # Program -> (tile, head): `together` heads at a time, whose keys fit the L2 cache, and among those the tiles
    # with the most keys first, so that the last programs to run are short ones.
    pid = tl.program_id(0)
    heads = num_heads * (batch + 1 if VARLEN else batch)
    section = pid // (together * tiles)
    within = pid - section * (together * tiles)
    width = tl.minimum(together, heads - section * together)
    tile = within // width
    sequence_head = section * together + within - tile * width
    if RIGHT:
        tile = tiles - 1 - tile
    b = sequence_head // num_heads
    h = sequence_head - b * num_heads
    h_kv = h // (num_heads // num_kv_heads)
    m0 = tile * BLOCK_M

    out_stride_t = num_heads * DV
    out += h * DV
    if lse is not None:
        lse += (h if VARLEN else sequence_head).to(tl.int64) * seqlen_q
    if VARLEN:  # noqa: SIM102 - the compiler drops this branch by the constexpr alone
        if b == batch:  # one sequence too many: the rows past the last
            begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + batch), 0), seqlen_q)
            _clear(out, lse, out_stride_t, begin + m0, seqlen_q, tiles * BLOCK_M, DV, BLOCK_DV, BLOCK_M)
            return
    first_q, len_q = sequence(cu_seqlens_q, b, seqlen_q, VARLEN)
    first_k, len_k = sequence(cu_seqlens_k, b, seqlen_k, VARLEN)
    if VARLEN:
        if m0 >= len_q:
            return
        out += first_q * out_stride_t
        if lse is not None:
            lse += first_q
    else:
        out += b.to(tl.int64) * seqlen_q * out_stride_t
        q += b.to(tl.int64) * q_stride_b
        k += b.to(tl.int64) * k_stride_b
        v += b.to(tl.int64) * v_stride_b

    rows = m0 + tl.arange(0, BLOCK_M)
    q += h.to(tl.int64) * q_stride_h + (first_q + m0) * q_stride_t
    k += h_kv.to(tl.int64) * k_stride_h + first_k * k_stride_t
    v += h_kv.to(tl.int64) * v_stride_h + first_k * v_stride_t
    if TMA:
        q_tile = q_tiles.load([b, h, m0, 0]).reshape(BLOCK_M, D)
    else:
        q_tile = _tile(q, q_stride_t, len_q - m0, D, BLOCK_D, BLOCK_M, WIDE, True)
    if HELD:
        q_tile = _in_registers(q_tile)

    scale = softmax_scale
    if q_descale is not None:
        scale *= per_head(q_descale, b, h_kv, num_kv_heads, Q_DESCALE)
    if k_descale is not None:
        scale *= per_head(k_descale, b, h_kv, num_kv_heads, K_DESCALE)
    slope = 0.0
    if alibi_slopes is not None:
        slope = per_head(alibi_slopes, b, h, num_heads, ALIBI)
    if attn_bias is not None:
        attn_bias += b.to(tl.int64) * bias_stride_b + h.to(tl.int64) * bias_stride_h

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2E
        m = tl.zeros([BLOCK_M], tl.float32) + sink
        l += tl.where(sink == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    first, inner, outer, last = keys_of_rows(m0, len_q, len_k, left, right, BLOCK_M, BLOCK_N, LEFT, RIGHT)
    if LEFT:
        acc, m, l = _attend(
            acc, m, l, q_tile, k_tiles, v_tiles, k, v, k_stride_t, v_stride_t, b, h_kv, first, inner, rows, len_q,
            len_k, scale, softcap, slope, attn_bias, bias_stride_q, bias_stride_k, left, right, rng, sequence_head,
            dropout_p, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, FOLD, SOFTCAP, ALIBI, BIAS, WIDE, PRECISE, PRECISION, LEFT,
            RIGHT, True, TMA, HELD,
        )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q_tile, k_tiles, v_tiles, k, v, k_stride_t, v_stride_t, b, h_kv, inner, outer, rows, len_q,
        len_k, scale, softcap, slope, attn_bias, bias_stride_q, bias_stride_k, left, right, rng, sequence_head,
        dropout_p, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, FOLD, SOFTCAP, ALIBI, BIAS, WIDE, PRECISE, PRECISION, LEFT, RIGHT,
        False, TMA, HELD,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q_tile, k_tiles, v_tiles, k, v, k_stride_t, v_stride_t, b, h_kv, outer, last, rows, len_q,
        len_k, scale, softcap, slope, attn_bias, bias_stride_q, bias_stride_k, left, right, rng, sequence_head,
        dropout_p, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, FOLD, SOFTCAP, ALIBI, BIAS, WIDE, PRECISE, PRECISION, LEFT, RIGHT,
        True, TMA, HELD,
    )  # fmt: skip

    present = tl.where(l == 0.0, 1.0, l)  # a row without keys: 0 and -inf
    weight = 1.0 / present
    if v_descale is not None:
        weight *= per_head(v_descale, b, h_kv, num_kv_heads, V_DESCALE)
    if rng is not None:
        weight *= 1.0 / (1.0 - dropout_p)
    acc *= weight[:, None]
    inside = rows < len_q
    offs = tl.arange(0, BLOCK_DV)
    pointers = out + rows.to(tl.int64)[:, None] * out_stride_t + offs[None, :]
    if DV == BLOCK_DV:
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside[:, None])
    else:
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside[:, None] & (offs[None, :] < DV))
    if lse is not None:
        tl.store(lse + rows, (m + tl.log2(present)) * LN2, mask=inside)
