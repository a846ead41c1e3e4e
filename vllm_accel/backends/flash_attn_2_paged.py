"""FlashAttention 2 over a paged cache: ``flash_attn_with_kvcache`` for one query each, the packed operator for more.

Conventions, read in flash-attn 2.8.3, csrc/flash_attn/flash_api.cpp (mha_fwd_kvcache, mha_varlen_fwd: blocks of a
multiple of 256 tokens, one head size, limits of windows) and src/block_info.h: given ``seqused_k`` and a block table,
the packed operator never reads ``cu_seqlens_k``. Only the first function splits long keys over the chip for every kind
of heads. What lies past a sequence's end is replaced by zeros (src/flash_fwd_kernel.h, Clear_OOB).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_accel.backends.convert import (
    aligned,
    clear_past_end,
    empty_rows_to_minus_inf,
    fold_sinks,
    unit_inner,
    window,
)
from vllm_accel.backends.flash_attn_2 import longest_k
from vllm_accel.backends.library import Found
from vllm_accel.backends.paged_rows import per_row
from vllm_accel.dispatch.backend import PagedArgs


class FlashAttn2Paged:
    """Paged attention with the functions of one installed flash-attn."""

    def __init__(self, found: Found) -> None:
        self._call = found

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
        """Return out and lse (None unless needed)."""
        q, k_cache, v_cache = aligned(q), aligned(k_cache), aligned(v_cache)
        attend = self._decode if args.max_seqlen_q == 1 else self._prefill
        return finished(*attend(q, k_cache, v_cache, args), args)

    def _decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor]:
        rows = per_row(args, q.shape[0])
        out, lse = self._call["flash_attn_with_kvcache"](
            q=q.unsqueeze(1), k_cache=k_cache, v_cache=v_cache, cache_seqlens=rows.used, block_table=rows.table,
            softmax_scale=args.softmax_scale, softcap=args.softcap, return_softmax_lse=True,
            # The one query is on the diagonal of the last key: nothing lies to its right. Without causal no kernel that
            # adds slope * j (see `alibi_lse_shift`) is chosen.
            causal=False, window_size=(args.window_size[0], -1),
            alibi_slopes=None if args.alibi_slopes is None else rows.of(args.alibi_slopes).contiguous(),
            num_splits=1 if args.batch_invariant else 0,
        )  # fmt: skip
        return out.squeeze(1), lse.squeeze(-1).transpose(0, 1)

    def _prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor]:
        left, right = args.window_size
        out, lse, _, _ = self._call["_flash_attn_varlen_forward"](
            q=q, k=k_cache, v=v_cache, block_table=args.block_table, seqused_k=args.seqused_k,
            cu_seqlens_q=args.cu_seqlens_q, cu_seqlens_k=args.cu_seqlens_q,  # the second is required, and not read
            max_seqlen_q=args.max_seqlen_q, max_seqlen_k=longest_k(args), dropout_p=0.0, return_softmax=False,
            softmax_scale=args.softmax_scale, causal=args.causal, window_size_left=left, window_size_right=right,
            softcap=args.softcap, zero_tensors=True,  # rows past the last sequence are left unwritten otherwise
            alibi_slopes=None if args.alibi_slopes is None else unit_inner(args.alibi_slopes),
        )  # fmt: skip
        if args.alibi_slopes is not None and (args.need_lse or args.sinks is not None):
            lse = empty_rows_to_minus_inf(lse) - _alibi_lse_shift(args, args.alibi_slopes, lse.shape[-1])
        return out, lse


def finished(out: Tensor, lse: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
    """Turn the +inf of rows without keys into -inf, and add the sinks."""
    if not args.need_lse and args.sinks is None:
        return out.contiguous(), None
    out, lse = fold_sinks(out, empty_rows_to_minus_inf(lse), args.sinks)
    # Rows of no sequence have no sink either.
    return out.contiguous(), clear_past_end(lse.contiguous(), args.cu_seqlens_q, float("-inf"), dim=-1)


def _alibi_lse_shift(args: PagedArgs, slopes: Tensor, tokens: int) -> Tensor:
    """Return what `flash_attn_2.alibi_lse_shift` returns, from key lengths instead of their sums."""
    left, right = window(args)
    if right != 0 or 0 <= left < longest_k(args):
        return slopes.new_zeros(())
    rows = torch.arange(tokens, dtype=torch.int32, device=slopes.device)
    ends = args.cu_seqlens_q[1:]
    sequence = torch.searchsorted(ends, rows, right=True).clamp_(max=ends.shape[0] - 1)
    diagonal = rows - ends[sequence] + args.seqused_k[sequence]
    return (slopes[sequence].transpose(0, 1) if slopes.dim() == 2 else slopes.unsqueeze(-1)) * diagonal
