"""What the backward kernels need of each row, delta, and the gradient of the sinks.

delta_i = sum_d dO_id O_id - dlse_i (Dao et al. 2022, algorithm 4): the softmax subtracts the mean of the gradients of
its inputs, which is this sum; the log-sum-exp's own gradient enters with the other sign, since d lse / d logit is the
probability.

One program computes the delta of BLOCK rows of one head. Layouts: out (B, S, H, Dv) contiguous, dout any strides with
the innermost 1, lse, dlse and delta fp32 (B, H, S) contiguous. A packed call is one sequence of all tokens here: rows
past the last sequence get a delta that nobody reads. Tiles: 16 rows, 1024 of a sink's sum; no table.
"""

import triton
import triton.language as tl
from vllm_accel.kernels.triton import backward_tile as tile_ops


@triton.jit(do_not_specialize=["tokens", "tiles", "heads"])
def delta_kernel(
    out, dout, dlse, delta,
    dout_stride_b, dout_stride_s, dout_stride_h, tokens, tiles, heads,
    HEAD_DIM_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    # Heads next to each other, as they are in memory.
    index = tl.program_id(0)
    head = index % heads
    tile = index // heads % tiles
    batch = (index // (heads * tiles)).to(tl.int64)
    first = tile.to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    left = (tokens - first).to(tl.int32)
    out_stride = heads.to(tl.int64) * HEAD_DIM_V
    out += (batch * tokens + first) * out_stride + head * HEAD_DIM_V
    dout += batch * dout_stride_b + first * dout_stride_s + head * dout_stride_h
    o = tile_ops.load_rows(out, rows[:, None], left, out_stride, HEAD_DIM_V, BLOCK_DV, WIDE)
    do = tile_ops.load_rows(dout, rows[:, None], left, dout_stride_s, HEAD_DIM_V, BLOCK_DV, WIDE)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    at = (batch * heads + head) * tokens + first
    if DLSE:
        total -= tl.load(dlse + at + rows, mask=rows < left, other=0.0)
    tl.store(delta + at + rows, total, mask=rows < left)


@triton.jit(do_not_specialize=["tokens", "batches", "heads"])
def sinks_kernel(
    sinks, lse, row_dot, dlse, dsinks, tokens, batches, heads, DLSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dsinks_h = -sum_i exp(sink_h - lse_i) (row_dot_i - dlse_i): one program a head, rows in a fixed order.

    row_dot is delta as `backward_dq` sums it, from fp32. With the delta of `delta_kernel`, made of an out that was
    rounded to 16 bits, dsinks was up to 4.4 times as far from float64 as plain PyTorch's (fp16, the case
    `sinks_window`, interpreted); 3 are allowed.

    A row past the last packed sequence has lse = -inf (with a sink no other row has); dlse may be anything there.
    """
    head = tl.program_id(0)
    sink = tl.load(sinks + head).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for batch in range(batches):
        base = ((tl.full([], 0, tl.int64) + batch) * heads + head) * tokens
        for first in range(0, tokens, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            m = tl.load(lse + base + rows, mask=rows < tokens, other=float("-inf"))
            d = tl.load(row_dot + base + rows, mask=rows < tokens, other=0.0)
            if DLSE:
                d -= tl.load(dlse + base + rows, mask=rows < tokens, other=0.0)
            empty = m == float("-inf")
            total -= tl.exp(sink - tl.where(empty, float("inf"), m)) * tl.where(empty, 0.0, d)
    tl.store(dsinks + head, tl.sum(total, axis=0).to(dsinks.dtype.element_ty))
