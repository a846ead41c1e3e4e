"""How FlashInfer's TensorRT-LLM functions are called: lengths, scales, and rows that see no key.

Conventions, read in flashinfer 0.7.2 (decode.py, prefill.py, mla/_core.py, xqa.py; data/csrc/xqa/mha.cu): a buffer of
scratch memory, zero before its first use; ``bmm1_scale`` is the softmax scale and ``bmm2_scale`` a factor on the
values, both one number for all heads; the log-sum-exp is (T, H) in base 2; a window counts keys left of the diagonal,
-1 is none. Nothing is said about a sequence without keys: each of these gets one block to read, and its rows are
cleared afterwards. XQA reads q, out and the table as dense memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.convert import aligned, fold_sinks
from vllm_accel.backends.flashinfer_paged import scaled_heads
from vllm_accel.backends.flashinfer_workspace import workspace
from vllm_accel.backends.paged_rows import Rows, per_row, without_strays
from vllm_accel.dispatch.backend import PagedArgs


class Xqa:
    """One query token for each sequence, no log-sum-exp."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, None]:
        """Return out, and None."""
        rows = per_row(args, q.shape[0])
        query = scaled_heads(q, args.k_descale, rows).contiguous()
        out = torch.empty_like(query)
        self._call(
            query=query, kv_cache=(aligned(k_cache), aligned(v_cache)), workspace_buffer=workspace(q.device),
            block_tables=without_strays(rows.table, rows.used, k_cache.shape[1]), seq_lens=rows.used.clamp(min=1),
            max_seq_len=args.max_seqlen_k, bmm1_scale=args.softmax_scale, bmm2_scale=1.0,
            window_left=args.window_size[0], kv_layout="NHD", out=out,
            sinks=None if args.sinks is None else args.sinks.float().contiguous(),
        )  # fmt: skip
        out = scaled_heads(out, args.v_descale, rows)
        return out.masked_fill_((rows.used == 0).view(-1, 1, 1), 0.0), None


class TrtllmGen:
    """Any number of query tokens, on the GPUs that trtllm-gen has binaries for."""

    def __init__(self, decode: Callable[..., Any], context: Callable[..., Any]) -> None:
        self._decode, self._context = decode, context

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
        """Return out and lse (None unless needed)."""
        rows = per_row(args, q.shape[0])
        need_lse = args.need_lse or args.sinks is not None
        shared = {
            "query": scaled_heads(q, args.k_descale, rows).contiguous(),
            "kv_cache": (aligned(k_cache), aligned(v_cache)),
            "workspace_buffer": workspace(q.device),
            "bmm1_scale": args.softmax_scale,
            "bmm2_scale": 1.0,
            "window_left": args.window_size[0],
            "kv_layout": "NHD",
            "out": torch.empty_like(q, memory_format=torch.contiguous_format),
            "return_lse": need_lse,
        }
        result = self._one(rows, args, k_cache, shared) if args.max_seqlen_q == 1 else self._more(args, k_cache, shared)
        out, lse = result if need_lse else (result, None)
        return finished(scaled_heads(out, args.v_descale, rows), lse, rows, args)

    def _one(self, rows: Rows, args: PagedArgs, k_cache: Tensor, shared: dict[str, Any]) -> Any:
        return self._decode(
            **shared, block_tables=without_strays(rows.table, rows.used, k_cache.shape[1]),
            seq_lens=rows.used.clamp(min=1), max_seq_len=args.max_seqlen_k, backend="trtllm-gen",
        )  # fmt: skip

    def _more(self, args: PagedArgs, k_cache: Tensor, shared: dict[str, Any]) -> Any:
        used = args.seqused_k.clamp(min=1)
        ends_k = torch.zeros_like(args.cu_seqlens_q)
        torch.cumsum(used, 0, dtype=torch.int32, out=ends_k[1:])
        return self._context(
            **shared, block_tables=without_strays(args.block_table, args.seqused_k, k_cache.shape[1]), seq_lens=used,
            max_q_len=args.max_seqlen_q, max_kv_len=args.max_seqlen_k, batch_size=used.shape[0],
            cum_seq_lens_q=args.cu_seqlens_q, cum_seq_lens_kv=ends_k, causal=args.causal,
        )  # fmt: skip


class Mla:
    """Multi-head latent attention over one cache of 576 channels, each query token as a sequence of its own."""

    def __init__(self, call: Callable[..., Any], backend: str) -> None:
        self._call, self._backend = call, backend

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
        """Return out and lse (None unless needed)."""
        rows = per_row(args, q.shape[0])
        need_lse = args.need_lse or args.sinks is not None
        result = self._call(
            query=scaled_heads(q, args.k_descale, rows).contiguous().unsqueeze(1), kv_cache=aligned(k_cache).squeeze(2),
            workspace_buffer=workspace(q.device), qk_nope_head_dim=128, kv_lora_rank=v_cache.shape[-1],
            qk_rope_head_dim=q.shape[-1] - v_cache.shape[-1],
            block_tables=without_strays(rows.table, rows.used, k_cache.shape[1]), seq_lens=rows.used.clamp(min=1),
            max_seq_len=args.max_seqlen_k, bmm1_scale=args.softmax_scale, bmm2_scale=1.0, backend=self._backend,
            return_lse=need_lse, return_lse_base="base2" if need_lse else None,
        )  # fmt: skip
        out, lse = result if need_lse else (result, None)
        shape = (q.shape[0], q.shape[1], v_cache.shape[-1])
        out = scaled_heads(out.reshape(shape), args.v_descale, rows)
        return finished(out, None if lse is None else lse.reshape(shape[:2]), rows, args)


def finished(out: Tensor, lse: Tensor | None, rows: Rows, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
    """Clear the rows that see no key, turn (T, H) of base 2 into (H, T) of base e, and add the sinks."""
    empty = rows.used == 0
    out = out.masked_fill_(empty.view(-1, 1, 1), 0.0)
    if lse is None:
        return out, None
    lse = (lse * math.log(2)).transpose(0, 1).masked_fill(empty, -math.inf)
    if args.sinks is not None:
        out, lse = fold_sinks(out, lse, args.sinks)
        row = torch.arange(lse.shape[1], device=lse.device)
        lse = lse.masked_fill(row >= args.cu_seqlens_q[-1], -math.inf)  # no sink for rows of no sequence
    return out, lse.contiguous() if args.need_lse else None
