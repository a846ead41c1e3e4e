"""Launch `forward_sm90`: which variant for which head size, and TMA descriptors (`bound` launches again)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vllm_accel.kernels.gluon.forward_sm90 import attention_forward
from vllm_accel.kernels.triton.launch import Launch

ROWS = 64  # query rows of one consumer warpgroup
#: Of an H200's 50 MB of L2: what the K and V of the heads in flight may take, so that rereads hit it. FlashAttention 3
#: takes the same share (hopper/tile_scheduler.hpp). Not timed.
L2_SHARE = 32 * 2**20
HEAD_DIMS = (64, 128, 256)
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class Variant(NamedTuple):
    """A compiled form of the kernel. BM is 64 rows for each consumer.

    Attributes:
        bn: keys of a block. stages: slots of the K ring and of the V ring. q_slots: Q tiles held by a consumer.
        held: whether Q is in registers. overlap: softmax under the second product. pingpong: consumers take turns.
        persistent: dense calls: as many blocks as multiprocessors, each with many tiles.
        consumer_registers, producer_registers: per thread.
    """

    bn: int
    stages: int = 2
    q_slots: int = 1
    held: bool = False
    overlap: bool = True
    pingpong: bool = False
    persistent: bool = False
    consumers: int = 2
    consumer_registers: int = 240
    producer_registers: int = 24

    def conservative(self) -> Variant:
        """Return the variant with nothing asynchronous but the copies: if the others are wrong, is this one right?"""
        return self._replace(held=False, overlap=False, pingpong=False, persistent=False, q_slots=1)


#: By tile of the head size. D = 256 fits in 227 KiB with BN = 64 only, and 3 stages of D = 128 with one Q slot only.
#: The fastest of those that an H200 ran (Triton 3.6.0, 2026-11-27; D = 64 2026-11-30); NOTES.md has all.
VARIANTS = {
    64: Variant(bn=128, stages=3, q_slots=2, held=True, persistent=True),
    128: Variant(bn=128),
    256: Variant(bn=64),
}


def tile_dim(head_dim: int, head_dim_v: int) -> int:
    """Return the compiled head size that holds both; TMA reads zeros past a row's end, so any multiple of 8 will do.

    Raises:
        ValueError: larger than 256.
    """
    for size in HEAD_DIMS:
        if max(head_dim, head_dim_v) <= size:
            return size
    raise ValueError(f"head sizes up to {HEAD_DIMS[-1]}; got {head_dim} and {head_dim_v}")


def strides_are_ready(tensor: Tensor) -> bool:
    """Tell whether TMA can read the strides of a (..., S, heads, D) tensor: 1, and positive multiples of 16 bytes.

    The address has to be a multiple of 16 bytes too, which may differ from call to call.
    """
    size = tensor.element_size()
    strides = zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
    return tensor.stride(-1) == 1 and all(n == 1 or (s > 0 and s * size % 16 == 0) for s, n in strides)


def descriptor(tensor: Tensor, rows: int, tile: int) -> TensorDescriptor:
    """Describe (B, S, heads, D) or packed (T, heads, D) as (B, heads, S, D) in tiles of (1, 1, rows, tile)."""
    if tensor.dim() == 3:
        tensor = tensor.unsqueeze(0)
    batch, tokens, heads, head_dim = tensor.shape
    shape = (batch, heads, tokens, head_dim)
    strides = (tensor.stride(0), tensor.stride(2), tensor.stride(1))
    # The stride of a dimension of 1 is never used, but checked; any valid one does.
    used = [s if n > 1 else tokens * heads * tile for s, n in zip(strides, shape, strict=False)]
    block = [1, 1, rows, tile]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(shape), [*used, 1], block, layout)


def slots(tokens: int, sequences: int, longest: int, tile: int) -> int:
    """Return how many slots for tiles a head of packed sequences gets: see `sequence_at`."""
    return min(max(1, -(-longest // tile)) * sequences + 1, tokens // tile + sequences + 1)


def forward_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    head_dim_v: int,
    variant: Variant,
    sm_count: int,
    splits: int = 1,
) -> Launch:
    """Describe the launch that fills out and lse.

    Args:
        q, k, v: with strides and addresses for TMA; (B, S, heads, D) or packed (T, heads, D) with int32 cu_seqlens.
        head_dim_v: the caller's, before padding to a multiple of 8.
        out: contiguous, like q with head_dim_v. lse: contiguous fp32 (B, H, Sq) or (H, Tq).
        sm_count: multiprocessors of the device.
        splits: parts of a dense tile's keys. More than one: out (splits, B, S, H, Dv) fp32, lse (splits, B, H, S).
    """
    *batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[-2]
    varlen = cu_seqlens_q is not None
    sequences = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else batch[0]
    tile = tile_dim(head_dim, head_dim_v)
    group = num_heads // num_kv_heads
    rows = variant.consumers * ROWS
    tiles_per_head = slots(tokens, sequences, max_seqlen_q, rows) if varlen else -(-tokens // rows)
    heads = num_heads if varlen else num_heads * sequences
    num_tiles = tiles_per_head * heads * splits
    bytes_per_head = max(1, max_seqlen_k) * 2 * tile * q.element_size()
    heads_together = min(max(1, L2_SHARE // bytes_per_head) * group, heads)
    # Packed lengths may be anything: tiles that are dealt out by their number would be shared out badly.
    persistent = variant.persistent and not varlen
    grid = min(num_tiles, sm_count) if persistent else num_tiles
    return Launch(
        fn=attention_forward,
        grid=(grid, 1, 1),
        args=(
            descriptor(q, ROWS, tile), descriptor(k, variant.bn, tile), descriptor(v, variant.bn, tile), out, lse,
            cu_seqlens_q, cu_seqlens_k, softmax_scale, tokens, k.shape[-3], sequences, num_heads, group,
            heads_together, tiles_per_head, num_tiles,
        ),
        constexprs={
            "CONSUMERS": variant.consumers, "BN": variant.bn, "D": tile, "HEAD_DIM": head_dim_v,
            "STAGES": variant.stages, "Q_SLOTS": variant.q_slots, "CAUSAL": causal, "VARLEN": varlen,
            "OVERLAP": variant.overlap, "PINGPONG": variant.pingpong, "PERSISTENT": persistent,
            "HELD": variant.held, "SPLIT": splits > 1,
            "CONSUMER_REGISTERS": variant.consumer_registers, "PRODUCER_REGISTERS": variant.producer_registers,
        },
        num_warps=4,
        num_stages=1,
    )  # fmt: skip
