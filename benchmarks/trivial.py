"""A backend whose kernel does nothing, so that what is left of a call is the dispatch. Never registered by itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vllm_accel import register_backend
from vllm_accel.dispatch import registry
from vllm_accel.dispatch.backend import AttentionArgs, TorchBackend
from vllm_accel.dispatch.capability import Capability
from vllm_accel.dispatch.device import Device, detect
from vllm_accel.dispatch.preference import shipped_order
from vllm_accel.dispatch.spec import AttentionSpec, Feature

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TrivialBackend(TorchBackend):
    """Takes every call and returns the same tensors each time."""

    name = "trivial"
    capability = Capability(dtypes=frozenset(_DTYPES), features=functools.reduce(lambda a, b: a | b, Feature))

    def __init__(self, device: torch.device) -> None:
        result = (torch.zeros(1, device=device), torch.zeros(1, device=device), None)

        def forward(q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor, None]:
            return result

        self._kernel = SimpleNamespace(forward=forward, backward=None)

    def bind(self, spec: AttentionSpec, device: Device) -> Any:
        """Return the kernel that does nothing."""
        return self._kernel


@contextlib.contextmanager
def installed(device: torch.device) -> Iterator[None]:
    """Make it the automatic choice for every attention call inside; every cached plan is dropped on both ends."""
    first = registry.ordered("attention", shipped_order("attention", detect(device)))[0]
    register_backend("attention", TrivialBackend(device), before=first)
    try:
        yield
    finally:
        registry.unregister_backend("attention", TrivialBackend.name)
