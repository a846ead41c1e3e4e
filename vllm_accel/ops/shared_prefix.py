"""Attention over a prefix that every sequence shares, read once for all of them and merged exactly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vllm_accel.ops.merge import merge_attention
from vllm_accel.ops.paged import attention_paged
from vllm_accel.ops.run import Result

#: What reading the prefix once must save, in bytes, for the second call and the merge to be worth it. CPU: from 48 MiB
#: on every step measured was faster for it, 1.1x to 4.7x, and between 15 and 32 MiB some were and some were not
#: (AMD EPYC with AVX2, one thread of a busy machine, 2026-11-27, `python -m benchmarks.shared_prefix`).
#: GPUs: about 60 us of launches at 3.4 TB/s are 200 MB, doubled since a chip's cache already saves some of the reads;
#: reckoned from data sheets, not measured.
MIN_SAVED = {"cpu": 48 << 20, "cuda": 512 << 20}
#: Query rows a key (tokens a sequence x query heads a key head) up to which a call waits for memory and not for
#: arithmetic, so that bytes saved are time saved: about half of what the machines do in a byte's time.
MAX_ROWS = {"cpu": 8, "cuda": 64}


def pays(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, prefix_tokens: int, batch: int, options: dict[str, Any]
) -> bool:
    """Tell whether attending to a common prefix once is possible, and worth its second call and its merge.

    The prefix's keys and values are read once instead of `batch` times. Depends on shapes, dtypes and the kind of
    device alone, so the same call is always answered alike.
    """
    kind = q.device.type
    if batch < 2 or not prefix_tokens or kind not in MIN_SAVED or refusal(options):
        return False
    bytes_per_token = k_cache.shape[2] * (k_cache.shape[3] + v_cache.shape[3]) * k_cache.element_size()
    rows = math.ceil(q.shape[0] / batch) * (q.shape[1] // k_cache.shape[2])
    return rows <= MAX_ROWS[kind] and (batch - 1) * prefix_tokens * bytes_per_token >= MIN_SAVED[kind]


def attention_shared_prefix(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    prefix_blocks: int,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    block_table: Tensor,
    seqused_k: Tensor,
    max_seqlen_k: int,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Result:
    """Attend as `attention_paged` does, where all sequences start with the same blocks (cascade: Juravsky et al. 2024).

    All queries together attend to the prefix, without a mask, as if they were one sequence; then each to the rest of
    its own; the two are merged by their log-sum-exps. The keys and values of the prefix are read once instead of once a
    sequence: that saves ``(B - 1) * prefix bytes`` of memory traffic, and costs a second call and a merge. So it pays
    for large batches over long prompts: `pays` says when, and `CacheStep.attend` asks it.

    Args:
        prefix_blocks: how many blocks at the start of every row of block_table are the same, and full. Every sequence
            must have all its own queries' keys after them.
        The others: as `attention_paged`, for the whole sequences. No windows and no ALiBi (their positions count from a
            part's own last key), no factors by sequence, not batch_invariant (the split depends on the batch).

    Returns:
        As `attention_paged`.

    Raises:
        ValueError: an option that does not split. On the CPU also rows that do not share the prefix.
        As `attention_paged`.
    """
    if text := refusal(options):
        raise ValueError(text)
    length = prefix_blocks * k_cache.shape[1]
    batch = seqused_k.shape[0]
    if not 0 <= prefix_blocks <= block_table.shape[1] or length > max_seqlen_k:
        raise ValueError(
            f"prefix_blocks={prefix_blocks} must be from 0 to the {block_table.shape[1]} columns of block_table, and "
            f"its {length} tokens at most max_seqlen_k={max_seqlen_k}"
        )
    tables: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
    if not prefix_blocks or batch < 2:
        return attention_paged(
            q, k_cache, v_cache, block_table=block_table, seqused_k=seqused_k, max_seqlen_k=max_seqlen_k, sinks=sinks,
            return_lse=return_lse, **tables, **options,
        )  # fmt: skip
    if q.device.type == "cpu":
        _check_values(block_table[:, :prefix_blocks], cu_seqlens_q, seqused_k, length)
    prefix = attention_paged(
        q, k_cache, v_cache, cu_seqlens_q=cu_seqlens_q[::batch].contiguous(), max_seqlen_q=q.shape[0],
        block_table=block_table[:1, :prefix_blocks], seqused_k=torch.full_like(seqused_k[:1], length),
        max_seqlen_k=length, return_lse=True, **{**options, "causal": False},
    )  # fmt: skip
    own = attention_paged(
        q, k_cache, v_cache, block_table=block_table[:, prefix_blocks:], seqused_k=seqused_k - length,
        max_seqlen_k=max_seqlen_k - length, return_lse=True, **tables, **options,
    )  # fmt: skip
    out, lse = merge_attention((prefix[0], own[0]), (prefix[1], own[1]))
    if sinks is not None:  # in both parts a row of no sequence sees nothing, and it has no sink either
        merged, with_sinks = merge_attention((out,), (lse,), sinks=sinks)
        inside = torch.isfinite(lse)
        out, lse = merged, torch.where(inside, with_sinks, lse)
    return (out, lse) if return_lse else out


def refusal(options: dict[str, Any]) -> str | None:
    """Say which option of `attention_paged` cannot be split, None if all can."""
    for name in ("q_descale", "k_descale", "v_descale"):
        factor = options.get(name)
        if isinstance(factor, Tensor) and factor.dim() == 2:
            return f"{name} differs by sequence, and a shared prefix is one for all; pass a scalar or (Hkv,)"
    if options.get("alibi_slopes") is not None or tuple(options.get("window_size", (-1, -1))) != (-1, -1):
        return "windows and ALiBi count positions from a part's own last key: a shared prefix has neither"
    if options.get("batch_invariant"):
        return "batch_invariant: where a sequence is split would depend on what else is in the batch"
    return None


def _check_values(prefix: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor, length: int) -> None:
    if not bool((prefix == prefix[:1]).all()):
        raise ValueError("block_table: not every row starts with the same prefix blocks")
    short = seqused_k - length < cu_seqlens_q.diff()
    if bool(short.any()):
        b = int(short.to(torch.uint8).argmax())
        raise ValueError(
            f"seqused_k[{b}] is {int(seqused_k[b])}: a prefix of {length} tokens leaves less than its "
            f"{int(cu_seqlens_q[b + 1] - cu_seqlens_q[b])} queries' own keys"
        )
