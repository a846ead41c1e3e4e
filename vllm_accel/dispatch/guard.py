"""One question on the hot path: are these tensors the same kind as those a plan was made for?

torch's own `TensorGuards` (what Dynamo uses) compares type, dispatch keys (so autocast, vmap, inference mode and fake
tensors), dtype, device, requires_grad and sizes in one C++ call: 0.37 us for three tensors, against 1.3 us for the
same attributes read from Python (torch 2.13, 2-core EPYC, 2026-11-23, `python -m benchmarks.dispatch`). It is not
public, so a Python twin stands behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TensorGuard = Callable[..., bool]


def python_guard(*tensors: Tensor) -> TensorGuard:
    """Return a check for tensors of the same type, dtype, device, sizes and gradient need, outside any transform."""

    def kind(t: Tensor) -> tuple[object, ...]:
        return type(t), t.dtype, t.device, t.shape, _inner_stride(t), t.requires_grad, t.layout

    def modes() -> tuple[object, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch._C._are_functorch_transforms_active(),
            torch.is_autocast_enabled(tensors[0].device.type),
        )

    expected = (modes(), *(kind(t) for t in tensors))
    return lambda *now: (modes(), *(kind(t) for t in now)) == expected


def _torch_guard(*tensors: Tensor) -> TensorGuard:
    if len({id(t) for t in tensors}) < len(tensors):
        return python_guard(*tensors)  # torch's refuses one tensor in two places, always
    # Of the strides only the innermost counts (kernels want it to be 1): another view must not need another plan.
    strides = [_UNIT[t.dim()] if t.is_contiguous() else [*[None] * (t.dim() - 1), *_inner_stride(t)] for t in tensors]
    guards = _guards_type(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=strides)  # type: ignore[arg-type, unused-ignore]
    check: TensorGuard = guards.check
    return check


#: Strides of a contiguous tensor by its dimensions: any, but the innermost is 1.
_UNIT: list[list[int | None]] = [[], *([*[None] * n, 1] for n in range(6))]


def _inner_stride(t: Tensor) -> tuple[int, ...]:
    return t.stride()[-1:]


def _works() -> bool:
    """Try the private class on every difference that we rely on; a torch that changed it gets the Python twin."""
    a, b = torch.zeros(2, 3), torch.zeros(3)
    try:
        check = _torch_guard(a, b)
        wide = torch.zeros(2, 6)[:, :3]
        same = check(a, b) and check(wide, b)
        differ = (
            check(a.t().contiguous().t(), b)
            or check(a.double(), b)
            or check(a[:1], b)
            or check(a, b[:2])
            or check(a.clone().requires_grad_(), b)
            or check(torch.nn.Parameter(a, requires_grad=False), b)
            or check(a.to("meta"), b)
        )
        with torch.autocast("cpu", torch.bfloat16):
            differ = differ or check(a, b)
        with torch.inference_mode():
            differ = differ or check(a.clone(), b)
    except Exception:  # any failure of a private class means: do not use it
        return False
    return bool(same and not differ)


try:
    from torch._C._dynamo.guards import TensorGuards as _guards_type  # type: ignore[attr-defined, unused-ignore]

    tensor_guard: Callable[..., TensorGuard] = _torch_guard if _works() else python_guard
except ImportError:
    tensor_guard = python_guard
