"""Check a paged attention call before any launch, resolve its defaults, and describe its kind."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_accel.dispatch.spec import Feature, bucket, bucket_up
from vllm_accel.ops.arguments import MIXED, AttentionSizes, Options, option_flags
from vllm_accel.ops.extras import Extras, check_small, extra_flags

_F = {flag.name: flag.value for flag in Feature}
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_QUERIES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


class PagedTensors(NamedTuple):
    """The tensors of a paged call but q and the caches: the first fields of `PagedArgs`."""

    cu_seqlens_q: Tensor
    block_table: Tensor
    seqused_k: Tensor
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None


class PagedOptions(NamedTuple):
    """The other keyword arguments of a paged call, as given; maxima included."""

    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    window_size: tuple[int, int]
    softmax_scale: float | None
    softcap: float
    return_lse: bool
    deterministic: bool
    batch_invariant: bool
    finite_tail: bool
    mla: bool = False


class PagedDescribed(NamedTuple):
    """A paged call, checked: the kind for the choice, sizes for the guards, values for the kernel's arguments."""

    kind: tuple[Any, ...]
    sizes: AttentionSizes
    values: tuple[Any, ...]
    empty: bool


def describe_paged(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tensors: PagedTensors, options: PagedOptions
) -> PagedDescribed:
    """Check a paged call and describe it.

    The description holds for any number of query tokens, any width of the block table and all maxima of one quarter
    octave: these change at every step of a decode.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    name = "kv_cache" if options.mla else "k_cache"
    heads, kv_heads, head_dim, head_dim_v = _sizes(q, k_cache, v_cache, options.mla)
    _check_dtypes(q, k_cache, v_cache, name)
    for what, tensor in ((name, k_cache), ("v_cache", v_cache)):
        if tensor.device != q.device:
            raise ValueError(f"{what} is on {tensor.device}, q on {q.device}; both must be on one device")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{what} must have an innermost stride of 1; got strides {tensor.stride()}")
    batch = _check_tables(tensors, q.device)
    check_no_grad(q, k_cache, v_cache, name, tensors.sinks)
    for what in ("max_seqlen_q", "max_seqlen_k"):
        length = getattr(options, what)
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise TypeError(f"{what} must be a Python int, at least the longest sequence, not {length!r}")
    if not isinstance(options.finite_tail, bool):
        raise TypeError(f"finite_tail must be True or False, not {options.finite_tail!r}")

    flags = _F["PAGED"] | (_F["FINITE_TAIL"] if options.finite_tail else 0) | (_F["MLA"] if options.mla else 0)
    flags |= option_flags(_dense_options(options), 0)
    flags |= _F["GQA"] if heads != kv_heads else 0
    flags |= _F["VALUE_DIM"] if head_dim != head_dim_v else 0
    longest_q, longest_k = bucket_up(options.max_seqlen_q), bucket_up(options.max_seqlen_k)
    if options.mla and isinstance(tensors.k_descale, Tensor):  # by the name that its caller knows
        check_small("kv_descale", tensors.k_descale, (torch.float32,), ((), (1,), (batch, 1)))
    extras = Extras(None, None, tensors.alibi_slopes, None, *tensors[4:])
    flags |= extra_flags(extras, q.dtype, q.device, (batch, heads, longest_q, longest_k), kv_heads)

    scale = options.softmax_scale
    values = (
        longest_q, longest_k, head_dim**-0.5 if scale is None else float(scale), options.causal,
        (options.window_size[0], options.window_size[1]), float(options.softcap), options.return_lse,
        options.deterministic, options.batch_invariant,
    )  # fmt: skip
    kind = (
        q.dtype, k_cache.dtype, heads, kv_heads, head_dim, head_dim_v, bucket(batch), longest_q, longest_k, MIXED,
        flags, k_cache.shape[1],
    )  # fmt: skip
    somewhere = q.shape[0] and batch and longest_q and longest_k and k_cache.shape[0] and tensors.block_table.shape[1]
    return PagedDescribed(kind, AttentionSizes(batch, longest_q, longest_k), values, not somewhere)


def _dense_options(options: PagedOptions) -> Options:
    return Options(
        options.causal, options.window_size, options.softmax_scale, options.softcap, 0.0, options.return_lse,
        options.deterministic, options.batch_invariant,
    )  # fmt: skip


def _sizes(q: Tensor, k_cache: Tensor, v_cache: Tensor, mla: bool) -> tuple[int, int, int, int]:
    """Return H, Hkv, D, Dv of tensors that belong together."""
    shapes = f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}"
    if mla:
        shapes = f"q {tuple(q.shape)}, kv_cache {(*k_cache.shape[:2], k_cache.shape[3])}"
    if q.dim() != 3 or k_cache.dim() != 4 or v_cache.dim() != 4:
        raise ValueError(
            f"q must be (tokens, heads, head_dim), caches (num_blocks, block_size, kv_heads, head_dim); got {shapes}"
        )
    _, heads, head_dim = q.shape
    blocks, block_size, kv_heads, head_dim_k = k_cache.shape
    blocks_v, block_size_v, heads_v, head_dim_v = v_cache.shape
    if (blocks, block_size, kv_heads) != (blocks_v, block_size_v, heads_v) or head_dim != head_dim_k:
        raise ValueError(
            "q (Tq, H, D), k_cache (num_blocks, block_size, Hkv, D), v_cache (num_blocks, block_size, Hkv, Dv) must "
            f"agree in blocks, key heads and head size; got {shapes}"
        )
    if not heads or not kv_heads or heads % kv_heads or not head_dim or not head_dim_v or not block_size:
        raise ValueError(
            f"H={heads} must be a positive multiple of Hkv={kv_heads}, head sizes and block_size={block_size} positive"
        )
    return heads, kv_heads, head_dim, head_dim_v


def _check_dtypes(q: Tensor, k_cache: Tensor, v_cache: Tensor, name: str) -> None:
    if q.dtype not in _QUERIES:
        raise TypeError(f"q has dtype {q.dtype}; attention takes floating-point tensors (16, 32, 64 bit or FP8)")
    if k_cache.dtype is not v_cache.dtype:
        raise TypeError(f"k_cache and v_cache must have one dtype; got {k_cache.dtype} and {v_cache.dtype}")
    eight = k_cache.dtype in _EIGHT_BITS and q.dtype.itemsize > 1
    if k_cache.dtype is not q.dtype and not eight:
        raise TypeError(f"{name} must have q's dtype, {q.dtype}, or be FP8 or int8 below it; got {k_cache.dtype}")


def _check_tables(tensors: PagedTensors, device: torch.device) -> int:
    """Check cu_seqlens_q, block_table and seqused_k, and return the number of sequences."""
    forms = (
        ("cu_seqlens_q", 1, "(batch + 1,)"),
        ("block_table", 2, "(batch, max_blocks)"),
        ("seqused_k", 1, "(batch,)"),
    )
    for (name, rank, form), tensor in zip(forms, tensors[:3], strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be an int32 tensor of shape {form}, not {tensor!r}")
        if tensor.dtype is not torch.int32 or tensor.dim() != rank:
            raise ValueError(f"{name} must be int32 of shape {form}; got {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, q on {device}; both must be on one device")
        if tensor.numel() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} must have an innermost stride of 1; got strides {tensor.stride()}")
    cu, table, used = tensors[:3]
    batch = used.shape[0]
    if cu.shape[0] != batch + 1 or table.shape[0] != batch:
        raise ValueError(
            f"cu_seqlens_q {tuple(cu.shape)}, block_table {tuple(table.shape)} and seqused_k {tuple(used.shape)} must "
            "be (batch + 1,), (batch, max_blocks) and (batch,)"
        )
    return batch


def check_no_grad(q: Tensor, k_cache: Tensor, v_cache: Tensor, name: str, sinks: Tensor | None) -> None:
    """Refuse a tensor whose gradient would be lost.

    Raises:
        ValueError: naming the tensor.
    """
    if not torch.is_grad_enabled():
        return
    for what, tensor in (("q", q), (name, k_cache), ("v_cache", v_cache), ("sinks", sinks)):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{what} requires a gradient, and attention over a paged cache has no backward; call it under "
                f"torch.no_grad() or torch.inference_mode(), or pass {what}.detach()"
            )


def check_paged_values(tensors: PagedTensors, options: PagedOptions, tokens: int, num_blocks: int, block: int) -> None:
    """Check what lies in cu_seqlens_q, seqused_k and the part of block_table that is read.

    Reads the tensors, so on a GPU this synchronises; there it runs with VLLM_ACCEL_CHECK=1 only.

    Raises:
        ValueError: naming the tensor and the offending entry.
    """
    ends, used = tensors.cu_seqlens_q.tolist(), tensors.seqused_k.tolist()
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens_q[0] must be 0; got {ends[0]}")
    for b in range(len(used)):
        length = ends[b + 1] - ends[b]
        if length < 0:
            raise ValueError(f"cu_seqlens_q must not decrease; entry {b + 1} is {ends[b + 1]} after {ends[b]}")
        if length > options.max_seqlen_q:
            raise ValueError(
                f"cu_seqlens_q: sequence {b} has {length} tokens, more than max_seqlen_q {options.max_seqlen_q}"
            )
    if ends[-1] > tokens:
        raise ValueError(f"cu_seqlens_q ends at {ends[-1]}, past the {tokens} tokens of q")
    table = tensors.block_table
    most = min(options.max_seqlen_k, table.shape[1] * block)
    for b, length in enumerate(used):
        if not 0 <= length <= most:
            raise ValueError(
                f"seqused_k[{b}] is {length}; it must be from 0 to max_seqlen_k {options.max_seqlen_k}, and at most "
                f"the {table.shape[1] * block} tokens of its row of block_table"
            )
    if not table.numel():
        return
    low, high = torch.aminmax(table)
    if low.item() >= 0 and high.item() < num_blocks:
        return  # the padding too: the usual case, in one pass
    for b, length in enumerate(used):
        for j, entry in enumerate(table[b, : -(-length // block)].tolist()):
            if not 0 <= entry < num_blocks:
                raise ValueError(f"block_table[{b}, {j}] is {entry}; the caches have blocks 0 to {num_blocks - 1}")
