"""Our own grouped products on CUTLASS (``kernels/cutlass``): tokens by expert, 16-bit, and e4m3 by blocks on sm_90.

Layouts: a by rows (K-major), b along K or along N (e4m3: along K), rows and columns at multiples of 16 bytes; else the
adapter copies or pads. `offs` are ends without a leading zero, read on the device and clamped there. Factors of e4m3
run along K first, those of a by row and those of b by blocks of 128 columns. The libraries are built by `warmup`, never
inside a call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.gemm.align import column_major, copies, padded, row_major
from vllm_accel.backends.gemm.groups import add_group_bias
from vllm_accel.backends.gemm.moe import bind_moe, products_of, with_moe
from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.capability import Guard, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_capability import UNSCALED, GemmCapability
from vllm_accel.dispatch.gemm_spec import Form, GemmSizes, GemmSpec, Layout, Scaling
from vllm_accel.dispatch.spec import Feature
from vllm_accel.errors import Reason
from vllm_accel.kernels.cutlass import build
from vllm_accel.kernels.cutlass.library import load

_E4M3 = torch.float8_e4m3fn
_ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", _E4M3: "e4m3"}
_BLOCKS = (Scaling.BLOCK_1x128, Scaling.BLOCK_128x128)
_FEW_ROWS = 64  # of an average group: what one tile of the smaller kernel takes
_MAX_INT = 2**31 - 1


def _variant(spec: GemmSpec, device: Device) -> build.Variant:
    few = spec.m <= _FEW_ROWS * max(1, spec.groups)
    return build.variant(device.arch, _ELEMENTS[spec.dtype], _along_k(spec), few)


def _elements(spec: GemmSpec) -> bool:
    """Tell whether a product, or both of a layer, has a dtype of these kernels."""
    products = products_of(spec) if spec.form is Form.MOE else (spec,)
    return all(product.dtype in _ELEMENTS for product in products)


def _along_k(spec: GemmSpec) -> bool:
    return spec.dtype is _E4M3 or spec.layout_b is Layout.COLUMN


def _variants(spec: GemmSpec, device: Device) -> tuple[build.Variant, ...]:
    """Return the kernels that a product or a layer of two needs."""
    products = products_of(spec) if spec.form is Form.MOE else (spec,)
    return tuple(dict.fromkeys(_variant(product, device) for product in products))


def _fp8(spec: GemmSpec, device: Device) -> str | None:
    if spec.form is Form.MOE:
        return None  # asked of its products
    if spec.dtype is not _E4M3:
        return None if spec.scaling_a is Scaling.NONE else f"takes no factors of {spec.dtype}"
    if spec.scaling_a is not Scaling.NONE:
        if device.compute_capability != (9, 0):
            return f"multiplies e4m3 on sm_90; {device.name or 'this GPU'} is {device.arch}"
        return None if spec.out_dtype is torch.bfloat16 else "gives bfloat16 for e4m3"
    return "takes e4m3 with factors alone"


def _built(spec: GemmSpec, device: Device) -> str | None:
    if device.compute_capability not in (_PRODUCTS.compute_capabilities or ()) or not _elements(spec):
        return None  # refused for that
    missing = [wanted for wanted in _variants(spec, device) if not build.path_of(wanted).is_file()]
    if not missing:
        return None
    return f"its kernel {missing[0]} is not built yet; vllm_accel.warmup(...) builds it with nvcc, in a minute or two"


def _sizes(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    if max(sizes.m, sizes.n, sizes.k) > _MAX_INT:
        return f"counts rows in 32 bits; this call has {max(sizes.m, sizes.n, sizes.k)}"
    return None


def _steps(spec: GemmSpec) -> tuple[int, int]:
    """Return what K and N have to be multiples of."""
    return (128, 128) if spec.dtype is _E4M3 else (8, 8)


def _costs(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    if spec.form is Form.MOE:
        return None
    said = copies(spec, sizes, a_rows=True, b_rows=not _along_k(spec))
    k, n = _steps(spec)
    if sizes.k % k or sizes.n % n:
        extra = f"pads K {sizes.k} and N {sizes.n} to multiples of {k}, copying"
        return f"{said}; {extra}" if said else extra
    return said


_PRODUCTS = GemmCapability(
    platforms=frozenset({"cuda"}),
    compute_capabilities=frozenset({(8, 0), (8, 6), (8, 7), (8, 9), (9, 0)}),
    dtypes=frozenset(_ELEMENTS),
    out_dtypes=frozenset({torch.bfloat16}),
    forms=frozenset({Form.GROUPED_M}),
    scalings=frozenset({UNSCALED, _BLOCKS}),
    features=Feature.BIAS | Feature.DETERMINISTIC,
    rules=(Rule("fp8", _fp8),),
    guards=(Guard("sizes", _sizes),),
    size_notes=(Guard("copies", _costs),),
)
_LAYERS = with_moe(_PRODUCTS)


class CutlassGemm:
    """The GEMM backend `cutlass`."""

    name = "cutlass"
    # Apart from what a layer's products can: a kernel that is not built yet is for `warmup`, in a layer too.
    capability = replace(_LAYERS, rules=(*_LAYERS.rules, Rule("not_built", _built)))

    def version(self) -> str | None:
        """Return the version of CUTLASS's headers, None without them."""
        place = build.headers()
        return None if place is None else build.version_of(place)

    def unavailable_reason(self) -> Reason | None:
        """Say what is missing to build the kernels: nvcc, a C++ compiler, the headers."""
        code = "toolchain" if build.headers() else "not_installed"
        texts = build.problems()  # the headers' come last, and are what is not installed
        return Reason(code, texts[0 if code == "toolchain" else -1]) if texts else None

    def build(self, spec: GemmSpec, device: Device) -> None:
        """Build the kernel for a kind of call, if the cache lacks it.

        Raises:
            RuntimeError: nvcc failed; the message has its last lines.
        """
        failed = build.build(_variants(spec, device))
        for variant, text in failed.items():
            raise RuntimeError(f"nvcc could not build {variant}: {text}")

    def bind(self, spec: GemmSpec, device: Device) -> Any:
        """Return the products of a kind of call, or a layer of them."""
        if spec.form is Form.MOE:
            return bind_moe(self, spec, device)
        return CutlassGemmKernel(spec, device)


class CutlassGemmKernel:
    """Tokens by expert of one kind of call on one kind of device."""

    def __init__(self, spec: GemmSpec, device: Device) -> None:
        self._spec, self._sms = spec, device.sm_count
        self._launch = load(build.path_of(_variant(spec, device)))
        self._steps = _steps(spec)

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return the product."""
        assert args.offs is not None
        (step_k, step_n), n = self._steps, b.shape[-1]
        a, b = padded(a, 1, step_k), padded(b, step_k, step_n)
        a, b = row_major(a), column_major(b) if _along_k(self._spec) else row_major(b)
        out = a.new_empty((a.shape[0], b.shape[-1]), dtype=self._spec.out_dtype)
        scale_a = None if args.scale_a is None else args.scale_a.contiguous()
        # Blocks of columns first: (E, N / 128, K / 128).
        scale_b = None if args.scale_b is None else args.scale_b.transpose(1, 2).contiguous()
        self._launch(a, b, out, args.offs, scale_a, scale_b, self._sms)
        return add_group_bias(out[:, :n].contiguous(), args)


BACKEND = CutlassGemm()
