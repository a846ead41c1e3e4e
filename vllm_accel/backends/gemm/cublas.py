"""cuBLAS and cuBLASLt through PyTorch (hipBLASLt on AMD): dense and batched products, FP8, int8, and groups in a loop.

Conventions, read in aten/src/ATen/native/cuda/ScaledBlas.cpp and Blas.cpp of PyTorch 2.10 to 2.13: ``_scaled_mm``
takes a row-major and b column-major, K and N multiples of 16, not e5m2 twice; factors are one fp32 number each, or
(M, 1) and (1, N) contiguous. Blocks need ``_scaled_mm_v2``, an sm_90 and cuBLASLt 12.9: 1x128 factors with rows
contiguous, 128x128 ones with K blocks contiguous and padded to multiples of 4. ``_int_mm`` takes M above 16, K and N
multiples of 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.convert import round_up
from vllm_accel.backends.gemm.align import column_major, copies, padded, row_major
from vllm_accel.backends.gemm.groups import spread
from vllm_accel.backends.gemm.moe import bind_moe, with_moe
from vllm_accel.backends.gemm.products import WORKSPACE, FloatProducts, ScaledProducts, takes_out_dtype
from vllm_accel.dispatch.backend import TorchBackend
from vllm_accel.dispatch.capability import Guard, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_capability import FLOATS, FP8, PLAIN_FEATURES, UNSCALED, GemmCapability
from vllm_accel.dispatch.gemm_spec import Form, GemmSizes, GemmSpec, Scaling
from vllm_accel.dispatch.spec import Feature

_BLOCK_PAIRS = (
    (Scaling.BLOCK_1x128, Scaling.BLOCK_128x128),
    (Scaling.BLOCK_128x128, Scaling.BLOCK_1x128),
    (Scaling.BLOCK_1x128, Scaling.BLOCK_1x128),
)
_SIMPLE = (Scaling.TENSOR, Scaling.ROW)
_SIMPLE_PAIRS = tuple((x, y) for x in _SIMPLE for y in _SIMPLE)


def has_fp8_units(device: Device) -> bool:
    """Tell whether a GPU multiplies FP8."""
    cc = device.compute_capability
    return device.arch in ("gfx942", "gfx950") if cc is None else cc >= (8, 9)


def _wide_result(spec: GemmSpec, device: Device) -> str | None:
    if spec.scaling_a is Scaling.NONE and spec.out_dtype is not spec.dtype and not takes_out_dtype():
        return f"16-bit products into float32 need torch 2.8; this is {torch.__version__}"
    return None


def _fp8(spec: GemmSpec, device: Device) -> str | None:
    if spec.dtype not in FP8:
        return None
    if (spec.scaling_a, spec.scaling_b) in _SIMPLE_PAIRS:
        return None  # natively, or upcast
    if device.platform != "cuda" or device.compute_capability is None or device.compute_capability[0] != 9:
        return f"multiplies blocks of 128 on sm_90 only; {device.name or 'this GPU'} is {device.arch}"
    if not hasattr(torch.ops.aten, "_scaled_mm_v2"):
        return f"blocks need torch 2.10 (_scaled_mm_v2); this is {torch.__version__}"
    if spec.dtype is spec.b_dtype is torch.float8_e5m2:
        return "does not multiply e5m2 by e5m2"
    built = device.runtime_version
    if built and built < (12, 9):
        return f"blocks need cuBLASLt 12.9; torch is built with CUDA {'.'.join(map(str, built))}"
    return None


def _int8(spec: GemmSpec, device: Device) -> str | None:
    if spec.dtype is torch.int8 and (spec.scaling_a, spec.scaling_b) not in _SIMPLE_PAIRS:
        return "multiplies int8 with factors by tensor or row, not by block"
    if spec.dtype is torch.int8 and device.compute_capability and device.compute_capability < (7, 5):
        return f"multiplies int8 from sm_75 on; {device.name or 'this GPU'} is {device.arch}"
    return None


def _loop(spec: GemmSpec, device: Device) -> str | None:
    if spec.form in (Form.GROUPED_M, Form.GROUPED_K):
        return "reads offs on the host, one synchronisation a call"
    return None


def _costs(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    if spec.dtype not in FP8:
        return None
    said = copies(spec, sizes, a_rows=True, b_rows=False)
    if sizes.k % 16 or sizes.n % 16:
        extra = f"pads K {sizes.k} and N {sizes.n} to multiples of 16, copying"
        return f"{said}; {extra}" if said else extra
    return said


def _upcasts(spec: GemmSpec, device: Device) -> str | None:
    if spec.dtype in FP8 and not has_fp8_units(device):
        return f"multiplies in 16 bits after an upcast: {device.name or 'this GPU'} has no FP8 units"
    return None


class Cublas(TorchBackend):
    """The GEMM backend `cublas`."""

    name = "cublas"
    capability = with_moe(GemmCapability(
        platforms=frozenset({"cuda", "rocm"}),
        dtypes=FLOATS | FP8 | {torch.int8},
        b_dtypes=FP8,
        out_dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        forms=frozenset({Form.DENSE, Form.GROUPED_M, Form.GROUPED_K, Form.BATCHED}),
        scalings=frozenset({UNSCALED, *_SIMPLE_PAIRS, *_BLOCK_PAIRS}),
        features=PLAIN_FEATURES | Feature.DETERMINISTIC,
        rules=(
            Rule("out_dtype", _wide_result), Rule("fp8", _fp8), Rule("int8", _int8), WORKSPACE,
        ),
        size_notes=(Guard("copies", _costs),),
        device_notes=(Rule("upcast", _upcasts),),
        synchronises=(Rule("host_sync", _loop),),
    ))  # fmt: skip

    def bind(self, spec: GemmSpec, device: Device) -> Any:
        """Return the products of a kind of call."""
        if spec.form is Form.MOE:
            return bind_moe(self, spec, device)
        if spec.scaling_a is Scaling.NONE:
            return FloatProducts(spec)
        return ScaledProducts(spec, _scaled(spec, device))


def _scaled(spec: GemmSpec, device: Device) -> Callable[..., Tensor]:
    """Return the function that multiplies two quantised matrices of a kind of call."""
    if spec.dtype is torch.int8:
        return _late(spec, _int_mm)
    pair = (spec.scaling_a, spec.scaling_b)
    if pair in _BLOCK_PAIRS:
        return _blocks(spec)
    twice_e5m2 = spec.dtype is spec.b_dtype is torch.float8_e5m2
    if not has_fp8_units(device) or twice_e5m2:
        return _late(spec, _upcast_mm(torch.float16 if _is_old(device) else torch.bfloat16))
    rows_fit = device.compute_capability is None or device.compute_capability[0] == 9
    if pair == (Scaling.TENSOR, Scaling.TENSOR) or (pair == (Scaling.ROW, Scaling.ROW) and rows_fit):
        return _factors_inside(spec)
    return _late(spec, _unit_mm)


def _is_old(device: Device) -> bool:
    return device.compute_capability is not None and device.compute_capability < (8, 0)


def _factors_inside(spec: GemmSpec) -> Callable[..., Tensor]:
    """Let cuBLASLt apply one factor for the tensor, or one for each row."""
    by_row = spec.scaling_a is Scaling.ROW
    out_dtype = torch.bfloat16 if by_row else spec.out_dtype  # what every release gives by row
    late = spec.out_dtype is torch.float32 or (by_row and spec.out_dtype is not torch.bfloat16)
    if by_row and late:
        return _late(spec, _unit_mm)

    def multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
        n = b.shape[1]
        x, y = row_major(padded(a, 1, 16)), column_major(padded(b, 16, 16))
        if by_row:
            scale_a = scale_a.unsqueeze(1).contiguous()
            scale_b = torch.nn.functional.pad(scale_b, (0, y.shape[1] - n)).unsqueeze(0).contiguous()
        else:
            scale_a, scale_b = scale_a.reshape(()), scale_b.reshape(())
        inside = bias if y.shape[1] == n and not late else None
        out: Tensor = torch._scaled_mm(x, y, scale_a=scale_a, scale_b=scale_b, bias=inside, out_dtype=out_dtype)
        out = out[:, :n]
        if bias is not None and inside is None:
            out = out + bias
        return out.contiguous()

    return multiply


def _blocks(spec: GemmSpec) -> Callable[..., Tensor]:
    """Let cuBLASLt apply a factor for each block of 128."""
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    recipes = {
        Scaling.BLOCK_1x128: ScalingType.BlockWise1x128, Scaling.BLOCK_128x128: ScalingType.BlockWise128x128,
    }  # fmt: skip
    plain = SwizzleType.NO_SWIZZLE

    def multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
        m, n = a.shape[0], b.shape[1]
        x, y = row_major(padded(a, 4, 16)), column_major(padded(b, 16, 16))
        factors_a = _block_factors(scale_a, spec.scaling_a, x.shape[0])
        factors_b = _block_factors(scale_b.t(), spec.scaling_b, y.shape[1])
        out: Tensor = scaled_mm(
            x, y, scale_a=factors_a, scale_recipe_a=recipes[spec.scaling_a], scale_b=factors_b,
            scale_recipe_b=recipes[spec.scaling_b], swizzle_a=plain, swizzle_b=plain, output_dtype=spec.out_dtype,
        )  # fmt: skip
        out = out[:m, :n]
        return (out if bias is None else out + bias).contiguous()

    return multiply


def _block_factors(scale: Tensor, scaling: Scaling, rows: int) -> Tensor:
    """Lay factors out as cuBLASLt reads them: (rows, K blocks) rows first, or (K blocks padded to 4, row blocks)."""
    if scaling is Scaling.BLOCK_1x128:
        return torch.nn.functional.pad(scale, (0, 0, 0, rows - scale.shape[0])).t().contiguous().t()
    blocks = scale.shape[1]
    return torch.nn.functional.pad(scale, (0, round_up(blocks, 4) - blocks)).contiguous().t()


def _late(spec: GemmSpec, mm: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Multiply first, then apply factors by tensor or row, then the bias, in fp32."""

    def multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
        out = mm(a, b).float()
        out = out * spread(scale_a, spec.scaling_a, a.shape, of_a=True)
        out *= spread(scale_b, spec.scaling_b, b.shape, of_a=False)
        return (out if bias is None else out.add_(bias)).to(spec.out_dtype)

    return multiply


def _unit_mm(a: Tensor, b: Tensor) -> Tensor:
    """Multiply FP8 matrices into fp32, without factors."""
    one = torch.ones((), device=a.device)
    x, y = row_major(padded(a, 1, 16)), column_major(padded(b, 16, 16))
    out: Tensor = torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.float32)
    return out[:, : b.shape[1]]


def _upcast_mm(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    wide = takes_out_dtype()

    def mm(a: Tensor, b: Tensor) -> Tensor:
        x, y = a.to(dtype), b.to(dtype)
        if wide:
            return torch.mm(x, y, out_dtype=torch.float32)
        return torch.mm(x.float(), y.float())  # a 16-bit result would be rounded, or overflow, before its factors

    return mm


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    m, n = a.shape[0], b.shape[1]
    x = padded(a, 8, 8)
    if x.shape[0] <= 16:
        x = torch.nn.functional.pad(x, (0, 0, 0, 24 - x.shape[0]))
    return torch._int_mm(x.contiguous(), padded(b, 8, 8))[:m, :n]


BACKEND = Cublas()
