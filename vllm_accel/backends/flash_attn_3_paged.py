"""FlashAttention 3 over a paged cache: the forward operator with ``page_table`` and ``seqused_k``.

Conventions, read in flash-attention's hopper/flash_attn_interface.py and flash_api_stable.cpp: any page size; windows
and causal masks as for packed sequences; rows of no sequence are left unwritten. Values are loaded in whole pages, so
NaN past a sequence's end reaches its output: github.com/Dao-AILab/flash-attention/issues/1745 and 2374.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vllm_accel.backends.convert import aligned, clear_past_end, fold_sinks
from vllm_accel.backends.library import Found, accepts
from vllm_accel.dispatch.backend import PagedArgs


class FlashAttn3Paged:
    """Paged attention with one installed FlashAttention 3, in either form of its operator."""

    def __init__(self, found: Found, num_splits: int, unused: dict[str, None]) -> None:
        self._call, self._num_splits = found["_flash_attn_forward"], num_splits
        self._sides = accepts(self._call, "window_size_left")
        self._unused = {} if self._sides else unused

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
        """Return out and lse (None unless needed)."""
        left, right = args.window_size
        given: dict[str, Any] = {
            **self._unused,
            "page_table": args.block_table,
            "seqused_k": args.seqused_k,
            **(
                {"window_size_left": left, "window_size_right": right}
                if self._sides
                else {"window_size": (left, right)}
            ),
        }
        out, lse, *_ = self._call(
            q=aligned(q), k=aligned(k_cache), v=aligned(v_cache), cu_seqlens_q=args.cu_seqlens_q, cu_seqlens_k=None,
            max_seqlen_q=args.max_seqlen_q, max_seqlen_k=None, softmax_scale=args.softmax_scale, causal=args.causal,
            softcap=args.softcap, num_splits=1 if args.batch_invariant else self._num_splits, **given,
        )  # fmt: skip
        out, lse = fold_sinks(out.contiguous(), lse, args.sinks)
        out = clear_past_end(out, args.cu_seqlens_q)
        if not args.need_lse:
            return out, None
        return out, clear_past_end(lse, args.cu_seqlens_q, float("-inf"), dim=-1)
