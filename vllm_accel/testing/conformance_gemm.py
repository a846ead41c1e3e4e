"""Hold any implementation of matrix products against the oracle: right, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_accel.dispatch import device as devices
from vllm_accel.dispatch.backend import Backend
from vllm_accel.dispatch.device import Device
from vllm_accel.ops import gemm as gemm_ops
from vllm_accel.ops.gemm_arguments import describe, spec_of
from vllm_accel.testing.cases_gemm import GemmCase, GemmInputs
from vllm_accel.testing.oracle_gemm import product_oracle
from vllm_accel.testing.outcome import Outcome, bound, outcome_of
from vllm_accel.testing.tolerance import assert_close, assert_grad_close

_OPTIONS = ("deterministic", "batch_invariant", "out_dtype", "output_dtype")


def public_call(case: GemmCase, **more: Any) -> Callable[..., Tensor]:
    """Return the public function that a case calls, with `more` keyword arguments, as ``call(a, b, **kwargs)``."""
    if case.scaling is not None:

        def scaled(a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
            return gemm_ops.scaled_gemm(a, b, **kwargs, **more)

        return scaled
    fn: Callable[..., Tensor] = gemm_ops.grouped_gemm if case.grouped else gemm_ops.gemm
    return lambda a, b, **kwargs: fn(a, b, **kwargs, **more)


def check_gemm_backend(
    backend: Backend,
    case: GemmCase,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: Device | None = None,
    where: torch.device | str = "cpu",
    seed: int = 0,
) -> Outcome:
    """Check the forward of one backend on one case, without going through automatic choice.

    Args:
        backend: the backend object. case: from `GEMM_CASES`, or your own.
        dtype: of a and b, of the result where they are quantised.
        device: what the backend is told that it runs on; default: what `where` really is. where: the tensors are.

    Raises:
        AssertionError: a wrong number, shape or dtype, or a refusal without a reason.
    """
    target = device or devices.detect(torch.device(where))
    call = gemm_kernel_call(backend, target, case)

    def check() -> None:
        check_gemm_call(call, case, dtype=dtype, where=where, seed=seed, grad=False)

    return outcome_of(backend, case.name, check)


def gemm_kernel_call(backend: Backend, device: Device, case: GemmCase) -> Callable[..., Tensor]:
    """Return ``call(a, b, **kwargs)`` for one backend: it asks the capability, binds and runs the forward.

    Raises (when called):
        UnsupportedCallError: the backend refuses; carries its reasons.
    """

    def call(a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        given: dict[str, Any] = {"bias": None, "deterministic": False, "batch_invariant": False}
        given |= {"offs": None} if case.grouped or case.scaling else {}
        given |= {} if case.scaling else {"out_dtype": None}
        args, options = gemm_ops.arguments(a=a, b=b, **{**given, **kwargs})
        described = describe(a, b, args, options, False)
        spec = spec_of(described.kind)
        out: Tensor = bound(backend, spec, described.sizes, device).forward(a, b, args)
        return out

    return call


def check_gemm_call(
    call: Callable[..., Tensor],
    case: GemmCase,
    *,
    dtype: torch.dtype = torch.bfloat16,
    where: torch.device | str = "cpu",
    seed: int = 0,
    grad: bool = True,
) -> None:
    """Compare ``call(a, b, **kwargs)`` with the oracle on one case, gradients included where the case asks for them.

    Raises:
        AssertionError: naming what is wrong, by how much, and the bound.
    """
    inputs = case.make(dtype, where, seed)
    maths = {name: value for name, value in inputs.kwargs.items() if name not in _OPTIONS}
    want = product_oracle(inputs.a, inputs.b, **maths)
    with torch.no_grad():
        found = call(inputs.a, inputs.b, **inputs.kwargs)
    wanted = inputs.kwargs.get("output_dtype") or inputs.kwargs.get("out_dtype") or dtype
    if found.dtype is not wanted or not found.is_contiguous():
        raise AssertionError(f"{case.name}: {found.dtype}, strides {found.stride()}; wanted {wanted}, contiguous")
    working = torch.float32 if case.scaling or case.wide else dtype
    plain = product_oracle(inputs.a, inputs.b, **maths, dtype=working).to(wanted)
    assert_close(found, want, plain, what=f"{case.name}: out")
    if grad and case.grad and case.scaling is None:
        _check_gradients(call, case, inputs, maths, wanted)


def _check_gradients(
    call: Callable[..., Tensor], case: GemmCase, inputs: GemmInputs, maths: dict[str, Any], wanted: torch.dtype
) -> None:
    leaves = [leaf.detach().requires_grad_() for leaf in inputs.leaves()]
    named = dict(zip(("a", "b", "bias"), leaves, strict=False))

    def run(fn: Callable[..., Tensor], **more: Any) -> tuple[Tensor, ...]:
        kwargs = {**more, **({"bias": named["bias"]} if "bias" in named else {})}
        out = fn(named["a"], named["b"], **kwargs)
        return torch.autograd.grad(out, leaves, dout.to(out.dtype))

    g = torch.Generator().manual_seed(99)
    shape = call(inputs.a, inputs.b, **inputs.kwargs).shape
    dout = torch.randn(shape, generator=g).to(wanted).to(inputs.a.device)
    found = run(call, **inputs.kwargs)
    want = run(product_oracle, **maths)
    plain = run(product_oracle, **maths, dtype=inputs.a.dtype)
    for name, got, ref, rough in zip(named, found, want, plain, strict=True):
        if got.dtype is not named[name].dtype:
            raise AssertionError(f"{case.name}: the gradient of {name} is {got.dtype}")
        assert_grad_close(got, ref, rough, what=f"{case.name}: gradient of {name}")
