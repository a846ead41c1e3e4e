"""dQ of one tile of rows: the row-wise half of FlashAttention-2's backward pass, with its own walk over the keys.

Algorithm (Dao 2023, "FlashAttention-2"; dQ in a kernel of its own as in Triton's fused-attention tutorial). A program
keeps BM rows of Q and dO, walks over the keys that they see, BN at a time, and computes

    S = Q K^T    P = exp(S - lse)    dS = P * (dO V^T - delta)    dQ += dS K

Every dQ is summed by one program in one order, so the bits are the same on every run.

ROW_DOT: also store sum_j P_ij dP_ij of each row, which equals sum_d dO_id O_id but for the rounding of O (see
`backward_delta.sinks_kernel`).

Layouts: as in `backward_dkv`; dq contiguous. Tiles: `tiles/backward.json`, keys `dq_d<block>`.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton import backward_tile as tile_ops
from vllm_accel.kernels.triton import scores

_LENGTHS = ["tokens_q", "tokens_k", "left", "right", "tiles", "heads", "bias_stride_b", "bias_stride_h"]


@triton.jit(do_not_specialize=_LENGTHS)
def dq_kernel(
    q, k, v, dout, lse, delta, dq, row_dot,
    cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, q_descale, k_descale, v_descale, rng,
    softmax_scale, softcap, dropout_p,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, dout_stride_b, dout_stride_s, dout_stride_h,
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,
    tokens_q, tokens_k, left, right, tiles, heads, group,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ROW_DOT: tl.constexpr,
    VARLEN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr,
    Q_DESCALE: tl.constexpr, K_DESCALE: tl.constexpr, V_DESCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group
    tile, query_head, batch = tile_ops.program(tiles, heads, RIGHT)
    first_q, len_q = scores.sequence(cu_seqlens_q, batch, tokens_q, VARLEN)
    first_k, len_k = scores.sequence(cu_seqlens_k, batch, tokens_k, VARLEN)
    m0 = tile * BM
    if m0 >= len_q:
        return
    PRECISE: tl.constexpr = q.dtype.element_ty == tl.float32
    head = query_head.to(tl.int64)
    kv_head = head // group
    scale = tile_ops.descaled(softmax_scale, q_descale, batch, kv_head, kv_heads, Q_DESCALE)
    scale = tile_ops.descaled(scale, k_descale, batch, kv_head, kv_heads, K_DESCALE)
    scale_v = tile_ops.descaled(1.0, v_descale, batch, kv_head, kv_heads, V_DESCALE)
    kept_scale = 1.0 / (1.0 - dropout_p)
    slope = 0.0
    if ALIBI:
        slope = scores.per_head(alibi_slopes, batch, head, heads, ALIBI)
    if BIAS != 0:
        bias += batch * bias_stride_b + head * bias_stride_h

    block = tl.arange(0, BM)
    q += batch * q_stride_b + (first_q + m0) * q_stride_s + head * q_stride_h
    dout += batch * dout_stride_b + (first_q + m0) * dout_stride_s + head * dout_stride_h
    qt = tile_ops.load_rows(q, block[:, None], len_q - m0, q_stride_s, HEAD_DIM, BLOCK_D, WIDE)
    dot = tile_ops.load_rows(dout, block[:, None], len_q - m0, dout_stride_s, HEAD_DIM_V, BLOCK_DV, WIDE)
    row_at = tile_ops.row_start(batch, head, heads, first_q, tokens_q, VARLEN) + m0
    row_lse, row_delta = tile_ops.load_statistics(lse + row_at, delta + row_at, block, len_q - m0)
    rows = (m0 + block)[:, None]
    k += batch * k_stride_b + first_k * k_stride_s + kv_head * k_stride_h
    v += batch * v_stride_b + first_k * v_stride_s + kv_head * v_stride_h
    keys = tl.arange(0, BN)
    start, inner, outer, last = scores.keys_of_rows(m0, len_q, len_k, left, right, BM, BN, LEFT, RIGHT)

    dq_sum = tl.zeros([BM, BLOCK_D], tl.float32)
    dots = tl.zeros([BM], tl.float32)
    for n0 in range(start, last, BN):
        n = tl.full([], 0, tl.int64) + n0
        kt = tile_ops.load_clamped(k + n * k_stride_s, keys[:, None], len_k - n0, k_stride_s, HEAD_DIM, BLOCK_D, WIDE)
        vt = tile_ops.load_clamped(
            v + n * v_stride_s, keys[:, None], len_k - n0, v_stride_s, HEAD_DIM_V, BLOCK_DV, WIDE
        )
        cols = (n0 + keys)[None, :]
        masked = (n0 >= outer) | (n0 < inner)
        qk = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
        p, slope_of_cap = tile_ops.probabilities(
            qk, row_lse[:, None], rows, cols, len_q, len_k, scale, softcap, slope,
            bias, bias_stride_q, bias_stride_k, left, right, masked,
            SOFTCAP, ALIBI != 0, BIAS, WIDE, PRECISE, LEFT, RIGHT, True,
        )  # fmt: skip
        dp = tl.dot(dot, tl.trans(vt), input_precision=PRECISION)
        if V_DESCALE >= 0:
            dp *= scale_v
        if DROPOUT:
            keep = scores.kept(rng, batch * heads + head, rows, cols, dropout_p)
            dp = tile_ops.dropped(dp, keep, kept_scale, True)
        if ROW_DOT:
            dots += tl.sum(p * dp, axis=1)
        ds = p * (dp - row_delta[:, None])
        if SOFTCAP:
            ds *= slope_of_cap
        dq_sum = tl.dot(ds.to(kt.dtype), kt, dq_sum, input_precision=PRECISION)

    if ROW_DOT:
        tl.store(row_dot + row_at + block, dots, mask=block < len_q - m0)
    dq_stride = heads.to(tl.int64) * HEAD_DIM
    token = tile_ops.token_start(batch, first_q, tokens_q, VARLEN) + m0
    tile_ops.store_rows(
        dq + token * dq_stride + head * HEAD_DIM,
        block[:, None],
        len_q - m0,
        dq_stride,
        dq_sum * scale,
        HEAD_DIM,
        BLOCK_D,
    )
