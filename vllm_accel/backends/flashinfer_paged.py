"""FlashInfer's paged prefill wrapper as a decode kernel that is planned without looking at a length on the device.

``plan`` divides (query tile, key chunk) pairs over the chip from lengths on the host; ``run`` reads the true lengths
and blocks from device buffers. So each query row becomes a sequence of one query (`paged_rows`: the query lengths are
then known), and the plan is made for the maximum key length; chunks past a sequence's end have no key and weigh nothing
(include/flashinfer/attention/prefill.cuh: ``chunk_start = min(kv_tile_idx * max_chunk_size, kv_len)``; with one query
row the place of a partial result does not depend on the true length; state.cuh: an empty part has weight 0). This is
what FlashInfer calls CUDA-graph mode, and a plan serves every call with as many rows and maxima in the same quarter
octave.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_accel.backends.convert import aligned, clear_past_end, fold_sinks
from vllm_accel.backends.flashinfer_workspace import GRAPH, place, refuse_capture, workspace_of
from vllm_accel.backends.paged_rows import Rows, per_row
from vllm_accel.dispatch.backend import PagedArgs
from vllm_accel.dispatch.spec import bucket_up

#: Plans kept by one kernel; each holds 1 to 3 MiB on the device and as much page-locked memory.
MAX_PLANS = 64


class _Plan(NamedTuple):
    """A planned wrapper, and the buffers it reads lengths and blocks from; the lock joins a call's two steps."""

    wrapper: Any
    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor
    width: int
    lock: threading.Lock


#: Plans that a captured graph reads: the graph may outlive the kernel, and nobody says when it is gone.
_captured: dict[int, _Plan] = {}


class FlashInferPaged:
    """Paged attention for a few query tokens of each sequence."""

    def __init__(self, wrapper: Callable[..., Any]) -> None:
        self._wrapper = wrapper
        self._plans: OrderedDict[Hashable, _Plan] = OrderedDict()
        self._lock = threading.Lock()

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
        """Return out and lse (None unless needed)."""
        q, k_cache, v_cache = aligned(q), aligned(k_cache), aligned(v_cache)
        rows = per_row(args, q.shape[0])
        q = scaled_heads(q, args.k_descale, rows)
        out = torch.empty((*q.shape[:2], v_cache.shape[-1]), dtype=q.dtype, device=q.device)
        plan = self._plan_for(q, k_cache, args)
        need_lse = args.need_lse or args.sinks is not None
        with plan.lock:
            fill(plan, rows, k_cache.shape[1])
            result = plan.wrapper.run(
                q=q, paged_kv_cache=(k_cache, v_cache), out=out, return_lse=need_lse, lse_base="ln", lse_layout="HN"
            )
        lse = result[1] if need_lse else None
        out = scaled_heads(out, args.v_descale, rows)
        if lse is not None and args.sinks is not None:
            out, lse = fold_sinks(out, lse, args.sinks)
            lse = clear_past_end(lse, args.cu_seqlens_q, float("-inf"), dim=-1)  # no sink for rows of no sequence
        return out, lse if args.need_lse else None

    def _plan_for(self, q: Tensor, k_cache: Tensor, args: PagedArgs) -> _Plan:
        """Return the plan for as many rows and at most as many blocks, made at its first use outside of a capture."""
        block_size = k_cache.shape[1]
        width = min(-(-args.max_seqlen_k // block_size), bucket_up(args.block_table.shape[1]))
        where = place(q.device)
        shape = (q.device, q.shape, k_cache.shape[1:], q.dtype, k_cache.dtype, width)
        key = (*shape, args.softmax_scale, args.softcap, args.window_size[0])
        with self._lock:
            found = self._plans.get((key, where))
            if found is not None:
                self._plans.move_to_end((key, where))
                if where == GRAPH:
                    _captured[id(found)] = found
                return found
            refuse_capture(where)
            for each in (where, GRAPH) if q.is_cuda else (where,):
                self._plans[key, each] = self._plan(q, k_cache, args, width, workspace_of(q.device, each))
            while len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
            return self._plans[key, where]

    def _plan(self, q: Tensor, k_cache: Tensor, args: PagedArgs, width: int, scratch: Tensor) -> _Plan:
        tokens, (block_size, kv_heads, head_dim) = q.shape[0], k_cache.shape[1:]

        def int32(n: int) -> Tensor:
            return torch.zeros(n, dtype=torch.int32, device=q.device)

        ends = torch.arange(tokens + 1, dtype=torch.int32)
        indptr, indices, last_page_len = int32(tokens + 1), int32(tokens * width + 1), int32(tokens)
        wrapper = self._wrapper(
            scratch, kv_layout="NHD", use_cuda_graph=True, qo_indptr_buf=int32(tokens + 1), paged_kv_indptr_buf=indptr,
            paged_kv_indices_buf=indices, paged_kv_last_page_len_buf=last_page_len, backend="fa2",
        )  # fmt: skip
        wrapper.plan(
            qo_indptr=ends, paged_kv_indptr=ends * width, paged_kv_indices=int32(0),
            paged_kv_last_page_len=torch.full((tokens,), block_size, dtype=torch.int32), num_qo_heads=q.shape[1],
            num_kv_heads=kv_heads, head_dim_qk=head_dim, page_size=block_size, causal=False,
            sm_scale=args.softmax_scale, window_left=args.window_size[0], logits_soft_cap=args.softcap,
            q_data_type=q.dtype, kv_data_type=k_cache.dtype, o_data_type=q.dtype,
        )  # fmt: skip
        return _Plan(wrapper, indptr, indices, last_page_len, width, threading.Lock())


def fill(plan: _Plan, rows: Rows, block_size: int) -> None:
    """Write the compressed block table of this call into the buffers of a plan, on the device."""
    table = rows.table[:, : plan.width]
    pages = torch.div(rows.used + (block_size - 1), block_size, rounding_mode="floor")
    torch.cumsum(pages, 0, dtype=torch.int32, out=plan.indptr[1:])
    torch.sub(rows.used, pages - 1, alpha=block_size, out=plan.last_page_len)
    column = torch.arange(table.shape[1], dtype=torch.int32, device=table.device)
    # What no key needs goes to one spare entry past all others.
    spare = plan.indices.shape[0] - 1
    target = torch.where(column < pages.unsqueeze(-1), plan.indptr[:-1].unsqueeze(-1) + column, spare)
    plan.indices.scatter_(0, target.flatten().long(), table.flatten())


def scaled_heads(tensor: Tensor, descale: Tensor | None, rows: Rows) -> Tensor:
    """Multiply (T, H, D) by a factor () or (Hkv,) or (B, Hkv) of its key heads, in fp32, rounded once."""
    if descale is None:
        return tensor
    factor = rows.of(descale)
    if factor.dim():
        factor = factor.repeat_interleave(tensor.shape[1] // factor.shape[-1], dim=-1).unsqueeze(-1)
    return (tensor.float() * factor).to(tensor.dtype)
