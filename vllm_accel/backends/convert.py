"""Conversions between this library's conventions and those of flash-style kernels, one idea each.

A flash-style backward takes out and lse and rebuilds the probabilities as exp(score - lse), with
delta = rowsum(dout * out). Two exact consequences carry most of the adapters:

* Sinks (one more logit in the denominator) can be applied after a kernel that has none: with the sink folded into out
  and lse, the same backward gives the right dq, dk, dv.
* A gradient for lse only subtracts dlse from delta: add a column to V that is zero in v, one in out, -dlse in dout.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_accel.dispatch.backend import AttentionArgs, PagedArgs


def window(args: AttentionArgs | PagedArgs) -> tuple[int, int]:
    """Return (left, right) with causal folded in as right = 0; -1 is unlimited."""
    left, right = args.window_size
    return (left, 0) if args.causal else (left, right)


def unit_inner(tensor: Tensor) -> Tensor:
    """Return the tensor with innermost stride 1, copied only if it has another."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor with innermost stride 1 and rows that start at multiples of 16 bytes, copied only if needed.

    CUDA kernels load 16 bytes at a time and most entry points do not check: a misaligned row is a fault that poisons
    the context. The last dimension must be a multiple of 16 bytes.
    """
    size, strides = tensor.element_size(), tensor.stride()
    rows = zip(strides[:-1], tensor.shape[:-1], strict=True)
    if strides[-1] == 1 and not (tensor.data_ptr() % 16 or any(s * size % 16 for s, n in rows if n > 1)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def heads_before_tokens(lse_by_token: Tensor) -> Tensor:
    """(B, Sq, H) or (Tq, H) -> (B, H, Sq) or (H, Tq)."""
    return lse_by_token.transpose(-1, -2)


def empty_rows_to_minus_inf(lse: Tensor) -> Tensor:
    """Replace the +inf that FlashAttention 2 writes for a row without keys by -inf."""
    return torch.where(lse == math.inf, -math.inf, lse)


def minus_inf_to_empty_rows(lse: Tensor) -> Tensor:
    """Give a backward that expects +inf for empty rows (so that exp(score - lse) is 0) what it expects."""
    return torch.where(lse == -math.inf, math.inf, lse)


def fold_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add one logit per head to the denominator of a finished attention.

    out (B, Sq, H, Dv) or (Tq, H, Dv), lse (B, H, Sq) or (H, Tq) fp32; without sinks both come back as they are.
    """
    if sinks is None:
        return out, lse
    sink = sinks.to(lse.dtype).unsqueeze(-1)
    weight = torch.sigmoid(lse - sink)  # -inf gives 0, as it should
    return (out * heads_before_tokens(weight).unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, sink)


def sinks_grad(sinks: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor | None:
    """Return the gradient of the sinks (H,), from the out and lse that include them."""
    if sinks is None:
        return None
    delta = heads_before_tokens((dout.float() * out.float()).sum(-1))
    if dlse is not None:
        delta = delta - dlse
    # A finite sink makes every lse finite, except past the last packed sequence, where there is no row at all.
    weight = torch.exp(sinks.to(lse.dtype).unsqueeze(-1) - torch.where(torch.isinf(lse), math.inf, lse))
    return -(weight * delta).movedim(-2, 0).flatten(1).sum(1).to(sinks.dtype)


def pad_heads(tensor: Tensor, head_dim: int) -> Tensor:
    """Append zeros to the last dimension up to `head_dim`; exact, since they add nothing to any product."""
    missing = head_dim - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


def with_dlse_column(
    v: Tensor, out: Tensor, dout: Tensor, dlse: Tensor | None, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad v, out and dout to `head_dim`, carrying dlse in the first added column.

    `head_dim` must be larger than v's where dlse is given. dout * out then sums to delta - dlse, and the gradient of v
    in the added columns is to be dropped.
    """
    v, padded_out, padded_dout = (pad_heads(t, head_dim) for t in (v, out, dout))
    if dlse is not None:
        column = out.shape[-1]
        padded_out, padded_dout = padded_out.clone(), padded_dout.clone()
        padded_out[..., column] = 1
        padded_dout[..., column] = -heads_before_tokens(dlse).to(padded_dout.dtype)
    return v, padded_out, padded_dout


def zero_past_end(tensor: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return packed rows with zeros past the last sequence, for kernels that multiply what lies there by 0."""
    if cu_seqlens is None:
        return tensor
    inside = torch.arange(tensor.shape[0], device=tensor.device) < cu_seqlens[-1]
    return torch.where(inside.view(-1, *(1,) * (tensor.dim() - 1)), tensor, 0.0)


def clear_past_end(tensor: Tensor, cu_seqlens: Tensor | None, fill: float = 0.0, dim: int = 0) -> Tensor:
    """Overwrite rows past the last packed sequence, which kernels leave unwritten; on the device, without a sync."""
    if cu_seqlens is None:
        return tensor
    rows = torch.arange(tensor.shape[dim], device=tensor.device)
    past = (rows >= cu_seqlens[-1]).view(-1, *(1,) * (tensor.dim() - 1 - dim % tensor.dim()))
    return tensor.masked_fill_(past, fill)
