"""What a matrix product is, in float64 and one group after another; shares no code with the library."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def dequantised(values: Tensor, factors: Tensor, scaling: str, of_a: bool, dtype: torch.dtype) -> Tensor:
    """Return values times factors for one matrix: (M, K) of a, or (K, N) of b. `scaling` as `scaled_gemm` names it."""
    wide, by = values.to(dtype), factors.to(dtype)
    rows, columns = wide.shape
    if scaling == "tensor":
        return wide * by.reshape(())
    if scaling == "row":
        return wide * (by.reshape(rows, 1) if of_a else by.reshape(1, columns))
    row, column = torch.arange(rows), torch.arange(columns)
    if scaling == "128x128":
        return wide * by.cpu()[row // 128][:, column // 128].to(wide.device)
    if of_a:
        return wide * by.cpu()[:, column // 128].to(wide.device)
    return wide * by.cpu()[row // 128].to(wide.device)


def product_oracle(
    a: Tensor,
    b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    scale_a: Tensor | None = None,
    scale_recipe_a: str = "",
    scale_b: Tensor | None = None,
    scale_recipe_b: str = "",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the product of `gemm`, `grouped_gemm` or `scaled_gemm`, computed and left in `dtype`; differentiable.

    Which product it is follows from dimensions, as in the library: with offs (T, K) x (E, K, N) or (M, T) x (T, N),
    without them (M, K) x (K, N) or (E, M, K) x (E, K, N).
    """

    def of_a(rows: slice, group: int | None) -> Tensor:
        part = a[rows] if group is None else a[group][rows]
        if scale_a is None:
            return part.to(dtype)
        factors = scale_a if group is None else scale_a[group]
        if scale_recipe_a == "tensor" or rows == slice(None):
            return dequantised(part, factors, scale_recipe_a, True, dtype)
        return dequantised(part, factors[rows], scale_recipe_a, True, dtype)

    def of_b(group: int | None) -> Tensor:
        part = b if group is None else b[group]
        if scale_b is None:
            return part.to(dtype)
        return dequantised(part, scale_b if group is None else scale_b[group], scale_recipe_b, False, dtype)

    def plus(out: Tensor, own: Tensor | None) -> Tensor:
        return out if own is None else out + own.to(dtype)

    everything = slice(None)
    if offs is None and a.dim() == 2:
        return plus(of_a(everything, None) @ of_b(None), bias)
    if offs is None:
        parts = [of_a(everything, e) @ of_b(e) for e in range(a.shape[0])]
        return torch.stack([plus(part, None if bias is None else bias[e]) for e, part in enumerate(parts)])
    ends = [0, *offs.tolist()]
    if b.dim() == 2:
        return torch.stack([a[:, s:t].to(dtype) @ b[s:t].to(dtype) for s, t in itertools.pairwise(ends)])
    parts = [
        plus(of_a(slice(s, t), None) @ of_b(e), None if bias is None else bias[e])
        for e, (s, t) in enumerate(itertools.pairwise(ends))
    ]
    rest = torch.zeros(a.shape[0] - ends[-1], b.shape[-1], dtype=dtype, device=a.device)
    return torch.cat([*parts, rest])
