"""`torch.compile` and `torch.export` over paged attention: one registered operator a call, with a fake of each.

Only traced calls use them. The backend is chosen when the operator runs, by the same plans as eager calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_accel.ops.paged_arguments import PagedOptions, PagedTensors, check_no_grad
from vllm_accel.ops.paged_run import run_paged
from vllm_accel.ops.run import Result

_REST = (
    "Tensor cu_seqlens_q, Tensor block_table, Tensor seqused_k, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, "
    "SymInt window_left, SymInt window_right, float? softmax_scale, float softcap, bool return_lse, "
    "bool deterministic, bool batch_invariant, bool finite_tail, str backend"
)
_N_TENSORS = len(PagedTensors._fields)

_library = torch.library.Library("vllm_accel", "FRAGMENT")
_library.define(f"attention_paged(Tensor q, Tensor k_cache, Tensor v_cache, {_REST}) -> (Tensor, Tensor)")
_library.define(f"attention_mla(Tensor q, Tensor kv_cache, SymInt head_dim_v, {_REST}) -> (Tensor, Tensor)")


def attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tensors: PagedTensors,
    options: PagedOptions,
    backend: str | Sequence[str] | None,
) -> Result:
    """Call the operator; this is what Dynamo traces."""
    check_no_grad(q, k_cache, v_cache, "k_cache", tensors.sinks)
    result = torch.ops.vllm_accel.attention_paged(
        _autocast(q), k_cache, v_cache, *tensors, *_flat(options), _names(backend)
    )
    return _result(result, options)


def attention_mla(
    q: Tensor,
    kv_cache: Tensor,
    head_dim_v: int,
    tensors: PagedTensors,
    options: PagedOptions,
    backend: str | Sequence[str] | None,
) -> Result:
    """Call the operator that takes the one cache of MLA: its two views would alias inside a graph."""
    check_no_grad(q, kv_cache, kv_cache, "kv_cache", tensors.sinks)
    result = torch.ops.vllm_accel.attention_mla(
        _autocast(q), kv_cache, head_dim_v, *tensors, *_flat(options), _names(backend)
    )
    return _result(result, options)


def mla_views(kv_cache: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    """Return keys (num_blocks, block_size, 1, D) and values (num_blocks, block_size, 1, Dv) of a latent cache."""
    keys = kv_cache.unsqueeze(2)
    return keys, keys.narrow(3, 0, head_dim_v)


def _result(result: tuple[Tensor, Tensor], options: PagedOptions) -> Result:
    return result if options.return_lse else result[0]


def _autocast(q: Tensor) -> Tensor:
    """Cast q where autocast is on; the caches are storage and stay as they are."""
    if torch.is_autocast_enabled(q.device.type) and q.dtype.itemsize > 1 and q.dtype is not torch.float64:
        return q.to(torch.get_autocast_dtype(q.device.type))
    return q


def _names(backend: str | Sequence[str] | None) -> str:
    return backend if isinstance(backend, str) else ",".join(backend or ())


def _flat(options: PagedOptions) -> tuple[Any, ...]:
    """Return the options in the order of the schema."""
    o = options
    return (
        o.max_seqlen_q, o.max_seqlen_k, o.causal, o.window_size[0], o.window_size[1], o.softmax_scale, o.softcap,
        o.return_lse, o.deterministic, o.batch_invariant, o.finite_tail,
    )  # fmt: skip


def _run(q: Tensor, k_cache: Tensor, v_cache: Tensor, rest: tuple[Any, ...], mla: bool) -> tuple[Tensor, Tensor]:
    tensors = PagedTensors(*rest[:_N_TENSORS])
    most_q, most_k, causal, left, right, scale, softcap, lse, same, invariant, finite, names = rest[_N_TENSORS:]
    options = PagedOptions(most_q, most_k, causal, (left, right), scale, softcap, lse, same, invariant, finite, mla)
    result = run_paged(
        q, k_cache, v_cache, tensors, options, tuple(names.split(",")) if names else None, attention_paged
    )
    if isinstance(result, tuple):
        return result
    return result, q.new_empty(0, dtype=torch.float32)


def _paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _run(q, k_cache, v_cache, rest, False)


def _mla(q: Tensor, kv_cache: Tensor, head_dim_v: int, *rest: Any) -> tuple[Tensor, Tensor]:
    return _run(q, *mla_views(kv_cache, head_dim_v), rest, True)


def _fake(q: Tensor, head_dim_v: int, rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    out = q.new_empty((tokens, heads, head_dim_v), dtype=q.dtype if q.dtype.itemsize > 1 else torch.bfloat16)
    if not rest[_N_TENSORS + 7]:  # return_lse
        return out, q.new_empty(0, dtype=torch.float32)
    return out, q.new_empty((heads, tokens), dtype=torch.float64 if q.dtype is torch.float64 else torch.float32)


def _fake_paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(q, v_cache.shape[-1], rest)


def _fake_mla(q: Tensor, kv_cache: Tensor, head_dim_v: int, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(q, head_dim_v, rest)


_library.impl("attention_paged", _paged, "CompositeExplicitAutograd")
_library.impl("attention_mla", _mla, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_accel::attention_paged", _fake_paged, lib=_library)
torch.library.register_fake("vllm_accel::attention_mla", _fake_mla, lib=_library)
