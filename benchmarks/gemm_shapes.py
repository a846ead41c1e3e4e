"""The matrix products of Mixtral and DeepSeek-V3 layers, and small ones for CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class GemmShape:
    """A grouped product, or a layer, to time.

    Attributes:
        name: unique. kind: "grouped" (T, K) x (E, K, N); "fp8" the same by blocks of 128; "moe" a whole layer, where
            rows are tokens, k the hidden size D and n the inner size I.
        rows, k, n, experts, top_k: sizes. skewed: expert e gets a share proportional to 1 / (e + 1), else all the same.
    """

    name: str
    kind: Literal["grouped", "fp8", "moe"]
    rows: int
    k: int
    n: int
    experts: int
    top_k: int = 1
    skewed: bool = False

    def flops(self) -> float:
        """Return the operations of one call."""
        products = 3 if self.kind == "moe" else 1
        return 2.0 * self.rows * self.top_k * self.k * self.n * products

    def counts(self) -> list[int]:
        """Return the rows of each expert."""
        if not self.skewed:
            return [self.rows * (e + 1) // self.experts - self.rows * e // self.experts for e in range(self.experts)]
        shares = [1 / (e + 1) for e in range(self.experts)]
        counts = [int(self.rows * share / sum(shares)) for share in shares]
        counts[0] += self.rows - sum(counts)
        return counts

    def ends(self, device: torch.device) -> torch.Tensor:
        """Return the ends of the groups."""
        return torch.tensor(self.counts(), device=device).cumsum(0, dtype=torch.int32)


def _layer(model: str, d: int, inner: int, experts: int, rows: int, skewed: bool) -> tuple[GemmShape, ...]:
    tail = f"{rows // 1024}k{'_skewed' if skewed else ''}"
    return (
        GemmShape(f"{model}_up_{tail}", "grouped", rows, d, 2 * inner, experts, skewed=skewed),
        GemmShape(f"{model}_down_{tail}", "grouped", rows, inner, d, experts, skewed=skewed),
    )


def _gpu() -> tuple[GemmShape, ...]:
    """Most valuable first: a run with a budget may end early."""
    mixtral, deepseek = ("mixtral", 4096, 14336, 8), ("deepseek", 7168, 2048, 64)
    first = [*_layer(*mixtral, 8192, False), *_layer(*deepseek, 8192, False)]
    layers = [
        GemmShape("mixtral_layer_4k", "moe", 4096, 4096, 14336, 8, top_k=2),
        GemmShape("deepseek_layer_4k", "moe", 4096, 7168, 2048, 64, top_k=8),
    ]
    fp8 = [GemmShape(f"{s.name}_fp8", "fp8", s.rows, s.k, s.n, s.experts) for s in (first[2], first[3], first[0])]
    rest = [
        shape
        for rows, skewed in ((8192, True), (32768, False), (4096, False), (32768, True), (4096, True))
        for model in (mixtral, deepseek)
        for shape in _layer(*model, rows, skewed)
    ]
    return (*first, *layers, *fp8, *rest)


GPU_SHAPES = _gpu()
CPU_SHAPES = (
    GemmShape("cpu_even_256", "grouped", 256, 256, 512, 8),
    GemmShape("cpu_skewed_256", "grouped", 256, 256, 512, 8, skewed=True),
    GemmShape("cpu_many_experts", "grouped", 64, 256, 512, 64),
    GemmShape("cpu_decode", "grouped", 4, 512, 1024, 32, skewed=True),
    GemmShape("cpu_layer", "moe", 128, 256, 256, 8, top_k=2),
)
QUICK_SHAPES = (
    GemmShape("quick", "grouped", 24, 32, 48, 4, skewed=True),
    GemmShape("quick_fp8", "fp8", 24, 130, 140, 3),
    GemmShape("quick_layer", "moe", 16, 32, 24, 4, top_k=2),
)
