"""One table row and one key length for every query row, for decode kernels that know sequences of equal query counts.

Such a kernel takes row b of q for sequence b, which is wrong as soon as one sequence has no query. Instead of moving q
and out, the small tensors are moved: each query row becomes a sequence of its own, with its sequence's blocks and the
keys that it sees. Rows of no sequence get no key. Nothing is read on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import PagedArgs


class Rows(NamedTuple):
    """What each of the T query rows needs: sequence int64 (T,), table int32 (T, max_blocks), used int32 (T,)."""

    sequence: Tensor
    table: Tensor
    used: Tensor

    def of(self, value: Tensor) -> Tensor:
        """Give each row its sequence's part of a tensor (B, H); what has fewer dimensions is the same for all."""
        return value if value.dim() < 2 else value.index_select(0, self.sequence)


def per_row(args: PagedArgs, tokens: int) -> Rows:
    """Make every query row a sequence of one query.

    The window's left side keeps its meaning where the last key that a row sees is on its diagonal (`causal`, or one
    query for each sequence); a right side is spent in `used`.
    """
    rows = torch.arange(tokens, dtype=torch.int32, device=args.seqused_k.device)
    ends = args.cu_seqlens_q[1:]
    sequence = torch.searchsorted(ends, rows, right=True).clamp_(max=ends.shape[0] - 1)
    used = args.seqused_k.index_select(0, sequence)
    right = 0 if args.causal else args.window_size[1]
    if args.max_seqlen_q > 1 and right >= 0:
        diagonal = used - ends.index_select(0, sequence) + rows  # of the key that a row's own token is
        used = torch.minimum(used, diagonal + (right + 1)).clamp_(min=0)
    used = torch.where(rows < args.cu_seqlens_q[-1], used, 0)
    return Rows(sequence, args.block_table.index_select(0, sequence), used)


def without_strays(table: Tensor, used: Tensor, block_size: int) -> Tensor:
    """Replace the entries that no key needs by 0, for kernels that look blocks up before they look at the length."""
    starts = torch.arange(0, table.shape[1] * block_size, block_size, dtype=used.dtype, device=used.device)
    return torch.where(starts < used.unsqueeze(-1), table, 0)
