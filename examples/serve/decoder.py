"""A small Llama-like decoder in plain torch, whose attention reads and writes a paged cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

from vllm_accel import CacheStep, PagedKVCache


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama-like decoder."""

    vocabulary: int = 1024
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    inner: int = 704

    @property
    def width(self) -> int:
        """Return the channels of the residual stream."""
        return self.heads * self.head_dim


class Layer(nn.Module):
    """Grouped-query attention over the cache, then SwiGLU, each after RMSNorm and added to its input."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        self.norm_attention, self.norm_mlp = nn.RMSNorm(sizes.width), nn.RMSNorm(sizes.width)
        self.qkv = nn.Linear(sizes.width, sum(self.heads) * sizes.head_dim, bias=False)
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)
        self.gate_up = nn.Linear(sizes.width, 2 * sizes.inner, bias=False)
        self.down = nn.Linear(sizes.inner, sizes.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], step: CacheStep, options: dict[str, Any]) -> Tensor:
        """Take and return (T, width): the new tokens of all sequences, packed."""
        heads = self.qkv(self.norm_attention(x)).unflatten(-1, (sum(self.heads), -1))
        q, k, v = heads.split(self.heads, dim=1)
        step.write(rotated(k, rotation), v)
        x = x + self.out(step.attend(rotated(q, rotation), causal=True, **options).flatten(1))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(silu(gate) * up)


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the halves of every head by the token's position (rotary embedding)."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rotation
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Decoder(nn.Module):
    """A decoder with random weights; `options` are those of `attention_paged`, such as `backend`."""

    def __init__(self, sizes: Sizes, seed: int = 0, **options: Any) -> None:
        super().__init__()
        self.sizes, self.options = sizes, options
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        source = torch.Generator().manual_seed(seed)
        for weight in self.parameters():  # wide enough that attention is sharp and the answers are not one token
            if weight.dim() == 2:
                nn.init.normal_(weight, std=1.5 / math.sqrt(weight.shape[1]), generator=source)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], positions: Sequence[int], step: CacheStep) -> list[int]:
        """Run the packed new tokens of some sequences through all layers; return the likeliest next token of each."""
        device, half = self.head.weight.device, self.sizes.head_dim // 2
        x = embedding(torch.tensor(tokens, device=device), self.embedding.weight)
        speeds = 10000.0 ** (torch.arange(half, device=device) / -half)
        angles = torch.tensor(positions, device=device)[:, None, None] * speeds
        rotation = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, step[i], self.options)
        last = step.cu_seqlens_q[1:].long() - 1
        likely: list[int] = self.head(self.norm(x[last])).argmax(-1).tolist()
        return likely

    def cache(self, blocks: int, block_size: int) -> PagedKVCache:
        """Return an empty cache for this model."""
        sizes, weight = self.sizes, self.head.weight
        return PagedKVCache(
            blocks, block_size, sizes.kv_heads, sizes.head_dim,
            num_layers=sizes.layers, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
