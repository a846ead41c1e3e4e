"""Calls that are not plain eager tensors: autocast casts first, fake tensors take the operator, the rest is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vllm_accel.ops.extras import Extras

#: Types of tensors that kernels take.
PLAIN = (Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", Tensor))  # Buffer came with torch 2.5


def redirect(q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> Callable[..., Any] | None:
    """Return what runs the call instead of a plan, or None for plain eager tensors.

    Raises:
        TypeError: an argument is not a tensor, or a tensor type (nested, distributed) that no kernel takes.
        NotImplementedError: inside vmap, forward-mode differentiation or another functorch transform.
    """
    plain = type(q) is type(k) is type(v) is Tensor and q.layout is k.layout is v.layout is torch.strided
    if plain and not (
        torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or q.is_nested
    ):
        return None  # the common case, in half a microsecond
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "attention does not run inside vmap, grad or jvp of torch.func; fold the mapped dimension into the batch"
        )
    if forward_ad._current_level >= 0 and any(has_tangent(t) for t in (q, k, v, *extras)):
        raise NotImplementedError("attention has no forward-mode derivative; use backward()")
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise TypeError(f"{name} is a nested or sparse tensor; pass its values to attention_varlen with cu_seqlens")
        if type(tensor) not in PLAIN:
            if is_traced(tensor):
                return lambda _, traced, options, lengths, backend: traced(q, k, v, extras, options, lengths, backend)
            raise TypeError(
                f"{name} is a {type(tensor).__name__}; attention takes plain tensors (for DTensor: to_local())"
            )
    if torch.compiler.is_compiling():  # torch.export and make_fx trace without Dynamo
        return lambda _, traced, options, lengths, backend: traced(q, k, v, extras, options, lengths, backend)
    if torch.is_autocast_enabled(q.device.type):
        return _autocast(q, k, v, extras)
    return None


def refuse_transforms(
    named: dict[str, Tensor], others: Iterable[Tensor | None]
) -> Literal["traced"] | torch.dtype | None:
    """Look at a call without gradients: None for plain tensors, else what has to be done instead.

    Args:
        named: the main tensors, q first. others: the optional ones.

    Returns:
        "traced" for fake tensors, the dtype that q has to be cast to under autocast, or None.

    Raises:
        TypeError, NotImplementedError: as `redirect`.
    """
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("attention does not run inside vmap, grad or jvp of torch.func")
    given = [*named.values(), *(t for t in others if isinstance(t, Tensor))]
    if forward_ad._current_level >= 0 and any(has_tangent(t) for t in given):
        raise NotImplementedError("attention has no forward-mode derivative")
    traced = torch.compiler.is_compiling()
    for name, tensor in named.items():
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise TypeError(f"{name} is a nested or sparse tensor; attention over a paged cache takes plain tensors")
        if type(tensor) not in PLAIN:
            if not is_traced(tensor):
                raise TypeError(f"{name} is a {type(tensor).__name__}; attention takes plain tensors")
            traced = True
    if traced:
        return "traced"
    q = named["q"]
    if torch.is_autocast_enabled(q.device.type):
        # The caches are storage and stay as they are.
        castable = q.dtype.itemsize > 1 and q.dtype is not torch.float64
        return torch.get_autocast_dtype(q.device.type) if castable else q.dtype
    return None


def has_tangent(tensor: Tensor | None) -> bool:
    """Tell whether forward-mode differentiation has given a tensor a tangent."""
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def is_traced(tensor: Tensor) -> bool:
    """Tell whether a tensor stands for one in a trace."""
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, (FakeTensor, FunctionalTensor))


def _autocast(q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> Callable[..., Any]:
    """Cast q, k, v as `F.scaled_dot_product_attention` does, then call with autocast off. fp32 biases stay fp32."""
    kind = q.device.type
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor | None) -> Any:
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
        return tensor.to(dtype) if eligible and tensor is not None else tensor

    def run(eager: Callable[..., Any], _: Any, options: Any, lengths: Any, backend: Any) -> Any:
        bias, casted = extras.attn_bias, extras
        if bias is not None and bias.dtype not in (torch.bool, torch.float32):
            casted = extras._replace(attn_bias=cast(bias))
        with torch.autocast(kind, enabled=False):
            return eager(cast(q), cast(k), cast(v), casted, options, lengths, backend)

    return run
