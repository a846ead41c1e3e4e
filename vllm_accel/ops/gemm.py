"""Dense matrix products behind the same dispatch: the proof that registry, selector and explain know no operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_accel.dispatch import override, registry
from vllm_accel.dispatch.choose import OpFamily, choose
from vllm_accel.dispatch.settings import GEMM, settings
from vllm_accel.dispatch.spec import GemmSpec, bucket

FAMILY = OpFamily(name="gemm", make_spec=lambda kind: GemmSpec(*kind))


class GemmSizes(NamedTuple):
    """Exact sizes of a product, for the guards of backends."""

    m: int
    n: int
    k: int


def gemm(a: Tensor, b: Tensor, bias: Tensor | None = None, *, backend: str | Sequence[str] | None = None) -> Tensor:
    """Multiply two matrices: ``a @ b + bias``, differentiable.

    Args:
        a: (M, K). b: (K, N), same dtype and device: fp16, bf16, fp32 or fp64. bias: (N,) in the same dtype.
        backend: as in `attention`.

    Returns:
        (M, N) in the dtype of a.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or devices, before any launch.
        UnsupportedCallError, BackendUnavailableError: as `attention`.
    """
    kind, sizes = describe(a, b, bias)
    asked, asked_by = asked_for(backend)
    bound, _ = choose(FAMILY, kind, a.device, asked, asked_by, sizes, False)
    product: Tensor = bound.kernel(a, b, bias)
    return product


def describe(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[tuple[Any, ...], GemmSizes]:
    """Check a product and describe its kind.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a must be (M, K) and b (K, N); got a {tuple(a.shape)}, b {tuple(b.shape)}")
    if a.dtype is not b.dtype or (bias is not None and bias.dtype is not a.dtype):
        raise TypeError(f"a, b and bias must have one dtype; got {a.dtype}, {b.dtype}, {bias and bias.dtype}")
    if a.device != b.device or (bias is not None and bias.device != a.device):
        raise ValueError(f"a, b and bias must be on one device; got {a.device}, {b.device}")
    if bias is not None and tuple(bias.shape) != (b.shape[1],):
        raise ValueError(f"bias must have shape ({b.shape[1]},); got {tuple(bias.shape)}")
    grad = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    sizes = GemmSizes(a.shape[0], b.shape[1], a.shape[1])
    return (a.dtype, *(bucket(size) for size in sizes), bias is not None, grad), sizes


def asked_for(backend: object) -> tuple[tuple[str, ...] | None, str]:
    """Return the backends that a call asks for, and what asked: the argument, the context, the environment."""
    if backend is not None:
        return registry.resolve("gemm", backend), "backend="
    if (overridden := override.variable("gemm").get()) is not None:
        return overridden, "use_backend"
    return settings().request("gemm"), GEMM
