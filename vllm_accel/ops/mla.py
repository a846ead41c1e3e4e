"""Absorbed multi-head latent attention over a paged cache: `attention_mla`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_accel.ops import paged_compiled
from vllm_accel.ops.arguments import NO_WINDOW
from vllm_accel.ops.paged_arguments import PagedOptions, PagedTensors
from vllm_accel.ops.paged_run import run_paged
from vllm_accel.ops.run import Result

_new = tuple.__new__
_tracing = torch.compiler.is_dynamo_compiling


def attention_mla(
    q: Tensor,
    kv_cache: Tensor,
    *,
    head_dim_v: int,
    softmax_scale: float,
    block_table: Tensor,
    seqused_k: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    finite_tail: bool = False,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    q_descale: Tensor | None = None,
    kv_descale: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: str | Sequence[str] | None = None,
) -> Result:
    """Attend in the latent space of multi-head latent attention (DeepSeek-V2, 2024), with the weights absorbed in q.

    All heads share one key of D channels a token, of which the first `head_dim_v` are also the value: the cache is
    read once. The same as `attention_paged` with one key head and ``v_cache = kv_cache[..., :head_dim_v]``.

    Args:
        q: (Tq, H, D), for DeepSeek D = 576 (512 latent and 64 rotary channels).
        kv_cache: (num_blocks, block_size, D), in q's dtype, or FP8 or int8 with `kv_descale`; innermost stride 1.
        head_dim_v: channels of the value, 512 for DeepSeek.
        softmax_scale: of the model's own head size (192 ** -0.5 for DeepSeek), so it has no default.
        kv_descale: fp32 factor of the cache: scalar, (1,) or (B, 1). sinks: (H,).
        The others: as `attention_paged`; pass ``causal=True`` with several query tokens a sequence.

    Returns:
        out (Tq, H, head_dim_v), with `return_lse` ``(out, lse)``, lse fp32 (H, Tq).

    Raises:
        As `attention_paged`.
    """
    # tuple.__new__: a named tuple's own constructor is a Python call.
    tensors = _new(PagedTensors, (cu_seqlens_q, block_table, seqused_k, None, sinks, q_descale, kv_descale, kv_descale))
    options = _new(
        PagedOptions,
        (
            max_seqlen_q, max_seqlen_k, causal, window_size, softmax_scale, softcap, return_lse, deterministic,
            batch_invariant, finite_tail, True,
        ),
    )  # fmt: skip
    if _tracing():
        return paged_compiled.attention_mla(q, kv_cache, head_dim_v, tensors, options, backend)
    keys, values = views(kv_cache, head_dim_v)

    def traced(q: Tensor, _k: Tensor, _v: Tensor, *rest: Any) -> Result:
        return paged_compiled.attention_mla(q, kv_cache, head_dim_v, *rest)

    return run_paged(q, keys, values, tensors, options, backend, traced)


def views(kv_cache: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    """Return the key and value views of a latent cache, after what has to hold for them to exist.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if not isinstance(kv_cache, Tensor):
        raise TypeError(f"kv_cache must be a tensor, not {type(kv_cache).__name__}")
    if kv_cache.dim() != 3:
        raise ValueError(f"kv_cache must be (num_blocks, block_size, head_dim); got {tuple(kv_cache.shape)}")
    if isinstance(head_dim_v, bool) or not isinstance(head_dim_v, int) or not 0 < head_dim_v <= kv_cache.shape[2]:
        raise ValueError(f"head_dim_v must be an int from 1 to D={kv_cache.shape[2]}, not {head_dim_v!r}")
    return paged_compiled.mla_views(kv_cache, head_dim_v)
