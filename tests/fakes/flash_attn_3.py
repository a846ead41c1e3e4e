"""A stand-in on CPU tensors for FlashAttention 3 (module flash_attn_interface, built from hopper/).

Read in flash-attention's hopper/flash_attn_interface.py (signatures), hopper/flash_api.cpp (checks, window clamps, the
LSE of an empty call), hopper/softmax.h and flash_bwd_preprocess_kernel.h (empty rows). Two forms of the operators have
been published: today's (``_flash_attn_forward``, ``_flash_attn_backward``: registered operators, one argument for each
side of the window, the backward returns only softmax_d) and the form in flash-attn's 2.8.3 sdist (``old_*`` here: a
window tuple, everything required, the backward returns dq, dk, dv, softmax_d). :mod:`fakes.install` installs either.

Empty rows have an LSE of -inf, but a call without any key at all fills it with +inf. No dropout, no ALiBi.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fakes import kernel
from fakes.kernel import INF, check

__version__ = "3.0.0"

_HALF = (torch.float16, torch.bfloat16)


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def _band(seqlen_q: int, seqlen_k: int, window: tuple[int | None, int | None]) -> Tensor:
    return kernel.band(seqlen_q, seqlen_k, *window)


def _window(causal: bool, left: int, right: int, max_q: int, max_k: int) -> tuple[int | None, int | None]:
    """flash_api.cpp: unlike FlashAttention 2's, these clamps never change the mask."""
    left, right = (-1 if left >= max_k - 1 else left), (-1 if right >= max_q - 1 else right)
    right = 0 if causal else right
    return (None if left < 0 else left), (None if right < 0 else right)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, *, forward: bool) -> None:
    allowed = (*_HALF, torch.float8_e4m3fn) if forward else _HALF
    check(q.dtype in allowed, "FlashAttention only supports fp16, bf16, and fp8_e4m3 data type")
    check(k.dtype == q.dtype, "query and key must have the same dtype")
    check(v.dtype == q.dtype, "query and value must have the same dtype")
    for x in (q, k, v):
        check(x.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    dim, dim_v, align = q.shape[-1], v.shape[-1], 16 if q.dtype.itemsize == 1 else 8
    check(dim <= 256, "FlashAttention forward only supports head dimension at most 256")
    check(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")
    check(k.shape[-1] == dim and k.shape[:-1] == v.shape[:-1], "k and v have the wrong shape")
    if dim_v != dim and forward:
        near = 128 < dim <= 192 and 96 < dim_v <= 128
        check(near or (dim <= 64 and dim_v <= 512), "If V headdim is different from Q/K dim, we only support ...")
    check(forward or max(dim, dim_v) <= 256, "FlashAttention forward only supports head dimension at most 256")
    check(dim % align == 0 and dim_v % align == 0, f"head_size should be a multiple of {align}")
    kernel.check_aligned(q=q, k=k, v=v)


def _check_int32(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        check(x is None or (x.dtype == torch.int32 and x.is_contiguous()), f"{name} must be int32 and contiguous")


def _dequantise(x: Tensor, descale: Tensor | None, b: int, heads_k: int) -> Tensor:
    x = x.double()
    if descale is None:
        return x
    per_head = descale[b].double().repeat_interleave(x.shape[-2] // heads_k)
    return x * per_head[:, None]


def _sequences(q, k, cu_q, cu_k, used_q, used_k, page_table) -> list[tuple[int, Any, Any, int, int]]:
    """List what belongs to each sequence: (number, index into q, index into k, rows, keys)."""
    batch = q.shape[0] if cu_q is None else cu_q.numel() - 1
    result = []
    for b in range(batch):
        if cu_q is None:
            start, rows = 0, q.shape[1]
        else:
            start, end = cu_q.tolist()[b : b + 2]
            rows = end - start
            check(end <= q.shape[0], "CUDA error: an illegal memory access was encountered")
        if cu_k is None:
            k_start = 0
            keys = k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]
        else:
            k_start, k_end = cu_k.tolist()[b : b + 2]
            keys = k_end - k_start
            check(k_end <= k.shape[0], "CUDA error: an illegal memory access was encountered")
        rows = rows if used_q is None else int(used_q[b])
        keys = keys if used_k is None else int(used_k[b])
        at_q = (b, slice(0, rows)) if cu_q is None else (slice(start, start + rows),)
        at_k = (b, slice(0, keys)) if cu_k is None else (slice(k_start, k_start + keys),)
        result.append((b, at_q, at_k, rows, keys))
    return result


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    out_: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: torch.Tensor | None = None,
    kv_batch_idx: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    seqlens_rotary: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    absent = (k_new, v_new, qv, out_, kv_batch_idx, leftpad_k, rotary_cos)
    check(all(x is None for x in absent) and not attention_chunk, "the fake does not model this argument")
    q, k = maybe_contiguous(q), maybe_contiguous(k)
    v = v.contiguous() if v.stride(-1) != 1 and v.stride(-3) != 1 else v
    _check_tensors(q, k, v, forward=True)
    _check_int32(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k
    )  # fmt: skip
    table = page_table is None or (page_table.dtype == torch.int32 and page_table.stride(-1) == 1)
    check(table, "page_table must be int32 with a contiguous last dimension")
    check(cu_seqlens_q is None or max_seqlen_q is not None, "max_seqlen_q must be provided if cu_seqlens_q is")
    check(cu_seqlens_k is None or max_seqlen_k is not None, "max_seqlen_k must be provided if cu_seqlens_k is")
    check(cu_seqlens_k is None or page_table is None, "If cu_seqlens_k is passed in, page table is not supported")
    check(softmax_scale is not None, "softmax_scale must be given")
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    heads, heads_k = q.shape[-2], k.shape[-2]
    for name, descale in (("q", q_descale), ("k", k_descale), ("v", v_descale)):
        shaped = descale is None or q.dtype in _HALF or tuple(descale.shape) == (batch, heads_k)
        check(shaped, f"{name}_descale must have shape (batch_size, num_heads_k)")
        check(descale is None or q.dtype in _HALF or descale.dtype == torch.float32, "expected scalar type Float")

    dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    out = kernel.garbage(*q.shape[:-1], v.shape[-1], dtype=dtype)
    lse_shape = (batch, heads, q.shape[1]) if cu_seqlens_q is None else (heads, q.shape[0])
    lse = kernel.garbage(*lse_shape, dtype=torch.float32)
    rest = (torch.tensor([]), torch.tensor([]))
    total_k = k.shape[0] if cu_seqlens_k is not None else batch * k.shape[1]
    if total_k == 0:
        return out.zero_(), lse.fill_(INF), *rest
    max_q = q.shape[1] if cu_seqlens_q is None else max_seqlen_q
    pages = k.shape[1] * page_table.shape[1] if page_table is not None else k.shape[1]
    max_k = pages if cu_seqlens_k is None else max_seqlen_k
    window = _window(causal, window_size_left, window_size_right, max_q, max_k)
    fp8 = q.dtype.itemsize == 1
    for b, at_q, at_k, rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table):
        if page_table is not None:
            blocks = page_table[b, : -(-keys // k.shape[1])].long()
            k_b, v_b = (x.double()[blocks].flatten(0, 1)[:keys] for x in (k, v))
        else:
            k_b, v_b = k[at_k], v[at_k]
        scales = (q_descale, k_descale, v_descale) if fp8 else (None, None, None)
        parts = [_dequantise(x, s, b, heads_k)[None] for x, s in zip((q[at_q], k_b, v_b), scales, strict=True)]
        out_b, lse_b = kernel.forward(*parts, scale=softmax_scale, softcap=softcap, visible=_band(rows, keys, window))
        out[at_q] = out_b[0].to(dtype)
        if cu_seqlens_q is None:
            lse[b, :, :rows] = lse_b[0].float()
        else:
            lse[:, at_q[0]] = lse_b[0].float()
    return out, lse, *rest


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    sequed_q: torch.Tensor | None = None,
    sequed_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> torch.Tensor:
    dout, q, k, v, out = [maybe_contiguous(x) for x in (dout, q, k, v, out)]
    _check_tensors(q, k, v, forward=False)
    check(out.dtype == q.dtype and dout.dtype == q.dtype, "out and dout must have the same dtype as query")
    check(out.shape == dout.shape == (*q.shape[:-1], v.shape[-1]), "out and dout have the wrong shape")
    _check_int32(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, sequed_q=sequed_q, sequed_k=sequed_k)
    check(cu_seqlens_q is None or max_seqlen_q is not None, "max_seqlen_q must be provided if cu_seqlens_q is")
    check(cu_seqlens_k is None or max_seqlen_k is not None, "max_seqlen_k must be provided if cu_seqlens_k is")
    for name, grad, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        check(grad is not None, f"{name} is allocated by the library and lost: pass one")
        check(grad.dtype == like.dtype and grad.shape == like.shape, f"{name} must have its input's dtype, shape")
        check(grad.stride(-1) == 1, f"{name} must have contiguous last dimension")
    # Read as dense float32, without a check.
    check(softmax_lse.dtype == torch.float32 and softmax_lse.is_contiguous(), "softmax_lse is read as dense float32")
    softmax_d = torch.empty(0)
    if q.numel() == 0 or k.numel() == 0:
        dq.zero_(), dk.zero_(), dv.zero_()
        return softmax_d
    max_q = q.shape[1] if cu_seqlens_q is None else max_seqlen_q
    max_k = k.shape[1] if cu_seqlens_k is None else max_seqlen_k
    window = _window(is_causal, window_size_left, window_size_right, max_q, max_k)
    for b, at_q, at_k, rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, None):
        check(rows <= max_q and keys <= max_k, "a maximum length is too small")
        lse = softmax_lse[b, :, :rows] if cu_seqlens_q is None else softmax_lse[:, at_q[0]]
        dout_b, out_b = dout[at_q][None], out[at_q][None]
        result = kernel.backward(
            dout_b, q[at_q][None], k[at_k][None], v[at_k][None], lse[None], kernel.delta_of(dout_b, out_b),
            scale=softmax_scale, softcap=softcap, visible=_band(rows, keys, window),
        )  # fmt: skip
        dq[at_q], dk[at_k], dv[at_k] = (grad[0].to(q.dtype) for grad in result[:3])
    return softmax_d


def old_flash_attn_forward(
    q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
    max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
    v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    return _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, *window_size, attention_chunk, softcap,
        rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip


def old_flash_attn_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq, dk,
    dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    softmax_d = _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, *window_size, softcap, deterministic, sm_margin,
    )  # fmt: skip
    return dq, dk, dv, softmax_d


class _FlashAttnFunc(torch.autograd.Function):
    """FlashAttnFunc and FlashAttnVarlenFunc; as there, the gradient of the LSE is ignored."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: dict[str, Any], o: dict[str, Any]) -> Any:
        o = dict(o)
        window, return_softmax, deterministic = (o.pop(x) for x in ("window_size", "return_lse", "deterministic"))
        if o["softmax_scale"] is None:
            o["softmax_scale"] = q.shape[-1] ** (-0.5)
        left, right = window
        out, lse, *_ = _flash_attn_forward(q, k, v, **lengths, **o, window_size_left=left, window_size_right=right)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.saved = (lengths, o, window, deterministic)
        return (out, lse) if return_softmax else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *ignored: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        lengths, o, (left, right), deterministic = ctx.saved
        grads = [kernel.garbage(*x.shape, dtype=x.dtype) for x in (q, k, v)]  # torch.empty_like there
        renamed = {key.replace("seqused", "sequed"): value for key, value in lengths.items()}
        _flash_attn_backward(
            dout, q, k, v, out, lse, **renamed, dq=grads[0], dk=grads[1], dv=grads[2],
            softmax_scale=o["softmax_scale"], is_causal=o["causal"], window_size_left=left, window_size_right=right,
            softcap=o["softcap"], deterministic=deterministic,
        )  # fmt: skip
        return *grads, None, None


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    options = {
        "softmax_scale": softmax_scale, "causal": causal, "qv": qv, "q_descale": q_descale, "k_descale": k_descale,
        "v_descale": v_descale, "window_size": window_size, "attention_chunk": attention_chunk, "softcap": softcap,
        "deterministic": deterministic, "return_lse": return_attn_probs,
    }  # fmt: skip
    return _FlashAttnFunc.apply(q, k, v, {}, options)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    options = {
        "softmax_scale": softmax_scale, "causal": causal, "qv": qv, "q_descale": q_descale, "k_descale": k_descale,
        "v_descale": v_descale, "window_size": window_size, "attention_chunk": attention_chunk, "softcap": softcap,
        "deterministic": deterministic, "return_lse": return_attn_probs,
    }  # fmt: skip
    lengths = {
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_q": seqused_q, "seqused_k": seqused_k,
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k,
    }  # fmt: skip
    return _FlashAttnFunc.apply(q, k, v, lengths, options)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    assert k_cache.stride(-1) == 1, "k_cache must have contiguous last dimension"
    assert v_cache.stride(-1) == 1, "v_cache must have contiguous last dimension"
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** (-0.5)
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32)
    out, lse, *_ = _flash_attn_forward(
        q, k_cache, v_cache, k, v, qv, None, cu_seqlens_q, None, cu_seqlens_k_new, None, cache_seqlens, max_seqlen_q,
        None, page_table, cache_batch_idx, cache_leftpad, rotary_cos, rotary_sin, rotary_seqlens, q_descale,
        k_descale, v_descale, softmax_scale, causal, window_size[0], window_size[1], attention_chunk, softcap,
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out
