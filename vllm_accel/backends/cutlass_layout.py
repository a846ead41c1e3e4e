"""What the CUTLASS attention kernel wants, in torch and under xFormers alike: heads, biases, packed log-sum-exp.

Conventions, read in pytorch's aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_forward.h and
kernel_backward.h: the log-sum-exp of packed calls is (sequences, H, max_seqlen_q rounded up to 32); rows of it past a
sequence are read by the backward kernel and must be +inf; a sequence without keys is skipped, so its output and the
gradient of its queries stay unwritten; the offset of a bottom-right diagonal is unsigned, so a sequence with fewer keys
than queries runs unmasked; a bias tile is loaded 16 bytes at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_accel.backends.convert import round_up, window
from vllm_accel.dispatch.backend import AttentionArgs

#: Rows of the log-sum-exp come in blocks of the backward kernel (kAlignLSE).
LSE_BLOCK = 32


def expand_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """Give every query head its key head: (.., Hkv, D) -> (.., H, D), a copy where they differ.

    The kernel has no groups. A stride-0 view would need no copy and is wrong there, a caller's own too: with a mask,
    32n + 1 keys and heads of 512 it was off by the largest value (pytorch#191937; H200, torch 2.11, 2026-11-27,
    `python -m benchmarks.known_bad`).
    """
    kv_heads = tensor.shape[-2]
    if kv_heads == num_heads:
        return tensor.contiguous() if 0 in tensor.stride() else tensor
    groups = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], num_heads // kv_heads, tensor.shape[-1])
    # One key head for all is a view of stride 0 still: reshape copies only where it has to.
    return groups.reshape(*tensor.shape[:-2], num_heads, tensor.shape[-1]).contiguous()


def sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """Add the gradients of the query heads that share a key head (fp32 inside)."""
    return grad if grad.shape[-2] == kv_heads else grad.unflatten(-2, (kv_heads, -1)).sum(-2)


def pad_lse(lse: Tensor) -> Tensor:
    """(B, H, Sq) -> (B, H, Sq rounded up to 32), +inf in the added rows and in rows without keys."""
    lse = torch.where(lse == -math.inf, math.inf, lse)
    return F.pad(lse, (0, round_up(lse.shape[-1], LSE_BLOCK) - lse.shape[-1]), value=math.inf).contiguous()


def aligned_bias(bias: Tensor, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Tensor:
    """Return attn_bias as an additive tensor of `dtype` seen as (B, H, Sq, Sk), with rows that start at 16 bytes.

    A mask becomes 0 and -inf. Memory is that of the bias itself (rounded up in the last dimension): other dimensions
    are broadcast by stride 0, as torch's own scaled_dot_product_attention hands them to this kernel.
    """
    step = 16 // dtype.itemsize
    fits = bias.dtype is dtype and bias.stride(-1) == 1 and bias.shape[-1] % step == 0
    if not (fits and bias.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in bias.stride()[:-1])):
        wide = bias.new_zeros((*bias.shape[:-1], round_up(bias.shape[-1], 16)), dtype=dtype)
        rows = wide[..., : bias.shape[-1]]
        if bias.dtype is torch.bool:
            rows.masked_fill_(~bias, -math.inf)
        else:
            rows.copy_(bias)
        bias = rows
    return bias.expand(shape)


def rows_hidden_by_bias(bias: Tensor, args: AttentionArgs, seqlen_q: int, seqlen_k: int) -> Tensor:
    """Return which rows see no key under attn_bias and the causal window, as a bool (B or 1, H or 1, Sq or 1).

    O(bias) memory. What a kernel leaves in such rows differs between releases of torch.
    """
    seen = bias if bias.dtype is torch.bool else bias != -math.inf
    left, right = window(args)
    if left < 0 and right < 0:
        return ~seen.any(-1)
    seen = seen.expand(-1, -1, -1, seqlen_k)
    counts = F.pad(seen.cumsum(-1, dtype=torch.int32), (1, 0))  # visible keys before each key
    diagonal = torch.arange(seqlen_q, device=bias.device) + (seqlen_k - seqlen_q)
    first = (diagonal - left).clamp_(0, seqlen_k) if left >= 0 else torch.zeros_like(diagonal)
    last = (diagonal + right + 1).clamp_(0, seqlen_k) if right >= 0 else torch.full_like(diagonal, seqlen_k)

    def at(ends: Tensor) -> Tensor:
        if counts.shape[2] == 1:
            return counts[:, :, 0, ends]
        return counts.gather(-1, ends.view(1, 1, -1, 1).expand(*counts.shape[:2], -1, 1)).squeeze(-1)

    return at(last) <= at(first)


class Packed:
    """The sequences of a packed call as the kernel sees them, worked out on the device without a synchronisation.

    With `split`, for bottom-right causal calls whose key lengths are free, every sequence becomes two: its queries that
    see no key (no keys at all, so the kernel skips them) and the rest, which has no more queries than keys.
    """

    def __init__(self, args: AttentionArgs, tokens_q: int, tokens_k: int, *, split: bool) -> None:
        assert args.cu_seqlens_q is not None and args.cu_seqlens_k is not None
        self.cu_seqlens_q, self.cu_seqlens_k = args.cu_seqlens_q.contiguous(), args.cu_seqlens_k.contiguous()
        self.max_seqlen_q, self.max_seqlen_k = args.max_seqlen_q, args.max_seqlen_k
        self._tokens_q, self._tokens_k = tokens_q, tokens_k
        if split:
            starts_q, starts_k = self.cu_seqlens_q[:-1], self.cu_seqlens_k[:-1]
            hidden = (self.cu_seqlens_q.diff() - self.cu_seqlens_k.diff()).clamp_(min=0)
            self.cu_seqlens_q = _interleave(starts_q, starts_q + hidden, self.cu_seqlens_q[-1:])
            self.cu_seqlens_k = _interleave(starts_k, starts_k, self.cu_seqlens_k[-1:])
        self.sequences = self.cu_seqlens_q.shape[0] - 1

    def _sequence_of(self, cu_seqlens: Tensor, tokens: int) -> Tensor:
        """Return the sequence of every token, `sequences` for tokens past the last one."""
        positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)

    def _place(self) -> tuple[Tensor, Tensor]:
        """Return the sequence of every query, and its number within the sequence (0 past the last one)."""
        sequence = self._sequence_of(self.cu_seqlens_q, self._tokens_q)
        start = self.cu_seqlens_q[sequence.clamp(max=self.sequences - 1)]
        row = torch.arange(self._tokens_q, device=start.device) - start
        return sequence, torch.where(sequence == self.sequences, 0, row)

    def queries_without_keys(self) -> Tensor:
        """Return a bool (Tq,): queries of a sequence without keys, and rows past the last sequence."""
        return self._lacking(self.cu_seqlens_q, self._tokens_q, self.cu_seqlens_k)

    def keys_without_queries(self) -> Tensor:
        """Return a bool (Tk,): the same for keys."""
        return self._lacking(self.cu_seqlens_k, self._tokens_k, self.cu_seqlens_q)

    def _lacking(self, own: Tensor, tokens: int, other: Tensor) -> Tensor:
        empty = F.pad(other.diff() == 0, (0, 1), value=True)
        return empty[self._sequence_of(own, tokens)]

    def lse_by_token(self, lse: Tensor) -> Tensor:
        """(sequences, H, rows) -> (H, Tq)."""
        sequence, row = self._place()
        return lse[sequence.clamp(max=self.sequences - 1), :, row].transpose(0, 1)

    def lse_by_sequence(self, lse: Tensor) -> Tensor:
        """(H, Tq) -> (sequences, H, rows rounded up to 32), +inf wherever there is no query or no key."""
        sequence, row = self._place()
        rows = round_up(self.max_seqlen_q, LSE_BLOCK)
        padded = lse.new_full((self.sequences + 1, lse.shape[0], rows), math.inf)  # the last for rows of no sequence
        padded[sequence, :, row] = torch.where(lse == -math.inf, math.inf, lse).transpose(0, 1)
        return padded[:-1]


def _interleave(even: Tensor, odd: Tensor, last: Tensor) -> Tensor:
    return torch.cat([torch.stack([even, odd], dim=1).flatten(), last])
