"""PyTorch's flash kernel for CPUs: ``aten::_scaled_dot_product_flash_attention_for_cpu``.

Its conventions (torch 2.11 to 2.13, tried on 2026-11-23): (B, H, S, D) with any strides but an innermost 1 (anything
else is silently wrong), one head size for q, k, v, natural-log lse that is 0 for rows without keys, causal aligned
top-left, masks additive and broadcastable but never boolean, GQA without expansion, no dropout, no softcap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.convert import (
    clear_past_end,
    fold_sinks,
    pad_heads,
    sinks_grad,
    unit_inner,
    window,
    with_dlse_column,
)
from vllm_accel.backends.gather import serve_paged, with_gather
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads, TorchBackend
from vllm_accel.dispatch.capability import Capability
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import PROMISES, AttentionSpec, Feature, Relation

# The binding without the operator's Python layer costs 3 us less per call (4.8 against 8.2); torch.ops if it is gone.
_forward = getattr(
    torch,
    "_scaled_dot_product_flash_attention_for_cpu",
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
)
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

#: Elements of the additive mask built at once where masks depend on the query: 8 MiB in fp32.
MAX_MASK = 1 << 21


class SdpaCpuBackend(TorchBackend):
    """The backend `sdpa_cpu`."""

    name = "sdpa_cpu"
    capability = with_gather(
        Capability(
            platforms=frozenset({"cpu"}),
            dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
            features=functools.reduce(lambda a, b: a | b, Feature)
            & ~(
                PROMISES
                | Feature.PAGED
                | Feature.MLA
                | Feature.SOFTCAP
                | Feature.DROPOUT
                | Feature.BIAS_GRAD
                | Feature.Q_DESCALE
                | Feature.K_DESCALE
                | Feature.V_DESCALE
                | Feature.BATCH_INVARIANT
            ),
        )
    )

    @serve_paged
    def bind(self, spec: AttentionSpec, device: Device) -> SdpaCpuKernel:
        """Return the direct kernel where one call of the operator does it all, else the general one."""
        masks = Feature.WINDOW_LEFT | Feature.WINDOW_RIGHT | Feature.ALIBI
        other = masks | Feature.VARLEN | Feature.SINKS | Feature.VALUE_DIM
        causal = Feature.CAUSAL in spec.features and spec.seqlen_q > 1
        if spec.features & other or (causal and spec.relation is not Relation.EQUAL):
            return SdpaCpuKernel()
        return FoldedKernel() if spec.seqlen_q == 1 and Feature.GQA in spec.features else DirectKernel(causal)


class SdpaCpuKernel:
    """Everything, sequence by sequence and in blocks of queries where a mask has to be built."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor | None, None]:
        """Return out and lse (None unless needed)."""
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        *batch, tokens, heads, _ = q.shape
        dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        lse = torch.full((*batch, heads, tokens), -math.inf, dtype=dtype)
        size = max(q.shape[-1], v.shape[-1])
        q, k, v = (pad_heads(t, size) for t in (q, k, v))
        for piece in _pieces(q, k, v, args):
            part, part_lse = _forward(
                piece.q, piece.k, piece.v, 0.0, piece.causal, attn_mask=piece.mask, scale=args.softmax_scale
            )
            piece.rows(out).copy_(part.transpose(1, 2)[..., : out.shape[-1]])
            piece.lse_rows(lse).copy_(piece.true_lse(part_lse))
        out, lse = fold_sinks(out, lse, args.sinks)
        if args.sinks is not None:  # past the last sequence there is no row, and so no sink
            lse = clear_past_end(lse, args.cu_seqlens_q, -math.inf, dim=-1)
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
        """Return the gradients; key gradients of several blocks add up in fp32."""
        dsinks = sinks_grad(args.sinks, out, lse, dout, dlse)
        head_dim, head_dim_v = q.shape[-1], v.shape[-1]
        size = max(head_dim, head_dim_v + (dlse is not None))
        v, out, dout = with_dlse_column(v, out, unit_inner(dout), dlse, size)
        q, k = (pad_heads(t, size) for t in (q, k))
        # A row without keys must add nothing: its probability is exp(score - inf) = 0.
        lse = torch.where(lse == -math.inf, math.inf, lse)
        dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
        wide = torch.float64 if q.dtype is torch.float64 else torch.float32
        dk, dv = (torch.zeros(t.shape, dtype=wide) for t in (k, v))
        for piece in _pieces(q, k, v, args, backward=True):
            grads = _backward(
                piece.rows(dout).transpose(1, 2), piece.q, piece.k, piece.v, piece.rows(out).transpose(1, 2),
                piece.lse_rows(lse), 0.0, piece.causal, attn_mask=piece.mask, scale=args.softmax_scale,
            )  # fmt: skip
            piece.rows(dq).copy_(grads[0].transpose(1, 2))
            piece.keys(dk).add_(grads[1].transpose(1, 2))
            piece.keys(dv).add_(grads[2].transpose(1, 2))
        dtype = q.dtype
        return AttentionGrads(
            dq[..., :head_dim], dk[..., :head_dim].to(dtype), dv[..., :head_dim_v].to(dtype), None, dsinks
        )


class DirectKernel(SdpaCpuKernel):
    """One call of the operator: no mask but a square causal one and attn_bias, one head size, no sinks."""

    def __init__(self, causal: bool) -> None:
        self._causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor | None, None]:
        """Return out and lse. The operator mostly writes (B, S, H, D) and returns a transposed view."""
        mask = args.attn_bias
        if mask is not None:
            if self._causal and args.need_lse:  # which rows see no key then depends on both masks
                return super().forward(q, k, v, args)
            mask = _additive(mask, _mask_dtype(q))
        out, lse = _forward(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, self._causal, attn_mask=mask,
            scale=args.softmax_scale,
        )  # fmt: skip
        if mask is not None and args.need_lse:
            lse = lse.masked_fill((mask == -math.inf).all(-1), -math.inf)  # the operator says 0
        return out.transpose(1, 2).contiguous(), lse, None  # no copy unless q was laid out heads first


class FoldedKernel(SdpaCpuKernel):
    """One query per sequence and grouped heads: the heads of a group go as queries, so that each key is read once.

    The operator's own grouping reads the keys once per query head. Batch 1 and 8, 32 heads over 8, 4096 keys of 128,
    medians of 15 in turns: folded is 2 times faster in fp32, 7 and 11 times in bf16 (2-core EPYC with AVX-512, torch
    2.13, 2026-11-23).
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor | None, None]:
        """Return out and lse."""
        batch, _, heads, head_dim = q.shape
        groups = (k.shape[2], heads // k.shape[2])
        mask = args.attn_bias
        if mask is not None:
            mask = _additive(mask, _mask_dtype(q))
            if mask.shape[1] > 1:  # (B, H, 1, Sk), one row a head
                mask = mask.reshape(mask.shape[0], *groups, mask.shape[3])
        out, lse = _forward(
            q.reshape(batch, *groups, head_dim), k.transpose(1, 2), v.transpose(1, 2), 0.0, False, attn_mask=mask,
            scale=args.softmax_scale,
        )  # fmt: skip
        if mask is not None and args.need_lse:
            lse = lse.masked_fill((mask == -math.inf).all(-1), -math.inf)  # the operator says 0
        return out.reshape(batch, 1, heads, head_dim), lse.reshape(batch, heads, 1), None


class _Piece:
    """Queries of one sequence (or of a dense batch) that one call of the operator handles."""

    __slots__ = ("_b", "_keys", "_rows", "causal", "empty", "k", "mask", "q", "v")

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: slice,
        keys: slice,
        packed: bool,
        mask: Tensor | None,
        causal: bool,
    ) -> None:
        self._b, self._rows, self._keys = packed, rows, keys
        self.q, self.k, self.v = (
            self.rows(q).transpose(1, 2),
            self.keys(k).transpose(1, 2),
            self.keys(v).transpose(1, 2),
        )
        self.causal = causal
        self.mask = mask

    def rows(self, t: Tensor) -> Tensor:
        """Return this piece's rows of a tensor shaped like q, with a batch dimension."""
        return t[None, self._rows] if self._b else t[:, self._rows]

    def keys(self, t: Tensor) -> Tensor:
        """Return this piece's rows of a tensor shaped like k."""
        return t[None, self._keys] if self._b else t[:, self._keys]

    def lse_rows(self, lse: Tensor) -> Tensor:
        """Return this piece's part of lse, (B, H, rows)."""
        return lse[None, :, self._rows] if self._b else lse[:, :, self._rows]

    def true_lse(self, lse: Tensor) -> Tensor:
        """Return -inf where the mask leaves a row no key; the operator says 0 there."""
        if self.mask is None:
            return lse
        return lse.masked_fill((self.mask == -math.inf).all(-1), -math.inf)


def _pieces(q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, *, backward: bool = False) -> Iterator[_Piece]:
    """Cut a call into operator calls. Rows that see no key at all are left out: their results are already there."""
    packed = args.cu_seqlens_q is not None
    for b, (rows, keys) in enumerate(_sequences(q, k, args)):
        sequence = b if packed else None
        if not _needs_mask(args):
            yield from _causal_pieces(q, k, v, rows, keys, packed, args.causal)
            continue
        shift = (keys.stop - keys.start) - (rows.stop - rows.start)
        if _one_mask(args) and (not args.causal or (backward and not shift)):
            # The operator takes a mask over keys and its own causal one together; only lse needs to know empty rows.
            mask = _mask(args._replace(causal=False), slice(0, 1), slice(0, keys.stop), shift, sequence, q)
            yield _Piece(q, k, v, rows, keys, packed, mask, args.causal)
            continue
        left, right = window(args)
        per_row = (1 if args.alibi_slopes is None else q.shape[-2]) * max(1, keys.stop - keys.start)
        if args.attn_bias is not None:
            per_row *= args.attn_bias.shape[0] * (1 if args.alibi_slopes is not None else args.attn_bias.shape[1])
        step = max(16, MAX_MASK // per_row)
        for start in range(rows.start, rows.stop, step):
            block = slice(start, min(start + step, rows.stop))
            first, last = block.start - rows.start, block.stop - rows.start
            low = max(0, first + shift - left) if left >= 0 else 0
            high = min(keys.stop - keys.start, last + shift + right) if right >= 0 else keys.stop - keys.start
            if high <= low:
                continue
            mask = _mask(args, slice(first, last), slice(low, high), shift, sequence, q)
            yield _Piece(q, k, v, block, slice(keys.start + low, keys.start + high), packed, mask, False)


def _sequences(q: Tensor, k: Tensor, args: AttentionArgs) -> Iterator[tuple[slice, slice]]:
    """Yield query rows and key rows of each sequence; a dense batch counts as one."""
    if args.cu_seqlens_q is None or args.cu_seqlens_k is None:
        yield slice(0, q.shape[1]), slice(0, k.shape[1])
        return
    ends_q, ends_k = args.cu_seqlens_q.tolist(), args.cu_seqlens_k.tolist()
    for b in range(len(ends_q) - 1):
        yield slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])


def _one_mask(args: AttentionArgs) -> bool:
    """Tell whether attn_bias is all that hides keys beside causality, and the same for every query."""
    left, right = args.window_size
    bias = args.attn_bias
    plain = args.alibi_slopes is None and left < 0 and (right < 0 or args.causal)
    return plain and bias is not None and bias.shape[2] == 1


def _needs_mask(args: AttentionArgs) -> bool:
    left, right = args.window_size
    limited = left >= 0 or (right >= 0 and not args.causal)
    return limited or args.attn_bias is not None or args.alibi_slopes is not None


def _causal_pieces(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice, packed: bool, causal: bool
) -> Iterator[_Piece]:
    """Bottom-right causal from an operator that aligns top-left."""
    n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
    if not n_q or not n_k:
        return
    if not causal or n_q == 1:
        yield _Piece(q, k, v, rows, keys, packed, None, False)
    elif n_q >= n_k:  # the first rows see nothing; the rest is square, and top-left is bottom-right
        yield _Piece(q, k, v, slice(rows.stop - n_k, rows.stop), keys, packed, None, True)
    else:
        # Blocks of queries, each with a bottom-right mask over the keys up to its end: O(S) memory, one pass, and no
        # merge of two partial results.
        shift, step = n_k - n_q, max(16, MAX_MASK // n_k)
        for start in range(0, n_q, step):
            stop = min(start + step, n_q)
            mask = _above_diagonal(stop - start, shift + stop, start + shift, q)
            block = slice(rows.start + start, rows.start + stop)
            yield _Piece(q, k, v, block, slice(keys.start, keys.start + shift + stop), packed, mask, False)


def _above_diagonal(n_q: int, n_k: int, offset: int, q: Tensor) -> Tensor:
    return torch.full((1, 1, n_q, n_k), -math.inf, dtype=_mask_dtype(q)).triu(offset + 1)


def _additive(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into what is added to the logits; the operator takes no other, in fp32 for 16-bit inputs."""
    if bias.dtype is torch.bool:
        return torch.zeros(bias.shape, dtype=dtype).masked_fill_(~bias, -math.inf)
    return bias.to(dtype)


def _mask_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def _mask(args: AttentionArgs, rows: slice, keys: slice, shift: int, sequence: int | None, q: Tensor) -> Tensor:
    """Build the additive mask (B or 1, H or 1, rows or 1, keys) of a block; rows and keys count within the sequence."""
    dtype = _mask_dtype(q)
    mask = torch.zeros((1, 1, 1, 1), dtype=dtype)
    if (bias := args.attn_bias) is not None:
        part: Any = bias[:, :, rows if bias.shape[2] > 1 else slice(None), keys if bias.shape[3] > 1 else slice(None)]
        mask = _additive(part, dtype)
    left, right = window(args)
    if left >= 0 or right >= 0 or args.alibi_slopes is not None:
        i = torch.arange(rows.start, rows.stop).view(-1, 1)
        distance = i + shift - torch.arange(keys.start, keys.stop)
        if (slopes := args.alibi_slopes) is not None:
            if sequence is not None and slopes.dim() == 2:
                slopes = slopes[sequence]
            mask = mask - slopes.to(dtype).reshape(-1, q.shape[-2], 1, 1) * distance.abs()
        if right >= 0:
            mask = mask.masked_fill(distance < -right, -math.inf)
        if left >= 0:
            mask = mask.masked_fill(distance > left, -math.inf)
    return mask.expand(-1, -1, -1, keys.stop - keys.start)


BACKEND = SdpaCpuBackend()
