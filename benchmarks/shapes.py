"""The shapes that backends are compared on: one short list for CPUs, one for data-centre GPUs.

Sizes follow what is published (heads and head sizes of Llama, DeepSeek and diffusion models), so that numbers can be
held beside other people's.
"""

from __future__ import annotations

import itertools
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

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """Return the (query, key) length of each sequence."""
        return self.lengths or ((self.seqlen_q, self.seqlen_k),) * self.batch

    @property
    def dim_v(self) -> int:
        """Return the head size of values."""
        return self.head_dim_v or self.head_dim

    def flops(self) -> float:
        """Return the operations of one call: a causal triangle counts half, backward two and a half forwards."""
        pairs = 0.0
        for n_q, n_k in self.sequences:  # every causal shape here has Sq <= Sk
            pairs += n_q * n_k - (n_q * n_q / 2 if self.causal and n_q > 1 else 0.0)
        forward = 2.0 * pairs * self.heads * (self.head_dim + self.dim_v)
        return forward * 3.5 if self.kind == "train" else forward

    def bytes(self, dtype: torch.dtype) -> float:
        """Return what a forward has to read and write at least once."""
        n_q, n_k = (sum(lengths) for lengths in zip(*self.sequences, strict=True))
        elements = (n_q * self.heads + n_k * self.kv_heads) * (self.head_dim + self.dim_v)
        return float(elements * dtype.itemsize)

    def make(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Draw the tensors of the call, requiring gradients for "train"."""
        lead_q: tuple[int, ...] = (self.batch, self.seqlen_q)
        lead_k: tuple[int, ...] = (self.batch, self.seqlen_k)
        options: dict[str, Any] = {"causal": self.causal}
        if self.lengths:
            ends_q, ends_k = ([0, *itertools.accumulate(column)] for column in zip(*self.lengths, strict=True))
            lead_q, lead_k = (ends_q[-1],), (ends_k[-1],)
            cu_q = torch.tensor(ends_q, dtype=torch.int32, device=device)
            cu_k = cu_q if ends_q == ends_k else torch.tensor(ends_k, dtype=torch.int32, device=device)
            longest_q, longest_k = (max(column) for column in zip(*self.lengths, strict=True))
            options |= {
                "cu_seqlens_q": cu_q,
                "cu_seqlens_k": cu_k,
                "max_seqlen_q": longest_q,
                "max_seqlen_k": longest_k,
            }
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
            return drawn.requires_grad_(self.kind == "train")

        q = draw(*lead_q, self.heads, self.head_dim)
        k = draw(*lead_k, self.kv_heads, self.head_dim)
        v = draw(*lead_k, self.kv_heads, self.dim_v)
        dout = torch.randn((*q.shape[:-1], self.dim_v), generator=generator, device=device).to(dtype)
        return Inputs(q, k, v, dout, options, self.lengths)


class Inputs(NamedTuple):
    """The tensors of one call, a gradient of the output, the keyword arguments, and the lengths on the host."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    options: dict[str, Any]
    lengths: tuple[tuple[int, int], ...] = ()


def _square(name: str, kind: Kind, s: int, **sizes: Any) -> Shape:
    return Shape(name, kind, seqlen_q=s, seqlen_k=s, **sizes)


def _ragged(*lengths: int) -> tuple[tuple[int, int], ...]:
    return tuple((n, n) for n in lengths)


_SMALL: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 64}

CPU_SHAPES: tuple[Shape, ...] = (
    _square("prefill_512_causal", "prefill", 512, **_SMALL),
    _square("prefill_2k_causal", "prefill", 2048, **_SMALL),
    _square("prefill_1k_full", "prefill", 1024, causal=False, **_SMALL),
    Shape("chunk_256_of_2k", "prefill", seqlen_q=256, seqlen_k=2048, **_SMALL),
    Shape("decode_b4_2k", "decode", batch=4, seqlen_q=1, seqlen_k=2048, **_SMALL),
    Shape("varlen_mix", "prefill", lengths=_ragged(700, 3, 260, 17, 512, 1, 90), **_SMALL),
    _square("train_1k_causal", "train", 1024, heads=4, kv_heads=4, head_dim=64),
)

_D64: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 64}

GPU_SHAPES: tuple[Shape, ...] = (
    _square("prefill_1k_causal", "prefill", 1024, batch=8),
    _square("prefill_4k_causal", "prefill", 4096, batch=2),
    _square("prefill_16k_causal", "prefill", 16384),
    _square("prefill_8k_full", "prefill", 8192, causal=False),
    _square("prefill_d64_4k_causal", "prefill", 4096, batch=4, **_D64),
    _square("prefill_d64_4k_full", "prefill", 4096, batch=4, causal=False, heads=16, kv_heads=16, head_dim=64),
    _square("prefill_d256_4k_causal", "prefill", 4096, heads=16, kv_heads=8, head_dim=256),
    _square("prefill_mla_192_128_4k", "prefill", 4096, heads=32, kv_heads=32, head_dim=192, head_dim_v=128),
    Shape("chunk_512_of_16k", "prefill", seqlen_q=512, seqlen_k=16384),
    Shape("decode_b1_4k", "decode", batch=1, seqlen_q=1, seqlen_k=4096),
    Shape("decode_b32_4k", "decode", batch=32, seqlen_q=1, seqlen_k=4096),
    Shape("decode_b16_16k", "decode", batch=16, seqlen_q=1, seqlen_k=16384),
    Shape("varlen_mix_16k", "prefill", lengths=_ragged(6000, 40, 2500, 17, 4096, 1, 900, 3000, 250)),
    Shape("varlen_decode_b32", "decode", lengths=tuple((1, 500 + 211 * i) for i in range(32))),
    _square("train_4k_causal", "train", 4096, batch=2, heads=16, kv_heads=16),
    _square("train_8k_causal_gqa", "train", 8192),
    _square("train_4k_full_d64", "train", 4096, batch=2, causal=False, heads=16, kv_heads=16, head_dim=64),
)

#: For the tests of the benchmark itself.
QUICK_SHAPES: tuple[Shape, ...] = (
    _square("quick_causal", "prefill", 48, heads=4, kv_heads=2, head_dim=16),
    Shape("quick_decode", "decode", batch=2, seqlen_q=1, seqlen_k=40, heads=4, kv_heads=2, head_dim=16),
    Shape("quick_varlen", "prefill", lengths=((7, 7), (1, 1), (20, 20)), heads=4, kv_heads=2, head_dim=16),
    _square("quick_train", "train", 32, heads=2, kv_heads=2, head_dim=16),
)


def named(shapes: tuple[Shape, ...], names: str) -> tuple[Shape, ...]:
    """Return the shapes whose name contains one of the comma-separated words; all of them for an empty string.

    Raises:
        ValueError: no shape matches; the message lists the names.
    """
    words = [word.strip() for word in names.split(",") if word.strip()]
    found = tuple(shape for shape in shapes if not words or any(word in shape.name for word in words))
    if not found:
        raise ValueError(f"no shape matches {names!r}; there are {', '.join(shape.name for shape in shapes)}")
    return found
