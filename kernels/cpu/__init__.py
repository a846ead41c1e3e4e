"""Launchers of the C++ attention kernels for CPUs. Importing this builds and loads nothing; `load` does, once."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: What the kernels call a dtype; 1-byte caches are dequantised as they are read.
TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
    torch.int8: 5,
    torch.bool: 6,
}


class Loaded(NamedTuple):
    """The extension module, or why there is none."""

    module: Any
    reason: str | None


@functools.cache
def load() -> Loaded:
    """Load the extension and lend it the OpenMP runtime of torch.

    The extension links none itself: a second copy beside torch's makes every parallel region of both slow (a 350 us
    matmul took 7100). Looking the symbol up in libtorch_cpu finds the copy that torch is bound to, whatever its name.
    """
    try:
        module = importlib.import_module(f"{__name__}._cpu")
    except ImportError as error:
        return Loaded(None, f"its extension is not built or does not load: {error}")
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    try:
        parallel = ctypes.CDLL(library).GOMP_parallel
    except (OSError, AttributeError) as error:
        return Loaded(None, f"torch's OpenMP runtime was not found: {error}")
    module.set_parallel(ctypes.cast(parallel, ctypes.c_void_p).value)
    return Loaded(module, None)


def type_code(q: torch.dtype, kv: torch.dtype, out: torch.dtype, bias: Tensor | None, sinks: Tensor | None) -> int:
    """Return the dtypes of a call as the extension takes them."""
    code = TYPES[q] | TYPES[kv] << 3 | TYPES[out] << 6
    if bias is not None:
        code |= TYPES[bias.dtype] << 9
    if sinks is not None:
        code |= TYPES[sinks.dtype] << 12
    return code
