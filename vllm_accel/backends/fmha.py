"""`xformers` and `mslk`: one API (fmha) under two module names, over PyTorch's CUTLASS and FlashAttention kernels.

The log-sum-exp has the form of the operator that made it, so the operator is always chosen here and never by the
library (which may also take one that compiles at its first call). The functions without autograd know no dropout and
return no gradient of a bias. Read in xformers 0.0.35, xformers/ops/fmha/{__init__, common, cutlass, flash}.py; mslk
1.1.0 has the same in mslk/attention/fmha.

Its masks for paged caches (``PagedBlockDiagonal...``) are not used, keys and values are copied out of their blocks
(`gather`). flash.py and flash3.py take these masks only with a FlashAttention package beside them, which `flash_attn_2`
and `flash_attn_3` call themselves, and not with PyTorch's kernels (``_is_paged_attention_supported``). triton_splitk.py
compiles for every batch size and every width of the table (``Z``, ``N_CTX_K`` and ``kv_cache_blocks_per_row`` are
constexpr in _triton/splitk_kernels.py), and both change from step to step.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from vllm_accel.backends import aten
from vllm_accel.backends.cutlass_kernel import CutlassKernel
from vllm_accel.backends.flash_attn_rules import GRID_HEADS, MAX_HEAD_DIM, one_head_dim
from vllm_accel.backends.flash_kernel import FlashKernel
from vllm_accel.backends.fmha_launch import FmhaCutlass, FmhaFlash
from vllm_accel.backends.gather import serve_paged, with_gather
from vllm_accel.backends.library import Function, Library, installed_version, look_up, require
from vllm_accel.backends.sdpa_efficient import BFLOAT16, BIAS_ROWS, GRID_BATCH, STRIDES, WINDOW_CAUSAL
from vllm_accel.backends.sdpa_flash import small_memory
from vllm_accel.dispatch.capability import Capability, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation
from vllm_accel.errors import Reason, UnsupportedCallError

_ATTENTION = ("query", "key", "value", "attn_bias", "p", "scale", "op")
_BLOCKS = ("q_seqinfo", "k_seqinfo")
_WINDOW = ("_window_size",)
_MASKS: dict[str, tuple[str, ...]] = {
    "_SeqLenInfo": ("seqstart", "max_seqlen", "min_seqlen", "seqstart_py"),
    "LocalAttentionFromBottomRightMask": ("window_left", "window_right"),
    "LowerTriangularFromBottomRightMask": (),
    "LowerTriangularFromBottomRightLocalAttentionMask": _WINDOW,
    "LowerTriangularMaskWithTensorBias": ("bias",),
    "BlockDiagonalMask": _BLOCKS,
    "BlockDiagonalCausalMask": _BLOCKS,
    "BlockDiagonalCausalLocalAttentionMask": (*_BLOCKS, *_WINDOW),
    "BlockDiagonalCausalFromBottomRightMask": _BLOCKS,
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (*_BLOCKS, *_WINDOW),
}


def library(label: str, module: str, **about: Any) -> Library:
    """Describe what both adapters call, in the module that has it."""
    operators = ("cutlass.FwOp", "cutlass.BwOp", "flash.FwOp", "flash.BwOp")
    backward = ("grad", "output", "lse", *_ATTENTION)
    return Library(
        label=label,
        functions=(
            Function(module, "memory_efficient_attention_forward", _ATTENTION),
            Function(module, "memory_efficient_attention_forward_requires_grad", _ATTENTION),
            Function(module, "memory_efficient_attention_backward", backward),
            *(Function(module, name) for name in operators),
            *(Function(f"{module}.attn_bias", name, parameters) for name, parameters in _MASKS.items()),
        ),
        **about,
    )


def _takes_flash(spec: AttentionSpec, device: Device) -> bool:
    """Tell which kernel a call gets: FlashAttention where it can do it (flash.py, FwOp), else CUTLASS."""
    cc = device.compute_capability
    size = one_head_dim(spec.head_dim, spec.head_dim_v, Feature.LSE_GRAD in spec.features)
    return (
        cc is not None
        and cc >= (8, 0)
        and spec.dtype in (torch.float16, torch.bfloat16)
        and not spec.features & (Feature.BIAS | Feature.MASK)
        and size <= MAX_HEAD_DIM
    )


def _flash_window(spec: AttentionSpec, device: Device) -> str | None:
    sides = Feature.WINDOW_LEFT | Feature.WINDOW_RIGHT
    if not spec.features & sides or Feature.CAUSAL in spec.features:
        return None
    if Feature.VARLEN in spec.features:
        return "has no mask for packed sequences with a window unless causal=True"
    if spec.relation is Relation.LONGER:
        return "cuts windows short where there are more queries than keys, unless causal=True"
    return None


def _cutlass_window(spec: AttentionSpec, device: Device) -> str | None:
    if text := WINDOW_CAUSAL.check(spec, device):
        return text
    both = Feature.WINDOW_LEFT | Feature.GRAD
    square = Feature.VARLEN in spec.features and spec.relation is Relation.EQUAL
    if both & spec.features == both and not square:
        return "its CUTLASS backward takes windows for packed sequences of equal lengths only"
    return None


def _cutlass_bias(spec: AttentionSpec, device: Device) -> str | None:
    if not spec.features & (Feature.BIAS | Feature.MASK) or Feature.CAUSAL not in spec.features:
        return None
    if spec.features & (Feature.GRAD | Feature.WINDOW_LEFT):
        return "combines attn_bias with causal=True without gradients and windows only"
    if spec.relation is Relation.SHORTER:
        return "combines attn_bias with a causal mask that is aligned top-left; this call has Sq < Sk"
    return None


def _cutlass_packed_backward(spec: AttentionSpec, device: Device) -> str | None:
    both = Feature.VARLEN | Feature.GRAD
    if both & spec.features != both or Feature.CAUSAL in spec.features or spec.relation is Relation.EQUAL:
        return None
    # getQueryStartShift in kernel_backward.h, with more splits over the keys than one; see AtenLaunch.backward.
    return "its CUTLASS backward divides by zero for a packed sequence that has keys and no queries"


_CUTLASS_RULES = (_cutlass_window, _cutlass_bias, _cutlass_packed_backward)


def _cutlass_reason(spec: AttentionSpec, device: Device) -> str | None:
    return next((text for rule in _CUTLASS_RULES if (text := rule(spec, device))), None)


def _kernel(spec: AttentionSpec, device: Device) -> str | None:
    return _flash_window(spec, device) if _takes_flash(spec, device) else _cutlass_reason(spec, device)


def _deterministic(spec: AttentionSpec, device: Device) -> str | None:
    both = Feature.DETERMINISTIC | Feature.GRAD
    return "has no reproducible gradients" if both & spec.features == both else None


CAPABILITY = Capability(
    platforms=frozenset({"cuda"}),
    # cutlass.py ends at sm_90 (CUDA_MAXIMUM_COMPUTE_CAPABILITY); older than sm_70 no torch carries.
    compute_capabilities=frozenset({(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)}),
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
    features=Feature.VARLEN
    | Feature.GRAD
    | Feature.LSE
    | Feature.LSE_GRAD
    | Feature.CAUSAL
    | Feature.WINDOW_LEFT
    | Feature.WINDOW_RIGHT
    | Feature.SCALE
    | Feature.BIAS
    | Feature.MASK
    | Feature.SINKS
    | Feature.SINKS_GRAD
    | Feature.DETERMINISTIC
    | Feature.GQA
    | Feature.VALUE_DIM,
    min_cuda=(11, 3),  # the document's minimum
    rules=(
        aten.CARRIED,
        BFLOAT16,
        Rule("kernel", _kernel),
        Rule("deterministic_backward", _deterministic),
        GRID_HEADS,
    ),
    guards=(GRID_BATCH, BIAS_ROWS, STRIDES),
)


class FmhaBackend:
    """One of the two libraries as a backend."""

    capability = with_gather(CAPABILITY)

    def __init__(self, name: str, library: Library) -> None:
        self.name = name
        self._library = library

    def version(self) -> str | None:
        """Return the version of the library."""
        return installed_version(self._library)

    def unavailable_reason(self) -> Reason | None:
        """Say why the functions cannot be called, or would refuse every call."""
        found = look_up(self._library)
        if isinstance(found, Reason):
            return found
        extension: Any = sys.modules.get(f"{self.name}._cpp_lib")
        if not getattr(extension, "_built_with_cuda", True):
            # common.py refuses everything then, also the kernels that are torch's own.
            error = str(getattr(extension, "_cpp_library_load_exception", "")).strip().splitlines()
            text = " ".join(line.strip() for line in error[:3]) or "its CUDA extension is not there"
            return Reason("broken", f"{self._library.label} is installed but runs nothing: {text}")
        if not _available(found["cutlass.FwOp"]):
            text = f"{self._library.label}: its CUTLASS operator does not know torch {torch.__version__}"
            return Reason("broken", text)
        return None

    @serve_paged
    def bind(self, spec: AttentionSpec, device: Device) -> FlashKernel | CutlassKernel:
        """Return the kernel over the installed library."""
        found = require(self.name, look_up(self._library))
        if _takes_flash(spec, device) and _available(found["flash.FwOp"]):
            return FlashKernel(FmhaFlash(found), small_memory(device))
        if text := _cutlass_reason(spec, device):
            raise UnsupportedCallError(f"{self.name} without flash kernels", {self.name: (Reason("kernel", text),)})
        return CutlassKernel(FmhaCutlass(found), spec)


def _available(operator: Any) -> bool:
    return bool(getattr(operator, "is_available", lambda: True)())
