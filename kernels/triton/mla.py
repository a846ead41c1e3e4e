"""The inner loop of multi-head latent attention: keys and values are one row of the cache, which is read once.

Absorbed form (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1): a row holds DV channels of compressed keys
and values and ROPE channels of rotary key; all query heads share it. `paged.paged_attention` does the rest.

Layouts: as in `paged`, with one key head, and values a view of the keys. Tiles: `tiles/mla.json`.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton.pages import online, pages_of, tokens_in, widen, within
from vllm_accel.kernels.triton.scores import factor, logits


@triton.jit
def attend_latent(
    begin, end, acc, m, l, q, q_rope, power, k_head, table, rows, len_q, len_k, scale, softcap, left, right, num_blocks,
    stride_kb, stride_ks,
    DV: tl.constexpr, ROPE: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, FOLD: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PRECISE: tl.constexpr, PRECISION: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Let the rows attend to the keys [begin, end), as `paged._attend` does; what lies behind them is read as 0."""
    columns = tl.arange(0, BLOCK_DV)
    columns_r = tl.arange(0, BLOCK_R)
    exponent = factor(scale, FOLD)
    page = pages_of(begin, end, table, num_blocks, PAGE, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = tokens_in(k_head, page, start, stride_kb, stride_ks, PAGE, BLOCK_N)[:, None]
        latent = tl.load(at + columns[None, :], mask=within(n < end, columns, DV, BLOCK_DV), other=0.0)
        rope = tl.load(at + DV + columns_r[None, :], mask=within(n < end, columns_r, ROPE, BLOCK_R), other=0.0)
        page = pages_of(start + BLOCK_N, end, table, num_blocks, PAGE, BLOCK_N)
        latent = widen(latent, q.dtype, BITS)
        s = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
        s = tl.dot(q_rope, tl.trans(widen(rope, q.dtype, BITS)), s, input_precision=PRECISION)
        if NORM:
            s *= power[:, None]
        s = logits(
            s, rows[:, None], n[None, :], len_q, len_k, scale, softcap, 0.0, None, 0, 0, left, right,
            FOLD, SOFTCAP, False, 0, False, PRECISE, LEFT, RIGHT, True,
        )  # fmt: skip
        p, rescale, m, l = online(s, m, l, exponent)
        acc = tl.dot(p.to(q.dtype), latent, acc * rescale[:, None], input_precision=PRECISION)
    return acc, m, l
