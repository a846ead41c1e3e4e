"""`QuantizedLinear`: a linear layer with FP8 or int8 weights, quantised once, and inputs quantised as they come."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vllm_accel.dispatch.gemm_spec import Scaling
from vllm_accel.ops.gemm import scaled_gemm
from vllm_accel.ops.gemm_arguments import scaling_of
from vllm_accel.ops.quantize import quantize_fp8, quantize_int8

#: What covers the inputs for each scaling of the weights.
_INPUTS = {
    Scaling.TENSOR: Scaling.TENSOR, Scaling.ROW: Scaling.ROW, Scaling.BLOCK_1x128: Scaling.BLOCK_1x128,
    Scaling.BLOCK_128x128: Scaling.BLOCK_1x128,
}  # fmt: skip


class QuantizedLinear(nn.Module):
    """Multiply by quantised weights; for inference (no gradient passes it).

    Args:
        weight: (out_features, in_features) in fp16, bf16 or fp32. bias: (out_features,) or None.
        scaling: of the weights: ``"tensor"``, ``"row"``, ``"1x128"`` or ``"128x128"``; inputs get one factor a tensor,
            a row, or a block of 128 of a row.
        dtype: torch.float8_e4m3fn, float8_e5m2 or int8. backend: as `scaled_gemm`.

    Raises:
        ValueError, TypeError: as `quantize_fp8` and `quantize_int8`.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scaling: object = Scaling.ROW,
        dtype: torch.dtype = torch.float8_e4m3fn,
        backend: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.scaling, self.dtype, self.backend = scaling_of(scaling, "scaling"), dtype, backend
        values, factors = self._quantise(weight, self.scaling)
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", factors)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        scaling: object = Scaling.ROW,
        dtype: torch.dtype = torch.float8_e4m3fn,
        backend: str | Sequence[str] | None = None,
    ) -> QuantizedLinear:
        """Quantise an `nn.Linear`."""
        return cls(linear.weight, linear.bias, scaling=scaling, dtype=dtype, backend=backend)

    def _quantise(self, x: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
        if self.dtype is torch.int8:
            return quantize_int8(x, scaling=scaling)
        return quantize_fp8(x, scaling=scaling, dtype=self.dtype)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., in_features) times the weights, plus the bias, in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        recipe = _INPUTS[self.scaling]
        values, factors = self._quantise(rows, recipe)
        blocks = self.scaling in (Scaling.BLOCK_1x128, Scaling.BLOCK_128x128)
        out = scaled_gemm(
            values, self.weight.t(), factors, recipe, self.weight_scale.t() if blocks else self.weight_scale,
            self.scaling, bias=self.bias if self.bias is None else self.bias.to(x.dtype), output_dtype=x.dtype,
            backend=self.backend,
        )  # fmt: skip
        return out.view(*x.shape[:-1], self.weight.shape[0])

    def extra_repr(self) -> str:
        """Describe the layer in its repr."""
        out_features, in_features = self.weight.shape
        return f"{in_features} -> {out_features}, {str(self.dtype).removeprefix('torch.')} by {self.scaling.value}"
