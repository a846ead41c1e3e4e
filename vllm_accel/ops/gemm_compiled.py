"""`torch.compile` and `torch.export` of matrix products: one registered operator, whose backward calls itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.gemm_spec import Form, Scaling
from vllm_accel.ops.gemm_arguments import GemmOptions
from vllm_accel.ops.gemm_autograd import gradients
from vllm_accel.ops.gemm_run import needs_grad, run_traced

_library = torch.library.Library("vllm_accel", "FRAGMENT")
_library.define(
    "gemm(Tensor a, Tensor b, Tensor? offs, Tensor? bias, Tensor? scale_a, Tensor? scale_b, bool full, str form, "
    "str scaling_a, str scaling_b, ScalarType? out_dtype, bool deterministic, bool batch_invariant, bool grad, "
    "str backend) -> Tensor"
)


def product(a: Tensor, b: Tensor, args: GemmArgs, options: GemmOptions, backend: str | Sequence[str] | None) -> Tensor:
    """Call the operator; this is what Dynamo traces."""
    form, scaling_a, scaling_b, out_dtype, deterministic, batch_invariant = options
    if scaling_a is Scaling.NONE and torch.is_autocast_enabled(a.device.type):
        dtype = torch.get_autocast_dtype(a.device.type)
        a, b = a.to(dtype), b.to(dtype)
        if args.bias is not None:
            args = args._replace(bias=args.bias.to(out_dtype or dtype))
    grad = needs_grad(a, b, args.bias)
    names = backend if isinstance(backend, str) else ",".join(backend or ())
    out: Tensor = torch.ops.vllm_accel.gemm(
        a, b, *args, form.name, scaling_a.name, scaling_b.name, out_dtype, deterministic, batch_invariant, grad, names
    )
    return out


def _forward(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    *tensors, full, form, scaling_a, scaling_b, out_dtype, exact, invariant, grad, names = rest
    options = GemmOptions(Form[form], Scaling[scaling_a], Scaling[scaling_b], out_dtype, exact, invariant)
    backend = tuple(names.split(",")) if names else None
    offs, bias, scale_a, scale_b = tensors
    return run_traced(a, b, GemmArgs(offs, bias, scale_a, scale_b, full), options, backend, grad)


def _fake(a: Tensor, b: Tensor, offs: Tensor | None, *rest: Any) -> Tensor:
    form, out_dtype = Form[rest[4]], rest[7]
    lead: list[Any] = []
    if form is Form.BATCHED:
        lead = [b.shape[0]]
    elif form is Form.GROUPED_K:
        assert offs is not None
        lead = [offs.shape[0]]
    return a.new_empty((*lead, a.shape[-2], b.shape[-1]), dtype=out_dtype or a.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, offs, bias, _, _, *ctx.values = inputs
    ctx.save_for_backward(a, b, offs)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    a, b, offs = ctx.saved_tensors
    full, form, _, _, _, exact, invariant, _, names = ctx.values

    def multiply(kind: Form, x: Tensor, y: Tensor) -> Tensor:
        grouped = kind in (Form.GROUPED_M, Form.GROUPED_K)
        found: Tensor = torch.ops.vllm_accel.gemm(
            x, y, offs if grouped else None, None, None, None, full, kind.name, "NONE", "NONE", None, exact, invariant,
            False, names,
        )  # fmt: skip
        return found

    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[3])
    da, db, dbias = gradients(multiply, Form[form], a, b, dout, needs)
    return (da, db, None, dbias, *(None,) * 11)


_library.impl("gemm", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_accel::gemm", _fake, lib=_library)
torch.library.register_autograd("vllm_accel::gemm", _backward, setup_context=_setup_context, lib=_library)
