"""cuDNN's attention: ``aten::_scaled_dot_product_cudnn_attention`` and its backward, called directly.

Conventions, read in pytorch's aten/src/ATen/native/cudnn/MHA.cpp and transformers/cuda/sdp_utils.cpp: (B, H, S, D) with
the output in the layout of the query; causal is aligned top-left; fewer key heads than query heads are native; natural
log-sum-exp, (B, H, Sq, 1) since torch 2.9; sizes up to 128 in multiples of 8 everywhere (more on some chips with some
versions); no key length of 1. A graph is built for every exact shape (about 30 ms).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends import aten
from vllm_accel.backends.convert import (
    fold_sinks,
    pad_heads,
    round_up,
    sinks_grad,
    with_dlse_column,
)
from vllm_accel.backends.cutlass_layout import rows_hidden_by_bias
from vllm_accel.backends.flash_attn_rules import GRID_BATCH, GRID_HEADS
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads, TorchBackend
from vllm_accel.dispatch.capability import Capability, Guard, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation
from vllm_accel.errors import Reason

_MAX_HEAD_DIM = 128
_STEP = 8


def _causal_square(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.CAUSAL not in spec.features or spec.relation is Relation.EQUAL or spec.seqlen_q == 1:
        return None
    return f"aligns causal top-left: equal lengths or one query only; this call has {spec.relation.value}"


def _mask_backward(spec: AttentionSpec, device: Device) -> str | None:
    both = Feature.MASK | Feature.GRAD
    # pytorch#196678: NaN in dQ where the log-sum-exp is very negative.
    return "takes attn_bias without gradients only" if both & spec.features == both else None


def _dlse_column(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.LSE_GRAD in spec.features and spec.head_dim_v >= _MAX_HEAD_DIM:
        return (
            "a gradient through the log-sum-exp travels in a spare column of v: value head sizes up to "
            f"{_MAX_HEAD_DIM - 1}; this call has {spec.head_dim_v}"
        )
    return None


def _mask_shape(spec: AttentionSpec, sizes: Any) -> str | None:
    shape = sizes.bias_shape
    if shape and shape[2:] != (sizes.seqlen_q, sizes.seqlen_k):
        return f"takes an attn_bias of all queries and keys; this one is {tuple(shape)}"
    return None


def _one_key(spec: AttentionSpec, sizes: Any) -> str | None:
    return "does not take a key length of 1" if sizes.seqlen_k == 1 else None


def _one_query_backward(spec: AttentionSpec, sizes: Any) -> str | None:
    if sizes.seqlen_q == 1 and Feature.GRAD in spec.features:
        return "gives NaN gradients for one query and a very negative log-sum-exp (NVIDIA/cudnn-frontend#1072)"
    return None


def _multiple_of_128(spec: AttentionSpec, sizes: Any) -> str | None:
    version = cudnn_version()
    if version is None or version > 91500 or not (sizes.seqlen_q % 128 or sizes.seqlen_k % 128):
        return None
    return f"cuDNN up to 9.15.0 is wrong for lengths that are no multiple of 128 (pytorch#169849); {version} is loaded"


def cudnn_version() -> int | None:
    """Return the version of the loaded cuDNN, 91500 style, None where torch has none."""
    return torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None


class SdpaCudnnBackend(TorchBackend):
    """The backend `sdpa_cudnn`."""

    name = "sdpa_cudnn"
    capability = Capability(
        platforms=frozenset({"cuda"}),
        compute_capabilities=frozenset({(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        # No BIAS: an fp32 bias would have to be rounded to q's dtype. No DETERMINISTIC: sdp_utils.cpp refuses it too.
        features=Feature.GRAD
        | Feature.LSE
        | Feature.LSE_GRAD
        | Feature.CAUSAL
        | Feature.SCALE
        | Feature.MASK
        | Feature.SINKS
        | Feature.SINKS_GRAD
        | Feature.GQA
        | Feature.VALUE_DIM,
        max_head_dim=_MAX_HEAD_DIM,
        per_shape_cost=True,
        rules=(
            Rule("causal", _causal_square),
            Rule("mask_backward", _mask_backward),
            Rule("dlse_column", _dlse_column),
            GRID_HEADS,
        ),
        guards=(
            GRID_BATCH,
            Guard("mask_shape", _mask_shape),
            Guard("one_key", _one_key),
            Guard("one_query_backward", _one_query_backward),
            Guard("multiple_of_128", _multiple_of_128),
        ),
    )

    def unavailable_reason(self) -> Reason | None:
        """Say that this build of torch has no cuDNN."""
        return aten.not_built("cuDNN", torch.backends.cudnn.is_available)

    def bind(self, spec: AttentionSpec, device: Device) -> SdpaCudnnKernel:
        """Return the kernel over aten's operators."""
        return SdpaCudnnKernel(causal=Feature.CAUSAL in spec.features and spec.relation is Relation.EQUAL)


class SdpaCudnnKernel:
    """Dense attention; the (B, H, S, D) that the operators want is a view."""

    def __init__(self, causal: bool) -> None:
        # One query at the end of the keys sees all of them: bottom-right has nothing to mask there, top-left would.
        self._causal = causal
        self._forward = aten.operator("_scaled_dot_product_cudnn_attention")
        self._backward = aten.operator("_scaled_dot_product_cudnn_attention_backward")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return out and lse (None unless needed)."""
        head_dim_v, need_lse = v.shape[-1], args.need_lse or args.sinks is not None
        bias = None if args.attn_bias is None else _additive(args.attn_bias, q.dtype)
        out, lse, *_ = self._forward(
            query=_heads_first(q),
            key=_heads_first(k),
            value=_heads_first(v),
            attn_bias=bias,
            compute_log_sumexp=need_lse,
            dropout_p=0.0,
            is_causal=self._causal,
            return_debug_mask=False,
            scale=args.softmax_scale,
        )
        out = out.transpose(1, 2)
        if out.shape[-1] != head_dim_v:
            out = out[..., :head_dim_v]
        if args.attn_bias is not None:  # what a row without keys holds is documented nowhere
            hidden = rows_hidden_by_bias(args.attn_bias, args, q.shape[1], k.shape[1])
            out = out.masked_fill(hidden.transpose(1, 2).unsqueeze(-1), 0.0)
        if not need_lse:
            return out.contiguous(), None, None
        lse = lse.squeeze(-1) if lse.dim() == 4 else lse
        if args.attn_bias is not None:
            lse = lse.masked_fill(hidden, -math.inf)
        out, lse = fold_sinks(out, lse, args.sinks)
        return out.contiguous(), lse.contiguous(), None

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
        dsinks = sinks_grad(args.sinks, out, lse, dout, dlse)
        head_dim, head_dim_v = q.shape[-1], v.shape[-1]
        v, out, dout = with_dlse_column(v, out, dout, dlse, round_up(head_dim_v + (dlse is not None), _STEP))
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # seed and offset are not read without dropout
        dq, dk, dv = self._backward(
            grad_out=_heads_first(dout),
            query=_heads_first(q),
            key=_heads_first(k),
            value=_heads_first(v),
            out=_heads_first(out),
            logsumexp=lse.contiguous() if stats_rank() == 3 else lse.contiguous().unsqueeze(-1),
            philox_seed=unused,
            philox_offset=unused,
            attn_bias=None,
            cum_seq_q=None,
            cum_seq_k=None,
            max_q=q.shape[1],
            max_k=k.shape[1],
            dropout_p=0.0,
            is_causal=self._causal,
            scale=args.softmax_scale,
        )
        dq, dk, dv = (t.transpose(1, 2) for t in (dq, dk, dv))
        return AttentionGrads(dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim_v], None, dsinks)


def _heads_first(tensor: Tensor) -> Tensor:
    """(B, S, H, D) -> a (B, H, S, D) view, of aligned rows whose head size is a multiple of 8."""
    missing = -tensor.shape[-1] % _STEP
    return aten.ready(pad_heads(tensor, tensor.shape[-1] + missing) if missing else tensor).transpose(1, 2)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask as 0 and -inf, with its own broadcast dimensions (aten expands the batch)."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def stats_rank() -> int:
    """Return the dimensions of the operators' log-sum-exp: (B, H, Sq, 1) since torch 2.9 (FlagGems#6051)."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return 4 if (major, minor) >= (2, 9) else 3


BACKEND = SdpaCudnnBackend()
