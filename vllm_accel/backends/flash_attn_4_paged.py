"""FlashAttention 4 over a paged cache: ``_flash_attn_fwd`` with ``page_table`` and ``seqused_k``.

Conventions, read in flash-attn-4 4.0.0b36, flash_attn/cute/interface.py: any page size on sm_90 and sm_100 (pages as
large as a tile load by TMA, others by cp.async), none on sm_80 and sm_120; keys are split over the chip on sm_100
alone; rows past a sequence's end in its last page must be finite.
"""

from __future__ import annotations

from torch import Tensor

from vllm_accel.backends.convert import clear_past_end
from vllm_accel.backends.library import Found
from vllm_accel.dispatch.backend import PagedArgs


class FlashAttn4Paged:
    """Paged attention with the functions of one installed flash-attn-4."""

    def __init__(self, found: Found, num_splits: int) -> None:
        self._call, self._num_splits = found["_flash_attn_fwd"], num_splits

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
        """Return out and lse (None unless needed)."""
        left, right = (None if side < 0 else side for side in args.window_size)  # None is no limit, -1 would be one
        out, lse, *_ = self._call(
            q=q, k=k_cache, v=v_cache, cu_seqlens_q=args.cu_seqlens_q, cu_seqlens_k=None, seqused_k=args.seqused_k,
            max_seqlen_q=args.max_seqlen_q, max_seqlen_k=args.max_seqlen_k, page_table=args.block_table,
            softmax_scale=args.softmax_scale, causal=args.causal, softcap=args.softcap, window_size_left=left,
            window_size_right=right, learnable_sink=args.sinks, return_lse=args.need_lse, num_splits=self._num_splits,
        )  # fmt: skip
        # Rows past the last sequence are left unwritten.
        out = clear_past_end(out.contiguous(), args.cu_seqlens_q)
        if not args.need_lse:
            return out, None
        return out, clear_past_end(lse, args.cu_seqlens_q, float("-inf"), dim=-1)
