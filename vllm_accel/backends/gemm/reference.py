"""Matrix products in plain PyTorch with fp32 accumulation, on every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import TorchBackend
from vllm_accel.dispatch.capability import Capability
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import GemmSpec


class ReferenceGemm(TorchBackend):
    """The GEMM backend `reference`."""

    name = "reference"
    capability = Capability(dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}))

    def bind(self, spec: GemmSpec, device: Device) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """Return the product for this dtype: torch.matmul accumulates 16-bit products in fp32."""
        return _product


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a @ b if bias is None else torch.addmm(bias, a, b)


BACKEND = ReferenceGemm()
