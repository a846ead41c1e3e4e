"""The gradient of an additive bias: dS of a tile, summed over the dimensions that the bias broadcasts.

dS = P * (dO V^T - delta) (Dao et al. 2022, appendix B.2) is the gradient of the biased logits. A program owns one BM
x BN tile of the bias (of a bias with one row or one column, that row or column of the tile) and walks in a fixed
order over everything that the tile was broadcast to: batches, heads, blocks of rows, blocks of keys. Nothing is added
by two programs, so the bits are the same on every run, and no gradient larger than the bias exists. Where a small
bias is broadcast far, `parts` programs share the walk and their fp32 sums are added afterwards.

It costs two of the seven products again, for which the other kernels stay free of it. Dense calls only: a packed call
has no bias. Layouts: as in `backward_dkv`; dbias contiguous (parts, B or 1, H or 1, Sq or 1, Sk or 1).
Tiles: `tiles/backward.json`, keys `bias_d<block>`.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton import backward_tile as tile_ops
from vllm_accel.kernels.triton import scores

_LENGTHS = [
    "tokens_q", "tokens_k", "left", "right", "batches", "heads", "bias_stride_b", "bias_stride_h",
    "bias_batches", "bias_heads", "bias_rows", "bias_keys", "parts",
]  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def bias_kernel(
    q, k, v, dout, lse, delta, dbias, alibi_slopes, bias, q_descale, k_descale, v_descale, rng,
    softmax_scale, softcap, dropout_p,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, dout_stride_b, dout_stride_s, dout_stride_h,
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k,
    tokens_q, tokens_k, left, right, batches, heads, group, bias_batches, bias_heads, bias_rows, bias_keys, parts,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_KEYS: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    WIDE: tl.constexpr, DROPOUT: tl.constexpr,
    Q_DESCALE: tl.constexpr, K_DESCALE: tl.constexpr, V_DESCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = q.dtype.element_ty == tl.float32
    row_blocks, key_blocks = tl.cdiv(tokens_q, BM), tl.cdiv(tokens_k, BN)
    # Which tile of the bias this is, and over how much of each dimension it walks.
    tiles_q, walk_q = row_blocks, 1
    tiles_k, walk_k = key_blocks, 1
    if SUM_ROWS:
        tiles_q, walk_q = 1, row_blocks
    if SUM_KEYS:
        tiles_k, walk_k = 1, key_blocks
    index = tl.program_id(0)
    tile_k = index % tiles_k
    index = index // tiles_k
    tile_q = index % tiles_q
    index = index // tiles_q
    bias_head = index % bias_heads
    index = index // bias_heads
    bias_batch = index % bias_batches
    part = index // bias_batches
    walk_h, walk_b = heads // bias_heads, batches // bias_batches
    steps = walk_k * walk_q * walk_h * walk_b
    share = tl.cdiv(steps, parts)
    total = tl.zeros([BM, BN], tl.float32)
    for step in range(part * share, tl.minimum(steps, part * share + share)):
        n0 = (tile_k + step % walk_k) * BN
        m0 = (tile_q + step // walk_k % walk_q) * BM
        head = (bias_head + step // (walk_k * walk_q) % walk_h).to(tl.int64)
        batch = (bias_batch + step // (walk_k * walk_q * walk_h)).to(tl.int64)
        kv_head = head // group
        m, n = tl.full([], 0, tl.int64) + m0, tl.full([], 0, tl.int64) + n0
        block, keys = tl.arange(0, BM), tl.arange(0, BN)
        diagonal = m0 + tokens_k - tokens_q
        meets = True
        if RIGHT:
            meets = meets & (n0 <= diagonal + BM - 1 + right)
        if LEFT:
            meets = meets & (n0 + BN - 1 >= diagonal - left)
        if meets:
            qt = tile_ops.load_rows(
                q + batch * q_stride_b + m * q_stride_s + head * q_stride_h,
                block[:, None], tokens_q - m0, q_stride_s, HEAD_DIM, BLOCK_D, WIDE,
            )  # fmt: skip
            kt = tile_ops.load_rows(
                k + batch * k_stride_b + n * k_stride_s + kv_head * k_stride_h,
                keys[:, None], tokens_k - n0, k_stride_s, HEAD_DIM, BLOCK_D, WIDE,
            )  # fmt: skip
            vt = tile_ops.load_rows(
                v + batch * v_stride_b + n * v_stride_s + kv_head * v_stride_h,
                keys[:, None], tokens_k - n0, v_stride_s, HEAD_DIM_V, BLOCK_DV, WIDE,
            )  # fmt: skip
            dot = tile_ops.load_rows(
                dout + batch * dout_stride_b + m * dout_stride_s + head * dout_stride_h,
                block[:, None], tokens_q - m0, dout_stride_s, HEAD_DIM_V, BLOCK_DV, WIDE,
            )  # fmt: skip
            row_at = (batch * heads + head) * tokens_q + m
            row_lse, row_delta = tile_ops.load_statistics(lse + row_at, delta + row_at, block, tokens_q - m0)
            kv_heads = heads // group
            scale = tile_ops.descaled(softmax_scale, q_descale, batch, kv_head, kv_heads, Q_DESCALE)
            scale = tile_ops.descaled(scale, k_descale, batch, kv_head, kv_heads, K_DESCALE)
            slope = 0.0
            if ALIBI:
                slope = scores.per_head(alibi_slopes, batch, head, heads, ALIBI)
            rows, cols = (m0 + block)[:, None], (n0 + keys)[None, :]
            qk = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
            p, _ = tile_ops.probabilities(
                qk, row_lse[:, None], rows, cols, tokens_q, tokens_k, scale, softcap, slope,
                bias + batch * bias_stride_b + head * bias_stride_h, bias_stride_q, bias_stride_k, left, right, True,
                SOFTCAP, ALIBI != 0, 1, WIDE, PRECISE, LEFT, RIGHT, True,
            )  # fmt: skip
            dp = tl.dot(dot, tl.trans(vt), input_precision=PRECISION)
            dp *= tile_ops.descaled(1.0, v_descale, batch, kv_head, kv_heads, V_DESCALE)
            if DROPOUT:
                keep = scores.kept(rng, batch * heads + head, rows, cols, dropout_p)
                dp = tile_ops.dropped(dp, keep, 1.0 / (1.0 - dropout_p), True)
            total += p * (dp - row_delta[:, None])

    at = (((tl.full([], 0, tl.int64) + part) * bias_batches + bias_batch) * bias_heads + bias_head) * bias_rows
    rows, keys = tile_q * BM + tl.arange(0, BM), tile_k * BN + tl.arange(0, BN)
    dtype = dbias.dtype.element_ty
    if SUM_ROWS and SUM_KEYS:
        tl.store(dbias + at, tl.sum(total).to(dtype))
    elif SUM_ROWS:
        tl.store(dbias + at * bias_keys + keys, tl.sum(total, axis=0).to(dtype), mask=keys < bias_keys)
    elif SUM_KEYS:
        tl.store(dbias + at + rows, tl.sum(total, axis=1).to(dtype), mask=rows < bias_rows)
    else:
        inside = (rows < bias_rows)[:, None] & (keys < bias_keys)[None, :]
        where = (at + rows.to(tl.int64))[:, None] * bias_keys + keys[None, :]
        tl.store(dbias + where, total.to(dtype), mask=inside)
