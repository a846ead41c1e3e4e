"""The gradients of a product are products, by the same dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.gemm_spec import Form
from vllm_accel.dispatch.plan import Plan
from vllm_accel.errors import UnsupportedCallError
from vllm_accel.ops.gemm_arguments import GemmOptions

Multiply = Callable[[Form, Tensor, Tensor], Tensor]


def gradients(
    multiply: Multiply, form: Form, a: Tensor, b: Tensor, dout: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of a, b and bias, each None where `needs` says so.

    Args:
        multiply: runs a product of a form with the offsets of the forward. dout: gradient of the result.
    """
    bias_dout, dout = dout, dout.to(a.dtype)
    da = db = dbias = None
    if form is Form.GROUPED_M:
        if needs[0]:
            da = multiply(Form.GROUPED_M, dout, b.transpose(-1, -2))
        if needs[1]:
            db = multiply(Form.GROUPED_K, a.t(), dout)
        if needs[2]:  # a sum by group, without atomics: ones times dout
            ones = dout.new_ones(1, dout.shape[0])
            dbias = multiply(Form.GROUPED_K, ones, dout).squeeze(1).to(bias_dout.dtype)
    elif form is Form.GROUPED_K:
        if needs[0]:
            da = multiply(Form.GROUPED_M, b, dout.transpose(-1, -2)).t()
        if needs[1]:
            db = multiply(Form.GROUPED_M, a.t(), dout)
    else:
        if needs[0]:
            da = multiply(form, dout, b.transpose(-1, -2))
        if needs[1]:
            db = multiply(form, a.transpose(-1, -2), dout)
        if needs[2]:
            dbias = bias_dout.sum(-2)
    return da, db, dbias


class GemmFunction(torch.autograd.Function):
    """Run a plan's product; its backward asks for the backend of the forward first. Double backward raises."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, args: GemmArgs, options: GemmOptions
    ) -> Tensor:
        """Run the kernel."""
        out: Tensor = plan.forward(a, b, args)
        ctx.save_for_backward(a, b, args.offs)
        ctx.options, ctx.full = options, args.full
        ctx.backend = None if plan.backend == "empty" else plan.backend
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of a, b and bias."""
        from vllm_accel.ops.gemm_run import product

        a, b, offs = ctx.saved_tensors
        exact, invariant = ctx.options.deterministic, ctx.options.batch_invariant

        def multiply(form: Form, x: Tensor, y: Tensor) -> Tensor:
            grouped = form in (Form.GROUPED_M, Form.GROUPED_K)
            args = GemmArgs(offs if grouped else None, full=ctx.full)
            options = GemmOptions(form, deterministic=exact, batch_invariant=invariant)
            try:
                return product(x, y, args, options, ctx.backend, checked=True)
            except UnsupportedCallError:  # exact sizes that its guards refuse
                return product(x, y, args, options, None, checked=True)

        return (*gradients(multiply, ctx.options.form, a, b, dout, ctx.needs_input_grad[:3]), None, None, None)
