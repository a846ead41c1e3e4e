"""Limits that the FlashAttention adapters share, as rules and guards of their capabilities."""

from __future__ import annotations

from typing import Any

import torch

from vllm_accel.backends.convert import round_up
from vllm_accel.dispatch.capability import Guard, Note, Rule
from vllm_accel.dispatch.device import KIB, Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature

DTYPES = frozenset({torch.float16, torch.bfloat16})
MAX_HEAD_DIM = 256

#: What all three do: some natively, the rest by the conversions of each adapter.
COMMON = (
    Feature.VARLEN
    | Feature.GRAD
    | Feature.LSE
    | Feature.LSE_GRAD
    | Feature.CAUSAL
    | Feature.WINDOW_LEFT
    | Feature.WINDOW_RIGHT
    | Feature.SCALE
    | Feature.SOFTCAP
    | Feature.SINKS
    | Feature.SINKS_GRAD
    | Feature.GQA
    | Feature.VALUE_DIM
)

#: The y and z dimensions of a CUDA grid (programming guide, technical specifications per compute capability).
MAX_GRID = 65535


def _dlse_column(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.LSE_GRAD in spec.features and spec.head_dim_v >= MAX_HEAD_DIM:
        return (
            f"a gradient through the log-sum-exp travels in a spare column of v: value head sizes up to "
            f"{MAX_HEAD_DIM - 1}; this call has {spec.head_dim_v}"
        )
    return None


def _dropout_softcap(spec: AttentionSpec, device: Device) -> str | None:
    both = Feature.DROPOUT | Feature.SOFTCAP
    return "does not combine dropout with softcap" if both & spec.features == both else None


def _dropout_backward(spec: AttentionSpec, device: Device) -> str | None:
    both = Feature.DROPOUT | Feature.GRAD
    size = one_head_dim(spec.head_dim, spec.head_dim_v, Feature.LSE_GRAD in spec.features)
    if both & spec.features != both or size <= 192:
        return None
    memory = device.shared_memory_per_block
    if memory >= 144 * KIB or (not memory and device.compute_capability in {(8, 0), (8, 7), (9, 0), (10, 0)}):
        return None
    return f"no backward with dropout for head sizes over 192 below 144 KiB of shared memory; {device.arch} has less"


def _paged(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.PAGED not in spec.features or (spec.head_dim == spec.head_dim_v and spec.head_dim % 8 == 0):
        return None
    return (
        "over a paged cache takes one head size, a multiple of 8, since another would copy the cache at every call; "
        f"this call has {spec.head_dim} and {spec.head_dim_v}"
    )


def _heads(spec: AttentionSpec, device: Device) -> str | None:
    return f"up to {MAX_GRID} heads; this call has {spec.num_heads}" if spec.num_heads > MAX_GRID else None


def _batch(spec: Any, sizes: Any) -> str | None:
    return f"up to {MAX_GRID} sequences; this call has {sizes.batch}" if sizes.batch > MAX_GRID else None


def one_head_dim(head_dim: int, head_dim_v: int, dlse: bool = False) -> int:
    """Return one head size for q, k and v: a multiple of 8, with a column for dlse where it has to travel in one."""
    return round_up(max(head_dim, head_dim_v + dlse), 8)


#: A cache is not padded, as q, k and v of a dense call are.
PAGED_HEADS = Rule("paged_head_dim", _paged)
PAGED_ALIGNED = Note(Feature.PAGED, "copies a cache whose rows do not start at multiples of 16 bytes")

#: FlashAttention 2, mha_fwd in flash_api.cpp.
DROPOUT_SOFTCAP = Rule("dropout_softcap", _dropout_softcap)

#: FlashAttention 2, run_mha_bwd_hdim256 in flash_bwd_launch_template.h: on a GPU with less shared memory it launches
#: nothing, says nothing, and the gradients are whatever the memory held.
DROPOUT_BACKWARD = Rule("dropout_backward", _dropout_backward)

#: For a library whose backward computes delta itself and takes no gradient of the log-sum-exp.
DLSE_COLUMN = Rule("dlse_column", _dlse_column)

#: Heads and sequences are grid dimensions of the kernels: beyond the limit the launch fails with "invalid
#: configuration argument" (flash_fwd_launch_template.h; tile_scheduler.hpp; flash_attn/cute/tile_scheduler.py).
GRID_HEADS = Rule("grid_heads", _heads)
GRID_BATCH = Guard("grid_batch", _batch)
