"""Attention over a prefix that every sequence shares, read once for all of them and merged exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_accel.ops.merge import merge_attention
from vllm_accel.ops.paged import attention_paged
from vllm_accel.ops.run import Result


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
    sequence: that saves ``(B - 1) * prefix bytes`` of memory traffic, and costs a second launch and a merge of about a
    dozen small kernels. So it pays for large batches over long prompts, and the caller says when.

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
    _check_options(options)
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


def _check_options(options: dict[str, Any]) -> None:
    for name in ("q_descale", "k_descale", "v_descale"):
        factor = options.get(name)
        if isinstance(factor, Tensor) and factor.dim() == 2:
            raise ValueError(f"{name} differs by sequence, and a shared prefix is one for all; pass a scalar or (Hkv,)")
    if options.get("alibi_slopes") is not None or tuple(options.get("window_size", (-1, -1))) != (-1, -1):
        raise ValueError("windows and ALiBi count positions from a part's own last key: a shared prefix has neither")
    if options.get("batch_invariant"):
        raise ValueError("batch_invariant: where a sequence is split would depend on what else is in the batch")


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
