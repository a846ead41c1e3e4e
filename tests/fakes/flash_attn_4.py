"""A stand-in on CPU tensors for flash-attn-4 4.0.0b36 (modules flash_attn.cute and flash_attn.cute.interface).

Read in flash_attn/cute/interface.py of that release: signatures, checks (assertions there, not RuntimeErrors), the
resolution of windows, empty inputs, what is returned; and in flash_bwd_preprocess.py and softmax.py (LSE, sinks).

A window side is unlimited when it is None. **A negative number is a limit**, unless both sides are negative. The LSE is
computed only for ``return_lse`` or when an input requires a gradient. Rows past seqused_k in a sequence's last page
must be finite. ``flash_attn.cute.__version__`` really is "0.0.0": ask importlib.metadata for flash-attn-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fakes import kernel

__version__ = "0.0.0"

# The architecture that this stand-in pretends to run on (there: torch.cuda or FLASH_ATTENTION_ARCH); a test may set it.
ARCH = 90


def _maybe_contiguous(x: Tensor | None) -> Tensor | None:
    if x is None or x.dim() == 0:
        return x
    return x.contiguous() if x.stride(-1) != 1 else x


def _resolve_window(causal: bool, left: int | None, right: int | None) -> tuple[int | None, int | None]:
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    return left, (0 if causal else right)


def _validate_head_dims(dim: int, dim_v: int, arch: int, alignment: int) -> None:
    aligned = dim % alignment == 0 and dim_v % alignment == 0
    if arch == 9:
        assert aligned and 8 <= dim <= 256 and 8 <= dim_v <= 256, f"({dim}, {dim_v}) is not supported on SM90"
    elif arch in (10, 11):
        special = (dim, dim_v) in ((192, 128), (256, 256)) or (dim in (64, dim_v) and dim_v == 512)
        standard = 8 <= dim <= 128 and 8 <= dim_v <= 128
        assert aligned and (standard or special), f"({dim}, {dim_v}) is not supported on SM100/SM110"


def _check(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *lengths: Tensor | None) -> None:
    assert q.dtype == k.dtype == v.dtype, "q, k, v, and qv must have the same dtype"
    assert q.dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn), "inputs must be float16, bfloat16 or fp8"
    assert q.dtype.itemsize > 1 or ARCH // 10 == 10, "FP8 is only supported on SM100"
    for x in lengths:
        assert x is None or (x.dtype == torch.int32 and x.stride(0) == 1), "lengths must be int32 and contiguous"
    if sink is not None:
        assert sink.shape == (q.shape[-2],)
        assert sink.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert q.shape[-2] % k.shape[-2] == 0, "num_head must be divisible by num_head_kv"
    assert k.shape[-1] == q.shape[-1] and k.shape[:-1] == v.shape[:-1]
    if ARCH // 10 not in (8, 12):
        _validate_head_dims(q.shape[-1], v.shape[-1], ARCH // 10, 16 // v.element_size())


def _unmodelled(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"the fake does not model {name}")


def _rows(x: Tensor, cu: Tensor | None, used: Tensor | None, b: int) -> Any:
    """Index of what sequence b has of a dense or a packed tensor."""
    if cu is None:
        return (b, slice(0, x.shape[1] if used is None else int(used[b])))
    start, stop = cu.tolist()[b : b + 2]
    kernel.check(stop <= x.shape[0], "CUDA error: an illegal memory access was encountered")
    return (slice(start, stop if used is None else start + int(used[b])),)


def _poisoned(x: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Tell whether NaN lies past the last packed sequence: whole tiles are loaded and multiplied by a probability of 0.

    Seen for v in the forward on an H200 (4.0.0b36, torch 2.11); the other products of the backward are of one kind.
    """
    return cu_seqlens is not None and bool(x[int(cu_seqlens[-1]) :].isnan().any())


def _flash_attn_fwd(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: torch.Tensor | None = None,
    tile_mn: tuple[int, int] | None = None,
    mma_pv_is_rs: bool | None = None,
    intra_wg_overlap: bool | None = None,
    num_threads: int = 384,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    _arch: int | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    block_sparse_tensors: Any | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    aux_tensors: list[torch.Tensor] | None = None,
    aux_scalars: tuple | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    scheduler_metadata: Any | None = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    _unmodelled(
        qv=qv, score_mod=score_mod, mask_mod=mask_mod, block_sparse_tensors=block_sparse_tensors, out=out, lse=lse,
        aux_tensors=aux_tensors, gather_kv_indices=gather_kv_indices,
    )  # fmt: skip
    requires_grad = any(x is not None and x.requires_grad for x in (q, k, v, learnable_sink))
    q, k, v = (_maybe_contiguous(x) for x in (q, k, v))
    _check(q, k, v, learnable_sink, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    fp8, heads, heads_k = q.dtype.itemsize == 1, q.shape[-2], k.shape[-2]
    if fp8 and requires_grad:
        raise NotImplementedError("FA4 CuTe FP8 backward is not supported yet (forward-only).")
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if page_table is not None:
        assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
        assert page_table.dtype == torch.int32 and page_table.shape[0] == batch
        assert ARCH // 10 not in (8, 12), "paged KV is not supported on SM80/SM120"
    assert seqused_k is None or seqused_k.shape == (batch,), "seqused_k must have shape (batch_size,)"
    descales = (q_descale, k_descale, v_descale)
    assert fp8 or all(x is None for x in descales), "descales are only supported for FP8 inputs"
    assert all(x is None or (x.shape == (batch, heads_k) and x.dtype == torch.float32) for x in descales)
    softmax_scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale

    dtype = torch.bfloat16 if fp8 else q.dtype
    result = kernel.garbage(*q.shape[:-1], v.shape[-1], dtype=dtype)
    shape = (batch, heads, q.shape[1]) if cu_seqlens_q is None else (heads, q.shape[0])
    sums = kernel.garbage(*shape, dtype=torch.float32)
    keep_lse = requires_grad or return_lse
    seqlen_k = k.shape[-3] if page_table is None else k.shape[0] * k.shape[1]
    if seqlen_k == 0 or result.numel() == 0:
        empty = torch.full((heads,), -math.inf) if learnable_sink is None else learnable_sink.float()
        return result.zero_(), sums.copy_(empty[:, None]) if keep_lse else None, None, None, None
    window = _resolve_window(causal, window_size_left, window_size_right)
    for b in range(batch):
        at_q = _rows(q, cu_seqlens_q, seqused_q, b)
        rows = q[at_q].shape[0]
        if page_table is not None:
            keys = int(seqused_k[b]) if seqused_k is not None else page_table.shape[1] * k.shape[1]
            blocks = page_table[b, : -(-keys // k.shape[1])].long()
            k_b, v_b = (x.double()[blocks].flatten(0, 1) for x in (k, v))  # whole pages: 0 * NaN is NaN
        else:
            at_k = _rows(k, cu_seqlens_k, seqused_k, b)
            k_b, v_b = k[at_k].double(), v[at_k].double()
            keys = k_b.shape[0]
        visible = torch.zeros(rows, k_b.shape[0], dtype=torch.bool)
        visible[:, :keys] = kernel.band(rows, keys, *window)
        parts = [q[at_q].double(), k_b, v_b]
        for i, descale in enumerate(descales):
            if descale is not None:
                group = parts[i].shape[-2] // heads_k
                parts[i] = parts[i] * descale[b].double().repeat_interleave(group)[:, None]
        out_b, lse_b = kernel.forward(
            *(x[None] for x in parts), scale=softmax_scale, softcap=softcap or 0.0, visible=visible,
            sink=learnable_sink,
        )  # fmt: skip
        result[at_q] = out_b[0].to(dtype)
        if cu_seqlens_q is None:
            sums[b, :, :rows] = lse_b[0].float()
        else:
            sums[:, at_q[0]] = lse_b[0].float()
    if _poisoned(v, cu_seqlens_k):
        result.fill_(float("nan"))
    return result, sums if keep_lse else None, None, None, None


def _flash_attn_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    m_block_size: int = 64,
    n_block_size: int = 128,
    num_threads: int = 256,
    pack_gqa: bool = False,
    num_stages_Q: int = 2,
    num_stages_dO: int = 2,
    SdP_swapAB: bool = False,
    dKV_swapAB: bool = False,
    dQ_swapAB: bool = False,
    AtomLayoutMSdP: int = 2,
    AtomLayoutNdKV: int = 2,
    AtomLayoutMdQ: int = 2,
    V_in_regs: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: list[torch.Tensor] | None = None,
    aux_scalars: tuple | None = None,
    block_sparse_tensors: Any | None = None,
    dlse: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    _unmodelled(score_mod=score_mod, mask_mod=mask_mod, block_sparse_tensors=block_sparse_tensors)
    assert ARCH // 10 in (9, 10, 11, 12), "Unsupported compute capability. Supported: 9.x, 10.x, 11.x, 12.x"
    assert not (deterministic and ARCH // 10 == 12), "deterministic backward not supported on SM 12.0"
    assert learnable_sink is None or ARCH // 10 in (9, 10, 11), "Learnable sink backward: SM90 and SM100/SM110"
    if q.numel() == 0 or k.numel() == 0:
        grads = [torch.zeros_like(x) if g is None else g.zero_() for x, g in ((q, dq), (k, dk), (v, dv))]
        if learnable_sink is None:
            return tuple(grads)
        dsink = torch.zeros_like(learnable_sink)
        if dlse is not None:
            dsink = dlse.sum(dim=(0, 2) if dlse.ndim == 3 else 1).to(learnable_sink.dtype)
        return *grads, dsink
    q, k, v, out, dout, lse, dlse = (_maybe_contiguous(x) for x in (q, k, v, out, dout, lse, dlse))
    _check(q, k, v, learnable_sink, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    assert q.dtype in (torch.float16, torch.bfloat16), "inputs must be float16 or bfloat16"
    assert out.dtype == q.dtype and dout.dtype == q.dtype, "inputs must have the same dtype"
    assert out.shape == dout.shape == (*q.shape[:-1], v.shape[-1])
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    shape = (batch, q.shape[2], q.shape[1]) if cu_seqlens_q is None else (q.shape[1], q.shape[0])
    assert lse.shape == shape and lse.dtype == torch.float32, f"lse must be float32 with shape {shape}"
    assert dlse is None or dlse.shape == shape
    softmax_scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    grads = [kernel.garbage(*x.shape, dtype=x.dtype) if g is None else g for x, g in ((q, dq), (k, dk), (v, dv))]
    for grad, like in zip(grads, (q, k, v), strict=True):
        assert grad.shape == like.shape and grad.dtype == like.dtype
    window = _resolve_window(causal, window_size_left, window_size_right)
    dsink = torch.zeros(q.shape[-2], dtype=torch.float64)
    for b in range(batch):
        at_q, at_k = _rows(q, cu_seqlens_q, seqused_q, b), _rows(k, cu_seqlens_k, seqused_k, b)
        rows, keys = q[at_q].shape[0], k[at_k].shape[0]
        at_lse = (b, slice(None), slice(0, rows)) if cu_seqlens_q is None else (slice(None), at_q[0])
        # flash_bwd_preprocess.py: dpsum = rowsum(dout * out) - dlse
        delta = kernel.delta_of(dout[at_q][None], out[at_q][None])
        delta = delta if dlse is None else delta - dlse[at_lse].double()[None]
        result = kernel.backward(
            dout[at_q][None], q[at_q][None], k[at_k][None], v[at_k][None], lse[at_lse][None], delta,
            scale=softmax_scale, softcap=softcap, visible=kernel.band(rows, keys, *window),
        )  # fmt: skip
        for into, grad, at in zip(grads, result[:3], (at_q, at_k, at_k), strict=True):
            into[at] = grad[0].to(into.dtype)
        if learnable_sink is not None:
            weight = torch.exp(learnable_sink.double()[:, None] - lse[at_lse].double())
            dsink -= (weight * delta[0]).sum(-1)
    rows = ((q, cu_seqlens_q), (dout, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    if any(_poisoned(x, cu) for x, cu in rows):
        for grad in grads:
            grad.fill_(float("nan"))
    if cu_seqlens_q is not None and q.shape[-1] == 48:
        grads[0].zero_()  # dq of the later rows stayed 0 (4.0.0b36, H200, torch 2.11)
    return tuple(grads) if learnable_sink is None else (*grads, dsink.to(learnable_sink.dtype))


class _FlashAttnFunc(torch.autograd.Function):
    """Both functions; differentiable in the LSE when it is asked for, always returns (out, lse or None)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, fwd: Any, bwd: Any) -> Any:
        if k is v and v.shape[-1] == 512:
            raise NotImplementedError("k is v with head size 512 means absorbed MLA: the fake does not model it")
        out, lse, *_ = _flash_attn_fwd(q, k, v, learnable_sink=sink, **fwd)
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.bwd, ctx.return_lse = bwd, fwd["return_lse"]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse, sink = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dlse = dlse if ctx.return_lse else None
        grads = _flash_attn_bwd(q, k, v, out, dout, lse, dlse=dlse, learnable_sink=sink, **ctx.bwd)
        return *grads, *([None] if sink is None else []), None, None


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: list | None = None,
    aux_scalars: tuple | None = None,
    block_sparse_tensors: Any | None = None,
    block_sparse_tensors_bwd: Any | None = None,
    return_lse: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
):
    shared = {
        "softmax_scale": softmax_scale, "causal": causal, "softcap": softcap, "window_size_left": window_size[0],
        "window_size_right": window_size[1], "score_mod": score_mod, "mask_mod": mask_mod, "aux_tensors": aux_tensors,
    }  # fmt: skip
    forward = {
        **shared, "qv": qv, "gather_kv_indices": gather_kv_indices, "return_lse": return_lse,
        "num_splits": num_splits, "pack_gqa": pack_gqa, "block_sparse_tensors": block_sparse_tensors,
    }  # fmt: skip
    return _FlashAttnFunc.apply(q, k, v, learnable_sink, forward, {**shared, "deterministic": deterministic})


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    gather_kv_indices: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: torch.Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    block_sparse_tensors: Any | None = None,
    aux_tensors: list | None = None,
    aux_scalars: tuple | None = None,
    return_lse: bool = False,
    scheduler_metadata: Any | None = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    gather_bwd_recompute_p: bool = False,
    gather_bwd_token_chunk: int | None = None,
):
    shared = {
        "softmax_scale": softmax_scale, "causal": causal, "softcap": softcap, "window_size_left": window_size[0],
        "window_size_right": window_size[1], "score_mod": score_mod, "mask_mod": mask_mod, "aux_tensors": aux_tensors,
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_q": seqused_q, "seqused_k": seqused_k,
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k,
    }  # fmt: skip
    forward = {
        **shared, "qv": qv, "gather_kv_indices": gather_kv_indices, "return_lse": return_lse,
        "page_table": page_table, "block_sparse_tensors": block_sparse_tensors,
    }  # fmt: skip
    return _FlashAttnFunc.apply(q, k, v, learnable_sink, forward, {**shared, "deterministic": deterministic})
