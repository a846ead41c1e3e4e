"""Attention over a paged cache in plain PyTorch: every option, every device, and no lengths on the host of a GPU.

Keys and values of a few sequences at a time are copied out of their blocks, and the arithmetic of the dense reference
does the rest: O(S) extra memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_accel.backends import gather
from vllm_accel.backends import reference_chunk as chunk
from vllm_accel.dispatch.backend import AttentionArgs, PagedArgs

#: Elements of keys and values gathered at once on a GPU (64 MiB in fp32); a single sequence may need more.
MAX_GATHERED = 1 << 24


class ReferencePagedKernel:
    """Sequence by sequence where lengths can be read, else by groups of padded sequences."""

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor]:
        """Return out and lse."""
        dtype = q.dtype if q.dtype.itemsize > 1 else torch.bfloat16
        # One more row than q has takes what belongs to no row.
        out = q.new_zeros((q.shape[0] + 1, q.shape[1], v_cache.shape[-1]), dtype=dtype)
        lse = out.new_full((q.shape[0] + 1, q.shape[1]), -math.inf, dtype=chunk.compute_dtype(q.dtype))
        if q.device.type == "cpu":
            self.on_host(q, k_cache, v_cache, args, out, lse)
        else:
            self.on_device(q, k_cache, v_cache, args, out, lse)
        return out[:-1], lse[:-1].t().contiguous()

    def on_host(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs, out: Tensor, lse: Tensor) -> None:
        """Attend to each sequence at its own lengths."""
        ends, used = args.cu_seqlens_q.tolist(), args.seqused_k.tolist()
        for b, length in enumerate(used):
            rows = slice(ends[b], ends[b + 1])
            if rows.start < rows.stop:
                keys, values = (gather.sequence(c, args.block_table[b], length) for c in (k_cache, v_cache))
                part, part_lse = chunk.forward(
                    _dense(args, b, b + 1), q[None, rows], keys[None], values[None], rng=None
                )
                out[rows], lse[rows] = part[0].to(out.dtype), part_lse[0].t()

    def on_device(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs, out: Tensor, lse: Tensor) -> None:
        """Attend to groups of sequences, as many as the budget holds; no length is read."""
        longest = min(args.max_seqlen_k, args.block_table.shape[1] * k_cache.shape[1])
        per_sequence = longest * k_cache.shape[2] * (k_cache.shape[3] + v_cache.shape[3])
        step = max(1, MAX_GATHERED // max(1, per_sequence))
        for first in range(0, args.seqused_k.shape[0], step):
            self._group(q, k_cache, v_cache, args, slice(first, first + step), longest, out, lse)

    def _group(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs, group: slice, longest: int, out: Tensor,
        lse: Tensor,
    ) -> None:  # fmt: skip
        """Attend for a group of sequences, padded on the device to the longest."""
        starts, stops = args.cu_seqlens_q[:-1][group].long(), args.cu_seqlens_q[1:][group].long()
        steps = torch.arange(args.max_seqlen_q, device=q.device)
        rows = starts[:, None] + steps
        inside = rows < stops[:, None]
        rows = torch.where(inside, rows, q.shape[0])
        queries = torch.where(inside[..., None, None], q[rows.clamp(max=q.shape[0] - 1)].to(out.dtype), 0.0)
        used = args.seqused_k[group].long().clamp(0, longest)
        keys, values = (gather.padded(c, args.block_table[group], used, longest) for c in (k_cache, v_cache))
        lengths = chunk.Lengths(stops - starts, used)
        dense = _dense(args, group.start, group.start + used.shape[0])
        part, part_lse = chunk.forward(dense, queries, keys, values, rng=None, lengths=lengths)
        out[rows] = part.to(out.dtype)  # rows of no sequence all go to the spare one
        lse[rows] = part_lse.transpose(1, 2)


def _dense(args: PagedArgs, first: int, stop: int) -> AttentionArgs:
    """Return the arguments of some sequences as a dense batch."""

    def pick(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.dim() < 2 or tensor.shape[0] == 1 else tensor[first:stop]

    return AttentionArgs(
        None, None, pick(args.alibi_slopes), None, args.sinks, pick(args.q_descale), pick(args.k_descale),
        pick(args.v_descale), args.max_seqlen_q, args.max_seqlen_k, args.softmax_scale, args.causal,
        args.window_size, args.softcap, 0.0, args.need_lse, args.deterministic, args.batch_invariant,
    )  # fmt: skip


PAGED_KERNEL = ReferencePagedKernel()
