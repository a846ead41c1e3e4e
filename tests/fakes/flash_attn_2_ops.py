"""A stand-in for the operators of flash-attn 2.8.3 on CPU tensors: signatures, checks and conventions.

Read in the sdist of flash-attn 2.8.3.post2: flash_attn/flash_attn_interface.py (signatures, padding, autograd),
csrc/flash_attn/flash_api.cpp (checks, window clamps, decode swap), csrc/flash_attn/src/{mask.h, softmax.h, alibi.h,
flash_fwd_kernel.h, flash_bwd_kernel.h, flash_bwd_preprocess_kernel.h}. Only the check for a CUDA device is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fakes import kernel
from fakes.kernel import INF, check


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


class _Mask:
    """What one launch does to scores: flash_api.cpp's window clamps, then mask.h."""

    def __init__(
        self, seqlen_q: int, seqlen_k: int, causal: bool, left: int, right: int, alibi: Tensor | None, *,
        forward: bool,
    ) -> None:  # fmt: skip
        # mha_fwd and mha_varlen_fwd; lengths are the *maximum* lengths of a packed batch.
        left, right = (-1 if left >= seqlen_k else left), (-1 if right >= seqlen_k else right)
        if forward and seqlen_q == 1 and alibi is None:
            causal = False
        if causal:
            right = 0
        # set_params_fprop: the causal kernel is chosen by the window, not by the flag. An unlimited side of a window
        # becomes seqlen_k *from the diagonal*: with Sq > Sk, that is a limit.
        self.is_causal = left < 0 and right == 0
        if left < 0 and right >= 0:
            left = seqlen_k
        elif left >= 0 and right < 0:
            right = seqlen_k
        self.left: int | None = None if self.is_causal or left < 0 else left
        self.right: int | None = None if right < 0 else right
        self.alibi = alibi

    def visible(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        return kernel.band(seqlen_q, seqlen_k, self.left, self.right)

    def bias(self, seqlen_q: int, seqlen_k: int, b: int | None = None) -> Tensor | None:
        """alibi.h, mask.h: slope * j in the causal kernel, else -slope * |i + Sk - Sq - j|."""
        if self.alibi is None:
            return None
        slopes = self.alibi if b is None or self.alibi.dim() == 1 else self.alibi[b]
        if self.is_causal:
            steps = torch.arange(seqlen_k).expand(seqlen_q, seqlen_k)
        else:
            steps = -kernel.distance(seqlen_q, seqlen_k).abs()
        return slopes.double()[..., None, None] * steps


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, p_dropout: float, softcap: float, heads_k: int) -> None:
    check(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    check(k.dtype == q.dtype, "query and key must have the same dtype")
    check(v.dtype == q.dtype, "query and value must have the same dtype")
    for x in (q, k, v):
        check(x.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    check(q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256")
    check(q.shape[-1] % 8 == 0, "query, key, value, and out_ must have a head_size that is a multiple of 8")
    check(q.shape[-2] % heads_k == 0, "Number of heads in key/value must divide number of heads in query")
    check(softcap <= 0.0 or p_dropout == 0.0, "Softcapping does not support dropout for now")
    check(p_dropout < 1.0, "Expected p_dropout < 1.f to be true, but got false.")


def _check_shape(name: str, x: Tensor, *shape: int) -> None:
    check(tuple(x.shape) == shape, f"{name} must have shape {shape}, got {tuple(x.shape)}")


def _check_alibi(alibi_slopes: Tensor | None, batch: int, heads: int) -> None:
    if alibi_slopes is None:
        return
    check(alibi_slopes.dtype == torch.float32, "ALiBi slopes must have dtype fp32")
    check(alibi_slopes.stride(-1) == 1, "ALiBi slopes tensor must have contiguous last dimension")
    check(tuple(alibi_slopes.shape) in ((heads,), (batch, heads)), "ALiBi slopes must be (H,) or (B, H)")


def _check_int32(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None:
            check(x.dtype == torch.int32, f"{name} must have dtype int32")
            check(x.is_contiguous(), f"{name} must be contiguous")


def _check_table(block_table: Tensor, batch: int) -> None:
    check(block_table.dtype == torch.int32, "block_table must have dtype torch.int32")
    check(block_table.stride(-1) == 1, "block_table must have contiguous last dimension")
    check(block_table.shape[0] == batch, f"block_table must have shape ({batch}, max_num_blocks_per_seq)")


def _rng(p_dropout: float) -> Tensor:
    # fwd allocates it always and the kernel fills it only with dropout.
    return kernel.draw_rng_state() if p_dropout > 0.0 else torch.full((2,), -(2**62), dtype=torch.int64)


def _probabilities(q: Tensor, k: Tensor, scale: float, mask: _Mask, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """S_dmask: probabilities padded to multiples of 128, negative where they were dropped."""
    eye = torch.eye(k.shape[1], dtype=torch.float64)[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    p, _ = kernel.forward(
        q, k, eye, scale=scale, visible=mask.visible(seqlen_q, seqlen_k), bias=mask.bias(seqlen_q, seqlen_k)
    )
    signed = torch.where(kept, 1.0, -1.0) * p.transpose(1, 2)
    out = torch.zeros(*shape, dtype=torch.float64)
    out[..., :seqlen_q, :seqlen_k] = signed
    return out.to(q.dtype)


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = [maybe_contiguous(x) for x in (q, k, v)]
    batch, seqlen_q, heads, dim = q.shape
    seqlen_k, heads_k = k.shape[1], k.shape[2]
    check(batch > 0, "batch size must be positive")
    _check_inputs(q, k, v, dropout_p, softcap, heads_k)
    _check_shape("k", k, batch, seqlen_k, heads_k, dim)
    _check_shape("v", v, batch, seqlen_k, heads_k, dim)
    _check_alibi(alibi_slopes, batch, heads)
    check(not return_softmax or dropout_p > 0.0, "return_softmax is only supported when p_dropout > 0.0")
    check(seqlen_q > 0 or seqlen_k == 0, "CUDA error: invalid configuration argument")
    kernel.check_aligned(q=q, k=k, v=v)

    mask = _Mask(seqlen_q, seqlen_k, causal, window_size_left, window_size_right, alibi_slopes, forward=True)
    rng_state, keep = _rng(dropout_p), 1.0 - dropout_p
    kept = kernel.dropout_mask(rng_state, (batch, heads, seqlen_q, seqlen_k), keep) if dropout_p > 0 else None
    out, lse = kernel.forward(
        q, k, v, scale=softmax_scale, softcap=softcap, visible=mask.visible(seqlen_q, seqlen_k),
        bias=mask.bias(seqlen_q, seqlen_k), kept=kept, keep=keep,
    )  # fmt: skip
    s_dmask = torch.empty(0, dtype=q.dtype)
    if return_softmax:
        shape = (batch, heads, kernel.round_up(seqlen_q, 128), kernel.round_up(seqlen_k, 128))
        s_dmask = _probabilities(q, k, softmax_scale, mask, kept, shape)
    # softmax.h normalize_softmax_lse, and the combine kernel of split-KV: +inf where nothing was seen.
    return out.to(q.dtype), torch.where(lse == -INF, INF, lse).float(), s_dmask, rng_state


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = [maybe_contiguous(x) for x in (q, k, v)]
    batch, (total_q, heads, dim) = cu_seqlens_q.numel() - 1, q.shape
    heads_k = k.shape[-2]
    _check_int32(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k)
    _check_inputs(q, k, v, dropout_p, softcap, heads_k)
    check(batch > 0, "batch size must be positive")
    check(leftpad_k is None and not return_softmax, "the fake does not model leftpad_k and return_softmax here")
    if block_table is not None:
        _check_table(block_table, batch)
        check(k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    _check_shape("k", k, *k.shape[:-2], heads_k, dim)
    _check_shape("v", v, *k.shape)
    _check_shape("cu_seqlens_k", cu_seqlens_k, batch + 1)
    _check_alibi(alibi_slopes, batch, heads)
    check(max_seqlen_q > 0 or max_seqlen_k == 0, "CUDA error: invalid configuration argument")
    kernel.check_aligned(q=q, k=k, v=v)

    # One query per sequence and grouped heads: the queries of a group become rows, and cu_seqlens_q is not read.
    swapped = (
        max_seqlen_q == 1 and heads > heads_k and window_size_left < 0 and window_size_right < 0
        and dropout_p == 0.0 and alibi_slopes is None
    )  # fmt: skip
    if swapped:
        size = (batch, heads_k, heads // heads_k, dim)
        check(total_q == batch, f"shape '{list(size)}' is invalid for input of size {q.numel()}")
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32)

    mask = _Mask(max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right, alibi_slopes, forward=True)
    rng_state, keep = _rng(dropout_p), 1.0 - dropout_p
    out = kernel.garbage(total_q, heads, dim, dtype=q.dtype)
    lse = kernel.garbage(heads, total_q, dtype=torch.float32)
    if zero_tensors or max_seqlen_k == 0:
        out.zero_()
        lse.fill_(INF if max_seqlen_k == 0 else -INF)
    if max_seqlen_k == 0:
        return out, lse, torch.empty(0, dtype=q.dtype), rng_state
    total_k = int(cu_seqlens_k[-1]) if block_table is not None else k.shape[0]
    for b, rows, keys in kernel.sequences(cu_seqlens_q, cu_seqlens_k, total_q, total_k):
        rows = slice(rows.start, min(rows.stop, rows.start + max_seqlen_q))
        used = keys.stop - keys.start if seqused_k is None else int(seqused_k[b])
        if block_table is not None:
            k_b, v_b = _gather(k, block_table[b], used), _gather(v, block_table[b], used)
        else:
            k_b, v_b = k[keys.start : keys.start + used], v[keys.start : keys.start + used]
        seqlen_q = rows.stop - rows.start
        shape = (1, heads, seqlen_q, used)
        kept = kernel.dropout_mask(rng_state, shape, keep, b) if dropout_p > 0 else None
        out_b, lse_b = kernel.forward(
            q[None, rows], k_b[None], v_b[None], scale=softmax_scale, softcap=softcap,
            visible=mask.visible(seqlen_q, used), bias=mask.bias(seqlen_q, used, b), kept=kept, keep=keep,
        )  # fmt: skip
        out[rows], lse[:, rows] = out_b[0].to(q.dtype), torch.where(lse_b == -INF, INF, lse_b)[0].float()
    return out, lse, torch.empty(0, dtype=q.dtype), rng_state


def _gather(cache: Tensor, blocks: Tensor, used: int) -> Tensor:
    """Read a sequence's rows from its blocks, no block more than it needs."""
    needed = blocks[: -(-used // cache.shape[1])].long()
    return cache[needed].flatten(0, 1)[:used]


def _check_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grads: tuple[Tensor | None, ...],
    dropout_p: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_inputs(q, k, v, dropout_p, softcap, k.shape[-2])
    check(out.dtype == q.dtype, "query and out must have the same dtype")
    check(dout.dtype == q.dtype, "query and dout must have the same dtype")
    for name, x, like in (("k", k, None), ("v", v, k), ("out", out, q), ("dout", dout, q)):
        if like is not None:
            _check_shape(name, x, *like.shape)
    check(k.shape[-1] == q.shape[-1], "k must have q's head size")
    result = []
    for name, grad, like in zip(("dq", "dk", "dv"), grads, (q, k, v), strict=True):
        grad = kernel.garbage(*like.shape, dtype=like.dtype) if grad is None else grad
        check(grad.dtype == like.dtype, f"{name} must have the same dtype as q")
        check(grad.stride(-1) == 1, f"{name} must have contiguous last dimension")
        _check_shape(name, grad, *like.shape)
        result.append(grad)
    # Not checked by the library: the kernel reads the LSE as densely packed float32.
    check(lse.dtype == torch.float32 and lse.is_contiguous(), "softmax_lse is read as dense float32")
    kernel.check_aligned(q=q, k=k, v=v, out=out, dout=dout, dq=result[0], dk=result[1], dv=result[2])
    return result[0], result[1], result[2]


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    dout, q, k, v, out = [maybe_contiguous(x) for x in (dout, q, k, v, out)]
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[1]
    check(batch > 0, "batch size must be positive")
    dq, dk, dv = _check_backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), dropout_p, softcap)
    _check_alibi(alibi_slopes, batch, heads)
    check(softmax_lse.numel() == batch * heads * seqlen_q, "softmax_lse is read as (B, H, Sq)")
    softmax_d = kernel.garbage(batch, heads, kernel.round_up(seqlen_q, 128), dtype=torch.float32)
    if seqlen_q == 0:
        dk.zero_(), dv.zero_(), softmax_d.zero_()
        return softmax_d
    check(seqlen_k > 0, "CUDA error: invalid configuration argument")

    mask = _Mask(seqlen_q, seqlen_k, causal, window_size_left, window_size_right, alibi_slopes, forward=False)
    keep, kept = 1.0 - dropout_p, None
    if dropout_p > 0.0:
        rng_state = kernel.draw_rng_state() if rng_state is None else rng_state
        kept = kernel.dropout_mask(rng_state, (batch, heads, seqlen_q, seqlen_k), keep)
    delta = kernel.delta_of(dout, out)
    grads = kernel.backward(
        dout, q, k, v, softmax_lse.view(batch, heads, seqlen_q), delta, scale=softmax_scale, softcap=softcap,
        visible=mask.visible(seqlen_q, seqlen_k), bias=mask.bias(seqlen_q, seqlen_k), kept=kept, keep=keep,
    )  # fmt: skip
    for into, grad in zip((dq, dk, dv), grads[:3], strict=True):
        into.copy_(grad)
    softmax_d[..., :seqlen_q] = delta * keep
    return softmax_d


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> torch.Tensor:
    dout, q, k, v, out = [maybe_contiguous(x) for x in (dout, q, k, v, out)]
    batch, (total_q, heads, _), (total_k, heads_k, _) = cu_seqlens_q.numel() - 1, q.shape, k.shape
    _check_int32(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check(batch > 0, "batch size must be positive")
    dq, dk, dv = _check_backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), dropout_p, softcap)
    _check_shape("cu_seqlens_k", cu_seqlens_k, batch + 1)
    _check_alibi(alibi_slopes, batch, heads)
    check(softmax_lse.numel() == heads * total_q, "softmax_lse is read as (H, total_q)")
    softmax_d = kernel.garbage(heads, total_q + 128 * batch, dtype=torch.float32)
    # With grouped heads dk and dv come from uninitialised buffers of H heads, summed over *all* rows: rows outside
    # the sequences are garbage even where the caller had zeroed them. zero_tensors clears everything first.
    if zero_tensors:
        dq.zero_(), dk.zero_(), dv.zero_()
    elif heads != heads_k:
        dk.fill_(torch.nan), dv.fill_(torch.nan)
    if max_seqlen_q == 0:
        dk.zero_(), dv.zero_()
        return softmax_d
    check(max_seqlen_k > 0, "CUDA error: invalid configuration argument")

    mask = _Mask(max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right, alibi_slopes, forward=False)
    keep = 1.0 - dropout_p
    if dropout_p > 0.0 and rng_state is None:
        rng_state = kernel.draw_rng_state()
    lse = softmax_lse.view(heads, total_q)
    for b, rows, keys in kernel.sequences(cu_seqlens_q, cu_seqlens_k, total_q, total_k):
        seqlen_q, seqlen_k = rows.stop - rows.start, keys.stop - keys.start
        check(seqlen_q <= max_seqlen_q and seqlen_k <= max_seqlen_k, "a maximum length is too small")
        shape = (1, heads, seqlen_q, seqlen_k)
        kept = kernel.dropout_mask(rng_state, shape, keep, b) if dropout_p > 0.0 else None
        delta = kernel.delta_of(dout[None, rows], out[None, rows])
        grads = kernel.backward(
            dout[None, rows], q[None, rows], k[None, keys], v[None, keys], lse[None, :, rows], delta,
            scale=softmax_scale, softcap=softcap, visible=mask.visible(seqlen_q, seqlen_k),
            bias=mask.bias(seqlen_q, seqlen_k, b), kept=kept, keep=keep,
        )  # fmt: skip
        dq[rows], dk[keys], dv[keys] = (grad[0].to(q.dtype) for grad in grads[:3])
    return softmax_d


# With torch 2.4 and newer these are the registered operators of the same names and parameters.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
