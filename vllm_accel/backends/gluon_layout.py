"""Which tensors TMA reads in place, and what makes the others readable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_accel.backends.convert import pad_heads, round_up


def for_tma(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what makes tensors of these sizes and strides readable for TMA, always with the same strides."""
    from vllm_accel.kernels.gluon.forward_sm90_launch import strides_are_ready

    head_dim = tensor.shape[-1]
    if head_dim % 8:
        return lambda t: pad_heads(t, round_up(head_dim, 8)).contiguous()
    return _at_aligned_address if strides_are_ready(tensor) else _contiguous_copy


def like_meta(tensor: Tensor) -> Tensor:
    """Return a tensor with the same sizes and strides that takes no memory."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _at_aligned_address(tensor: Tensor) -> Tensor:
    if tensor.data_ptr() % 16 == 0:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
