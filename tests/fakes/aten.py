"""Stand-ins on CPU tensors for the CUDA attention operators of ATen, with the schemas of torch 2.13.

Read in pytorch's aten/src/ATen/native/transformers/cuda/attention.cu and attention_backward.cu (checks, shapes), in
flash_attn/flash_api.cpp, in mem_eff_attention/kernel_forward.h and kernel_backward.h (masks, LSE), in
aten/src/ATen/native/cudnn/MHA.cpp (cuDNN), and in torch/_meta_registrations.py (shapes).

Flash: (B, S, H, D) or packed (T, H, D); grouped heads; LSE +inf in empty rows; ``rng_state`` (2,) uint64.
Efficient: (B, S, H, D), equal heads; packed as (1, T, H, D); LSE padded to a multiple of 32 and *0.0* in empty rows.
cuDNN: (B, H, S, D), causal from the top left; LSE (B, H, Sq, 1); no tensors at all for empty inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fakes import flash_attn_2_ops as flash
from fakes import kernel
from fakes.kernel import INF, check

NO_MASK, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2


def _last_dim_contiguous(*tensors: Tensor) -> None:
    check(all(x.stride(-1) == 1 for x in tensors), "Input tensor must have contiguous last dimension")


def _flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
    num_splits=None,
):  # fmt: skip
    _last_dim_contiguous(query, key, value)
    # In the schema, not in the builds: PyTorch compiles the kernels with FLASHATTENTION_DISABLE_ALIBI. Seen on an H200.
    check(alibi_slopes is None, "This flash attention build does not support alibi.")
    check((cum_seq_q is None) == (cum_seq_k is None), "cumulative_sequence_length_q and _k must be both set or not")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    left = -1 if window_size_left is None else window_size_left
    right = -1 if window_size_right is None else window_size_right
    if cum_seq_q is not None:
        out, lse, mask, rng = flash._flash_attn_varlen_forward(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, scale, is_causal, left, right,
            alibi_slopes=alibi_slopes, return_softmax=return_debug_mask, seqused_k=seqused_k,
            block_table=block_table,
        )  # fmt: skip
    elif query.shape[0] == 0:
        out, mask, rng = torch.empty_like(query), torch.empty(0), kernel.draw_rng_state()
        lse = torch.empty(0, query.shape[2], query.shape[1])
    else:
        out, lse, mask, rng = flash._flash_attn_forward(
            query, key, value, dropout_p, scale, is_causal, left, right, 0.0, alibi_slopes, return_debug_mask
        )
    return out, lse, rng.to(torch.uint64), torch.empty((), dtype=torch.uint64), mask


def _flash_attention_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    # No ALiBi, no softcap, no seqused_k and no block table here: their forward has no backward.
    _last_dim_contiguous(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    left = -1 if window_size_left is None else window_size_left
    right = -1 if window_size_right is None else window_size_right
    grads = [kernel.garbage(*x.shape, dtype=x.dtype) for x in (query, key, value)]
    deterministic = torch.are_deterministic_algorithms_enabled()
    tensors = (grad_out.contiguous(), query, key, value, out.contiguous(), logsumexp, *grads)
    if cum_seq_q is not None:
        flash._flash_attn_varlen_backward(
            *tensors, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, scale, is_causal, left, right, 0.0, None,
            deterministic, rng_state,
        )  # fmt: skip
    else:
        flash._flash_attn_backward(
            *tensors, dropout_p, scale, is_causal, left, right, 0.0, None, deterministic, rng_state
        )
    return tuple(grads)


def _alignment(dtype: torch.dtype) -> int:
    """Elements in 16 bytes: what the kernels for sm_80 and newer need (cutlassF.h has no unaligned ones there)."""
    return 16 // dtype.itemsize


def _check_efficient(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask_type: int, window: int):
    for x in (query, key, value):
        check(x.dim() == 4, "Expected x.dim() == 4")
        check(x.shape[0] == query.shape[0] and x.shape[2] == query.shape[2], "batch and head counts must agree")
    check(key.shape[1] == value.shape[1], "Expected key.size(1) == value.size(1)")
    check(query.shape[3] == key.shape[3], "Expected query.size(3) == key.size(3)")
    _last_dim_contiguous(query, key, value)
    check(query.dtype in (torch.float32, torch.float16, torch.bfloat16), "Only fp32, half & bf16 supported")
    for x in (key, value):  # measured on an H200 with torch 2.11 (benchmarks.known_bad): wrong values, no error
        shared = any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride(), strict=True))
        check(not shared, "keys or values with a stride of 0 give wrong values (pytorch#191937)")
    align = _alignment(query.dtype)
    for x in (query, key):
        check(x.stride(2) % align == 0, "cutlassF: no kernel found to launch!")
        check(x.stride(1) % align == 0, "query is not correctly aligned (strideM)")
        check(x.data_ptr() % 16 == 0, "query is not correctly aligned")
    if bias is not None:
        check(bias.dtype == query.dtype, "invalid dtype for bias - should match query's dtype")
        check(bias.dim() == 4, "Bias expected in BMHK format")
        shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        check(tuple(bias.shape) == shape, f"attn_bias: wrong shape {tuple(bias.shape)}, expected {shape}")
        check(bias.stride(3) == 1, "attn_bias: wrong alignment (last dimension must be contiguous)")
        for stride, size in zip(bias.stride()[:3], bias.shape[:3], strict=True):
            check(size <= 1 or stride % align == 0, f"attn_bias is not correctly aligned, stride {stride}")
        check(bias.data_ptr() % 16 == 0, "attn_bias is not correctly aligned")
    check(mask_type in (NO_MASK, TOP_LEFT, BOTTOM_RIGHT), "invalid value for `custom_mask_type`")
    check(window <= 0 or mask_type != NO_MASK, "custom_mask_type not supported")


def _efficient_visible(seqlen_q: int, seqlen_k: int, mask_type: int, window: int, *, backward: bool) -> Tensor:
    """Which keys are seen; a window of W means W keys up to and including the diagonal."""
    top_left = mask_type != BOTTOM_RIGHT
    seen = kernel.band(seqlen_q, seqlen_k, None, None if mask_type == NO_MASK else 0, top_left=top_left)
    if window > 0:
        # kernel_backward.h measures the window from the *top left* diagonal even when the causal mask is aligned
        # bottom right, so its gradients are wrong wherever the two lengths differ.
        seen &= kernel.band(seqlen_q, seqlen_k, window - 1, None, top_left=top_left or backward)
    return seen


def _efficient_attention_forward(
    query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type,
    compute_log_sumexp=False, *, scale=None, seqlen_k=None, window_size=None,
):  # fmt: skip
    window = 0 if window_size is None else window_size
    _check_efficient(query, key, value, bias, custom_mask_type, window)
    check((cu_seqlens_q is None) == (cu_seqlens_k is None), "seqstart_q.has_value() == seqstart_k.has_value()")
    batch, total_q, heads, dim = query.shape
    max_q, sequences = total_q, batch
    if cu_seqlens_q is not None:
        flash._check_int32(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        check(batch == 1, "cu_seqlen only supports batch_size=1")
        check(max_seqlen_q is not None, "Expected max_seqlen_q_.has_value()")
        max_q, sequences = max_seqlen_q, cu_seqlens_q.numel() - 1
    scale = dim**-0.5 if scale is None else scale
    seed, offset = (x.reshape(()) for x in kernel.draw_rng_state().split(1)) if dropout_p else (torch.tensor(-7),) * 2
    out = kernel.garbage(batch, total_q, heads, value.shape[3], dtype=query.dtype)
    padded = kernel.round_up(max_q, 32) if compute_log_sumexp else 0
    lse = kernel.garbage(sequences, heads, padded, dtype=torch.float32)
    returned_k = max_seqlen_k if max_seqlen_k is not None else (0 if cu_seqlens_q is not None else key.shape[1])
    if out.numel() == 0 or key.shape[1] == 0:
        out.zero_()  # and lse stays uninitialised
        return out, lse, seed, offset, max_q, returned_k
    for b in range(sequences):
        if cu_seqlens_q is None:
            q, k, v, rows = query[b : b + 1], key[b : b + 1], value[b : b + 1], (b, slice(None))
        else:
            start, stop = cu_seqlens_q.tolist()[b : b + 2]
            k_start, k_stop = cu_seqlens_k.tolist()[b : b + 2]
            check(stop <= total_q and k_stop <= key.shape[1], "CUDA error: an illegal memory access was encountered")
            k_stop = k_stop if seqlen_k is None else k_start + int(seqlen_k[b])
            stop = min(stop, start + max_q)
            rows, keys = (0, slice(start, stop)), slice(k_start, k_stop)
            q, k, v = query[:, start:stop], key[:, keys], value[:, keys]
        out_b, lse_b = _efficient_one(q, k, v, bias, b, dropout_p, (seed, offset), scale, custom_mask_type, window)
        out[rows] = out_b.to(query.dtype)
        if compute_log_sumexp:
            # Only the tile of 32 in which a sequence ends is padded, with +inf.
            length = q.shape[1]
            lse[b, :, :length] = lse_b
            lse[b, :, length : kernel.round_up(length, 32)] = INF
    return out, lse, seed, offset, max_q, returned_k


def _efficient_one(q, k, v, bias, b, dropout_p, rng, scale, mask_type, window) -> tuple[Tensor, Tensor]:
    """Attend within one sequence, and say what the kernel leaves where its result is not defined."""
    seqlen_q, seqlen_k, heads = q.shape[1], k.shape[1], q.shape[2]
    if seqlen_k == 0 or (mask_type == BOTTOM_RIGHT and seqlen_k < seqlen_q):
        # No key: large heads write no output at all. More queries than keys with a bottom-right mask: the offset of
        # the diagonal is an unsigned number and wraps, so tiles go unmasked.
        lse = torch.zeros(heads, seqlen_q) if seqlen_k == 0 else kernel.garbage(heads, seqlen_q, dtype=torch.float32)
        return kernel.garbage(seqlen_q, heads, v.shape[3], dtype=torch.float32), lse
    keep, kept = 1.0 - dropout_p, None
    if dropout_p:
        kept = kernel.dropout_mask(torch.stack(rng), (1, heads, seqlen_q, seqlen_k), keep, b)
    out, lse = kernel.forward(
        q, k, v, scale=scale, bias=None if bias is None else bias[b : b + 1].double(), kept=kept, keep=keep,
        visible=_efficient_visible(seqlen_q, seqlen_k, mask_type, window, backward=False),
    )  # fmt: skip
    return out[0], torch.where(lse == -INF, 0.0, lse)[0]


def _efficient_attention_backward(
    grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, logsumexp,
    dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *, scale=None, num_splits_key=None,
    window_size=None, shared_storage_dqdkdv=False,
):  # fmt: skip
    window = 0 if window_size is None else window_size
    _check_efficient(query, key, value, bias, custom_mask_type, window)
    align = _alignment(query.dtype)
    check(value.stride(1) % align == 0 and value.stride(2) % align == 0, "value is not correctly aligned")
    check(tuple(grad_out_.shape) == (*query.shape[:3], value.shape[3]), "grad_out has the wrong shape")
    check(grad_out_.dtype == query.dtype and out.dtype == query.dtype, "grad_out and out must have query's dtype")
    check(cu_seqlens_q is None or bias is None, "cu seqlen + bias not supported")
    check(not bias_requires_grad or bias is not None, "bias_requires_grad is true but no bias was provided")
    check(logsumexp.stride(1) % 8 == 0 and logsumexp.dtype == torch.float32, "LSE is not correctly aligned (strideH)")
    batch, heads = query.shape[0], query.shape[2]
    grads = [kernel.garbage(*x.shape, dtype=x.dtype) for x in (query, key, value)]
    grad_bias = torch.empty(0)  # undefined there
    if bias_requires_grad:
        grad_bias = kernel.garbage(*bias.shape[:3], kernel.round_up(bias.shape[3], 16), dtype=bias.dtype)
        grad_bias = grad_bias[..., : bias.shape[3]]
    sequences = batch
    if cu_seqlens_q is not None:
        flash._check_int32(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        check(batch == 1, "cu_seqlen only supports batch_size=1")
        check(0 < max_seqlen_q <= query.shape[1], f"Invalid max_seqlen_q:{max_seqlen_q}")
        check(0 < max_seqlen_k <= key.shape[1], f"Invalid max_seqlen_k:{max_seqlen_k}")
        sequences = cu_seqlens_q.numel() - 1
    if query.numel() == 0 or key.shape[1] == 0:
        for grad in grads:
            grad.zero_()
        return *grads, grad_bias
    scale = query.shape[3] ** -0.5 if scale is None else scale
    keep, rng = 1.0 - dropout_p, torch.stack((philox_seed, philox_offset)) if dropout_p else None
    for b in range(sequences):
        if cu_seqlens_q is None:
            rows = keys = (slice(b, b + 1), slice(None))
        else:
            (q0, q1), (k0, k1) = cu_seqlens_q.tolist()[b : b + 2], cu_seqlens_k.tolist()[b : b + 2]
            check(q1 - q0 <= max_seqlen_q and k1 - k0 <= max_seqlen_k, "CUDA error: device-side assert triggered")
            rows, keys = (slice(None), slice(q0, q1)), (slice(None), slice(k0, k1))
        q, k, v, dout = query[rows], key[keys], value[keys], grad_out_[rows]
        seqlen_q, seqlen_k = q.shape[1], k.shape[1]
        if seqlen_k == 0:
            continue  # no block writes the gradient of these queries
        padding = logsumexp[b, :, seqlen_q : kernel.round_up(seqlen_q, 32)]
        check(bool((padding == INF).all()), "rows of the LSE past the sequence must be +inf: the kernel reads them")
        kept = kernel.dropout_mask(rng, (1, heads, seqlen_q, seqlen_k), keep, b) if dropout_p else None
        result = kernel.backward(
            dout, q, k, v, logsumexp[b : b + 1, :, :seqlen_q], kernel.delta_of(dout, out[rows]), scale=scale,
            visible=_efficient_visible(seqlen_q, seqlen_k, custom_mask_type, window, backward=True),
            bias=None if bias is None else bias[b : b + 1].double(), kept=kept, keep=keep,
        )  # fmt: skip
        for into, grad, at in zip(grads, result[:3], (rows, keys, keys), strict=True):
            into[at] = grad.to(into.dtype)
        if bias_requires_grad:
            grad_bias[b] = result[3][0].to(bias.dtype)
    return *grads, grad_bias


def _cudnn_bias(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if bias is None:
        return None
    check(bias.dim() in (2, 3, 4), f"cuDNN SDPA expects either a 2D, 3D, or 4D attn_bias but got {bias.dim()}D")
    check(bias.dtype == query.dtype, "cuDNN SDPA: the bias must have the dtype of the query")
    heads = bias.shape[1] if bias.dim() == 4 else 1
    return bias.expand(query.shape[0], heads, query.shape[2], key.shape[2]).double()


def _check_cudnn(query: Tensor, key: Tensor, value: Tensor) -> None:
    check(query.dtype in (torch.float16, torch.bfloat16), "cuDNN SDPA supports fp16 and bf16")
    for x in (query, key, value):
        check(x.dim() == 4 and x.dtype == query.dtype and x.stride(-1) == 1, "cuDNN SDPA: wrong rank, dtype or stride")
        check(x.shape[-1] % 8 == 0 and x.shape[-1] <= 256, "cuDNN SDPA: head size must be a multiple of 8, <= 256")
    check(query.shape[1] % key.shape[1] == 0, "cuDNN SDPA: query heads must be a multiple of key heads")


def _scaled_dot_product_cudnn_attention(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
    scale=None,
):  # fmt: skip
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    rng = kernel.draw_rng_state() if dropout_p else torch.tensor([-7, -7])
    tail = (None, None, seqlen_q, seqlen_k, rng[0], rng[1], None)
    if not (query.numel() and key.numel() and value.numel()):
        return None, None, *tail  # run_cudnn_SDP_fprop returns before it allocates anything
    _check_cudnn(query, key, value)
    keep, kept = 1.0 - dropout_p, None
    if dropout_p:
        kept = kernel.dropout_mask(rng, (query.shape[0], query.shape[1], seqlen_q, seqlen_k), keep)
    out, lse = kernel.forward(
        *(x.transpose(1, 2) for x in (query, key, value)), kept=kept, keep=keep,
        scale=query.shape[3] ** -0.5 if scale is None else scale, bias=_cudnn_bias(attn_bias, query, key),
        visible=kernel.band(seqlen_q, seqlen_k, None, 0 if is_causal else None, top_left=True),
    )  # fmt: skip
    # What cuDNN gives where a bias of -inf hides every key is documented nowhere: no caller may rely on it.
    empty = (lse == -INF) | (lse.isnan())
    out = torch.where(empty.transpose(1, 2)[..., None], torch.nan, out).to(query.dtype)
    lse = torch.where(empty, torch.nan, lse).float()[..., None].contiguous() if compute_log_sumexp else None
    order = sorted(range(4), key=query.stride, reverse=True)  # the output takes the layout of the query
    result = out.transpose(1, 2).permute(order).contiguous().permute([order.index(d) for d in range(4)])
    return result, lse, *tail


def _scaled_dot_product_cudnn_attention_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
    max_k, dropout_p, is_causal, *, scale=None,
):  # fmt: skip
    _check_cudnn(query, key, value)
    check(cum_seq_q is None and cum_seq_k is None, "the fake models dense cuDNN attention only")
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    check(tuple(logsumexp.shape) == (*query.shape[:3], 1), "stats must be (B, H, Sq, 1)")
    keep, kept = 1.0 - dropout_p, None
    if dropout_p:
        shape = (query.shape[0], query.shape[1], seqlen_q, seqlen_k)
        kept = kernel.dropout_mask(torch.stack((philox_seed, philox_offset)), shape, keep)
    dout, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    result = kernel.backward(
        dout, q, k, v, logsumexp[..., 0], kernel.delta_of(dout, o), kept=kept, keep=keep,
        scale=query.shape[3] ** -0.5 if scale is None else scale, bias=_cudnn_bias(attn_bias, query, key),
        visible=kernel.band(seqlen_q, seqlen_k, None, 0 if is_causal else None, top_left=True),
    )  # fmt: skip
    return tuple(grad.transpose(1, 2).to(query.dtype) for grad in result[:3])


class Op:
    """Looks like ``torch.ops.aten.name``: callable, with ``.default`` and the schema of the real operator."""

    def __init__(self, name: str, function) -> None:
        self.__name__, self._function = name, function
        real = getattr(torch.ops.aten, name, None)
        self._schema = real.default._schema if real is not None else None

    @property
    def default(self) -> Op:
        return self

    def overloads(self) -> list[str]:
        return ["default"]

    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)


OPERATORS = {
    name: globals()[name]
    for name in (
        "_flash_attention_forward",
        "_flash_attention_backward",
        "_efficient_attention_forward",
        "_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_cudnn_attention_backward",
    )
}
