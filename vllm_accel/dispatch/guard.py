"""One question on the hot path: are these tensors the same kind as those a plan was made for?

torch's own `TensorGuards` (what Dynamo uses) compares type, dispatch keys (so autocast, vmap, inference mode and fake
tensors), dtype, device, requires_grad and sizes in one C++ call: 0.37 us for three tensors, against 1.3 us for the
same attributes read from Python (torch 2.13, 2-core EPYC, 2026-11-23, `python -m benchmarks.dispatch`). It is not
public, so a Python twin stands behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

TensorGuard = Callable[..., bool]
#: For each tensor, the dimensions that a guard does not look at.
Free = tuple[frozenset[int], ...]
_NONE: frozenset[int] = frozenset()


def python_guard(*tensors: Tensor, free: Free = ()) -> TensorGuard:
    """Return a check for tensors of the same type, dtype, device, sizes and gradient need, outside any transform."""
    dims = free or (_NONE,) * len(tensors)

    def kind(t: Tensor, free_dims: frozenset[int]) -> tuple[object, ...]:
        sizes = tuple(n for dim, n in enumerate(t.shape) if dim not in free_dims)
        return type(t), t.dtype, t.device, t.dim(), sizes, _inner_stride(t), t.requires_grad, t.layout

    def modes() -> tuple[object, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch._C._are_functorch_transforms_active(),
            torch.is_autocast_enabled(tensors[0].device.type),
        )

    def kinds(now: tuple[Tensor, ...]) -> tuple[object, ...]:
        return (modes(), *map(kind, now, dims))

    expected = kinds(tensors)
    return lambda *now: len(now) == len(dims) and kinds(now) == expected


def guard_but(free: Free, *tensors: Tensor) -> TensorGuard:
    """Return a guard like `tensor_guard` that lets the dimensions differ that `free` names for each tensor."""
    if tensor_guard is python_guard or len({id(t) for t in tensors}) < len(tensors):
        return python_guard(*tensors, free=free)
    sizes = [
        [None if dim in dims else n for dim, n in enumerate(t.shape)] for t, dims in zip(tensors, free, strict=True)
    ]
    strides = [[*[None] * (t.dim() - 1), *_inner_stride(t)] for t in tensors]
    check: TensorGuard = _guards_type(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


def _torch_guard(*tensors: Tensor) -> TensorGuard:
    if len({id(t) for t in tensors}) < len(tensors):
        return python_guard(*tensors)  # torch's refuses one tensor in two places, always
    # Of the strides only the innermost counts (kernels want it to be 1): another view must not need another plan.
    strides = [_UNIT[t.dim()] if t.is_contiguous() else [*[None] * (t.dim() - 1), *_inner_stride(t)] for t in tensors]
    guards = _guards_type(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=strides)
    check: TensorGuard = guards.check
    return check


class Kin(NamedTuple):
    """What a plan knows of tensors at other lengths: a check for them, and the strides its own guard was made of."""

    check: TensorGuard
    strides: list[list[int | None]]

    def guard(self, q: Tensor, k: Tensor, v: Tensor) -> TensorGuard:
        """Return the guard for tensors that `check` has accepted, at their own lengths."""
        check: TensorGuard = _guards_type(q, k, v, dynamic_dims_sizes=None, dynamic_dims_strides=self.strides).check
        return check


def kin_of(q: Tensor, k: Tensor, v: Tensor) -> Kin | None:
    """Describe (B, S, H, D) tensors of the same kind at any B and S; None where torch's own guard cannot be used."""
    if tensor_guard is python_guard or q is k or k is v or q is v:
        return None
    sizes = [[None, None, *t.shape[2:]] for t in (q, k, v)]
    strides: list[list[int | None]] = [[None, None, None, t.stride(-1)] for t in (q, k, v)]
    return Kin(_guards_type(q, k, v, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check, strides)


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


_guards_type: Any
try:
    from torch._C._dynamo.guards import TensorGuards as _guards_type

    tensor_guard: Callable[..., TensorGuard] = _torch_guard if _works() else python_guard
except ImportError:
    tensor_guard = python_guard
