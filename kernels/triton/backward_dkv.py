"""dK and dV, and on request dQ too, of one tile of keys: the column-wise half of FlashAttention-2's backward pass.

Algorithm (Dao 2023, "FlashAttention-2", algorithm 2). A program keeps BN keys and values, walks over the rows that see
them, BM at a time, for each query head of the group in turn, and computes the transposed tiles

    S^T = K Q^T        P^T = exp(S^T - lse)        dV += P^T dO
    dP^T = V dO^T      dS^T = P^T * (dP^T - delta) dK += dS^T Q

so that P^T and dS^T are left operands straight from registers. The group is summed here, in a fixed order: no atomics
and no copy of dK per query head.

DQ_ATOMIC: dQ += dS K is added to an fp32 tensor of zeros as well. Five products instead of the seven that the two
kernels (this and `backward_dq`) need together, but the sum's order, and with it its last bits, changes from run to run.

Layouts: q, k, v, dout (B, S, heads, D), any strides with the innermost 1; packed (T, heads, D) with cu_seqlens.
lse, delta fp32 (B, H, Sq) or (H, Tq), dk, dv, dq_sum contiguous like k, v and q.
Tiles: `tiles/backward.json`, keys `dkv_d<block>` and `fused_d<block>`.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton import backward_tile as tile_ops
from vllm_accel.kernels.triton import scores

_LENGTHS = ["tokens_q", "tokens_k", "left", "right", "tiles", "heads", "bias_stride_b", "bias_stride_h"]


@triton.jit(do_not_specialize=_LENGTHS)
def dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, dq_sum,
    cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, q_descale, k_descale, v_descale, rng,
    softmax_scale, softcap, dropout_p,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, dout_stride_b, dout_stride_s, dout_stride_h,
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,
    tokens_q, tokens_k, left, right, tiles, heads, group,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DQ_ATOMIC: tl.constexpr,
    VARLEN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, DROPOUT: tl.constexpr,
    Q_DESCALE: tl.constexpr, K_DESCALE: tl.constexpr, V_DESCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group
    tile, kv_head, batch = tile_ops.program(tiles, kv_heads, False)
    first_q, len_q = scores.sequence(cu_seqlens_q, batch, tokens_q, VARLEN)
    first_k, len_k = scores.sequence(cu_seqlens_k, batch, tokens_k, VARLEN)
    n0 = tile * BN
    if n0 >= len_k:
        return
    PRECISE: tl.constexpr = q.dtype.element_ty == tl.float32
    # Keys past the end only matter where dQ sums over them: dK and dV of theirs are not stored.
    MASK: tl.constexpr = LEFT or RIGHT or DQ_ATOMIC

    scale = tile_ops.descaled(softmax_scale, q_descale, batch, kv_head, kv_heads, Q_DESCALE)
    scale = tile_ops.descaled(scale, k_descale, batch, kv_head, kv_heads, K_DESCALE)
    scale_v = tile_ops.descaled(1.0, v_descale, batch, kv_head, kv_heads, V_DESCALE)
    kept_scale = 1.0 / (1.0 - dropout_p)

    # From here on every pointer is that of the first row of the sequence, or of the tile.
    k += batch * k_stride_b + (first_k + n0) * k_stride_s + kv_head.to(tl.int64) * k_stride_h
    v += batch * v_stride_b + (first_k + n0) * v_stride_s + kv_head.to(tl.int64) * v_stride_h
    keys = tl.arange(0, BN)[:, None]
    kt = tile_ops.load_rows(k, keys, len_k - n0, k_stride_s, HEAD_DIM, BLOCK_D, WIDE)
    vt = tile_ops.load_rows(v, keys, len_k - n0, v_stride_s, HEAD_DIM_V, BLOCK_DV, WIDE)
    cols = n0 + keys
    dk_sum = tl.zeros([BN, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BN, BLOCK_DV], tl.float32)
    start, inner, outer, last = scores.rows_of_keys(n0, len_q, len_k, left, right, BM, BN, LEFT, RIGHT)
    if DQ_ATOMIC:
        ragged = n0 + BN > len_k
    else:
        ragged = False

    for member in range(group):
        head = (kv_head * group + member).to(tl.int64)
        q_head = q + batch * q_stride_b + first_q * q_stride_s + head * q_stride_h
        dout_head = dout + batch * dout_stride_b + first_q * dout_stride_s + head * dout_stride_h
        row_at = tile_ops.row_start(batch, head, heads, first_q, tokens_q, VARLEN)
        slope = 0.0
        if ALIBI:
            slope = scores.per_head(alibi_slopes, batch, head, heads, ALIBI)
        bias_head = bias
        if BIAS != 0:
            bias_head += batch * bias_stride_b + head * bias_stride_h
        if DQ_ATOMIC:
            dq_stride = heads.to(tl.int64) * HEAD_DIM
            token = tile_ops.token_start(batch, first_q, tokens_q, VARLEN)
            dq_head = dq_sum + token * dq_stride + head * HEAD_DIM
        for m0 in range(start, last, BM):
            block = tl.arange(0, BM)
            m = tl.full([], 0, tl.int64) + m0
            qt = tile_ops.load_clamped(
                q_head + m * q_stride_s, block[:, None], len_q - m0, q_stride_s, HEAD_DIM, BLOCK_D, WIDE
            )
            row_lse, row_delta = tile_ops.load_statistics(lse + row_at + m, delta + row_at + m, block, len_q - m0)
            rows = (m0 + block)[None, :]
            masked = ragged | (m0 < inner) | (m0 >= outer)
            qk = tl.dot(kt, tl.trans(qt), input_precision=PRECISION)
            p, slope_of_cap = tile_ops.probabilities(
                qk, row_lse[None, :], rows, cols, len_q, len_k, scale, softcap, slope,
                bias_head, bias_stride_q, bias_stride_k, left, right, masked,
                SOFTCAP, ALIBI != 0, BIAS, WIDE, PRECISE, LEFT, RIGHT, MASK,
            )  # fmt: skip
            keep = None
            if DROPOUT:
                keep = scores.kept(rng, batch * heads + head, rows, cols, dropout_p)
            dot = tile_ops.load_clamped(
                dout_head + m * dout_stride_s, block[:, None], len_q - m0, dout_stride_s, HEAD_DIM_V, BLOCK_DV, WIDE
            )
            weights = tile_ops.dropped(p, keep, kept_scale, DROPOUT)
            dv_sum = tl.dot(weights.to(dot.dtype), dot, dv_sum, input_precision=PRECISION)
            dp = tl.dot(vt, tl.trans(dot), input_precision=PRECISION)
            if V_DESCALE >= 0:
                dp *= scale_v
            dp = tile_ops.dropped(dp, keep, kept_scale, DROPOUT)
            ds = p * (dp - row_delta[None, :])
            if SOFTCAP:
                ds *= slope_of_cap
            narrow = ds.to(qt.dtype)
            dk_sum = tl.dot(narrow, qt, dk_sum, input_precision=PRECISION)
            if DQ_ATOMIC:
                dq = tl.dot(tl.trans(narrow), kt, input_precision=PRECISION) * scale
                tile_ops.add_rows(dq_head + m * dq_stride, block[:, None], len_q - m0, dq_stride, dq, HEAD_DIM, BLOCK_D)

    token = tile_ops.token_start(batch, first_k, tokens_k, VARLEN) + n0
    dk_stride = kv_heads.to(tl.int64) * HEAD_DIM
    dv_stride = kv_heads.to(tl.int64) * HEAD_DIM_V
    tile_ops.store_rows(
        dk + token * dk_stride + kv_head * HEAD_DIM, keys, len_k - n0, dk_stride, dk_sum * scale, HEAD_DIM, BLOCK_D
    )
    if V_DESCALE >= 0:
        dv_sum *= scale_v
    tile_ops.store_rows(
        dv + token * dv_stride + kv_head * HEAD_DIM_V, keys, len_k - n0, dv_stride, dv_sum, HEAD_DIM_V, BLOCK_DV
    )
