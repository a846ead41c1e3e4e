"""Launch the backward pass for Hopper: which variant for which head size, and TMA descriptors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vllm_accel.kernels.gluon.backward_sm90_dkv import attention_dkv
from vllm_accel.kernels.gluon.backward_sm90_dq import attention_dq
from vllm_accel.kernels.gluon.forward_sm90_launch import L2_SHARE, ROWS, descriptor, slots
from vllm_accel.kernels.triton.launch import Launch

TILE = 2 * ROWS  # keys of a dK and dV tile, rows of a dQ tile
HEAD_DIMS = (64, 128)


class Variant(NamedTuple):
    """A compiled form of the two kernels.

    Attributes:
        bm: rows of a block of the dK and dV kernel. dkv_stages: slots of its ring of Q and dO.
        dkv_paired: whether a slot holds two blocks, and K and V are in registers; else dK is one block behind.
        bn: keys of a block of the dQ kernel. dq_stages: slots of its ring of K and V.
        dq_paired: whether a slot holds two blocks, and Q and dO are in registers.
        dq_overlap: not paired: whether the product of the block before runs under the exponentials.
        persistent: as many blocks of threads as multiprocessors, each with many tiles.
        consumer_registers, producer_registers: per thread.
    """

    bm: int
    dkv_stages: int
    dkv_paired: bool
    bn: int
    dq_stages: int
    dq_paired: bool = False
    dq_overlap: bool = False
    persistent: bool = False
    consumer_registers: int = 240
    producer_registers: int = 24


#: By tile of the head size: the fastest of those that an H200 ran (Triton 3.6.0, 2026-11-30; NOTES.md has all).
VARIANTS = {
    64: Variant(bm=64, dkv_stages=3, dkv_paired=True, bn=64, dq_stages=3, dq_paired=True, persistent=True),
    128: Variant(bm=64, dkv_stages=3, dkv_paired=False, bn=64, dq_stages=4, dq_overlap=True),
}
#: Of packed calls. Blocks of threads that take tiles by their number share sequences of uneven lengths out badly, and
#: without them blocks of 128 keys are the faster ones.
PACKED_VARIANTS = {
    **VARIANTS,
    64: VARIANTS[64]._replace(bn=128, dq_paired=False, persistent=False),
}


def variant_of(head_dim: int, head_dim_v: int, *, packed: bool) -> Variant:
    """Return the form that calls with these head sizes take."""
    return (PACKED_VARIANTS if packed else VARIANTS)[tile_dim(head_dim, head_dim_v)]


def tile_dim(head_dim: int, head_dim_v: int) -> int:
    """Return the compiled head size that holds both.

    Raises:
        ValueError: larger than 128.
    """
    for size in HEAD_DIMS:
        if max(head_dim, head_dim_v) <= size:
            return size
    raise ValueError(f"head sizes up to {HEAD_DIMS[-1]}; got {head_dim} and {head_dim_v}")


def _heads_together(seqlen: int, tile: int, bytes_of_number: int, group: int, heads: int) -> int:
    """Return how many heads' two streamed tensors fit in the share of L2; `group` of them share one."""
    bytes_per_head = max(1, seqlen) * 2 * tile * bytes_of_number
    return min(max(1, L2_SHARE // bytes_per_head) * group, heads)


def _tiles(tokens: int, sequences: int, cu_seqlens: Tensor | None, longest: int, heads: int) -> tuple[int, int]:
    """Return how many tiles (packed: slots for them) a head has, and how many heads: packed, of one batch."""
    if cu_seqlens is None:
        return -(-tokens // TILE), heads * sequences
    return slots(tokens, sequences, longest, TILE), heads


def dkv_launch(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, *,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float, causal: bool, variant: Variant, sm_count: int,
) -> Launch:  # fmt: skip
    """Describe the launch that fills dk and dv.

    Args:
        q, k, v, dout: (B, S, heads, D) or packed (T, heads, D) with int32 cu_seqlens, strides and addresses for TMA;
            more numbers than dk and dv have are zeros.
        lse, delta: contiguous fp32 (B, H, Sq) or (H, Tq). dk, dv: contiguous, like k and v; packed rows of no sequence
            become 0.
        sm_count: multiprocessors of the device.
    """
    *batch, tokens_q, num_heads, _ = q.shape
    tokens_k, num_kv_heads = k.shape[-3:-1]
    head_dim, head_dim_v = dk.shape[-1], dv.shape[-1]
    sequences = batch[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    tile = tile_dim(head_dim, head_dim_v)
    group = num_heads // num_kv_heads
    tiles, heads = _tiles(tokens_k, sequences, cu_seqlens_k, max_seqlen_k, num_kv_heads)
    together = _heads_together(max_seqlen_q * group, tile, q.element_size(), 1, heads)
    return Launch(
        fn=attention_dkv,
        grid=(min(tiles * heads, sm_count) if variant.persistent else tiles * heads, 1, 1),
        args=(
            descriptor(q, variant.bm, tile), descriptor(k, ROWS, tile), descriptor(v, ROWS, tile),
            descriptor(dout, variant.bm, tile), lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, tokens_q,
            tokens_k, sequences, num_kv_heads, group, together, tiles,
        ),
        constexprs={
            "BM": variant.bm, "D": tile, "HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim_v, "STAGES": variant.dkv_stages,
            "CAUSAL": causal, "VARLEN": cu_seqlens_q is not None, "PAIRED": variant.dkv_paired,
            "PERSISTENT": variant.persistent,
            "CONSUMER_REGISTERS": variant.consumer_registers, "PRODUCER_REGISTERS": variant.producer_registers,
        },
        num_warps=4,
        num_stages=1,
    )  # fmt: skip


def dq_launch(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, *,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float, causal: bool, variant: Variant, sm_count: int, after_dkv: bool,
) -> Launch:  # fmt: skip
    """Describe the launch that fills dq, contiguous and like q; the rest as in `dkv_launch`.

    Args:
        after_dkv: whether the launch before this one on the stream is `dkv_launch`'s of the same call: then this one
            starts under the end of that one. Nothing else may be (nobody would wait for delta).
    """
    *batch, tokens_q, num_heads, _ = q.shape
    tokens_k, num_kv_heads = k.shape[-3:-1]
    head_dim = dq.shape[-1]
    sequences = batch[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    tile = tile_dim(head_dim, v.shape[-1])
    group = num_heads // num_kv_heads
    tiles, heads = _tiles(tokens_q, sequences, cu_seqlens_q, max_seqlen_q, num_heads)
    together = _heads_together(max_seqlen_k, tile, q.element_size(), group, heads)
    return Launch(
        fn=attention_dq,
        grid=(min(tiles * heads, sm_count) if variant.persistent else tiles * heads, 1, 1),
        args=(
            descriptor(q, ROWS, tile), descriptor(k, variant.bn, tile), descriptor(v, variant.bn, tile),
            descriptor(dout, ROWS, tile), lse, delta, dq, cu_seqlens_q, cu_seqlens_k, softmax_scale, tokens_q, tokens_k,
            sequences, num_heads, group, together, tiles,
        ),
        constexprs={
            "BN": variant.bn, "D": tile, "HEAD_DIM": head_dim, "STAGES": variant.dq_stages, "CAUSAL": causal,
            "VARLEN": cu_seqlens_q is not None, "OVERLAP": variant.dq_overlap, "PAIRED": variant.dq_paired,
            "PERSISTENT": variant.persistent,
            "CONSUMER_REGISTERS": variant.consumer_registers, "PRODUCER_REGISTERS": variant.producer_registers,
        },
        num_warps=4,
        num_stages=1,
        early=after_dkv,
    )  # fmt: skip
