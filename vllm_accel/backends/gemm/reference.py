"""Matrix products in plain PyTorch, in the safe upcast of the inputs, one group after another, on every device.

16-bit and FP8 inputs are multiplied in fp32, int8 in fp64 (exact up to 2^53), fp32 and fp64 as they are. On a GPU
groups are masks: every group costs a product of all rows, and the host is never asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_accel.backends.gemm.groups import by_group, spread
from vllm_accel.backends.gemm.moe import ComposedMoe, bind_moe, with_moe
from vllm_accel.backends.gemm.products import WORKSPACE
from vllm_accel.dispatch.backend import GemmArgs, TorchBackend
from vllm_accel.dispatch.capability import Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_capability import FLOATS, FP8, PLAIN_FEATURES, UNSCALED, GemmCapability
from vllm_accel.dispatch.gemm_spec import Form, GemmSpec, Scaling
from vllm_accel.dispatch.offsets import group_of_rows
from vllm_accel.dispatch.spec import Feature

FORMS = frozenset({Form.DENSE, Form.GROUPED_M, Form.GROUPED_K, Form.BATCHED})
_FACTORS = tuple(scaling for scaling in Scaling if scaling is not Scaling.NONE)
#: Rows of a product where bits must not depend on how many rows there are: always this many, the last ones padded.
_TILE = 64


def _every_group(spec: GemmSpec, device: Device) -> str | None:
    if device.type == "cuda" and spec.form in (Form.GROUPED_M, Form.GROUPED_K, Form.MOE):
        return f"multiplies all rows once for each of {spec.groups} groups, and masks"
    return None


class ReferenceGemm(TorchBackend):
    """The GEMM backend `reference`."""

    name = "reference"
    capability = with_moe(
        GemmCapability(
            dtypes=FLOATS | FP8 | {torch.int8},
            b_dtypes=FP8,
            out_dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32}),
            forms=FORMS,
            scalings=frozenset({UNSCALED, *((x, y) for x in _FACTORS for y in _FACTORS)}),
            features=PLAIN_FEATURES | Feature.DETERMINISTIC | Feature.BATCH_INVARIANT,
            rules=(WORKSPACE,),
            device_notes=(Rule("masks", _every_group),),
        )
    )

    def bind(self, spec: GemmSpec, device: Device) -> ReferenceGemmKernel | ComposedMoe:
        """Return the products of a kind of call."""
        if spec.form is Form.MOE:
            return bind_moe(self, spec, device)
        return ReferenceGemmKernel(spec, device)


class ReferenceGemmKernel:
    """Products of one kind of call."""

    def __init__(self, spec: GemmSpec, device: Device) -> None:
        self._spec = spec
        self._masks = device.type != "cpu"  # spans would be read on the host
        self._wide = _wide(spec.dtype)
        self._tiled = Feature.BATCH_INVARIANT in spec.features and spec.form is not Form.GROUPED_K

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return the product."""
        form, wide = self._spec.form, self._wide
        if form is Form.DENSE:
            out = self._product(a, b, args, None)
        elif form is Form.BATCHED or not self._masks:
            groups = b.shape[0] if args.offs is None else args.offs.shape[0]
            lead = () if form is Form.GROUPED_M else (groups,)
            out = a.new_zeros((*lead, a.shape[-2], b.shape[-1]), dtype=wide)

            def multiply(x: Tensor, y: Tensor, group: int, target: Tensor) -> Tensor:
                return target.copy_(self._product(x, y, self._args_of(args, group, target, out), group))

            out = by_group(form, a, b, args, multiply, out)
        else:
            out = self._masked(a, b, args)
        return out.to(self._spec.out_dtype)

    def _args_of(self, args: GemmArgs, group: int, target: Tensor, out: Tensor) -> GemmArgs:
        """Return the bias and factors of one group; those of a's rows are cut like the rows of the result."""
        scale_a = args.scale_a
        if scale_a is not None and self._spec.form is Form.BATCHED:
            scale_a = scale_a[group]
        elif scale_a is not None and self._spec.scaling_a is not Scaling.TENSOR:
            start = target.storage_offset() // out.stride(0)
            scale_a = scale_a[start : start + target.shape[0]]
        bias = args.bias if args.bias is None else args.bias[group]
        return GemmArgs(None, bias, scale_a, None if args.scale_b is None else args.scale_b[group])

    def _masked(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        assert args.offs is not None
        rows = self._spec.form is Form.GROUPED_M
        group_of = group_of_rows(args.offs, a.shape[0] if rows else a.shape[1])
        if not rows:
            inside = [group_of == group for group in range(args.offs.shape[0])]
            return torch.stack(
                [
                    self._product(torch.where(own, a, 0), torch.where(own.unsqueeze(1), b, 0), GemmArgs(), None)
                    for own in inside
                ]
            )
        out = a.new_zeros((a.shape[0], b.shape[-1]), dtype=self._wide)
        for group in range(b.shape[0]):
            bias = args.bias if args.bias is None else args.bias[group]
            scale_b = args.scale_b if args.scale_b is None else args.scale_b[group]
            part = self._product(a, b[group], GemmArgs(None, bias, args.scale_a, scale_b), group)
            out = torch.where((group_of == group).unsqueeze(1), part, out)
        return out

    def _product(self, a: Tensor, b: Tensor, args: GemmArgs, group: int | None) -> Tensor:
        """Multiply two matrices in the wide dtype, bias added."""
        spec = self._spec
        x, y = a.to(self._wide), b.to(self._wide)
        if args.scale_a is not None and args.scale_b is not None:
            x = x * spread(args.scale_a, spec.scaling_a, a.shape, of_a=True)
            y = y * spread(args.scale_b, spec.scaling_b, b.shape, of_a=False)
        out = _in_tiles(x, y) if self._tiled else x @ y
        return out if args.bias is None else out + args.bias


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype in (torch.int8, torch.float64):
        return torch.float64
    return torch.float32


def _in_tiles(x: Tensor, y: Tensor) -> Tensor:
    """Multiply tiles of equally many rows, so that a row's sum runs the same way whatever comes with it."""
    rows = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -rows % _TILE)).contiguous()
    return torch.cat([tile @ y for tile in padded.split(_TILE)])[:rows]


BACKEND = ReferenceGemm()
