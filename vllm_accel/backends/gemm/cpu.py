"""Matrix products on CPUs: torch's oneDNN and BLAS, group by group.

Groups go to PyTorch's own loop, in C++, where it takes the strides: 64 products of (1, 256) x (256, 512) in fp32 took
0.94 ms, in a loop in Python 1.13 to 1.30 (two AMX cores, torch 2.13, 2026-11-30). 16-bit operands are widened where
the processor does not multiply them.

On a processor without 16-bit matrix instructions torch multiplies 16-bit matrices many times slower than fp32 ones:
bf16 (64, 1024) x (1024, 2048) took 890 ms row-major and 49 ms column-major, widened 15 ms (one AVX2 core, torch 2.13,
2026-11-27). A sum in fp32, rounded once, is what the 16-bit product promises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.gemm.align import BYTES, whole_k
from vllm_accel.backends.gemm.groups import by_group, spread
from vllm_accel.backends.gemm.moe import bind_moe, with_moe
from vllm_accel.backends.gemm.products import FloatProducts, ScaledProducts, zeros_of
from vllm_accel.backends.gemm.torch_grouped import has_cpu_kernel
from vllm_accel.dispatch.backend import GemmArgs, TorchBackend
from vllm_accel.dispatch.capability import Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_capability import FLOATS, FP8, PLAIN_FEATURES, UNSCALED, GemmCapability
from vllm_accel.dispatch.gemm_spec import Form, GemmSpec, Layout, Scaling
from vllm_accel.dispatch.spec import Feature

_FACTORS = tuple(scaling for scaling in Scaling if scaling is not Scaling.NONE)
_HALVES = (torch.float16, torch.bfloat16)
_FEW, _LARGE = 64, 3 << 20  # rows up to which, and weights of one matrix from which, `turned` pays


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
        return NativeProducts(spec)


def _int8_blocks(spec: GemmSpec) -> str | None:
    simple = (Scaling.TENSOR, Scaling.ROW)
    if spec.dtype is torch.int8 and not (spec.scaling_a in simple and spec.scaling_b in simple):
        return "multiplies int8 with factors by tensor or row, not by block"
    return None


def multiplies_halves(dtype: torch.dtype) -> bool:
    """Tell whether this processor has instructions that multiply and add in a 16-bit dtype."""
    flags = ("avx512_bf16", "amx_bf16") if dtype is torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.9 and newer
        known = torch.cpu.get_capabilities()
        return any(known.get(flag, False) for flag in flags)
    older = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return any(getattr(torch.cpu, older.get(flag, f"_is_{flag}_supported"), bool)() for flag in flags)


class NativeProducts:
    """Products in the operands' dtype."""

    def __init__(self, spec: GemmSpec) -> None:
        self._form, self._plain = spec.form, FloatProducts(spec)
        self._whole = spec.dtype.itemsize == 2 and spec.form is not Form.GROUPED_K
        few = 2 <= spec.m // max(1, spec.groups) <= _FEW
        large = spec.k * spec.n >= _LARGE and spec.layout_b is Layout.COLUMN
        self._turns = few and large and spec.dtype is torch.bfloat16 and multiplies_halves(spec.dtype)
        grouped = self._form in (Form.GROUPED_M, Form.GROUPED_K)
        self._in_torch = grouped and spec.dtype is not torch.float64 and has_cpu_kernel() and not self._turns

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return the product."""
        form = self._form
        if self._whole:
            a, b = whole_k(a, b)
        if args.bias is None:
            if self._in_torch and args.offs is not None and _strides_fit(a) and _strides_fit(b):
                return self._grouped(a, b, args.offs, args.full)
            if self._turns and form is Form.DENSE:
                return turned(a, b, a.new_empty((a.shape[0], b.shape[1])))
            if self._turns and form is Form.GROUPED_M:
                return by_group(form, a, b, args, _turned_group, zeros_of(form, a, b, args, a.dtype))
        return self._plain.forward(a, b, args)

    def _grouped(self, a: Tensor, b: Tensor, offs: Tensor, full: bool) -> Tensor:
        """Run PyTorch's loop; ends on a CPU have been looked at before (SPEC 6)."""
        out = torch._grouped_mm(a, b, offs=offs)
        if self._form is Form.GROUPED_M and not full and (end := int(offs[-1])) < a.shape[0]:
            out[end:].zero_()
        return out.contiguous()  # rows off 16 bytes come padded


def turned(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Write x @ y into target, for weights stored as (N, K) and few rows as the transpose of y^T @ x^T.

    oneDNN brings the right-hand operand into blocks at every call: so it is the small one. 1.1 to 1.7 times as fast
    for 2 to 64 rows and 3 M to 59 M weights, in bf16 on two AMX cores (torch 2.13, 2026-11-30).
    """
    if not 2 <= x.shape[0] <= _FEW or y.stride(0) != 1:
        return torch.mm(x, y, out=target)
    return target.copy_(torch.mm(y.t(), x.t()).t())


def _turned_group(x: Tensor, y: Tensor, group: int, target: Tensor) -> Tensor:
    return turned(x, y, target)


def _strides_fit(t: Tensor) -> bool:
    """Tell whether PyTorch's grouped product takes the strides: one of two is 1, the other a multiple of 16 bytes."""
    outer, inner = t.stride()[-2:]
    if inner == 1:
        step, least = outer, t.shape[-1]
    elif outer == 1:
        step, least = inner, t.shape[-2]
    else:
        return False
    return step >= least and step * t.element_size() % BYTES == 0 and t.data_ptr() % BYTES == 0


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
