"""Products out of torch's own operators, for `cublas` and `cpu`: one call, a batch, or a loop over groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_accel import cublas as workspaces
from vllm_accel.backends.gemm.groups import by_group
from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.capability import Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_spec import Form, GemmSpec, Scaling
from vllm_accel.dispatch.spec import Feature


def takes_out_dtype() -> bool:
    """Tell whether this torch multiplies 16-bit matrices into fp32 (on CUDA, since 2.8)."""
    return "dtype" in torch.ops.aten.mm.overloads()


def _reproducible(spec: GemmSpec, device: Device) -> str | None:
    if Feature.DETERMINISTIC not in spec.features:
        return None
    found = workspaces.workspace()
    if found.reproducible or device.platform != "cuda":
        return None
    return (
        f"{workspaces.VARIABLE} is {found.config or 'unset'}; deterministic results need it to be :4096:8 or :16:8 "
        'before CUDA starts: vllm_accel.cublas.configure_workspace(":4096:8")'
    )


#: For backends whose products are cuBLAS's on an NVIDIA GPU.
WORKSPACE = Rule("workspace", _reproducible)


class FloatProducts:
    """Products of fp16, bf16, fp32 and fp64, rounded once to the result's dtype."""

    def __init__(self, spec: GemmSpec) -> None:
        self._form = spec.form
        self._wide = spec.out_dtype is not spec.dtype
        self._out = spec.out_dtype

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return the product."""
        bias = args.bias
        if self._form is Form.DENSE:
            if self._wide:
                out = torch.mm(a, b, out_dtype=self._out)
                return out if bias is None else out.add_(bias)
            return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
        if self._form is Form.BATCHED:
            if self._wide:
                out = torch.bmm(a, b, out_dtype=self._out)
                return out if bias is None else out.add_(bias.unsqueeze(1))
            return torch.bmm(a, b) if bias is None else torch.baddbmm(bias.unsqueeze(1), a, b)
        return by_group(self._form, a, b, args, self._into(bias), zeros_of(self._form, a, b, args, self._out))

    def _into(self, bias: Tensor | None) -> Callable[..., Tensor]:
        def multiply(x: Tensor, y: Tensor, group: int, target: Tensor) -> Tensor:
            if self._wide:
                target.copy_(torch.mm(x, y, out_dtype=self._out))
                return target if bias is None else target.add_(bias[group])
            if bias is None:
                return torch.mm(x, y, out=target)
            return torch.addmm(bias[group], x, y, out=target)

        return multiply


def zeros_of(form: Form, a: Tensor, b: Tensor, args: GemmArgs, dtype: torch.dtype) -> Tensor:
    """Return what groups without rows, and rows without a group, have to be."""
    if form is Form.GROUPED_M:
        make = a.new_empty if args.full else a.new_zeros
        return make((a.shape[0], b.shape[-1]), dtype=dtype)
    groups = b.shape[0] if args.offs is None else args.offs.shape[0]
    return a.new_zeros((groups, a.shape[-2], b.shape[-1]), dtype=dtype)


class ScaledProducts:
    """Products of quantised operands, group by group, by one function for two matrices.

    `multiply(a, b, scale_a, scale_b, bias)` multiplies (M, K) and (K, N) with the factors of `Scaling`.
    """

    def __init__(self, spec: GemmSpec, multiply: Callable[..., Tensor]) -> None:
        self._spec, self._multiply = spec, multiply

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return the product."""
        spec, form = self._spec, self._spec.form
        scale_a, scale_b, bias = args.scale_a, args.scale_b, args.bias
        assert scale_a is not None and scale_b is not None
        if form is Form.DENSE:
            out: Tensor = self._multiply(a, b, scale_a, scale_b, bias)
            return out
        result = zeros_of(form, a, b, args, spec.out_dtype)
        rows_scaled = spec.scaling_a is not Scaling.TENSOR

        def multiply(x: Tensor, y: Tensor, group: int, target: Tensor) -> Tensor:
            factors = scale_a
            if form is Form.BATCHED:
                factors = scale_a[group]
            elif rows_scaled:
                start = target.storage_offset() // result.stride(0)
                factors = scale_a[start : start + target.shape[0]]
            own = bias if bias is None else bias[group]
            return target.copy_(self._multiply(x, y, factors, scale_b[group], own))

        return by_group(form, a, b, args, multiply, result)
