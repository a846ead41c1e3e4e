"""The backward pass of `gluon_hopper`: delta in Triton, then dK and dV, then dQ in Gluon.

The same bits on every run: no atomics, and the sum over a group of heads is in one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.gluon_layout import for_tma, like_meta
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads

#: Of q and of v. Two accumulators of 64 x 256 numbers do not fit into a warpgroup's registers.
BACKWARD_HEAD_DIM = 128
_PLANS = 64  # of one kind of call; training sees few sizes

_Run = Callable[..., AttentionGrads]


class GluonBackward:
    """Gradients of dense and packed calls, full or causal; launches are kept by sizes and strides."""

    def __init__(self, sm_count: int) -> None:
        self._sm_count = sm_count
        self._plans: dict[Any, _Run] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, out: Tensor, lse: Tensor, dout: Tensor,
        dlse: Tensor | None,
    ) -> AttentionGrads:  # fmt: skip
        """Return dq, dk and dv, contiguous. Arguments: those of `AttentionKernel.backward`."""
        packed = args.cu_seqlens_q
        key = (
            args.causal, q.device, q.shape, k.shape, v.shape[-1], q.stride(), k.stride(), v.stride(), dout.stride(),
            None if packed is None else (packed.shape, args.max_seqlen_q, args.max_seqlen_k),
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = _prepare(q, k, v, dout, args, self._sm_count)
        return plan(q, k, v, args, out, lse, dout, dlse)


def _prepare(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, args: AttentionArgs, sm_count: int) -> _Run:
    """Return what computes the gradients of calls with these sizes and strides."""
    from vllm_accel.kernels.gluon import backward_sm90_launch as launches
    from vllm_accel.kernels.gluon.bound import Bound
    from vllm_accel.kernels.triton.backward import start
    from vllm_accel.kernels.triton.backward_launch import row_delta_launch

    ready = tuple(for_tma(t) for t in (q, k, v, dout))
    # Described by tensors that take no memory.
    meta_q, meta_k, meta_v, meta_dout = (
        make(like_meta(t)) for make, t in zip(ready, (q, k, v, dout), strict=True)
    )  # fmt: skip
    described = (meta_q, meta_k, meta_v, meta_dout)
    lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32, device="meta")
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (q, k, v))
    variant = launches.variant_of(q.shape[-1], v.shape[-1], packed=args.cu_seqlens_q is not None)
    options: dict[str, Any] = {
        "cu_seqlens_q": args.cu_seqlens_q, "cu_seqlens_k": args.cu_seqlens_k, "max_seqlen_q": args.max_seqlen_q,
        "max_seqlen_k": args.max_seqlen_k, "softmax_scale": args.softmax_scale, "causal": args.causal,
        "variant": variant, "sm_count": sm_count,
    }  # fmt: skip
    index = q.device.index or 0
    for_keys = Bound(launches.dkv_launch(*described, lse, lse, dk, dv, **options), index)
    for_rows = Bound(launches.dq_launch(*described, lse, lse, dq, **options, after_dkv=True), index)

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        args: AttentionArgs,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
    ) -> AttentionGrads:
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        cu_q, cu_k = args.cu_seqlens_q, args.cu_seqlens_k
        if cu_q is not None and cu_k is not None:
            cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
        lse = lse.contiguous()
        delta = torch.empty_like(lse)
        rows = dout if dout.stride(-1) == 1 else dout.contiguous()
        start(row_delta_launch(out, rows, None if dlse is None else dlse.to(torch.float32).contiguous(), delta))
        read = [make(t) for make, t in zip(ready, (q, k, v, dout), strict=True)]
        for_keys(*read, lse, delta, dk, dv, cu_q, cu_k, args.softmax_scale)
        # Nothing may come between these two: `dq_launch`.
        for_rows(*read, lse, delta, dq, cu_q, cu_k, args.softmax_scale)
        return AttentionGrads(dq, dk, dv)

    return run
