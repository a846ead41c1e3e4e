"""One attention call to check and time: its sizes, its operations and bytes, and its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["prefill", "decode", "train"]


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention call to time.

    Attributes:
        name: unique. kind: "train" times forward with backward, "decode" is bound by reading the cache.
        batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v: sizes of a dense call.
        lengths: (query, key) lengths of packed sequences; makes the call varlen. causal: aligned bottom-right.
        window: keys to the left of the diagonal that a query sees, 0 for all. block_size: of a paged cache, 0 without.
        padded: a dense batch of several lengths, the first one whole, with a boolean mask of keys (B, 1, 1, Sk).

    Raises:
        ValueError: sizes that make no call.
    """

    name: str
    kind: Kind
    batch: int = 1
    seqlen_q: int = 0
    seqlen_k: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    head_dim_v: int = 0
    causal: bool = True
    lengths: tuple[tuple[int, int], ...] = ()
    window: int = 0
    block_size: int = 0
    padded: bool = False

    def __post_init__(self) -> None:
        sizes = [self.heads, self.kv_heads, self.head_dim, self.batch, *itertools.chain(*self.sequences)]
        if min(sizes) < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.name}: sizes have to be positive, and heads a multiple of kv_heads")
        if self.kind not in ("prefill", "decode", "train"):
            raise ValueError(f"{self.name}: kind {self.kind!r} is not prefill, decode or train")
        if self.window and not self.causal:
            raise ValueError(f"{self.name}: a window is to the left of a causal diagonal")
        if self.block_size and self.kind == "train":
            raise ValueError(f"{self.name}: attention over a paged cache has no backward")
        if self.padded and (self.packed or self.causal or self.kind != "prefill"):
            raise ValueError(f"{self.name}: what is padded is a dense forward that is not causal")

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """Return the (query, key) length of each sequence."""
        return self.lengths or ((self.seqlen_q, self.seqlen_k),) * self.batch

    @property
    def dim_v(self) -> int:
        """Return the head size of values."""
        return self.head_dim_v or self.head_dim

    @property
    def packed(self) -> bool:
        """Tell whether the queries of all sequences lie one after another."""
        return bool(self.lengths or self.block_size)

    def flops(self) -> float:
        """Return the operations of one call: a causal triangle counts half, backward two and a half forwards."""
        pairs = 0.0
        for n_q, n_k in self.sequences:  # every causal shape here has Sq <= Sk
            whole = n_q * n_k - (n_q * n_q / 2 if self.causal and n_q > 1 else 0.0)
            pairs += min(whole, n_q * self.window) if self.window else whole
        forward = 2.0 * pairs * self.heads * (self.head_dim + self.dim_v)
        return forward * 3.5 if self.kind == "train" else forward

    def bytes(self, dtype: torch.dtype) -> float:
        """Return what a forward has to read and write at least once."""
        n_q, n_k = (sum(lengths) for lengths in zip(*self.sequences, strict=True))
        elements = (n_q * self.heads + n_k * self.kv_heads) * (self.head_dim + self.dim_v)
        return float(elements * dtype.itemsize)

    def make(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Draw the tensors of the call, requiring gradients for "train"; on the meta device they hold nothing."""
        drawn = _drawer(dtype, device)
        ends_q, ends_k = ([0, *itertools.accumulate(column)] for column in zip(*self.sequences, strict=True))
        longest_q, longest_k = (max(column) for column in zip(*self.sequences, strict=True))
        lead_q: tuple[int, ...] = (self.batch, self.seqlen_q)
        lead_k: tuple[int, ...] = (self.batch, self.seqlen_k)
        options: dict[str, Any] = {"causal": self.causal}
        if self.window:
            options["window_size"] = (self.window, -1)
        if self.padded:
            options["attn_bias"] = _key_mask(self.batch, self.seqlen_k, device)
        if self.packed:
            lead_q, lead_k = (ends_q[-1],), (ends_k[-1],)
            cu_q = torch.tensor(ends_q, dtype=torch.int32, device=device)
            options |= {"cu_seqlens_q": cu_q, "max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
        if self.block_size:
            used = [n_k for _, n_k in self.sequences]
            table = _block_table(used, self.block_size)
            lead_k = (int(table.max()) + 1, self.block_size)
            options["block_table"] = table.to(device)
            options["seqused_k"] = torch.tensor(used, dtype=torch.int32, device=device)
            options["finite_tail"] = True
        elif self.packed:
            same = ends_q == ends_k
            options["cu_seqlens_k"] = cu_q if same else torch.tensor(ends_k, dtype=torch.int32, device=device)
        grad = self.kind == "train"
        q = drawn(*lead_q, self.heads, self.head_dim).requires_grad_(grad)
        k = drawn(*lead_k, self.kv_heads, self.head_dim).requires_grad_(grad)
        v = drawn(*lead_k, self.kv_heads, self.dim_v).requires_grad_(grad)
        return Inputs(q, k, v, drawn(*q.shape[:-1], self.dim_v), options, self.lengths)


class Inputs(NamedTuple):
    """The tensors of one call, a gradient of the output, the keyword arguments, and the lengths on the host.

    With a block size k and v are caches (num_blocks, block_size, Hkv, D).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    options: dict[str, Any]
    lengths: tuple[tuple[int, int], ...] = ()


def _drawer(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    if device.type == "meta":
        return lambda *shape: torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def _key_mask(batch: int, keys: int, device: torch.device) -> Tensor:
    """Hide the ends of all sequences but the first: up to a half, spread evenly."""
    seen = [max(1, round(keys * (1 - (b * 0.6180339887) % 1.0 / 2))) for b in range(batch)]
    mask = torch.arange(keys) < torch.tensor(seen)[:, None]
    return mask[:, None, None].to(device)


def _block_table(used: list[int], block_size: int) -> Tensor:
    """Hand out blocks in a random order, as a cache in use has them."""
    needed = [-(-n // block_size) for n in used]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.zeros(len(used), max(needed), dtype=torch.int32)
    for b, count in enumerate(needed):
        table[b, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    return table
