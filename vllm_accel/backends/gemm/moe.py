"""A whole mixture-of-experts layer on the grouped products of one backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import Backend, GemmArgs, MoeArgs
from vllm_accel.dispatch.capability import Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_capability import GemmCapability
from vllm_accel.dispatch.gemm_spec import Form, GemmSpec, Layout, Scaling
from vllm_accel.dispatch.spec import bucket
from vllm_accel.kernels.torch.moe import ACTIVATIONS, gated, mixture

_ACTIVATIONS = frozenset(ACTIVATIONS)


def with_moe(capability: GemmCapability) -> GemmCapability:
    """Return the capability of a backend with grouped products, with the layers that are made of them."""

    def products(spec: GemmSpec, device: Device) -> str | None:
        if spec.form is not Form.MOE:
            return None
        for product in products_of(spec):
            if reasons := capability.unsupported_reasons(product, device):
                return f"its grouped products cannot: {reasons[0].text}"
        return None

    def waits(spec: GemmSpec, device: Device) -> str | None:
        if spec.form is not Form.MOE:
            return None
        found = (capability.waits_for_device(product, device) for product in products_of(spec))
        return next((reason.text for reason in found if reason), None)

    return replace(
        capability,
        forms=capability.forms | {Form.MOE},
        activations=_ACTIVATIONS,
        weight_scalings=frozenset(b for a, b in capability.scalings if a is activations_of(b)),
        weight_dtypes=frozenset(d for d in capability.dtypes if d.itemsize == 1),
        rules=(*capability.rules, Rule("products", products)),
        synchronises=(*capability.synchronises, Rule("host_sync", waits)),
    )


def activations_of(weights: Scaling) -> Scaling:
    """Return the scaling that activations get for weights of a scaling."""
    if weights in (Scaling.BLOCK_1x128, Scaling.BLOCK_128x128):
        return Scaling.BLOCK_1x128
    return weights if weights is Scaling.NONE else Scaling.ROW


def products_of(spec: GemmSpec) -> Iterator[GemmSpec]:
    """Yield the specs of the two grouped products of a layer."""
    scaled = spec.scaling_b is not Scaling.NONE
    for n, k, layout in ((2 * spec.k, spec.n, spec.layout_a), (spec.n, spec.k, spec.layout_b)):
        yield GemmSpec(
            Form.GROUPED_M, spec.b_dtype if scaled else spec.dtype, spec.b_dtype, spec.out_dtype,
            bucket(spec.m * max(spec.top_k, 1)), bucket(n), bucket(k), spec.groups, spec.features,
            activations_of(spec.scaling_b), spec.scaling_b, Layout.ROW, layout,
        )  # fmt: skip


def bind_moe(backend: Backend, spec: GemmSpec, device: Device) -> ComposedMoe:
    """Bind the grouped products of a layer."""
    first, second = (backend.bind(product, device) for product in products_of(spec))
    return ComposedMoe(first, second, spec)


class ComposedMoe:
    """A layer of one kind, out of two bound grouped products."""

    def __init__(self, first: Any, second: Any, spec: GemmSpec) -> None:
        self._first, self._second, self._spec = first, second, spec
        self._between = gated(spec.activation)
        self._scaling = activations_of(spec.scaling_b)

    def forward(self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, args: MoeArgs) -> Tensor:
        """Return the layer's output."""

        def first(rows: Tensor, ends: Tensor, order: Tensor) -> Tensor:
            return self._product(self._first, rows, w_gate_up, ends, args.bias_gate_up, args.scale_gate_up)

        def second(rows: Tensor, ends: Tensor, order: Tensor) -> Tensor:
            return self._product(self._second, rows, w_down, ends, args.bias_down, args.scale_down)

        experts = w_down.shape[0]
        return mixture(x, args.topk_weights, args.topk_ids, experts, first, self._between, second)

    def _product(
        self, kernel: Any, rows: Tensor, weights: Tensor, ends: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        scale_a = None
        if scale is not None:
            rows, scale_a = quantised(rows, self._scaling, self._spec.b_dtype)
        # The rows of nobody's pairs are never read: nothing has to be zeroed.
        out: Tensor = kernel.forward(rows, weights, GemmArgs(ends, bias, scale_a, scale, full=True))
        return out


def quantised(rows: Tensor, scaling: Scaling, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise activations as the weights are."""
    from vllm_accel.ops.quantize import quantize_fp8, quantize_int8

    if dtype is torch.int8:
        return quantize_int8(rows, scaling=scaling)
    return quantize_fp8(rows, scaling=scaling, dtype=torch.float8_e4m3fn)
