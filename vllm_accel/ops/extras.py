"""The optional tensors of an attention call: which there are, what they must look like, which need gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.spec import Feature

_F = {flag.name: flag.value for flag in Feature}
_GRAD = _F["GRAD"]


class Extras(NamedTuple):
    """The optional tensors of an attention call, as given (attn_bias already 4-D)."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    alibi_slopes: Tensor | None = None
    attn_bias: Tensor | None = None
    sinks: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None


NO_EXTRAS = Extras()


def extra_flags(
    extras: Extras,
    dtype: torch.dtype,
    device: torch.device,
    full: tuple[int, int, int, int],
    kv_heads: int,
) -> int:
    batch, heads = full[0], full[1]
    flags = 0
    for name, tensor in zip(Extras._fields[2:], extras[2:], strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, q on {device}; both must be on one device")
    if (slopes := extras.alibi_slopes) is not None:
        check_small("alibi_slopes", slopes, (torch.float32,), ((heads,), (batch, heads)))
        if slopes.requires_grad:
            raise ValueError("alibi_slopes requires a gradient, and none is defined for it; pass alibi_slopes.detach()")
        flags |= _F["ALIBI"]
    if (bias := extras.attn_bias) is not None:
        flags |= _bias_flags(bias, dtype, full)
    if (sinks := extras.sinks) is not None:
        check_small("sinks", sinks, (torch.float32, dtype), ((heads,),))
        flags |= _F["SINKS"]
    for name in ("q_descale", "k_descale", "v_descale"):
        if (descale := getattr(extras, name)) is not None:
            check_small(name, descale, (torch.float32,), ((), (kv_heads,), (batch, kv_heads)))
            if descale.requires_grad:
                raise ValueError(f"{name} requires a gradient, and none is defined for it; pass {name}.detach()")
            flags |= _F[name.upper()]
    return flags


def _bias_flags(bias: Tensor, dtype: torch.dtype, full: tuple[int, int, int, int]) -> int:
    if bias.dtype not in (torch.bool, torch.float32, dtype):
        raise TypeError(f"attn_bias must be bool, float32 or {dtype}; got {bias.dtype}")
    if bias.dim() != 4 or any(b not in (1, f) for b, f in zip(bias.shape, full, strict=True)):
        raise ValueError(f"attn_bias {tuple(bias.shape)} must be broadcastable to (B, H, Sq, Sk) = {full}")
    if bias.dtype is torch.bool:
        return _F["MASK"]
    return _F["BIAS"]


def check_small(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]
) -> None:
    """Check the dtype and the shape of a small optional tensor."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}; got {tensor.dtype}")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}; got {tuple(tensor.shape)}")


def check_lengths(args: AttentionArgs, tokens_q: int, tokens_k: int) -> None:
    """Check the values of cu_seqlens: sorted, from 0, within the tensors, and no longer than the maxima.

    Reads the tensors, so on a GPU this synchronises; there it runs with VLLM_ACCEL_CHECK=1 only.

    Raises:
        ValueError: naming the tensor and the offending entry.
    """
    for name, cu, tokens, longest in (
        ("cu_seqlens_q", args.cu_seqlens_q, tokens_q, args.max_seqlen_q),
        ("cu_seqlens_k", args.cu_seqlens_k, tokens_k, args.max_seqlen_k),
    ):
        assert cu is not None
        ends = cu.tolist()
        if ends[0] != 0:
            raise ValueError(f"{name}[0] must be 0; got {ends[0]}")
        for i in range(1, len(ends)):
            length = ends[i] - ends[i - 1]
            if length < 0:
                raise ValueError(f"{name} must not decrease; entry {i} is {ends[i]} after {ends[i - 1]}")
            if length > longest:
                raise ValueError(f"{name}: sequence {i - 1} has {length} tokens, more than its max_seqlen {longest}")
        if ends[-1] > tokens:
            raise ValueError(f"{name} ends at {ends[-1]}, past the {tokens} tokens of the tensor")


def present(extras: Extras) -> tuple[Tensor, ...]:
    """Return the optional tensors that are given; cu_seqlens that serves queries and keys counts once."""
    if extras is NO_EXTRAS:
        return ()
    shared = extras.cu_seqlens_q is extras.cu_seqlens_k
    return tuple([t for t in (extras[1:] if shared else extras) if t is not None])


def with_four_dims(attn_bias: Any) -> Any:
    """Give a bias of fewer dimensions leading ones, so that kernels see (B or 1, H or 1, Sq or 1, Sk or 1)."""
    if isinstance(attn_bias, Tensor) and attn_bias.dim() < 4:
        return attn_bias[(None,) * (4 - attn_bias.dim())]
    return attn_bias


def needs_grad(q: Tensor, k: Tensor, v: Tensor, extras: Extras) -> int:
    """Return the feature flags GRAD, BIAS_GRAD and SINKS_GRAD that the inputs ask for, 0 for none.

    Flags travel instead of being looked up later, because below autograd (in the compiled operator) tensors no longer
    say what they require.
    """
    if not torch.is_grad_enabled():
        return 0
    flags = _GRAD if q.requires_grad or k.requires_grad or v.requires_grad else 0
    for tensor, flag in ((extras.attn_bias, "BIAS_GRAD"), (extras.sinks, "SINKS_GRAD")):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            flags |= _GRAD | _F[flag]
    return flags
