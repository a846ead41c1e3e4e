"""Matrix products on CPUs: torch's oneDNN and BLAS, group by group, with 16-bit operands widened where that is faster.

On a processor without 16-bit matrix instructions torch multiplies 16-bit matrices many times slower than fp32 ones:
bf16 (64, 1024) x (1024, 2048) took 890 ms row-major and 49 ms column-major, widened 15 ms (one AVX2 core, torch 2.13,
2026-11-27). A sum in fp32, rounded once, is what the 16-bit product promises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.gemm.groups import by_group, spread
from vllm_accel.backends.gemm.moe import bind_moe, with_moe
from vllm_accel.backends.gemm.products import FloatProducts, ScaledProducts, zeros_of
from vllm_accel.dispatch.backend import GemmArgs, TorchBackend
from vllm_accel.dispatch.capability import Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_capability import FLOATS, FP8, PLAIN_FEATURES, UNSCALED, GemmCapability
from vllm_accel.dispatch.gemm_spec import Form, GemmSpec, Scaling
from vllm_accel.dispatch.spec import Feature

_FACTORS = tuple(scaling for scaling in Scaling if scaling is not Scaling.NONE)
_HALVES = (torch.float16, torch.bfloat16)


class CpuGemm(TorchBackend):
    """The GEMM backend `cpu`."""

    name = "cpu"
    capability = with_moe(
        GemmCapability(
            platforms=frozenset({"cpu"}),
            dtypes=FLOATS | FP8 | {torch.int8},
            b_dtypes=FP8,
            out_dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
            forms=frozenset({Form.DENSE, Form.GROUPED_M, Form.GROUPED_K, Form.BATCHED}),
            scalings=frozenset({UNSCALED, *((x, y) for x in _FACTORS for y in _FACTORS)}),
            features=PLAIN_FEATURES | Feature.DETERMINISTIC,
            rules=(Rule("int8_blocks", lambda spec, device: _int8_blocks(spec)),),
        )
    )

    def bind(self, spec: GemmSpec, device: Device) -> Any:
        """Return the products of a kind of call."""
        if spec.form is Form.MOE:
            return bind_moe(self, spec, device)
        if spec.scaling_a is not Scaling.NONE:
            return ScaledProducts(spec, _int8(spec) if spec.dtype is torch.int8 else _dequantised(spec))
        if spec.dtype in _HALVES and (spec.out_dtype is torch.float32 or not multiplies_halves(spec.dtype)):
            return WideProducts(spec)
        return FloatProducts(spec)


def _int8_blocks(spec: GemmSpec) -> str | None:
    simple = (Scaling.TENSOR, Scaling.ROW)
    if spec.dtype is torch.int8 and not (spec.scaling_a in simple and spec.scaling_b in simple):
        return "multiplies int8 with factors by tensor or row, not by block"
    return None


def multiplies_halves(dtype: torch.dtype) -> bool:
    """Tell whether this processor has instructions that multiply and add in a 16-bit dtype."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if dtype is torch.float16:
        names = ("_is_avx512_fp16_supported", "_is_amx_fp16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


class WideProducts:
    """16-bit operands, multiplied in fp32 and rounded once."""

    def __init__(self, spec: GemmSpec) -> None:
        self._spec = spec
        self._direct = FloatProducts(spec)

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return the product."""
        form, out_dtype = self._spec.form, self._spec.out_dtype
        bias = args.bias
        if form in (Form.DENSE, Form.BATCHED):
            if form is Form.DENSE and a.shape[0] == 1 and b.stride(0) == 1 and out_dtype is a.dtype:
                return self._direct.forward(a, b, args)  # 0.5 ms against 1.9: the weights need not be widened
            out = a.float() @ b.float()
            if bias is not None:
                out += bias if form is Form.DENSE else bias.unsqueeze(1)
            return out.to(out_dtype)

        def multiply(x: Tensor, y: Tensor, group: int, target: Tensor) -> Tensor:
            if x.shape[0] == 1 and y.stride(0) == 1 and bias is None and out_dtype is x.dtype:
                return torch.mm(x, y, out=target)
            part = x.float() @ y.float()
            return target.copy_(part if bias is None else part.add_(bias[group]))

        return by_group(form, a, b, args, multiply, zeros_of(form, a, b, args, out_dtype))


def _dequantised(spec: GemmSpec) -> Any:
    """Multiply in fp32: factors by tensor and row after the product, blocks before it."""

    def multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
        x, y = a.float(), b.float()
        late_a, late_b = (s in (Scaling.TENSOR, Scaling.ROW) for s in (spec.scaling_a, spec.scaling_b))
        factors_a = spread(scale_a, spec.scaling_a, a.shape, of_a=True)
        factors_b = spread(scale_b, spec.scaling_b, b.shape, of_a=False)
        out = (x if late_a else x.mul_(factors_a)) @ (y if late_b else y.mul_(factors_b))
        if late_a:
            out *= factors_a
        if late_b:
            out *= factors_b
        return (out if bias is None else out.add_(bias)).to(spec.out_dtype)

    return multiply


def _int8(spec: GemmSpec) -> Any:
    """Multiply in int32 exactly, then apply the factors."""

    def multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
        out = torch._int_mm(a.contiguous(), b).float()
        out *= spread(scale_a, spec.scaling_a, a.shape, of_a=True)
        out *= spread(scale_b, spec.scaling_b, b.shape, of_a=False)
        return (out if bias is None else out.add_(bias)).to(spec.out_dtype)

    return multiply


BACKEND = CpuGemm()
