"""Quantise operands for `scaled_gemm`: the largest magnitude that a factor covers becomes the largest of the dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_accel.dispatch.gemm_spec import Scaling
from vllm_accel.ops.gemm_arguments import scaling_of

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BLOCK = 128


def quantize_fp8(
    x: Tensor, *, scaling: object = Scaling.TENSOR, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Quantise to FP8; the summed dimension K comes last, in activations (M, K) and in weights (N, K) alike.

    Args:
        x: (M, K), or (E, N, K): each matrix by itself; fp16, bf16 or fp32. Not differentiable.
        scaling: what a factor covers: ``"tensor"``, ``"row"``, ``"1x128"``, ``"128x128"``, a `Scaling` or torch's type.
        dtype: float8_e4m3fn or float8_e5m2.

    Returns:
        values, factors: values in dtype with x's shape, factors fp32: (1,) or (E,); (..., M); (..., M, ceil(K / 128));
        (..., ceil(M / 128), ceil(K / 128)). For b of `scaled_gemm`, take `mT` of the values and of factors by block.

    Raises:
        ValueError, TypeError: another dtype, scaling or number of dimensions.
    """
    if dtype not in _FP8:
        raise TypeError(f"dtype must be float8_e4m3fn or float8_e5m2; got {dtype}")
    values, factors = _scaled(x, scaling_of(scaling, "scaling"), torch.finfo(dtype).max)
    return values.to(dtype), factors


def quantize_int8(x: Tensor, *, scaling: object = Scaling.ROW) -> tuple[Tensor, Tensor]:
    """Quantise to int8, symmetric, rounded to nearest: as `quantize_fp8`.

    Raises:
        ValueError, TypeError: as `quantize_fp8`; blocks are not for int8.
    """
    found = scaling_of(scaling, "scaling")
    if found not in (Scaling.TENSOR, Scaling.ROW):
        raise ValueError(f'scaling must be "tensor" or "row" for int8; got {found.value!r}')
    values, factors = _scaled(x, found, 127.0)
    return values.round().to(torch.int8), factors


def _scaled(x: Tensor, scaling: Scaling, largest: float) -> tuple[Tensor, Tensor]:
    """Return x over its factors in fp32, within the largest magnitude, and the factors."""
    if x.dim() not in (2, 3) or not x.is_floating_point() or x.element_size() == 1:
        raise ValueError(f"x must be (M, K) or (E, N, K) in fp16, bf16 or fp32; got {tuple(x.shape)}, {x.dtype}")
    if scaling is Scaling.NONE:
        raise ValueError('scaling must be "tensor", "row", "1x128" or "128x128"')
    wide = x.detach().float()
    if scaling in (Scaling.TENSOR, Scaling.ROW):
        dims = (-1,) if scaling is Scaling.ROW else (-2, -1)
        factors = _factors(wide.abs().amax(dims, keepdim=True) if wide.numel() else wide.new_zeros(1), largest)
        values = wide / factors
        shape = x.shape[:-1] if scaling is Scaling.ROW else (x.shape[0] if x.dim() == 3 else 1,)
        return values.clamp_(-largest, largest), factors.expand(*shape, *(1,) * len(dims)).reshape(shape)
    *lead, m, k = x.shape
    rows = _BLOCK if scaling is Scaling.BLOCK_128x128 else 1
    filled = torch.nn.functional.pad(wide, (0, -k % _BLOCK, 0, -m % rows))
    blocks = filled.view(*lead, filled.shape[-2] // rows, rows, filled.shape[-1] // _BLOCK, _BLOCK)
    factors = _factors(blocks.abs().amax((-3, -1), keepdim=True), largest)
    values = (blocks / factors).view(filled.shape)[..., :m, :k]
    return values.clamp(-largest, largest), factors.squeeze(-1).squeeze(-2)


def _factors(largest_here: Tensor, largest: float) -> Tensor:
    """Return what brings the largest magnitude to the dtype's; 1 where everything is 0."""
    return torch.where(largest_here > 0, largest_here / largest, 1.0)
