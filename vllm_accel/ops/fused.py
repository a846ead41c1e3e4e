"""Our Triton kernels behind `write_kv` and `merge_attention`, which choose no backend: one launch instead of twenty."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from vllm_accel.dispatch.settings import settings

logger = logging.getLogger("vllm_accel")
_T = TypeVar("_T")
_PLAIN = (Tensor, torch.nn.Parameter)


@functools.cache
def _supported(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)  # AMD's MI200 and MI300 are 9.0 and 9.4


class Fused:
    """One kernel: used where it can run, left for good when it fails, and captured only where it has run before.

    Args:
        call: the public call that it serves, for messages. module: of `vllm_accel.kernels.triton`, with its launcher.
    """

    def __init__(self, call: str, module: str) -> None:
        self._call, self._module = call, module
        #: What stopped the kernel in this process.
        self.failed: Exception | None = None
        #: Kinds of calls that have run, and so are compiled.
        self._ready: set[Hashable] = set()

    @functools.cached_property
    def _launcher(self) -> Any:
        """The module that launches the kernel, None without Triton."""
        try:
            return importlib.import_module(f"vllm_accel.kernels.triton.{self._module}")
        except ImportError:
            return None

    def launcher(self, tensors: Iterable[Tensor | None], kind: Hashable) -> Any:
        """Return the module that launches the kernel for a kind of call, or None where it is not to run."""
        given = [t for t in tensors if t is not None]
        device = given[0].device
        if any(type(t) not in _PLAIN or t.device != device for t in given):
            return None  # a fake tensor has no memory to write to
        if device.type != "cuda" or self.failed or settings().use_triton is False or not _supported(device):
            return None
        if torch.cuda.is_current_stream_capturing() and kind not in self._ready:
            return None  # to compile would break the capture
        return self._launcher

    def run(self, launch: Callable[[], _T], device: torch.device, kind: Hashable) -> tuple[_T] | None:
        """Launch on the tensors' device and return the result in a tuple; None, and a warning once, if that fails."""
        try:
            if device.type != "cuda" or torch.cuda.current_device() == device.index:
                result = launch()
            else:
                with torch.cuda.device(device):
                    result = launch()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            logger.warning("the Triton kernel of %s failed and is not used again: %s", self._call, error)
            self.failed = error
            return None
        self._ready.add(kind)
        return (result,)
