"""Put attention over disjoint sets of keys together, exactly, by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_accel.ops.fused import Fused

_kernel = Fused("merge_attention", "merge_launch")


def merge_attention(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor, *, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge partial results over disjoint key sets into the result over their union.

    Each part is ``attention(..., return_lse=True)`` of the same queries. Causal masks, windows and ALiBi count
    positions within a part's own keys, so every part but the last must be free of them; sinks belong to exactly one
    part, or here. Method: online softmax (Milakov and Gimelshein 2018), in fp32 (fp64 for fp64), differentiable.

    Args:
        outs: parts, each (B, Sq, H, Dv) or (Tq, H, Dv).
        lses: their log-sum-exps, each (B, H, Sq) or (H, Tq), natural logarithm, -inf where a part has no key.
        sinks: (H,), one extra logit per head in the merged denominator.

    Returns:
        out in the dtype of the first part, and lse. Where every part is -inf: 0 and -inf (or the sink).

    Raises:
        ValueError: no part, or shapes that do not belong together. TypeError: out and lse are not both tensors.
    """
    parts, logs = list(outs), list(lses)
    if not parts or len(parts) != len(logs):
        raise ValueError(f"merge_attention needs one lse per out and at least one part; got {len(parts)}, {len(logs)}")
    for i, (out, lse) in enumerate(zip(parts, logs, strict=True)):
        if not isinstance(out, Tensor) or not isinstance(lse, Tensor):
            raise TypeError(f"part {i} must be tensors out, lse; got {type(out).__name__}, {type(lse).__name__}")
        *batch, tokens, heads, _ = out.shape
        if out.shape != parts[0].shape or tuple(lse.shape) != (*batch, heads, tokens):
            raise ValueError(
                f"part {i}: out {tuple(out.shape)} and lse {tuple(lse.shape)} do not belong together with the first "
                f"out {tuple(parts[0].shape)}; lse is (B, H, Sq) for out (B, Sq, H, Dv), (H, Tq) for (Tq, H, Dv)"
            )
    heads = parts[0].shape[-2]
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape ({heads},); got {tuple(sinks.shape)}")
    if (fused := _fused(parts, logs, sinks)) is not None:
        return fused
    dtype = torch.float64 if parts[0].dtype is torch.float64 else torch.float32
    stacked = torch.stack([lse.to(dtype) for lse in logs])
    if sinks is not None:
        extra = sinks.to(dtype).unsqueeze(-1).expand_as(stacked[0]).unsqueeze(0)
        merged_lse = _logsumexp(torch.cat([stacked, extra]))
    else:
        merged_lse = _logsumexp(stacked)
    seen = torch.isfinite(merged_lse)
    shift = torch.where(seen, merged_lse, 0.0)
    merged = torch.zeros_like(parts[0], dtype=dtype)
    for out, lse in zip(parts, stacked, strict=True):
        weight = torch.where(
            torch.isfinite(lse) & seen, torch.exp(torch.where(torch.isfinite(lse), lse, 0.0) - shift), 0.0
        )
        merged = merged + weight.transpose(-1, -2).unsqueeze(-1) * out.to(dtype)
    return merged.to(parts[0].dtype), merged_lse


def _fused(parts: list[Tensor], logs: list[Tensor], sinks: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Merge in one launch where our kernel runs: on a GPU, without gradients, outside of torch.compile."""
    given = (*parts, *logs) if sinks is None else (*parts, *logs, sinks)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return None
    kind = (len(parts), parts[0].shape[-1], sinks is not None, tuple([t.dtype for t in given]))
    triton = _kernel.launcher(given, kind)
    if triton is None or not parts[0].numel() or any(t.dtype not in triton.DTYPES for t in given):
        return None
    result: tuple[tuple[Tensor, Tensor]] | None = _kernel.run(
        lambda: triton.merge(parts, logs, sinks), parts[0].device, kind
    )
    return None if result is None else result[0]


def _logsumexp(stacked: Tensor) -> Tensor:
    """Reduce the first dimension; -inf everywhere gives -inf with a gradient of zero instead of NaN."""
    finite = torch.isfinite(stacked)
    any_finite = finite.any(0)
    top = torch.where(any_finite, torch.where(finite, stacked, -torch.inf).amax(0), 0.0).detach()
    total = torch.where(finite, torch.exp(torch.where(finite, stacked, 0.0) - top), 0.0).sum(0)
    return torch.where(any_finite, top + torch.log(torch.where(any_finite, total, 1.0)), -torch.inf)
