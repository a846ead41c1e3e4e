"""Check an attention call before any launch, resolve its defaults, and describe its kind."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation, bucket
from vllm_accel.ops.extras import NO_EXTRAS, Extras, extra_flags

NO_WINDOW = (-1, -1)

_F = {flag.name: flag.value for flag in Feature}
_CAUSAL, _GRAD, _LSE, _GQA, _VALUE_DIM = _F["CAUSAL"], _F["GRAD"], _F["LSE"], _F["GQA"], _F["VALUE_DIM"]
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *_FP8)


class AttentionSizes(NamedTuple):
    """Exact sizes of a call, for the guards of backends.

    batch: sequences. seqlen_q, seqlen_k: of the longest sequence. bias_shape: of the 4-D attn_bias, else ().
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    bias_shape: tuple[int, ...] = ()


class Described(NamedTuple):
    """An attention call, checked: the kind for the choice, sizes for the guards, args for the kernel."""

    kind: tuple[Any, ...]
    sizes: AttentionSizes
    args: AttentionArgs
    empty: bool


class Options(NamedTuple):
    """The keyword arguments of an attention call, as given."""

    causal: bool
    window_size: tuple[int, int]
    softmax_scale: float | None
    softcap: float
    dropout_p: float
    return_lse: bool
    deterministic: bool
    batch_invariant: bool


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    options: Options,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    grad: int,
) -> Described:
    """Check a dense (lengths None) or packed call and describe it; `grad` is what `needs_grad` says.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    # On the miss path of a growing decode (under 8 us in all): shapes are unpacked once, constants bound outside.
    if max_seqlen_q is None:
        batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v = _dense_sizes(q, k, v)
        lengths = length_kind(batch, seqlen_q, seqlen_k)
        flags, empty = 0, not (batch and seqlen_q and seqlen_k)
    else:
        tokens_q, tokens_k, heads, kv_heads, head_dim, head_dim_v = _packed_sizes(q, k, v)
        batch, seqlen_q, seqlen_k, relation = _packed(tokens_q, tokens_k, extras, max_seqlen_q, max_seqlen_k, q.device)
        lengths = (bucket(batch), bucket(seqlen_q), bucket(seqlen_k), relation)
        flags, empty = _F["VARLEN"], not (batch and seqlen_q and seqlen_k and tokens_q and tokens_k)
    if not kv_heads or heads % kv_heads or not head_dim or not head_dim_v or not heads:
        raise ValueError(f"H={heads} must be a positive multiple of Hkv={kv_heads}, and head sizes positive")
    dtype, device = q.dtype, q.device
    if k.dtype is not dtype or v.dtype is not dtype:
        raise TypeError(f"q, k, v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if dtype not in _DTYPES:
        raise TypeError(f"q has dtype {dtype}; attention takes floating-point tensors (16, 32, 64 bit or FP8)")
    if k.device != device or v.device != device:
        raise ValueError(f"q, k, v must be on one device; got {q.device}, {k.device}, {v.device}")

    flags |= option_flags(options, grad)
    if heads != kv_heads:
        flags |= _GQA
    if head_dim != head_dim_v:
        flags |= _VALUE_DIM
    bias_shape: tuple[int, ...] = ()
    if extras is not NO_EXTRAS:
        flags |= extra_flags(extras, dtype, device, (batch, heads, seqlen_q, seqlen_k), kv_heads)
        bias_shape = () if extras.attn_bias is None else tuple(extras.attn_bias.shape)

    causal, window_size, scale, softcap, dropout_p, return_lse, deterministic, batch_invariant = options
    args: AttentionArgs = _new(
        AttentionArgs,
        (
            *extras, seqlen_q, seqlen_k, head_dim**-0.5 if scale is None else float(scale), causal,
            (window_size[0], window_size[1]), float(softcap), float(dropout_p), return_lse or bool(grad),
            deterministic, batch_invariant,
        ),
    )  # fmt: skip
    kind = (dtype, dtype, heads, kv_heads, head_dim, head_dim_v, *lengths, flags)
    return Described(kind, AttentionSizes(batch, seqlen_q, seqlen_k, bias_shape), args, empty)


#: Where a kind holds what it knows of lengths.
LENGTHS = slice(6, 10)


def length_kind(batch: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int, int, int]:
    """Return what the choice knows of dense lengths: buckets, and how Sq stands to Sk."""
    relation = _EQUAL if seqlen_q == seqlen_k else _SHORTER if seqlen_q < seqlen_k else _LONGER
    return bucket(batch), bucket(seqlen_q), bucket(seqlen_k), relation


def spec_of(kind: tuple[Any, ...]) -> AttentionSpec:
    """Build the spec from the kind of a call; that of a paged call has a block size at its end."""
    *fields, relation, flags = kind[: LENGTHS.stop + 1]
    block_size = kind[LENGTHS.stop + 1 :]
    return AttentionSpec(  # type: ignore[call-arg, unused-ignore]
        *fields, _RELATIONS[relation], Feature(flags), *block_size
    )


# Relations travel as numbers: the hash of an enum member is a Python call.
_RELATIONS = tuple(Relation)
_EQUAL, _SHORTER, _LONGER, _MIXED = (
    _RELATIONS.index(r) for r in (Relation.EQUAL, Relation.SHORTER, Relation.LONGER, Relation.MIXED)
)
#: How the lengths of packed or paged sequences stand to each other, for a kind.
MIXED = _MIXED
_new = tuple.__new__


def _dense_sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """Return B, Sq, Sk, H, Hkv, D, Dv of (B, S, H, D) tensors that belong together."""
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k, v must be (batch, tokens, heads, head_dim); got {_shapes(q, k, v)}")
    batch, seqlen_q, heads, head_dim = q.shape
    batch_k, seqlen_k, kv_heads, head_dim_k = k.shape
    batch_v, seqlen_v, heads_v, head_dim_v = v.shape
    if not batch == batch_k == batch_v or seqlen_k != seqlen_v or kv_heads != heads_v or head_dim != head_dim_k:
        raise ValueError(
            "q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv) must agree in batch, key length, key heads "
            f"and head size; got {_shapes(q, k, v)}"
        )
    return batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v


def _packed_sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int, int]:
    """Return Tq, Tk, H, Hkv, D, Dv of (T, H, D) tensors that belong together."""
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError(f"q, k, v must be (tokens, heads, head_dim); got {_shapes(q, k, v)}")
    tokens_q, heads, head_dim = q.shape
    tokens_k, kv_heads, head_dim_k = k.shape
    tokens_v, heads_v, head_dim_v = v.shape
    if tokens_k != tokens_v or kv_heads != heads_v or head_dim != head_dim_k:
        raise ValueError(
            "q (Tq, H, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv) must agree in keys, key heads and head size; "
            f"got {_shapes(q, k, v)}"
        )
    return tokens_q, tokens_k, heads, kv_heads, head_dim, head_dim_v


def option_flags(options: Options, grad: int) -> int:
    """Check the options that are no tensors and return their feature flags."""
    causal, window_size, scale, softcap, dropout_p, return_lse, deterministic, batch_invariant = options
    if not type(causal) is type(return_lse) is type(deterministic) is type(batch_invariant) is bool:
        for name in ("causal", "return_lse", "deterministic", "batch_invariant"):
            if not isinstance(getattr(options, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(options, name)!r}")
    flags = (_CAUSAL if causal else 0) | grad
    if return_lse:
        flags |= _LSE | (_F["LSE_GRAD"] if grad else 0)
    if window_size is not NO_WINDOW:
        flags |= _window_flags(window_size)
    if scale is not None:
        if not _is_number(scale) or not 0.0 < scale < math.inf:
            raise ValueError(f"softmax_scale must be a positive finite Python float or None, not {scale!r}")
        flags |= _F["SCALE"]
    if softcap != 0.0:
        if not _is_number(softcap) or not 0.0 < softcap < math.inf:
            raise ValueError(f"softcap must be 0.0 (off) or a positive finite float, not {softcap!r}")
        flags |= _F["SOFTCAP"]
    if dropout_p != 0.0:
        if not _is_number(dropout_p) or not 0.0 < dropout_p < 1.0:
            raise ValueError(f"dropout_p must be at least 0.0 and below 1.0, not {dropout_p!r}")
        flags |= _F["DROPOUT"]
    if deterministic:
        flags |= _F["DETERMINISTIC"]
    if batch_invariant:
        flags |= _F["BATCH_INVARIANT"]
    return flags


def _window_flags(window_size: Any) -> int:
    if (
        not isinstance(window_size, (tuple, list))
        or len(window_size) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) for side in window_size)
    ):
        raise TypeError(f"window_size must be two ints (left, right), -1 for unlimited, not {window_size!r}")
    left, right = window_size
    if left < -1 or right < -1:
        raise ValueError(f"window_size={window_size!r}: each side is -1 (unlimited) or a number of keys, at least 0")
    return (_F["WINDOW_LEFT"] if left >= 0 else 0) | (_F["WINDOW_RIGHT"] if right >= 0 else 0)


def _packed(
    tokens_q: int,
    tokens_k: int,
    extras: Extras,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    device: torch.device,
) -> tuple[int, int, int, int]:
    cu_q, cu_k = extras.cu_seqlens_q, extras.cu_seqlens_k
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if not isinstance(cu, Tensor):
            raise TypeError(f"{name} must be an int32 tensor of shape (batch + 1,), not {cu!r}")
        if cu.dtype is not torch.int32 or cu.dim() != 1 or cu.shape[0] < 1:
            raise ValueError(f"{name} must be int32 of shape (batch + 1,); got {cu.dtype} {tuple(cu.shape)}")
        if cu.device != device:
            raise ValueError(f"{name} is on {cu.device}, q on {device}; both must be on one device")
    assert cu_q is not None and cu_k is not None
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"cu_seqlens_q {tuple(cu_q.shape)} and cu_seqlens_k {tuple(cu_k.shape)} must have one shape (batch + 1,)"
        )
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise TypeError(f"{name} must be a Python int, at least the longest sequence, not {length!r}")
    assert max_seqlen_q is not None and max_seqlen_k is not None
    relation = _EQUAL if cu_q is cu_k and max_seqlen_q == max_seqlen_k else _MIXED
    # A maximum beyond the tensor is harmless and common (a fixed buffer); kernels get the smaller one.
    return cu_q.shape[0] - 1, min(max_seqlen_q, tokens_q), min(max_seqlen_k, tokens_k), relation


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
