"""The answer where there is nothing to compute: no batch, no queries or no keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads, PagedArgs


class EmptyKernel:
    """Zeros, and the log-sum-exp of no keys: -inf, or the sink."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return zeros of q's shape with Dv, and the log-sum-exp."""
        dtype = q.dtype if q.dtype.itemsize > 1 else torch.bfloat16  # FP8 queries give bf16
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
        *batch, tokens, heads, _ = q.shape
        lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        lse = q.new_full((*batch, heads, tokens), -math.inf, dtype=lse_dtype)
        if args.sinks is not None:
            lse.copy_(args.sinks.unsqueeze(-1).expand_as(lse))
        return out, lse, None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        args: AttentionArgs,
        out: Tensor,
        lse: Tensor,
        rng: Tensor | None,
        dout: Tensor,
        dlse: Tensor | None,
    ) -> AttentionGrads:
        """Return zeros; only the sinks can have moved the log-sum-exp."""
        bias, sinks = args.attn_bias, args.sinks
        dsinks = None
        if sinks is not None:
            heads_first = lse.new_zeros(lse.shape) if dlse is None else dlse
            dsinks = heads_first.movedim(-2, 0).flatten(1).sum(1).to(sinks.dtype)
        dbias = bias.new_zeros(bias.shape) if bias is not None and bias.is_floating_point() else None
        return AttentionGrads(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dbias, dsinks)


class EmptyPagedKernel:
    """The same for a paged call: rows of a sequence have the log-sum-exp of no keys, rows of none -inf."""

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor]:
        """Return zeros and the log-sum-exp."""
        out, found, _ = EMPTY.forward(q, k_cache, v_cache, _NO_ARGS)
        assert found is not None
        if args.sinks is None:
            return out, found
        inside = torch.arange(q.shape[0], device=q.device) < args.cu_seqlens_q[-1]
        return out, torch.where(inside, args.sinks.to(found.dtype).unsqueeze(-1), found)


EMPTY = EmptyKernel()
EMPTY_PAGED = EmptyPagedKernel()
_NO_ARGS = AttentionArgs(*(None,) * 8, 0, 0, 1.0, False, (-1, -1), 0.0, 0.0, True, False, False)
