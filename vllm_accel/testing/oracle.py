"""What attention means, in float64 and in few words: the reference that every backend is compared with.

Nothing here is shared with the rest of the library, and nothing here is fast: every score is stored. All
functions are differentiable by autograd, and give gradients of exactly zero wherever nothing is attended.

``*_oracle`` functions compute in float64. ``plain_*`` functions compute the same in plain PyTorch, with
products in the inputs' dtype and the softmax in float32: how far they are from the oracle is the yardstick of
:mod:`vllm_accel.testing.tolerance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Options",
    "attention_oracle",
    "attention_paged_oracle",
    "attention_varlen_oracle",
    "merge_oracle",
    "plain_attention",
    "plain_attention_paged",
    "plain_attention_varlen",
]

_NEG_INF = float("-inf")


class Options(TypedDict, total=False):
    """The options of :func:`attention_oracle` that packed and paged attention share."""

    causal: bool
    window_size: tuple[int, int]
    softmax_scale: float | None
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    q_descale: Tensor | float | None
    k_descale: Tensor | float | None
    v_descale: Tensor | float | None


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    q_descale: Tensor | float | None = None,
    k_descale: Tensor | float | None = None,
    v_descale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dense attention in float64.

    q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv) -> out (B, Sq, H, Dv), lse (B, H, Sq), in float64.
    The options mean what they mean in ``vllm_accel.attention``. A key that no query may see, and a query that
    sees no key, may hold NaN: neither results nor gradients of anything else notice.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q = _dequantise(q, q_descale, k.shape[2]).double()
    v = _dequantise(v, v_descale, k.shape[2]).double()
    k = _dequantise(k, k_descale, k.shape[2]).double()
    return _dense(q, k, v, causal, window_size, scale, softcap, alibi_slopes, attn_bias, sinks)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    q_descale: Tensor | float | None = None,
    k_descale: Tensor | float | None = None,
    v_descale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`attention_oracle` computes, with products in q's dtype and the softmax in float32.

    FP8 inputs are dequantised to bfloat16 first. Returns out in q's dtype (bfloat16 for FP8) and lse in
    float32 (float64 for float64 inputs). Only the tolerance rule uses it.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    q = _dequantise(q, q_descale, k.shape[2]).to(dtype)
    v = _dequantise(v, v_descale, k.shape[2]).to(dtype)
    k = _dequantise(k, k_descale, k.shape[2]).to(dtype)
    return _dense(q, k, v, causal, window_size, scale, softcap, alibi_slopes, attn_bias, sinks)


def attention_varlen_oracle(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Unpack[Options]
) -> tuple[Tensor, Tensor]:
    """Compute attention over packed sequences, one at a time, in float64.

    q (Tq, H, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv) -> out (Tq, H, Dv), lse (H, Tq). Rows past the last
    ``cu_seqlens_q`` give 0 and -inf; what lies there, or in k and v past ``cu_seqlens_k``, is not read.
    """
    return _each_sequence(attention_oracle, q.double(), k, v, cu_seqlens_q, cu_seqlens_k, options)


def plain_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Unpack[Options]
) -> tuple[Tensor, Tensor]:
    """Apply :func:`plain_attention` to packed sequences, one at a time; shapes as in the varlen oracle."""
    return _each_sequence(plain_attention, q, k, v, cu_seqlens_q, cu_seqlens_k, options)


def attention_paged_oracle(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *,
    cu_seqlens_q: Tensor, block_table: Tensor, seqused_k: Tensor, **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gather every sequence's keys from its blocks, then compute attention in float64.

    q (Tq, H, D), caches (num_blocks, block_size, Hkv, D or Dv), block_table (B, max_blocks), seqused_k (B,)
    -> out (Tq, H, Dv), lse (H, Tq). Entries of the table past ``ceil(seqused_k / block_size)`` are not read.
    """
    keys, values, ends = _gathered(k_cache, v_cache, block_table, seqused_k)
    return attention_varlen_oracle(
        q, keys.double(), values.double(), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=ends, **options
    )


def plain_attention_paged(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *,
    cu_seqlens_q: Tensor, block_table: Tensor, seqused_k: Tensor, **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply :func:`plain_attention` to the gathered keys; shapes as in the paged oracle."""
    keys, values, ends = _gathered(k_cache, v_cache, block_table, seqused_k)
    return plain_attention_varlen(q, keys, values, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=ends, **options)


def _gathered(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seqused_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the keys and values of all sequences one after another, and where each sequence ends."""
    block_size, lengths = k_cache.shape[1], [0]
    keys, values = [k_cache[:0].flatten(0, 1)], [v_cache[:0].flatten(0, 1)]
    for blocks, used in zip(block_table.tolist(), seqused_k.tolist(), strict=True):
        for j in range(0, used, block_size):
            block, length = blocks[j // block_size], min(block_size, used - j)
            keys.append(k_cache[block, :length])
            values.append(v_cache[block, :length])
        lengths.append(lengths[-1] + used)
    return _joined(keys), _joined(values), torch.tensor(lengths)


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate, also where a dtype of 8 bits has no kernel for it."""
    dtype = parts[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(parts)
    return torch.cat([part.view(torch.uint8) for part in parts]).view(dtype)


def merge_oracle(outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys, in float64.

    outs of (..., S, H, Dv) and lses of (..., H, S) -> out and lse of the same shapes. A part whose lse is
    -inf has no weight, whatever its out holds; where every part is, the result is 0 and -inf (or the sink).
    """
    lse_parts = torch.stack([lse.double().transpose(-1, -2) for lse in lses], dim=-1)  # (..., S, H, parts)
    present = lse_parts != _NEG_INF
    share, lse = _softmax(lse_parts, present, _sink_column(sinks, lse_parts, head_dim=-1))
    out_parts = torch.stack([out.double() for out in outs], dim=-1)  # (..., S, H, Dv, parts)
    out = (torch.where(present.unsqueeze(-2), out_parts, 0.0) * share.unsqueeze(-2)).sum(-1)
    return out, lse.transpose(-1, -2)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int], scale: float, softcap: float,
    alibi_slopes: Tensor | None, attn_bias: Tensor | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute attention of (B, S, H, D) tensors: products in their dtype, the rest in float32 or float64."""
    soft = torch.float64 if q.dtype == torch.float64 else torch.float32
    visible = _visible(q, k, causal, window_size, attn_bias)  # (B, H, Sq, Sk)
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or Hkv, S, D)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    # A row that takes part in nothing is replaced, not multiplied by zero: it may hold NaN.
    q = torch.where(visible.any(3).unsqueeze(-1), q, 0.0)
    k = torch.where(visible.any(2).unsqueeze(-1), k, 0.0)
    v = torch.where(visible.any(2).unsqueeze(-1), v, 0.0)

    scores = (q @ k.transpose(-1, -2)).to(soft) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_bias is not None and attn_bias.dtype != torch.bool:
        scores = scores + attn_bias.to(soft)
    if alibi_slopes is not None:
        distance = _distance(q.shape[2], k.shape[2], q.device).abs()
        scores = scores - alibi_slopes.to(soft)[..., None, None] * distance
    probabilities, lse = _softmax(scores, visible, _sink_column(sinks, scores, head_dim=1))
    out = probabilities.to(v.dtype) @ v
    return out.transpose(1, 2).contiguous(), lse


def _distance(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """Return j - (i + Sk - Sq), how far key j lies to the right of query i's diagonal: (Sq, Sk)."""
    i = torch.arange(seqlen_q, device=device).unsqueeze(1)
    j = torch.arange(seqlen_k, device=device).unsqueeze(0)
    return j - (i + seqlen_k - seqlen_q)


def _visible(q: Tensor, k: Tensor, causal: bool, window_size: tuple[int, int], attn_bias: Tensor | None) -> Tensor:
    """Return which keys each query sees: bool (B, H, Sq, Sk)."""
    batch, seqlen_q, heads, _ = q.shape
    distance = _distance(seqlen_q, k.shape[1], q.device)
    left, right = window_size
    if left < -1 or right < -1:
        raise ValueError(f"window_size must be -1 (unlimited) or more on each side, got {window_size}")
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen = seen & (distance <= 0)
    if left >= 0:
        seen = seen & (distance >= -left)
    if right >= 0:
        seen = seen & (distance <= right)
    if attn_bias is not None:
        seen = seen & (attn_bias if attn_bias.dtype == torch.bool else attn_bias != _NEG_INF)
    return seen.expand(batch, heads, seqlen_q, k.shape[1])


def _softmax(scores: Tensor, visible: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise over the last dimension and one extra logit; a row with neither gives zeros and -inf."""
    hidden = torch.where(visible, scores, _NEG_INF)
    largest = torch.cat([hidden, sink.unsqueeze(-1)], dim=-1).amax(-1).detach()
    largest = torch.where(largest == _NEG_INF, 0.0, largest)
    # The inner where() keeps hidden scores, which may be anything, out of exp(): no 0 * inf in its gradient.
    weights = torch.exp(torch.where(visible, scores, 0.0) - largest.unsqueeze(-1))
    weights = torch.where(visible, weights, 0.0)
    total = weights.sum(-1) + torch.exp(sink - largest)
    empty = total == 0.0
    total = torch.where(empty, 1.0, total)
    return weights / total.unsqueeze(-1), torch.where(empty, _NEG_INF, torch.log(total) + largest)


def _sink_column(sinks: Tensor | None, scores: Tensor, head_dim: int) -> Tensor:
    """Return one logit for each row of scores: the sink of its head, or -inf."""
    shape = scores.shape[:-1]
    if sinks is None:
        return scores.new_full(shape, _NEG_INF)
    sizes = [1] * len(shape)
    sizes[head_dim] = -1
    return sinks.to(scores.dtype).reshape(sizes).expand(shape)


def _dequantise(x: Tensor, descale: Tensor | float | None, kv_heads: int) -> Tensor:
    """Multiply (B, S, heads, D) by a descale that is a scalar, (Hkv,) or (B, Hkv)."""
    if descale is None:
        return x if x.dtype.itemsize > 1 else x.to(torch.float32)
    factor = torch.as_tensor(descale, dtype=torch.float64, device=x.device)
    if factor.ndim > 0:
        factor = factor.reshape(-1, 1, kv_heads, 1).repeat_interleave(x.shape[2] // kv_heads, dim=2)
    return x.to(torch.float64) * factor


def _each_sequence(
    attend: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend within every sequence, and put the results one after the other before the rows of none."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    rest = q.shape[0] - starts_q[-1]
    outs = [torch.zeros(rest, q.shape[1], v.shape[2], dtype=dtype, device=q.device)]
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lses = [torch.full((q.shape[1], rest), _NEG_INF, dtype=lse_dtype, device=q.device)]
    for b in reversed(range(len(starts_q) - 1)):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        own = {name: _of_sequence(name, value, b) for name, value in options.items()}
        out, lse = attend(q[rows].unsqueeze(0), k[keys].unsqueeze(0), v[keys].unsqueeze(0), **own)
        outs.insert(0, out[0])
        lses.insert(0, lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def _of_sequence(name: str, value: object, b: int) -> object:
    """Return what sequence b has of an option: row b of slopes (B, H) and descales (B, Hkv)."""
    per_sequence = name == "alibi_slopes" or name.endswith("_descale")
    return value[b] if per_sequence and isinstance(value, Tensor) and value.ndim == 2 else value
