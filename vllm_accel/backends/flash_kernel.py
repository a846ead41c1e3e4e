"""Attention over the FlashAttention 2 kernels that PyTorch carries, whichever library launches them.

`sdpa_flash` calls aten's operators, `xformers` and `mslk` their own functions; the kernels, and so the conversions, are
the same, and most of them those of `flash_attn_2`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from torch import Tensor

from vllm_accel.backends.aten import ready
from vllm_accel.backends.convert import (
    clear_past_end,
    empty_rows_to_minus_inf,
    fold_sinks,
    minus_inf_to_empty_rows,
    pad_heads,
    sinks_grad,
    with_dlse_column,
)
from vllm_accel.backends.flash_attn_2 import AsPacked, longest_k, open_right_is_cut
from vllm_accel.backends.flash_attn_rules import one_head_dim
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads


class FlashCall(NamedTuple):
    """One launch, in the kernels' terms: windows count keys on each side of the bottom-right diagonal, -1 is no limit.

    cu_seqlens are given for packed tensors (T, H, D), None for (B, S, H, D).
    """

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    window_left: int
    window_right: int
    softmax_scale: float
    dropout_p: float
    need_lse: bool


class FlashLaunch(Protocol):
    """A library's way to the kernels. q, k, v have one head size, a multiple of 8, and aligned rows."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: FlashCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return out, lse (B, H, Sq) or (H, Tq) with +inf in rows without keys, and an int64 (2,) with dropout."""
        ...

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor | None, dout: Tensor,
        call: FlashCall,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return dq, dk, dv, given lse as `forward` returned it."""
        ...


class FlashKernel:
    """Dense and packed attention.

    `small_memory` says that the chip has too little shared memory for the backward of head sizes 193 to 224.
    """

    def __init__(self, launch: FlashLaunch, small_memory: bool) -> None:
        self._launch = launch
        self._small_memory = small_memory

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return out, lse (None unless needed) and the state of the random generator."""
        if args.cu_seqlens_q is None and open_right_is_cut(args):
            packed = AsPacked(q, k, args)
            out, lse, rng = self._forward(packed.rows(q), packed.rows(k), packed.rows(v), packed.args)
            return packed.dense(out), packed.dense_lse(lse), rng
        return self._forward(q, k, v, args)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        head_dim_v = v.shape[-1]
        size = one_head_dim(q.shape[-1], head_dim_v)
        q, k, v = (ready(pad_heads(t, size)) for t in (q, k, v))
        out, lse, rng = self._launch.forward(q, k, v, _call(q, k, args))
        # The kernels write no row past the last sequence, and allocate out with the strides of q.
        out = clear_past_end(out[..., :head_dim_v], args.cu_seqlens_q).contiguous()
        if lse is None:
            return out, None, rng
        lse = clear_past_end(empty_rows_to_minus_inf(lse), args.cu_seqlens_q, -math.inf, dim=-1)
        if args.sinks is not None:
            out, lse = fold_sinks(out, lse, args.sinks)
            lse = clear_past_end(lse, args.cu_seqlens_q, -math.inf, dim=-1)  # no sink for rows of no sequence
        return out, lse.contiguous(), rng

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
        """Return the gradients."""
        if args.cu_seqlens_q is None and open_right_is_cut(args):
            packed = AsPacked(q, k, args)
            q, k, v, out, dout = (packed.rows(t) for t in (q, k, v, out, dout))
            lse, dlse = packed.rows_of_lse(lse), None if dlse is None else packed.rows_of_lse(dlse)
            grads = self._backward(q, k, v, packed.args, out, lse, rng, dout, dlse)
            dq, dk, dv = (packed.dense(grad) for grad in grads[:3])
            return AttentionGrads(dq, dk, dv, None, grads.dsinks)
        return self._backward(q, k, v, args, out, lse, rng, dout, dlse)

    def _backward(
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
        lse = minus_inf_to_empty_rows(lse)
        dsinks = sinks_grad(args.sinks, out, lse, dout, dlse)
        head_dim, head_dim_v = q.shape[-1], v.shape[-1]
        size = one_head_dim(head_dim, head_dim_v, dlse is not None)
        if self._small_memory and 192 < size <= 224:
            size = (
                232  # the kernel for 256 has a form for small shared memory, the one for 224 has none (sdp_utils.cpp)
            )
        v, out, dout = with_dlse_column(v, out, dout, dlse, size)
        q, k, v, out, dout = (ready(pad_heads(t, size)) for t in (q, k, v, out, dout))
        dq, dk, dv = self._launch.backward(q, k, v, out, lse.contiguous(), rng, dout, _call(q, k, args))
        dq = clear_past_end(dq, args.cu_seqlens_q)
        dk, dv = clear_past_end(dk, args.cu_seqlens_k), clear_past_end(dv, args.cu_seqlens_k)
        return AttentionGrads(dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim_v], None, dsinks)


def _call(q: Tensor, k: Tensor, args: AttentionArgs) -> FlashCall:
    cu_q, cu_k = args.cu_seqlens_q, args.cu_seqlens_k
    longest = args.max_seqlen_q
    if cu_q is not None and longest == 1 and q.shape[-2] != k.shape[-2]:
        # With 1 and grouped heads mha_varlen_fwd takes row b for sequence b and never reads cu_seqlens_q, which is
        # wrong as soon as one sequence is empty.
        longest = 2
    left, right = args.window_size
    return FlashCall(
        cu_seqlens_q=None if cu_q is None else cu_q.contiguous(),
        cu_seqlens_k=None if cu_k is None else cu_k.contiguous(),
        max_seqlen_q=longest,
        max_seqlen_k=longest_k(args),
        causal=args.causal,
        window_left=left,
        # The causal flag does it; a right side of 0 besides would keep one query from its fast path over heads.
        window_right=-1 if args.causal else right,
        softmax_scale=args.softmax_scale,
        dropout_p=args.dropout_p,
        need_lse=args.need_lse or args.sinks is not None,
    )
