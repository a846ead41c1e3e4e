"""Attention over PyTorch's CUTLASS kernel, whichever library launches it (`sdpa_efficient`, `xformers`, `mslk`)."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_accel.backends.aten import ready
from vllm_accel.backends.convert import (
    clear_past_end,
    fold_sinks,
    pad_heads,
    round_up,
    sinks_grad,
    window,
    with_dlse_column,
)
from vllm_accel.backends.cutlass_layout import (
    Packed,
    aligned_bias,
    expand_heads,
    pad_lse,
    rows_hidden_by_bias,
    sum_groups,
)
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation


class Call(NamedTuple):
    """One launch, in the kernel's terms.

    bias: additive, (B, H, Sq, Sk), aligned. packed: the sequences of a packed call. causal: aligned bottom-right.
    square: every sequence has as many queries as keys, so that top-left is bottom-right. window: keys that a query
    sees, the one on the diagonal included, 0 for all. reproducible: no sum may depend on the order of blocks.
    """

    bias: Tensor | None
    packed: Packed | None
    causal: bool
    square: bool
    window: int
    softmax_scale: float
    dropout_p: float
    need_lse: bool
    reproducible: bool


Grads = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Launch(Protocol):
    """A library's way to the kernel. q, k, v are (B, S, H, D) with equal heads and aligned rows; packed: B = 1."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return out, the kernel's own lse (anything unless `need_lse`), and what reproduces the dropout mask."""
        ...

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor | None, dout: Tensor, call: Call,
        bias_grad: bool,
    ) -> Grads:  # fmt: skip
        """Return dq, dk, dv and, if asked for, the gradient of the bias; lse as `pad_lse` and `Packed` give it."""
        ...


class CutlassKernel:
    """Dense and packed attention; bound to a spec for what a call's tensors do not say."""

    def __init__(self, launch: Launch, spec: AttentionSpec) -> None:
        self._launch = launch
        self._bias_grad = Feature.BIAS_GRAD in spec.features
        self._equal_lengths = spec.relation is Relation.EQUAL

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return out, lse (None unless needed) and the state of the random generator."""
        out, lse, rng = self._attend(q, k, v, args)
        if lse is not None:
            out, lse = fold_sinks(out, lse, args.sinks)
            if args.sinks is not None:
                lse = clear_past_end(lse, args.cu_seqlens_q, -math.inf, dim=-1)  # no sink for rows of no sequence
        return out, lse, rng

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
        dq, dk, dv, dbias = self._gradients(q, k, v, args, out, lse, rng, dout, dlse)
        return AttentionGrads(dq, dk, dv, dbias, dsinks)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if skip := _first_seeing_row(args):
            rest, lse, rng = self._attend(q[:, skip:], k, v, _without_first(args, skip))
            out = rest.new_zeros((*q.shape[:-1], rest.shape[-1]))
            out[:, skip:] = rest
            return out, None if lse is None else F.pad(lse, (skip, 0), value=-math.inf), rng
        dtype, head_dim_v = q.dtype, v.shape[-1]
        q, k, v = _widened(args, q, k, v)
        call = self._call(q, k, args)
        out, lse, rng = self._launch.forward(*self._inputs(q, k, v, call), call)
        out = out[..., :head_dim_v].to(dtype)
        if call.packed is None:
            lse = lse[..., : out.shape[1]]
        else:
            out = out[0]
            lse = call.packed.lse_by_token(lse) if call.need_lse else lse
        out, lse = self._clear_hidden(out, lse, q, k, args, call)
        return out.contiguous(), lse.contiguous() if call.need_lse else None, rng

    def _clear_hidden(
        self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, args: AttentionArgs, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Write 0 and -inf into rows without keys, where the kernel left anything."""
        if call.packed is not None and self._equal_lengths:
            out = clear_past_end(out, args.cu_seqlens_q)
            return out, clear_past_end(lse, args.cu_seqlens_q, -math.inf, dim=-1) if call.need_lse else lse
        if call.packed is not None:
            hidden = call.packed.queries_without_keys()
            out = out.masked_fill(hidden[:, None, None], 0.0)
        elif args.attn_bias is not None:
            hidden = rows_hidden_by_bias(args.attn_bias, args, q.shape[1], k.shape[1])
            out = out.masked_fill(hidden.transpose(1, 2).unsqueeze(-1), 0.0)
        else:
            return out, lse
        return out, lse.masked_fill(hidden, -math.inf) if call.need_lse else lse

    def _gradients(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, out: Tensor, lse: Tensor, rng: Tensor | None,
        dout: Tensor, dlse: Tensor | None,
    ) -> Grads:  # fmt: skip
        if skip := _first_seeing_row(args):
            rows = slice(skip, None)
            grads = self._gradients(
                q[:, rows], k, v, _without_first(args, skip), out[:, rows], lse[..., rows], rng, dout[:, rows],
                None if dlse is None else dlse[..., rows],
            )  # fmt: skip
            dq = q.new_zeros(q.shape)
            dq[:, rows] = grads[0]
            dbias = grads[3]
            if dbias is not None and args.attn_bias is not None and args.attn_bias.shape[2] > 1:
                dbias = F.pad(dbias, (0, 0, skip, 0))
            return dq, grads[1], grads[2], dbias
        dtype, head_dim, head_dim_v, kv_heads = q.dtype, q.shape[-1], v.shape[-1], k.shape[-2]
        q, k, v, out, dout = _widened(args, q, k, v, out, dout)
        call = self._call(q, k, args)
        step = 16 // q.element_size()
        width = round_up(head_dim_v + (dlse is not None), step)
        v, out, dout = with_dlse_column(v, out, dout, dlse, width)
        q, k, v = self._inputs(q, k, v, call)
        if call.packed is None:
            lse = pad_lse(lse)
        else:
            lse = call.packed.lse_by_sequence(lse)
            out, dout = out.unsqueeze(0), dout.unsqueeze(0)
        dq, dk, dv, dbias = self._run_backward(q, k, v, _packed_heads(out), lse, rng, ready(dout), call, args)
        dq, dk, dv = dq[..., :head_dim], sum_groups(dk, kv_heads)[..., :head_dim], sum_groups(dv, kv_heads)
        dv = dv[..., :head_dim_v]
        if call.packed is not None:
            # No block writes the gradient of a query without keys, nor of anything past the last sequence.
            dq = dq[0].masked_fill(call.packed.queries_without_keys()[:, None, None], 0.0)
            idle = call.packed.keys_without_queries()[:, None, None]
            dk, dv = dk[0].masked_fill(idle, 0.0), dv[0].masked_fill(idle, 0.0)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), dbias

    def _run_backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor | None, dout: Tensor, call: Call,
        args: AttentionArgs,
    ) -> Grads:  # fmt: skip
        """Run the kernel once, or for each part that shares a bias whose gradient is wanted.

        The kernel writes that gradient for every batch element and head, B * H / (its own) times the bias; one part at
        a time it takes no more memory than the bias.
        """
        bias = args.attn_bias
        if bias is None or not self._bias_grad:
            return self._launch.backward(q, k, v, out, lse, rng, dout, call, False)
        assert call.bias is not None
        batch = [slice(b, b + 1) for b in range(q.shape[0])] if bias.shape[0] < q.shape[0] else [slice(None)]
        heads = [slice(h, h + 1) for h in range(q.shape[2])] if bias.shape[1] < q.shape[2] else [slice(None)]
        if len(batch) == len(heads) == 1:
            dq, dk, dv, dbias = self._launch.backward(q, k, v, out, lse, rng, dout, call, True)
            assert dbias is not None
            return dq, dk, dv, _within_mask(dbias, args).to(bias.dtype)
        wide = torch.promote_types(bias.dtype, torch.float32)
        total = torch.zeros(bias.shape, dtype=wide, device=bias.device)
        dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
        for b in batch:
            for h in heads:
                one = call._replace(bias=call.bias[b, h])
                q_part, k_part, v_part, out_part, dout_part = (t[b, :, h].contiguous() for t in (q, k, v, out, dout))
                dq[b, :, h], dk[b, :, h], dv[b, :, h], part = self._launch.backward(
                    q_part, k_part, v_part, out_part, lse[b, h].contiguous(), rng, dout_part, one, True
                )
                assert part is not None
                total[b if bias.shape[0] > 1 else slice(None), h if bias.shape[1] > 1 else slice(None)] += part
        return dq, dk, dv, _within_mask(total, args).to(bias.dtype)

    def _inputs(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Give k and v the heads of q, pad head sizes to 16 bytes, align rows, and add a batch to packed tensors."""
        step, heads = 16 // q.element_size(), q.shape[-2]
        k, v = expand_heads(k, heads), expand_heads(v, heads)
        q, k, v = (ready(pad_heads(t, round_up(t.shape[-1], step))) for t in (q, k, v))
        return (q, k, v) if call.packed is None else (q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))

    def _call(self, q: Tensor, k: Tensor, args: AttentionArgs) -> Call:
        left, right = window(args)
        causal = right == 0
        packed, square = None, args.max_seqlen_q == args.max_seqlen_k
        if args.cu_seqlens_q is not None:
            square = self._equal_lengths
            packed = Packed(args, q.shape[0], k.shape[0], split=causal and not square)
        bias = args.attn_bias
        if bias is not None:
            bias = aligned_bias(bias, q.dtype, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
        return Call(
            bias=bias,
            packed=packed,
            causal=causal,
            square=square,
            window=0 if left < 0 else min(left, 1 << 30) + 1,  # ours counts keys before the diagonal
            softmax_scale=args.softmax_scale,
            dropout_p=args.dropout_p,
            need_lse=args.need_lse or args.sinks is not None,
            reproducible=args.deterministic or args.batch_invariant,
        )


def _first_seeing_row(args: AttentionArgs) -> int:
    """Return how many queries of a dense causal call see no key: those before a square at the bottom right."""
    if args.cu_seqlens_q is not None or window(args)[1] != 0:
        return 0
    return max(0, args.max_seqlen_q - args.max_seqlen_k)


def _without_first(args: AttentionArgs, skip: int) -> AttentionArgs:
    bias = args.attn_bias
    if bias is not None and bias.shape[2] > 1:
        bias = bias[:, :, skip:]
    return args._replace(attn_bias=bias, max_seqlen_q=args.max_seqlen_q - skip)


def _widened(args: AttentionArgs, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Compute in fp32 where the bias is: the kernel takes a bias of q's dtype, and rounding it would be wrong."""
    bias = args.attn_bias
    return tuple(t.float() for t in tensors) if bias is not None and bias.dtype is torch.float32 else tensors


def _packed_heads(out: Tensor) -> Tensor:
    """Return out with its heads side by side: the backward kernel takes H * D for the distance between its rows."""
    heads, size = out.shape[-2:]
    return out if out.stride()[-3:] == (heads * size, size, 1) else out.contiguous()


def _within_mask(dbias: Tensor, args: AttentionArgs) -> Tensor:
    """Zero the gradient of hidden scores: the kernel skips whole tiles above the diagonal and leaves them unwritten."""
    left, right = window(args)
    shift = args.max_seqlen_k - args.max_seqlen_q
    if right >= 0:
        dbias = dbias.tril(shift + right)
    return dbias if left < 0 else dbias.triu(shift - left)
