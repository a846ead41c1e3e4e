"""The cases that every attention backend is held against: small, each with the reason why it exists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Bias = Literal["full", "row", "keys", "heads", "column"]
Layout = Literal["contiguous", "packed_qkv", "heads_first", "inner_stride"]


@dataclass(frozen=True, slots=True)
class Case:
    """One attention call with its options.

    Attributes:
        name: unique. why: the rule or the public report that it guards.
        batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, head_dim_v: sizes of a dense call.
        lengths: (query, key) lengths of packed sequences; makes the call varlen.
        tail: rows past the last packed sequence, filled with NaN.
        shared_cu: pass one cu_seqlens tensor for queries and keys.
        options: plain keyword arguments. bias: shape of attn_bias, by what varies. bool_bias: make it a mask.
        alibi: "heads" or "batch". sinks: give one logit per head. descale: give q, k and v factors.
        grad: also check gradients. lse_grad: through the log-sum-exp too. layout: memory layout of q, k, v.
        scale_inputs: factor on q, for large logits.
    """

    name: str
    why: str
    batch: int = 2
    seqlen_q: int = 40
    seqlen_k: int = 40
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    head_dim_v: int = 64
    lengths: tuple[tuple[int, int], ...] | None = None
    tail: int = 0
    shared_cu: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    bias: Bias | None = None
    bool_bias: bool = False
    bias_grad: bool = False
    alibi: Literal["heads", "batch"] | None = None
    sinks: bool = False
    descale: bool = False
    grad: bool = True
    lse_grad: bool = False
    layout: Layout = "contiguous"
    scale_inputs: float = 1.0

    @property
    def varlen(self) -> bool:
        """Tell whether the case is a packed call."""
        return self.lengths is not None

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Draw the tensors of the case; the same numbers on every device."""
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=g).to(to).to(device)

        if self.lengths is None:
            lead_q: tuple[int, ...] = (self.batch, self.seqlen_q)
            lead_k: tuple[int, ...] = (self.batch, self.seqlen_k)
        else:
            lead_q = (sum(q for q, _ in self.lengths) + self.tail,)
            lead_k = (sum(k for _, k in self.lengths) + self.tail,)
        q = draw(*lead_q, self.num_heads, self.head_dim) * self.scale_inputs
        k = draw(*lead_k, self.num_kv_heads, self.head_dim)
        v = draw(*lead_k, self.num_kv_heads, self.head_dim_v)
        if self.tail:
            for t in (q, k, v):
                t[-self.tail :] = float("nan")
        q, k, v = (_laid_out(t, self.layout) for t in (q, k, v))
        options: dict[str, Any] = dict(self.options)
        if self.lengths is not None:
            options |= _lengths(self.lengths, self.shared_cu, device)
        batch = self.batch if self.lengths is None else len(self.lengths)
        if self.alibi:
            shape = (self.num_heads,) if self.alibi == "heads" else (batch, self.num_heads)
            options["alibi_slopes"] = draw(*shape, to=torch.float32).abs() * 0.3
        if self.bias:
            options["attn_bias"] = self._bias(draw, dtype)
        if self.sinks:
            options["sinks"] = draw(self.num_heads, to=torch.float32)
        if self.descale:
            forms = {"q_descale": (), "k_descale": (self.num_kv_heads,), "v_descale": (batch, self.num_kv_heads)}
            options |= {name: draw(*form, to=torch.float32).abs() + 0.5 for name, form in forms.items()}
        return Inputs(q, k, v, options, self)

    def _bias(self, draw: Any, dtype: torch.dtype) -> Tensor:
        full = (self.batch, self.num_heads, self.seqlen_q, self.seqlen_k)
        keep = {
            "full": (1, 1, 1, 1),
            "row": (0, 0, 1, 1),
            "keys": (1, 0, 0, 1),
            "heads": (0, 1, 1, 1),
            "column": (1, 1, 1, 0),
        }
        shape = [n if kept else 1 for n, kept in zip(full, keep[self.bias or "full"], strict=True)]
        bias: Tensor = draw(*shape, to=torch.float32 if self.bool_bias else dtype)
        return bias > -0.7 if self.bool_bias else bias


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors and options of one drawn case."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    case: Case

    def leaves(self) -> list[Tensor]:
        """Return q, k, v and the other differentiable inputs that the case asks gradients of."""
        named = [self.q, self.k, self.v]
        if self.case.bias_grad:
            named.append(self.options["attn_bias"])
        if self.case.sinks:
            named.append(self.options["sinks"])
        return named


def _laid_out(t: Tensor, layout: Layout) -> Tensor:
    """Return the same values with other strides."""
    if layout == "heads_first":  # (.., H, S, D) in memory, as model code that transposes leaves it
        return t.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "inner_stride":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "packed_qkv":  # a slice of one wider tensor
        wide = torch.full((*t.shape[:-2], 3, *t.shape[-2:]), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., 1, :, :] = t
        return wide[..., 1, :, :]
    return t


def _lengths(lengths: tuple[tuple[int, int], ...], shared: bool, device: torch.device | str) -> dict[str, Any]:
    q, k = ([0], [0])
    for lq, lk in lengths:
        q.append(q[-1] + lq)
        k.append(k[-1] + lk)
    cu_q = torch.tensor(q, dtype=torch.int32, device=device)
    cu_k = cu_q if shared else torch.tensor(k, dtype=torch.int32, device=device)
    return {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": max(lq for lq, _ in lengths),
        "max_seqlen_k": max(lk for _, lk in lengths),
    }


_MIXED = ((17, 17), (1, 1), (33, 33), (8, 8))
_CROSS = ((5, 19), (1, 33), (0, 7), (12, 12), (3, 0), (9, 4))
_TRAIN = {"grad": True, "lse_grad": True}

CASES: tuple[Case, ...] = (
    Case("plain", "SPEC 3 order", lse_grad=True),
    Case("causal", "SPEC 3 causal", options={"causal": True}, lse_grad=True),
    Case("causal_shorter", "bottom-right for Sq < Sk; torch is top-left (pytorch#108108)", seqlen_q=13, seqlen_k=45, options={"causal": True}),
    Case("causal_longer", "rows without keys for Sq > Sk (pytorch#103963)", seqlen_q=45, seqlen_k=13, options={"causal": True}, lse_grad=True),
    Case("decode", "one query per sequence", seqlen_q=1, seqlen_k=77, options={"causal": True}, num_heads=8, num_kv_heads=2),
    Case("gqa", "heads share keys", num_heads=8, num_kv_heads=2, options={"causal": True}, lse_grad=True),
    Case("mqa", "one key head", num_heads=6, num_kv_heads=1),
    Case("window", "both sides inclusive", options={"window_size": (7, 3)}),
    Case("window_left", "left only, and Sq < Sk", seqlen_q=20, seqlen_k=50, options={"window_size": (9, -1)}),
    Case("window_right", "right only: FlashAttention 4 takes -1 as a bound", options={"window_size": (-1, 4)}),
    Case("window_zero", "the diagonal alone (dq is 0 by cancellation alone: nothing to compare)", options={"window_size": (0, 0)}, grad=False),
    Case("window_causal", "both apply: a sliding window", seqlen_q=30, seqlen_k=70, num_heads=4, num_kv_heads=2, options={"window_size": (15, -1), "causal": True}),
    Case("window_causal_right", "causal wins over a wider right side", options={"window_size": (15, 5), "causal": True}),
    Case("window_empty_rows", "a window that ends before the first key", seqlen_q=50, seqlen_k=20, options={"window_size": (3, 3)}, lse_grad=True),
    Case("scale", "a caller's scale", options={"softmax_scale": 0.31}),
    Case("softcap", "Gemma 2", options={"softcap": 3.0, "causal": True}, lse_grad=True),
    Case("softcap_large", "saturates, never NaN (vllm#56579)", options={"softcap": 1.5}, scale_inputs=40.0, grad=False),
    Case("large_logits", "no overflow", scale_inputs=20.0, options={"causal": True}, grad=False),
    Case("alibi", "slopes per head", alibi="heads", lse_grad=True),
    Case("alibi_causal", "FlashAttention 2 shifts the lse here", seqlen_q=20, seqlen_k=37, alibi="heads", options={"causal": True}, lse_grad=True),
    Case("alibi_batch", "slopes per batch and head, with a window", alibi="batch", options={"window_size": (8, 2)}),
    Case("bias_full", "a bias of full shape", bias="full"),
    Case("bias_grad", "with its gradient", bias="full", bias_grad=True),
    Case("bias_heads", "broadcast over the batch, gradient summed", bias="heads", bias_grad=True),
    Case("bias_row", "broadcast over batch and heads, with causal", bias="row", bias_grad=True, options={"causal": True}),
    Case("bias_keys", "one value per key", bias="keys", seqlen_k=37),
    Case("bias_column", "broadcast over keys", bias="column", bias_grad=True, seqlen_q=11),
    Case("mask_keys", "a padding mask (B, 1, 1, Sk)", bias="keys", bool_bias=True),
    Case("mask_full", "a boolean mask, GQA, causal", bias="full", bool_bias=True, num_heads=4, num_kv_heads=2, options={"causal": True}),
    Case("sinks", "one more logit per head", sinks=True, lse_grad=True),
    Case("sinks_window", "gpt-oss", sinks=True, num_heads=8, num_kv_heads=2, options={"causal": True, "window_size": (11, -1)}),
    Case("sinks_empty", "sinks of rows without keys", sinks=True, seqlen_q=30, seqlen_k=12, options={"causal": True}, lse_grad=True),
    Case("value_dim", "Dv below D (MLA prefill)", head_dim=48, head_dim_v=32, options={"causal": True}, lse_grad=True),
    Case("value_dim_larger", "Dv above D", head_dim=32, head_dim_v=64),
    Case("head_40", "not a multiple of 16", head_dim=40, head_dim_v=40, options={"causal": True}),
    Case("head_33", "odd: padded by the adapter, the scale is the caller's", head_dim=33, head_dim_v=33, lse_grad=True),
    Case("head_128", "", head_dim=128, head_dim_v=128, options={"causal": True}),
    Case("head_256", "", head_dim=256, head_dim_v=256, seqlen_q=24, seqlen_k=24),
    Case("head_320", "beyond every kernel but ours", head_dim=320, head_dim_v=320, seqlen_q=12, seqlen_k=12),
    Case("tiny", "one token, one head", batch=1, seqlen_q=1, seqlen_k=1, num_heads=1, num_kv_heads=1, head_dim=16, head_dim_v=16),
    Case("long", "several key blocks and a ragged end", batch=1, seqlen_q=257, seqlen_k=391, num_heads=2, num_kv_heads=1, options={"causal": True}),
    Case("packed_qkv", "slices of one tensor", layout="packed_qkv", options={"causal": True}),
    Case("heads_first", "transposed views", layout="heads_first", seqlen_q=23),
    Case("inner_stride", "innermost stride not 1 (silently wrong in aten's CPU operator)", layout="inner_stride"),
    Case("deterministic", "same bits", options={"deterministic": True, "causal": True}, num_heads=4, num_kv_heads=2),
    Case("batch_invariant", "bits of one sequence", options={"batch_invariant": True, "causal": True}, num_heads=4, num_kv_heads=2),
    Case("descale", "factors for q, k, v", descale=True, num_heads=4, num_kv_heads=2),
    Case("everything", "all options that combine", seqlen_q=21, seqlen_k=34, num_heads=4, num_kv_heads=2, head_dim=40, head_dim_v=24, bias="heads", bias_grad=True, alibi="batch", sinks=True, options={"causal": True, "window_size": (12, 2), "softcap": 4.0, "softmax_scale": 0.2}, lse_grad=True),
    Case("varlen", "packed sequences", lengths=_MIXED, shared_cu=True, lse_grad=True),
    Case("varlen_causal", "", lengths=_MIXED, shared_cu=True, options={"causal": True}, num_heads=4, num_kv_heads=2, lse_grad=True),
    Case("varlen_cross", "lengths differ, some are 0", lengths=_CROSS, lse_grad=True),
    Case("varlen_cross_causal", "bottom-right per sequence", lengths=_CROSS, options={"causal": True}, num_heads=4, num_kv_heads=2, lse_grad=True),
    Case("varlen_tail", "NaN past the last sequence stays outside", lengths=_MIXED, tail=5, shared_cu=True, options={"causal": True}, lse_grad=True),
    Case("varlen_tail_sinks", "no sink where there is no row", lengths=_MIXED, tail=5, sinks=True, options={"causal": True}, lse_grad=True),
    Case("varlen_window", "", lengths=_CROSS, options={"window_size": (6, 2)}),
    Case("varlen_window_causal", "", lengths=_MIXED, options={"window_size": (6, -1), "causal": True}),
    Case("varlen_softcap", "", lengths=_MIXED, options={"softcap": 2.5}),
    Case("varlen_alibi", "", lengths=_CROSS, alibi="batch", options={"causal": True}, lse_grad=True),
    Case("varlen_sinks", "", lengths=_CROSS, sinks=True, options={"causal": True}, lse_grad=True),
    Case("varlen_value_dim", "", lengths=_MIXED, head_dim=48, head_dim_v=32, options={"causal": True}, lse_grad=True),
    Case("varlen_decode", "one query each", lengths=((1, 40), (1, 3), (1, 129)), num_heads=8, num_kv_heads=2, options={"causal": True}),
    Case("varlen_packed", "slices of one packed tensor", lengths=_MIXED, layout="packed_qkv", shared_cu=True),
    Case("varlen_invariant", "bits of one sequence", lengths=_CROSS, options={"batch_invariant": True, "causal": True}),
)  # fmt: skip
