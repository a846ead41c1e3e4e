"""Our own matrix products in Triton (``kernels/triton/grouped_gemm.py``): dense, grouped and batched, FP8 and int8.

It takes tensors as they are: any strides, any sizes, empty groups, b contiguous along K or along N. Where strides and
addresses are multiples of 16 bytes, chips from sm_90 on load through TMA. On chips without FP8 products, FP8 is widened
to fp16 inside the kernel, exactly; sums are fp32 (int32 for int8).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.gemm.moe import ComposedMoe, bind_moe, with_moe
from vllm_accel.backends.triton import tf32_allowed
from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.capability import Guard, Rule
from vllm_accel.dispatch.device import Device, detect
from vllm_accel.dispatch.gemm_capability import FP8, PLAIN_FEATURES, UNSCALED, GemmCapability
from vllm_accel.dispatch.gemm_spec import Form, GemmSizes, GemmSpec, Scaling
from vllm_accel.dispatch.spec import Feature
from vllm_accel.errors import Reason

_MAX_GROUPS = 4096  # searched in one vector: kernels/triton/grouped_gemm_launch.py
_MAX_INT = 2**31 - 1
_LEAST_TILE = 16
#: Steps along one dimension of a block, of at most 256 rows, are 32 bits; a wider tensor is copied.
_MAX_STRIDE = 2**31 // 256
#: Rows of a group that stand for all, where the bits of a row must not depend on how many come with it.
_FIXED_ROWS = 512
_OF_A = (Scaling.TENSOR, Scaling.ROW, Scaling.BLOCK_1x128)
_OF_B = (*_OF_A, Scaling.BLOCK_128x128)
_KEPT = 256  # bound launches of one kind of call


def _counts(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    if sizes.groups > _MAX_GROUPS and spec.form is not Form.BATCHED:
        return f"takes up to {_MAX_GROUPS} groups; this call has {sizes.groups}"
    tiles = max(1, sizes.groups) * -(-sizes.m // _LEAST_TILE) * -(-sizes.n // _LEAST_TILE)
    if max(tiles, sizes.m) > _MAX_INT:
        return f"counts tiles in 32 bits; this call may have {tiles}"
    if max(sizes.n, sizes.k) >= _MAX_STRIDE:
        return f"takes N and K below {_MAX_STRIDE}; this call has {sizes.n} and {sizes.k}"
    return None


def _loads(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    if spec.form is Form.MOE:
        return None
    odd = [
        name
        for name, shape, stride, dtype in (
            ("a", sizes.a_shape, sizes.a_stride, spec.dtype),
            ("b", sizes.b_shape, sizes.b_stride, spec.b_dtype),
        )
        if 1 not in stride[-2:] or any(s != 1 and s * dtype.itemsize % 16 for s in stride[-2:])
    ]
    if not odd:
        return None
    return f"strides of {' and '.join(odd)} are not multiples of 16 bytes: loaded by pointers, narrowly, without TMA"


def _widened(spec: GemmSpec, device: Device) -> str | None:
    cc = device.compute_capability
    if spec.b_dtype in FP8 and (cc is None or cc < (8, 9)):
        return f"widens FP8 to fp16 in the kernel: its compiler has no FP8 products for {device.arch}"
    return None


def _ahead(spec: GemmSpec, device: Device) -> str | None:
    if spec.form is Form.GROUPED_M and spec.dtype is torch.bfloat16 and device.compute_capability == (9, 0):
        return "before torch_grouped: 0.97 to 1.40 times its speed on an H200 (docs/gemm_kernels.md)"
    return None


class TritonGemm:
    """The GEMM backend `triton`."""

    name = "triton"
    capability = with_moe(
        GemmCapability(
            platforms=frozenset({"cuda", "rocm"}),
            # Compiled for 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0 (tests/test_grouped_gemm_compile.py); others take that of
            # a relative.
            compute_capabilities=frozenset(
                {(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}
            ),
            archs=frozenset({"gfx90a", "gfx942"}),
            dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.int8}) | FP8,
            b_dtypes=FP8,
            out_dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
            forms=frozenset({Form.DENSE, Form.GROUPED_M, Form.GROUPED_K, Form.BATCHED}),
            scalings=frozenset({UNSCALED, *((x, y) for x in _OF_A for y in _OF_B)}),
            features=PLAIN_FEATURES | Feature.DETERMINISTIC | Feature.BATCH_INVARIANT,
            # One kernel a kind of call: 0.3 to 1.1 s each, cross-compiled for sm_80 and sm_90 (Triton 3.7.1, two idle
            # Xeon cores, 2026-11-30; 2 to 4 s on two busy EPYC cores). Forward attention took 1.5 s on an H200.
            first_call_seconds=1.5,
            guards=(Guard("counts", _counts),),
            size_notes=(Guard("pointers", _loads),),
            device_notes=(Rule("widened", _widened), Rule("ahead", _ahead)),
        )
    )

    def version(self) -> str | None:
        """Return Triton's version, without importing it."""
        from vllm_accel.kernels.triton.toolchain import triton_version

        return triton_version()

    def unavailable_reason(self) -> Reason | None:
        """Say why Triton cannot compile here: not importable, no C compiler, an assembler that is too old, no cache."""
        from vllm_accel.kernels.triton.toolchain import problems

        arch = detect(torch.device("cuda", torch.cuda.current_device())).arch if torch.cuda.is_available() else None
        return next((Reason(p.code, p.text) for p in problems(arch)), None)

    def bind(self, spec: GemmSpec, device: Device) -> TritonGemmKernel | ComposedMoe:
        """Return the products of a kind of call."""
        if spec.form is Form.MOE:
            return bind_moe(self, spec, device)
        return TritonGemmKernel(spec, device)


class TritonGemmKernel:
    """Products of one kind of call on one kind of device."""

    def __init__(self, spec: GemmSpec, device: Device) -> None:
        # Imported here: declaring a backend must not import Triton (0.5 s).
        from vllm_accel.kernels.triton import grouped_gemm_bound, grouped_gemm_launch

        self._launches, self._bind = grouped_gemm_launch, grouped_gemm_bound.BoundGemm
        self._spec, self._device = spec, device
        self._native = grouped_gemm_launch.natively_fp8(device.arch)
        groups = spec.groups if spec.form is Form.GROUPED_M else 1
        self._rows = _FIXED_ROWS if Feature.BATCH_INVARIANT in spec.features else max(1, spec.m // max(1, groups))
        self._asks_tf32 = spec.dtype is torch.float32 and device.platform == "cuda"
        self._bytes = spec.scaling_a is not Scaling.NONE and not self._native
        self._bound: dict[tuple[Any, ...], Any] = {}

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return the product."""
        return self._run(a, b, args)[0]

    def prepare(self, a: Tensor, b: Tensor, args: GemmArgs) -> Callable[[Tensor, Tensor, GemmArgs], Tensor]:
        """Return a forward for these shapes, 3 us of Python shorter where strides are those of the call before."""
        if self._bytes or self._asks_tf32:
            return self.forward  # other views of a and b, another flag
        shape, dtype = self._shape(a, b, args.offs), self._spec.out_dtype
        known: tuple[Any, Any] = ((), None)  # strides and their launch, replaced together: threads share a plan

        def forward(a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
            nonlocal known
            offs, bias, scale_a, scale_b, _ = args
            strides = (
                a.stride(), b.stride(), None if bias is None else bias.stride(),
                None if scale_a is None else scale_a.stride(), None if scale_b is None else scale_b.stride(),
            )  # fmt: skip
            before, bound = known
            if strides != before:
                out, bound = self._run(a, b, args)
                if max(a.stride()[-2:]) < _MAX_STRIDE > max(b.stride()[-2:]):  # else a copy was launched, not a and b
                    known = strides, bound
                return out
            out = a.new_empty(shape, dtype=dtype)
            bound((a, b, out, offs, bias, None, scale_a, scale_b))
            return out

        return forward

    def _run(self, a: Tensor, b: Tensor, args: GemmArgs) -> tuple[Tensor, Any]:
        """Return the product and the bound launch that wrote it."""
        spec = self._spec
        offs, bias, scale_a, scale_b, _ = args
        if spec.form is Form.DENSE:
            a, b = a.unsqueeze(0), b.unsqueeze(0)
        if max(a.stride()[-2:]) >= _MAX_STRIDE or max(b.stride()[-2:]) >= _MAX_STRIDE:
            a, b = a.contiguous(), b.contiguous()
        out = a.new_empty(self._shape(a, b, offs), dtype=spec.out_dtype)
        factors_a, factors_b = _of_a(scale_a, spec), _of_b(scale_b, spec)
        tf32 = self._asks_tf32 and tf32_allowed()
        strides = tuple(None if t is None else t.stride() for t in (bias, factors_a, factors_b))
        key = (a.shape, a.stride(), b.shape, b.stride(), out.shape, strides, tf32)
        bound = self._bound.get(key)
        if bound is None:
            bound = self._make(key, a, b, out, GemmArgs(offs, bias, factors_a, factors_b), tf32)
        if self._bytes:
            a, b = self._launches.as_read(a, b, False)
        bound((a, b, out, offs, bias, None, factors_a, factors_b))
        return (out[0] if spec.form is Form.DENSE else out), bound

    def _shape(self, a: Tensor, b: Tensor, offs: Tensor | None) -> tuple[int, ...]:
        if self._spec.form is Form.GROUPED_K:
            assert offs is not None
            return offs.shape[0], a.shape[0], b.shape[1]
        return (*a.shape[:-1], b.shape[-1])

    def _make(self, key: tuple[Any, ...], a: Tensor, b: Tensor, out: Tensor, args: GemmArgs, tf32: bool) -> Any:
        scale = self._launches.Scale
        columns = 128 if self._spec.scaling_b is Scaling.BLOCK_128x128 else 1
        plain, described = self._launches.gemm_launches(
            a, b, out, arch=self._device.arch, sm_count=self._device.sm_count or 1, rows=self._rows, offs=args.offs,
            bias=args.bias, native_fp8=self._native, tf32=tf32,
            a_scale=None if args.scale_a is None else scale(args.scale_a),
            b_scale=None if args.scale_b is None else scale(args.scale_b, columns),
        )  # fmt: skip
        if len(self._bound) >= _KEPT:
            self._bound.clear()
        bound = self._bound[key] = self._bind(plain, described)
        return bound


def _of_a(scale: Tensor | None, spec: GemmSpec) -> Tensor | None:
    """Return factors of a as (groups, rows, steps along K), 1 for what is shared."""
    if scale is None:
        return None
    if spec.form is not Form.BATCHED and spec.scaling_a is not Scaling.TENSOR:
        scale = scale.unsqueeze(0)
    if spec.scaling_a is Scaling.TENSOR:
        return scale.view(-1, 1, 1) if scale.stride(0) else scale[:1].view(1, 1, 1)
    return scale.unsqueeze(2) if spec.scaling_a is Scaling.ROW else scale


def _of_b(scale: Tensor | None, spec: GemmSpec) -> Tensor | None:
    """Return factors of b as (groups, steps along K, columns or blocks of them), 1 for what is shared."""
    if scale is None:
        return None
    if spec.form is Form.DENSE and spec.scaling_b is not Scaling.TENSOR:
        scale = scale.unsqueeze(0)
    if spec.scaling_b is Scaling.TENSOR:
        return scale.view(-1, 1, 1) if scale.stride(0) else scale[:1].view(1, 1, 1)
    return scale.unsqueeze(1) if spec.scaling_b is Scaling.ROW else scale


BACKEND = TritonGemm()
