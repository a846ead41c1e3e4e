"""A stand-in for the package flash_attn 2.8.3 on CPU tensors: what a user calls.

Read in flash_attn/flash_attn_interface.py of flash-attn 2.8.3.post2; the operators below it are in
``flash_attn_2_ops``. Two conventions live here: head sizes that are no multiple of 8 are padded, so that ``out`` is
then a view of a larger tensor; and the log-sum-exp that is returned looks differentiable, but its gradient is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fakes import kernel
from fakes.flash_attn_2_ops import (
    _check_int32,
    _check_table,
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _gather,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
    maybe_contiguous,
)
from fakes.kernel import check

__version__ = "2.8.3"

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]


def _pad_to_8(*tensors: Tensor) -> list[Tensor]:
    return [torch.nn.functional.pad(x, [0, -x.shape[-1] % 8]) if x.shape[-1] % 8 else x for x in tensors]


class _FlashAttnFunc(torch.autograd.Function):
    """Both FlashAttnFunc and FlashAttnVarlenFunc: ``lengths`` is empty, or cu_seqlens and maximum lengths."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Any, ...], o: dict[str, Any]) -> Any:
        ctx.head_size, o = q.shape[-1], dict(o)
        return_softmax, block_table = o.pop("return_softmax"), o.pop("block_table")
        ctx.deterministic = o.pop("deterministic")
        if o["softmax_scale"] is None:
            o["softmax_scale"] = q.shape[-1] ** (-0.5)
        q, k, v = _pad_to_8(q, k, v)
        keep_softmax = return_softmax and o["dropout_p"] > 0
        if lengths:
            paged = {"block_table": block_table}
            out, lse, s_dmask, rng = _wrapped_flash_attn_varlen_forward(q, k, v, *lengths, **o, **paged)
        else:
            out, lse, s_dmask, rng = _wrapped_flash_attn_forward(q, k, v, **o, return_softmax=keep_softmax)
        ctx.save_for_backward(q, k, v, out, lse, rng)
        ctx.lengths, ctx.options = lengths, o
        out = out[..., : ctx.head_size]
        return (out, lse, s_dmask) if return_softmax else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *ignored: Any) -> Any:
        q, k, v, out, lse, rng = ctx.saved_tensors
        grads = tuple(kernel.garbage(*x.shape, dtype=x.dtype) for x in (q, k, v))  # torch.empty_like there
        run = _wrapped_flash_attn_varlen_backward if ctx.lengths else _wrapped_flash_attn_backward
        run(
            *_pad_to_8(dout), q, k, v, out, lse, *grads, *ctx.lengths, **ctx.options,
            deterministic=ctx.deterministic, rng_state=rng,
        )  # fmt: skip
        return *(grad[..., : ctx.head_size] for grad in grads), None, None


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    options = {
        "dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal,
        "window_size_left": window_size[0], "window_size_right": window_size[1], "softcap": softcap,
        "alibi_slopes": alibi_slopes, "deterministic": deterministic, "return_softmax": return_attn_probs,
        "block_table": None,
    }  # fmt: skip
    return _FlashAttnFunc.apply(q, k, v, (), options)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    options = {
        "dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal,
        "window_size_left": window_size[0], "window_size_right": window_size[1], "softcap": softcap,
        "alibi_slopes": alibi_slopes, "deterministic": deterministic, "return_softmax": return_attn_probs,
        "block_table": block_table,
    }  # fmt: skip
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _FlashAttnFunc.apply(q, k, v, lengths, options)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Attend to a cache; appending, rotary embeddings, left padding and batch indices are not modelled."""
    modelled = all(x is None for x in (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad))
    check(modelled, "the fake of flash_attn_with_kvcache only reads a cache")
    assert k_cache.stride(-1) == 1, "k_cache must have contiguous last dimension"
    assert v_cache.stride(-1) == 1, "v_cache must have contiguous last dimension"
    q = maybe_contiguous(q)
    kernel.check_aligned(q=q, k_cache=k_cache, v_cache=v_cache)
    batch, seqlen_q, heads, dim = q.shape
    softmax_scale = dim ** (-0.5) if softmax_scale is None else softmax_scale
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((k_cache.shape[0],), cache_seqlens, dtype=torch.int32)
    if block_table is not None:
        _check_table(block_table, batch)
        check(k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    _check_int32(seqlens_k=cache_seqlens)
    check(cache_seqlens is None or tuple(cache_seqlens.shape) == (batch,), f"seqlens_k must have shape ({batch})")
    capacity = k_cache.shape[1] * (block_table.shape[1] if block_table is not None else 1)
    used = [capacity] * batch if cache_seqlens is None else cache_seqlens.tolist()
    out = kernel.garbage(batch, seqlen_q, heads, dim, dtype=q.dtype)
    lse = kernel.garbage(batch, heads, seqlen_q, dtype=torch.float32)
    for b in range(batch):
        keys, values = (
            _gather(cache, block_table[b], used[b]) if block_table is not None else cache[b, : used[b]]
            for cache in (k_cache, v_cache)
        )
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        # The windows of mha_fwd_kvcache are clamped by the capacity of the cache, not by the sequence.
        out_b, lse_b, _, _ = _flash_attn_varlen_forward(
            *_pad_to_8(q[b], keys, values), torch.tensor([0, seqlen_q], dtype=torch.int32),
            torch.tensor([0, used[b]], dtype=torch.int32), seqlen_q, max(capacity, 1), 0.0, softmax_scale, causal,
            *window_size, softcap, slopes,
        )  # fmt: skip
        out[b], lse[b] = out_b[..., :dim], lse_b
    return (out, lse) if return_softmax_lse else out
