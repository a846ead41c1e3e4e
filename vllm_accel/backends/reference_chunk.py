"""The arithmetic of the reference backend: dense attention over chunks of queries, forward and backward.

Shapes inside: B batch, N key heads, G query heads per key head, C queries of a chunk, S keys, D / E head sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads

#: Scores held at once. 2^22 in fp32 is 16 MiB a temporary, beyond which chunks were no faster (2-core EPYC, 2026-11).
MAX_SCORES = 1 << 22


class Lengths(NamedTuple):
    """Lengths of padded sequences, (B,) on the device."""

    q: Tensor
    k: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic, and of lse."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def forward(
    args: AttentionArgs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rng: Tensor | None,
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out (B, Sq, H, Dv) and lse (B, H, Sq), both in the compute dtype."""
    batch, seqlen_q, heads, _ = q.shape
    qg, kn, vn = _grouped(args, q, k, v)
    out = qg.new_zeros(batch, kn.shape[1], heads // kn.shape[1], seqlen_q, vn.shape[-1])
    lse = qg.new_full(out.shape[:-1], -math.inf)
    sink = None if args.sinks is None else args.sinks.to(qg.dtype).view(1, *out.shape[1:3], 1)
    for rows, keys in _chunks(args, seqlen_q, kn.shape[2], batch * heads, dense=lengths is None):
        scores, _ = _scores(args, qg[..., rows, :], kn[:, :, keys], rows, keys, seqlen_q, k.shape[1], lengths)
        top = scores.amax(-1) if scores.shape[-1] else lse[..., rows]
        top = top if sink is None else torch.maximum(top, sink)
        safe = torch.where(torch.isinf(top) & (top < 0), 0.0, top)
        weights = torch.exp(scores - safe.unsqueeze(-1))
        total = weights.sum(-1)
        total = total if sink is None else total + torch.exp(sink - safe)
        if rng is not None:
            weights = weights * _kept(args, rng, weights.shape, rows, keys, seqlen_q)
        seen = total > 0
        part = weights @ vn[:, :, None, keys]
        out[..., rows, :] = torch.where(seen.unsqueeze(-1), part / torch.where(seen, total, 1.0).unsqueeze(-1), 0.0)
        lse[..., rows] = torch.where(seen, safe + torch.log(total), -math.inf)
    return out.flatten(1, 2).transpose(1, 2).contiguous(), lse.flatten(1, 2)


def backward(
    args: AttentionArgs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    rng: Tensor | None,
    lengths: Lengths | None = None,
) -> AttentionGrads:
    """Return gradients in the compute dtype: dq (B, Sq, H, D), dk and dv (B, Sk, Hkv, .), dbias like bias, dsinks."""
    batch, seqlen_q, heads, _ = q.shape
    qg, kn, vn = _grouped(args, q, k, v)
    split = (kn.shape[1], heads // kn.shape[1])
    dog = dout.to(qg.dtype).transpose(1, 2).unflatten(1, split)
    delta = (dog * out.to(qg.dtype).transpose(1, 2).unflatten(1, split)).sum(-1)
    if dlse is not None:  # d lse / d score is the probability: it joins delta with the other sign
        delta = delta - dlse.to(qg.dtype).unflatten(1, split)
    lseg = lse.to(qg.dtype).unflatten(1, split)
    dq, dk, dv = torch.zeros_like(qg), torch.zeros_like(kn), torch.zeros_like(vn)
    bias = args.attn_bias
    wants_dbias = bias is not None and bias.is_floating_point()
    dbias = torch.zeros(bias.shape, dtype=qg.dtype, device=q.device) if wants_dbias and bias is not None else None
    for rows, keys in _chunks(args, seqlen_q, kn.shape[2], batch * heads, dense=lengths is None):
        scores, slope = _scores(args, qg[..., rows, :], kn[:, :, keys], rows, keys, seqlen_q, k.shape[1], lengths)
        row_lse = lseg[..., rows].unsqueeze(-1)
        p = torch.where(torch.isinf(row_lse), 0.0, torch.exp(scores - torch.where(torch.isinf(row_lse), 0.0, row_lse)))
        do = dog[..., rows, :]
        dp = do @ vn[:, :, None, keys].mT
        dropped = p
        if rng is not None:
            keep = _kept(args, rng, p.shape, rows, keys, seqlen_q)
            dropped, dp = p * keep, dp * keep
        dv[:, :, keys] += (dropped.mT @ do).sum(2)
        ds = p * (dp - delta[..., rows].unsqueeze(-1))
        if dbias is not None:
            _add_dbias(dbias, ds.flatten(1, 2), rows, keys)
        ds = ds * args.softmax_scale if slope is None else ds * slope * args.softmax_scale
        dq[..., rows, :] += ds @ kn[:, :, None, keys]
        dk[:, :, keys] += (ds.mT @ qg[..., rows, :]).sum(2)
    dsinks = None
    if args.sinks is not None:
        sink = args.sinks.to(qg.dtype).view(1, *split, 1)
        weight = torch.where(torch.isinf(lseg), 0.0, torch.exp(sink - torch.where(torch.isinf(lseg), 0.0, lseg)))
        dsinks = -(weight * delta).sum((0, 3)).flatten()
    dq = _descaled(dq, args.q_descale).flatten(1, 2).transpose(1, 2)
    dk, dv = (_descaled(d, s).transpose(1, 2) for d, s in ((dk, args.k_descale), (dv, args.v_descale)))
    return AttentionGrads(dq, dk, dv, dbias, dsinks)


def _grouped(args: AttentionArgs, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, N, G, Sq, D), k (B, N, S, D), v (B, N, S, E) in the compute dtype, descaled."""
    dtype = compute_dtype(q.dtype)
    qg = q.to(dtype).transpose(1, 2).unflatten(1, (k.shape[2], q.shape[2] // k.shape[2]))
    kn, vn = k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)
    return _descaled(qg, args.q_descale), _descaled(kn, args.k_descale), _descaled(vn, args.v_descale)


def _descaled(tensor: Tensor, descale: Tensor | None) -> Tensor:
    """Multiply (B, N, ...) by a scalar, (N,) or (B, N) factor."""
    if descale is None:
        return tensor
    factor = descale.to(tensor.dtype)
    return tensor * (factor.reshape(factor.shape + (1,) * (tensor.dim() - 2)) if factor.dim() else factor)


def _chunks(
    args: AttentionArgs, seqlen_q: int, seqlen_k: int, rows_per_query: int, *, dense: bool
) -> Iterator[tuple[slice, slice]]:
    """Yield query rows whose scores fit the budget, and the keys that any of them can see (all, where padded)."""
    step = max(1, MAX_SCORES // max(1, rows_per_query * seqlen_k))
    left, right = args.window_size
    right = 0 if args.causal else right
    shift = seqlen_k - seqlen_q
    for start in range(0, seqlen_q, step):
        stop = min(start + step, seqlen_q)
        first = max(0, start + shift - left) if dense and left >= 0 else 0
        last = min(seqlen_k, stop + shift + right) if dense and right >= 0 else seqlen_k
        yield slice(start, stop), slice(first, max(first, last))


def _scores(
    args: AttentionArgs,
    q: Tensor,
    k: Tensor,
    rows: slice,
    keys: slice,
    seqlen_q: int,
    seqlen_k: int,
    lengths: Lengths | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the masked logits (B, N, G, C, S) and the derivative of the softcap (None without one)."""
    scores = (q @ k.unsqueeze(2).mT) * args.softmax_scale
    slope = None
    if args.softcap:
        squashed = torch.tanh(scores / args.softcap)
        scores, slope = squashed * args.softcap, 1 - squashed * squashed
    if (bias := args.attn_bias) is not None:
        part = bias[:, :, rows if bias.shape[2] > 1 else slice(None), keys if bias.shape[3] > 1 else slice(None)]
        part = part.unflatten(1, q.shape[1:3]) if part.shape[1] > 1 else part.unsqueeze(1)
        masked = part.dtype is torch.bool
        scores = torch.where(part, scores, -math.inf) if masked else scores + part.to(scores.dtype)
    distance = _distance(rows, keys, seqlen_q, seqlen_k, lengths, q.device)
    if (slopes := args.alibi_slopes) is not None:
        slopes = slopes.to(scores.dtype).reshape(-1, *q.shape[1:3], 1, 1)
        scores = scores - slopes * distance.abs()
    left, right = args.window_size
    right = 0 if args.causal else right
    hidden = []
    if right >= 0:
        hidden.append(distance < -right)
    if left >= 0:
        hidden.append(distance > left)
    if lengths is not None:
        columns = torch.arange(keys.start, keys.stop, device=q.device)
        hidden.append((columns >= lengths.k[:, None])[:, None, None, None])
    for mask in hidden:
        scores = scores.masked_fill(mask, -math.inf)
    return scores, slope


def _distance(
    rows: slice, keys: slice, seqlen_q: int, seqlen_k: int, lengths: Lengths | None, device: torch.device
) -> Tensor:
    """Return how far each key lies behind the diagonal of its query: (B or 1, 1, 1, C, S), negative for the future."""
    i = torch.arange(rows.start, rows.stop, device=device).view(-1, 1)
    j = torch.arange(keys.start, keys.stop, device=device).view(1, -1)
    shift = seqlen_k - seqlen_q if lengths is None else (lengths.k - lengths.q).view(-1, 1, 1, 1, 1)
    return i - j + shift


def _add_dbias(dbias: Tensor, ds: Tensor, rows: slice, keys: slice) -> None:
    """Sum the gradient of the logits (B, H, C, S) over the dimensions that the bias broadcasts."""
    reduce = [dim for dim in range(4) if dbias.shape[dim] == 1]
    part = ds.sum(reduce, keepdim=True) if reduce else ds
    dbias[:, :, rows if dbias.shape[2] > 1 else slice(None), keys if dbias.shape[3] > 1 else slice(None)] += part


def _kept(args: AttentionArgs, rng: Tensor, shape: torch.Size, rows: slice, keys: slice, seqlen_q: int) -> Tensor:
    """Return 1 / (1 - p) where a weight is kept and 0 where it is dropped, from a counter hash of its position.

    A counter-based generator (splitmix64's finaliser, Steele et al. 2014) gives the backward pass the same mask in any
    order, with nothing stored and no synchronisation.
    """
    batch, groups, device = shape[0], shape[1] * shape[2], rng.device
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(groups, device=device).view(1, -1, 1, 1)
    i = torch.arange(rows.start, rows.stop, device=device).view(1, 1, -1, 1)
    j = torch.arange(keys.start, keys.stop, device=device).view(1, 1, 1, -1)
    x = _mix(rng[0] + ((b * groups + h) * (1 << 24) + i) * -7046029254386353131)
    x = _mix(x ^ (rng[1] + j * -4417276706812531889))
    uniform = ((x >> 11) & ((1 << 52) - 1)).to(torch.float64) / (1 << 52)
    keep = (uniform >= args.dropout_p).to(compute_dtype(torch.float32)) / (1 - args.dropout_p)
    return keep.view(shape)


def _mix(x: Tensor) -> Tensor:
    """Scramble 64-bit integers (arithmetic wraps; the shifts are logical)."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))


class Padding:
    """Pack and unpad sequences on the device, so that nothing has to know a length on the host."""

    def __init__(self, args: AttentionArgs, tokens_q: int, tokens_k: int) -> None:
        assert args.cu_seqlens_q is not None and args.cu_seqlens_k is not None
        self._cu = {"q": args.cu_seqlens_q.long(), "k": args.cu_seqlens_k.long()}
        self._longest = {"q": args.max_seqlen_q, "k": args.max_seqlen_k}
        self._tokens = {"q": tokens_q, "k": tokens_k}
        self.lengths = Lengths(self._cu["q"].diff(), self._cu["k"].diff())

    def queries(self, packed: Tensor) -> Tensor:
        """(Tq, ...) -> (B, max_seqlen_q, ...), zeros beyond each length."""
        return self._pad(packed, "q", 0.0)

    def keys(self, packed: Tensor) -> Tensor:
        """(Tk, ...) -> (B, max_seqlen_k, ...), zeros beyond each length, whatever lies there."""
        return self._pad(packed, "k", 0.0)

    def lse(self, packed: Tensor, fill: float = -math.inf) -> Tensor:
        """(H, Tq) -> (B, H, max_seqlen_q)."""
        return self._pad(packed.t(), "q", fill).transpose(1, 2)

    def unpad_queries(self, padded: Tensor) -> Tensor:
        """(B, max_seqlen_q, ...) -> (Tq, ...), zeros past the last sequence."""
        return self._unpad(padded, "q", 0.0)

    def unpad_keys(self, padded: Tensor) -> Tensor:
        """(B, max_seqlen_k, ...) -> (Tk, ...), zeros past the last sequence."""
        return self._unpad(padded, "k", 0.0)

    def unpad_lse(self, padded: Tensor) -> Tensor:
        """(B, H, max_seqlen_q) -> (H, Tq), -inf past the last sequence."""
        return self._unpad(padded.transpose(1, 2), "q", -math.inf).t()

    def _pad(self, packed: Tensor, side: str, fill: float) -> Tensor:
        cu, steps = self._cu[side], torch.arange(self._longest[side], device=packed.device)
        inside = (steps < cu.diff()[:, None]).view(-1, len(steps), *(1,) * (packed.dim() - 1))
        index = (cu[:-1, None] + steps).clamp(max=self._tokens[side] - 1)
        return torch.where(inside, packed[index], torch.full((), fill, dtype=packed.dtype, device=packed.device))

    def _unpad(self, padded: Tensor, side: str, fill: float) -> Tensor:
        cu, tokens = self._cu[side], torch.arange(self._tokens[side], device=padded.device)
        sequence = torch.searchsorted(cu[1:], tokens, right=True).clamp(max=len(cu) - 2)
        step = (tokens - cu[sequence]).clamp(max=self._longest[side] - 1)
        inside = (tokens < cu[-1]).view(-1, *(1,) * (padded.dim() - 2))
        found = padded[sequence, step]
        return torch.where(inside, found, torch.full((), fill, dtype=padded.dtype, device=padded.device))
