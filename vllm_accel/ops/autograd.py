"""The one autograd function behind every attention backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.plan import Plan

_TENSOR_FIELDS = 8  # the first fields of AttentionArgs are the optional tensors


class AttentionFunction(torch.autograd.Function):
    """Run a plan's kernel forward, and the same kernel's backward later.

    Inputs: q, k, v, attn_bias, sinks (differentiable, the last two may be None), plan, args, whether lse is wanted.
    Outputs: out, lse. Double backward raises (the kernels have none).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_bias: Tensor | None,
        sinks: Tensor | None,
        plan: Plan,
        args: AttentionArgs,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        """Run the kernel and keep what its backward needs."""
        out, lse, rng = plan.forward(q, k, v, args)
        ctx.set_materialize_grads(False)
        if not return_lse:
            ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, rng, *args[:_TENSOR_FIELDS])
        ctx.kernel, ctx.values, ctx.device = plan.kernel, args[_TENSOR_FIELDS:], q.device
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the same backend's backward."""
        q, k, v, out, lse, rng, *tensors = ctx.saved_tensors
        args = AttentionArgs(*tensors, *ctx.values)
        if dout is None:
            dout = torch.zeros_like(out)
        if ctx.device.type == "cuda":  # autograd's threads set the device; kernels that are not torch's rely on it
            with torch.cuda.device(ctx.device):
                grads = ctx.kernel.backward(q, k, v, args, out, lse, rng, dout, dlse)
        else:
            grads = ctx.kernel.backward(q, k, v, args, out, lse, rng, dout, dlse)
        return (*grads, None, None, None)
