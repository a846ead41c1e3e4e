"""PyTorch's FlashAttention 2 over a paged cache: ``aten::_flash_attention_forward`` with its ``block_table``.

This is what ``torch.nn.attention.varlen.varlen_attn`` calls for a block table; the operator is called directly for the
reasons in `sdpa_flash`. Whether a torch has it is read in the operator's schema: 2.13 has, 2.11 has not. Conventions,
read in pytorch's aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp (mha_varlen_fwd): blocks of a multiple
of 256 tokens; with ``seqused_k`` the values of ``cum_seq_k`` do not matter, its shape does; keys are split over the
chip; rows of no sequence are left unwritten. One query each and grouped heads are moved into another shape by
reckoning with exactly one query a sequence, which a sequence without a query would break: then every row is made a
sequence of its own. Nothing of this ran on a GPU here; the fake has the operator's schema.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_accel.backends import aten
from vllm_accel.backends.convert import aligned, clear_past_end
from vllm_accel.backends.flash_attn_2 import longest_k
from vllm_accel.backends.flash_attn_2_paged import finished
from vllm_accel.backends.paged_rows import per_row
from vllm_accel.dispatch.backend import PagedArgs
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature

_OPERATOR = "_flash_attention_forward"
#: What the copy of `gather` can do beyond the operator.
_COPIED = Feature.MLA | Feature.VALUE_DIM | Feature.K_DESCALE | Feature.V_DESCALE


def reads_blocks(spec: AttentionSpec, device: Device) -> bool:
    """Tell whether the operator of this torch takes a paged call as it is; another one is copied out of its blocks."""
    return (
        device.platform == "cuda"
        and spec.block_size % 256 == 0
        and spec.head_dim % 8 == 0
        and spec.kv_dtype is spec.dtype
        and not spec.features & _COPIED
        and {"block_table", "seqused_k"} <= aten.parameters(_OPERATOR)
    )


class SdpaFlashPaged:
    """Paged attention with PyTorch's own operator."""

    def __init__(self) -> None:
        self._operator = aten.operator(_OPERATOR)

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
        """Return out and lse (None unless needed)."""
        left, right = args.window_size
        ends, table, used = args.cu_seqlens_q, args.block_table, args.seqused_k
        causal, longest = args.causal, longest_k(args)
        if args.max_seqlen_q == 1:
            # The one query is on the diagonal of the last key: nothing lies to its right.
            _, table, used = per_row(args, q.shape[0])
            ends = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
            causal, right = False, -1
        out, lse, *_ = self._operator(
            query=aligned(q), key=aligned(k_cache), value=aligned(v_cache), cum_seq_q=ends, cum_seq_k=ends,
            max_q=args.max_seqlen_q, max_k=longest, dropout_p=0.0, is_causal=causal, return_debug_mask=False,
            scale=args.softmax_scale, window_size_left=None if left < 0 else left,
            window_size_right=None if right < 0 else right, seqused_k=used.contiguous(), block_table=table,
        )  # fmt: skip
        out, lse = clear_past_end(out, ends), clear_past_end(lse, ends, float("-inf"), dim=-1)
        return finished(out, lse, args)
