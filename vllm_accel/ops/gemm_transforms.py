"""Not plain eager tensors: autocast casts first, fake tensors take the operator, others are refused."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.ops.transforms import PLAIN, has_tangent, is_traced


def look(a: Tensor, b: Tensor, args: GemmArgs) -> Literal["traced"] | torch.dtype | None:
    """Say what has to be done with tensors that no plan knows.

    Returns:
        None for plain tensors, "traced" for fake ones, or the dtype that autocast wants a and b in.

    Raises:
        TypeError: not a tensor, or a tensor type (nested, distributed) that no kernel takes.
        NotImplementedError: inside vmap, forward-mode differentiation or another functorch transform.
    """
    named = {"a": a, "b": b, "offs": args.offs, "bias": args.bias, "scale_a": args.scale_a, "scale_b": args.scale_b}
    given = {name: tensor for name, tensor in named.items() if tensor is not None or name in "ab"}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("matrix products do not run inside vmap, grad or jvp of torch.func")
    tensors = [tensor for tensor in given.values() if tensor is not None]
    if forward_ad._current_level >= 0 and any(has_tangent(t) for t in tensors):
        raise NotImplementedError("matrix products have no forward-mode derivative here; use backward()")
    traced = torch.compiler.is_compiling()
    for name, tensor in given.items():
        assert tensor is not None
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise TypeError(f"{name} is a nested or sparse tensor; pass its values with offs to grouped_gemm")
        if type(tensor) not in PLAIN:
            if not is_traced(tensor):
                raise TypeError(f"{name} is a {type(tensor).__name__}; products take plain tensors (to_local())")
            traced = True
    if traced:
        return "traced"
    if args.scale_a is None and torch.is_autocast_enabled(a.device.type) and a.is_floating_point():
        return a.dtype if a.dtype is torch.float64 else torch.get_autocast_dtype(a.device.type)
    return None
