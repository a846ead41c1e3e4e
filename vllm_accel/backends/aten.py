"""What the adapters over PyTorch's CUDA attention operators share: operators by name, and what this torch carries.

The private operators' schemas differ between releases, so everything is passed by keyword and a parameter that not
every release has is looked up in the schema, once, when a kernel is bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.convert import aligned
from vllm_accel.dispatch.capability import Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.errors import Reason


def operator(name: str) -> Callable[..., Any]:
    """Return the overload of ``torch.ops.aten`` that takes tensors alone."""
    function: Callable[..., Any] = getattr(torch.ops.aten, name).default
    return function


def parameters(name: str) -> frozenset[str]:
    """Name the parameters of an operator in this torch, empty where it has no such operator."""
    packet = getattr(torch.ops.aten, name, None)
    return frozenset() if packet is None else frozenset(a.name for a in packet.default._schema.arguments)


def ready(tensor: Tensor) -> Tensor:
    """Return `aligned` of a tensor whose last dimension is a multiple of 16 bytes: 0.2 us where it is contiguous."""
    return tensor if tensor.is_contiguous() and not tensor.data_ptr() % 16 else aligned(tensor)


def not_built(what: str, built: Callable[[], bool] | None) -> Reason | None:
    """Say that this torch is a GPU build without some kernels; None for a CPU build, where devices decide."""
    if (torch.version.cuda or torch.version.hip) and built is not None and not built():
        return Reason("not_built", f"torch {torch.__version__} is built without {what}")
    return None


def _carried(spec: Any, device: Device) -> str | None:
    """Refuse a GPU that this build of torch has no code for: kernels then fail with "no kernel image"."""
    cc, names = device.compute_capability, device.torch_arch_list
    if cc is None or not names:
        return None
    for name in names:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        built = (int(digits[:-1] or 0), int(digits[-1]))
        same_major = built[0] == cc[0] and built[1] <= cc[1]  # machine code runs on later chips of its generation
        if (kind == "sm" and same_major) or (kind == "compute" and built <= cc):
            return None
    return f"torch is built for {', '.join(names)}, which has no code for {device.arch}"


CARRIED = Rule("torch_arch_list", _carried)
