"""Launchers of the C++ attention kernels for CPUs. Importing this builds and loads nothing; `load` does, once."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_accel.dispatch.spec import Feature

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
    if not hasattr(module, "sources"):
        return Loaded(None, "its extension was built from older sources: install vllm_accel again")
    library = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    try:
        parallel = ctypes.CDLL(library).GOMP_parallel
    except (OSError, AttributeError) as error:
        return Loaded(None, f"torch's OpenMP runtime was not found: {error}")
    module.set_parallel(ctypes.cast(parallel, ctypes.c_void_p).value)
    return Loaded(module, None)


#: Rows (queries x heads of a group) up to which keys are read in place, at the speed of memory; as in drive.cpp.
_DECODE_ROWS = 16
#: Keys that a query sees times head size, up to which training without the matrix unit takes no longer than PyTorch's
#: with it.
_TRAINED = 1 << 15


@functools.cache
def _torch_has(dtype: torch.dtype) -> bool:
    """Tell whether torch multiplies in a dtype on this machine's matrix unit (AMX)."""
    asked = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}.get(dtype)
    supported = getattr(torch.cpu, asked, None) if asked else None
    return supported is not None and bool(supported())


def _we_have(dtype: torch.dtype) -> bool:
    """Tell whether prefill in a dtype multiplies on the matrix unit here."""
    sets: tuple[str, ...] = () if load().reason else load().module.instruction_sets()
    return dtype is torch.bfloat16 and bool(sets) and sets[0].startswith("amx")


def outrun(spec: Any) -> str | None:
    """Say why PyTorch's kernel is the faster one for a kind of attention call, None where it is not.

    That is prefill on a machine whose matrix unit torch uses and this extension does not: built by a compiler that
    does not know it, not permitted, or (fp16) without such a kernel; and long training there, whose backward does not
    use it. Forward and backward in bf16, times PyTorch's speed with one thread (Intel Xeon with AMX, 2026-11-30):
    heads of 64, causal: 3.4 at 64 tokens, 1.7 at 512, 1.07 at 1024, 0.93 at 2048; not causal 1.2 at 256, 0.84 at 1024;
    heads of 128, causal: 1.2 at 512, 0.73 at 1024. Decode, which is bound by memory, is ours either way.
    """
    if spec.block_size or spec.seqlen_q * (spec.num_heads // spec.num_kv_heads) <= _DECODE_ROWS:
        return None
    if not _torch_has(spec.dtype):
        return None
    if not _we_have(spec.dtype):
        return "PyTorch multiplies this dtype on the processor's matrix unit (AMX), these kernels do not here"
    seen = spec.seqlen_k / 2 if Feature.CAUSAL in spec.features else spec.seqlen_k
    if Feature.GRAD in spec.features and seen * spec.head_dim > _TRAINED:
        return "PyTorch's backward multiplies this dtype on the processor's matrix unit (AMX), this one does not"
    return None


def type_code(q: torch.dtype, kv: torch.dtype, out: torch.dtype, bias: Tensor | None, sinks: Tensor | None) -> int:
    """Return the dtypes of a call as the extension takes them."""
    code = TYPES[q] | TYPES[kv] << 3 | TYPES[out] << 6
    if bias is not None:
        code |= TYPES[bias.dtype] << 9
    if sinks is not None:
        code |= TYPES[sinks.dtype] << 12
    return code
