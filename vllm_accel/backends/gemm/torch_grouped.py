"""PyTorch's own grouped products: CUTLASS kernels on sm_90 and sm_100, a loop in C++ elsewhere.

Conventions, read in aten/src/ATen/native/GroupedMMUtils.h, cuda/GroupedBlas.cpp and cuda/GroupMMCommon.cuh of
PyTorch 2.10 to 2.13: `offs` are int32 ends without a leading zero; rows or columns are contiguous and start at
multiples of 16 bytes; the kernel asserts on the device that ends do not go down and that a group starts at a multiple
of 16 bytes in memory, so rows of groups have to be the strided dimension; results have padded rows; rows past the last
group are left unwritten; at most 1024 groups. FP8 takes e4m3 with factors by row, b column-major, K and N multiples of
16, and gives bf16.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.gemm.align import column_major, copies, either_major, padded, row_major, whole_k
from vllm_accel.backends.gemm.groups import add_group_bias, zero_past_end
from vllm_accel.backends.gemm.moe import bind_moe, with_moe
from vllm_accel.dispatch.backend import GemmArgs, TorchBackend
from vllm_accel.dispatch.capability import Guard, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_capability import PLAIN_FEATURES, UNSCALED, GemmCapability
from vllm_accel.dispatch.gemm_spec import Form, GemmSizes, GemmSpec, Scaling
from vllm_accel.dispatch.spec import Feature
from vllm_accel.errors import Reason

_ROWS = (Scaling.ROW, Scaling.ROW)
_CUTLASS = (9, 10)  # major compute capabilities
_KEPT = 256  # bound launches of one kind of call


def _on_cutlass(spec: GemmSpec, device: Device) -> bool:
    cc = device.compute_capability
    return cc is not None and cc[0] in _CUTLASS and spec.dtype is not torch.float16 and spec.dtype is not torch.float32


def _fp8(spec: GemmSpec, device: Device) -> str | None:
    if spec.scaling_a is Scaling.NONE:
        return None
    if not _on_cutlass(spec, device):
        return f"multiplies FP8 groups on sm_90 and sm_100; {device.name or 'this device'} is {device.arch or 'a CPU'}"
    if spec.dtype is not torch.float8_e4m3fn or spec.b_dtype is not torch.float8_e4m3fn:
        return "multiplies e4m3 by e4m3"
    if spec.out_dtype is not torch.bfloat16:
        return "gives bfloat16"
    return None


def _fallback(spec: GemmSpec, device: Device) -> str | None:
    if spec.form is Form.BATCHED or _on_cutlass(spec, device):
        return None
    return "PyTorch's loop reads offs on the host, one synchronisation a call"


def _cpu(spec: GemmSpec, device: Device) -> str | None:
    if device.type == "cpu" and not has_cpu_kernel():
        return f"has a CPU kernel from torch 2.9 on; this is {torch.__version__}"
    return None


def has_cpu_kernel() -> bool:
    """Tell whether this torch has its grouped product on CPUs."""
    keys = ("CPU", "CompositeExplicitAutograd")
    return _exists() and any(torch._C._dispatch_has_kernel_for_dispatch_key("aten::_grouped_mm", key) for key in keys)


def _exists() -> bool:
    return hasattr(torch, "_grouped_mm")


def _groups(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    return f"takes up to 1024 groups; this call has {sizes.groups}" if sizes.groups > 1024 else None


def _costs(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    if spec.scaling_a is not Scaling.NONE:
        said = copies(spec, sizes, a_rows=True, b_rows=False)
        if sizes.k % 16 or sizes.n % 16:
            extra = f"pads K {sizes.k} and N {sizes.n} to multiples of 16, copying"
            return f"{said}; {extra}" if said else extra
        return said
    a_rows = {Form.GROUPED_M: True, Form.GROUPED_K: False}.get(spec.form)
    return copies(spec, sizes, a_rows=a_rows, b_rows=True if spec.form is Form.GROUPED_K else None)


class TorchGrouped(TorchBackend):
    """The GEMM backend `torch_grouped`."""

    name = "torch_grouped"
    capability = with_moe(
        GemmCapability(
            platforms=frozenset({"cuda", "rocm", "cpu"}),
            dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn}),
            out_dtypes=frozenset({torch.bfloat16}),
            forms=frozenset({Form.GROUPED_M, Form.GROUPED_K, Form.BATCHED}),
            scalings=frozenset({UNSCALED, _ROWS}),
            features=PLAIN_FEATURES | Feature.DETERMINISTIC,
            rules=(Rule("fp8", _fp8), Rule("cpu_kernel", _cpu)),
            guards=(Guard("groups", _groups),),
            size_notes=(Guard("copies", _costs),),
            synchronises=(Rule("host_sync", _fallback),),
        )
    )

    def unavailable_reason(self) -> Reason | None:
        """Say that this torch has no grouped product."""
        if _exists():
            return None
        return Reason("missing_function", f"torch {torch.__version__} has no _grouped_mm; 2.8 and newer have")

    def bind(self, spec: GemmSpec, device: Device) -> Any:
        """Return the products of a kind of call."""
        if spec.form is Form.MOE:
            return bind_moe(self, spec, device)
        return TorchGroupedKernel(spec, device)


class TorchGroupedKernel:
    """Grouped products of one kind of call."""

    def __init__(self, spec: GemmSpec, device: Device) -> None:
        self._spec = spec
        self._clear = clearing(device)

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return the product."""
        spec, form = self._spec, self._spec.form
        offs = args.offs
        if offs is not None:
            # Ends that go down or past the last row would end in a device-side assert or outside of the tensors.
            rows = a.shape[0] if form is Form.GROUPED_M else a.shape[1]
            offs = offs if args.full else offs.clamp(0, rows).cummax(0).values.to(torch.int32)
            args = args._replace(offs=offs)
        if a.device.type == "cpu" and a.dtype.itemsize == 2 and form is not Form.GROUPED_K:
            a, b = whole_k(a, b)
        if spec.scaling_a is not Scaling.NONE:
            out = self._scaled(a, b, offs, args)
        else:
            out = torch._grouped_mm(*self._laid_out(a, b), offs=offs)
        out = out.contiguous()
        if form is Form.GROUPED_M:
            cleared = args.full or self._clear(out, offs)
            return add_group_bias(out if cleared else zero_past_end(out, args), args)
        if form is Form.GROUPED_K:
            return out if self._clear(out, offs) else _zero_empty(out, offs)
        return out if args.bias is None else out.add_(args.bias.unsqueeze(1))

    def _laid_out(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Put the grouped dimension where its steps are strides, multiples of 16 bytes, whatever the ends are."""
        if self._spec.form is Form.GROUPED_M:
            return row_major(a), either_major(b)
        if self._spec.form is Form.GROUPED_K:
            return column_major(a), row_major(b)
        return either_major(a), either_major(b)

    def _scaled(self, a: Tensor, b: Tensor, offs: Tensor | None, args: GemmArgs) -> Tensor:
        assert args.scale_a is not None and args.scale_b is not None
        n = b.shape[-1]
        x, y = row_major(padded(a, 1, 16)), column_major(padded(b, 16, 16))
        scale_b = torch.nn.functional.pad(args.scale_b, (0, y.shape[-1] - n)).contiguous()
        out: Tensor = torch._scaled_grouped_mm(
            x, y, scale_a=args.scale_a.contiguous(), scale_b=scale_b, offs=offs, out_dtype=torch.bfloat16
        )
        return out[..., :n]


def clearing(device: Device) -> Callable[[Tensor, Tensor | None], bool]:
    """Return what writes zeros into the unwritten part of a result, or returns False where a mask has to do it.

    A mask reads and writes the whole result, a tenth of the time of a wide product; our kernel touches what is left.
    """
    if device.platform == "cuda" and torch.cuda.is_available():
        from vllm_accel.kernels.triton.toolchain import problems

        if not problems(device.arch):
            return _Clear()
    return lambda out, offs: False


class _Clear:
    """Our clearing kernels, bound by shape; not where they fail, and never compiled while a graph is captured."""

    def __init__(self) -> None:
        from vllm_accel.kernels.triton import clear, launch

        self._launch, self._bind = clear.clear_launch, launch.Bound
        self._bound: dict[torch.Size, Any] = {}
        self._works = True

    def __call__(self, out: Tensor, offs: Tensor | None) -> bool:
        assert offs is not None
        bound = self._bound.get(out.shape)
        if bound is None:
            if not self._works or torch.cuda.is_current_stream_capturing():
                return False
            try:
                bound = self._bind(self._launch(out, offs))
                bound((out, offs))
            except Exception as error:
                self._works = False
                text = "torch_grouped clears with masks from now on: the kernel that would do it failed: %s"
                logging.getLogger("vllm_accel").warning(text, error)
                return False
            if len(self._bound) >= _KEPT:
                self._bound.clear()
            self._bound[out.shape] = bound
            return True
        bound((out, offs))
        return True


def _zero_empty(out: Tensor, offs: Tensor | None) -> Tensor:
    """Overwrite the products of groups without rows, which kernels may leave unwritten; on the device."""
    assert offs is not None
    empty = torch.diff(offs, prepend=offs.new_zeros(1)) == 0
    return out.masked_fill_(empty.view(-1, 1, 1), 0)


BACKEND = TorchGrouped()
