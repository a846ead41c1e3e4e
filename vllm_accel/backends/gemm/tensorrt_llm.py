"""TensorRT-LLM: its fused mixture of experts on CUTLASS, as FlashInfer carries it, and its operators (`trtllm_ops`).

Layers are whole and 16-bit. Conventions, read in flashinfer 0.7.2 (fused_moe/core.py; data/csrc/fused_moe/
cutlass_backend: the checks of flashinfer_cutlass_fused_moe_binding.cu, doGatedActivation of
cutlass_fused_moe_kernels.cuh): weights are (E, 2I, D) and (E, D, I), contiguous, with up before gate; ids int32,
factors fp32; D and I are multiples of 8. The kernel is compiled at the first call. The default epilogue adds with
atomics, so the other one is asked for where bits have to repeat.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.flashinfer import no_compiler
from vllm_accel.backends.gemm import trtllm_ops
from vllm_accel.backends.library import Function, Library, installed_version, look_up, require
from vllm_accel.dispatch.backend import MoeArgs
from vllm_accel.dispatch.capability import Guard, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_capability import UNSCALED, GemmCapability
from vllm_accel.dispatch.gemm_spec import Form, GemmSizes, GemmSpec
from vllm_accel.dispatch.spec import Feature
from vllm_accel.errors import BackendUnavailableError, Reason

_MOE = "cutlass_fused_moe"
LIBRARY = Library(
    label="FlashInfer (TensorRT-LLM kernels)",
    functions=(
        Function(
            "flashinfer.fused_moe", _MOE,
            (
                "input", "token_selected_experts", "token_final_scales", "fc1_expert_weights", "fc2_expert_weights",
                "output_dtype", "quant_scales", "fc1_expert_biases", "fc2_expert_biases", "output",
                "use_fused_finalize",
            ),
        ),
    ),
    versions=">=0.7.2,<0.8",
    version_modules=("flashinfer",),
    distributions=("flashinfer-python",),
    absent_hint="pip install flashinfer-python",
)  # fmt: skip
_STEP = 8  # elements of 16 bits in 16 bytes, which TMA asks for


def _layers() -> Reason | None:
    found = look_up(LIBRARY)
    return found if isinstance(found, Reason) else no_compiler()


def _kinds(spec: GemmSpec, device: Device) -> str | None:
    if spec.form is not Form.MOE:
        return trtllm_ops.refuses(spec, device)
    if spec.dtype is trtllm_ops.E4M3 or spec.out_dtype is not spec.dtype:
        return "runs layers in 16 bits, and gives the dtype of x"
    return None


def _half(spec: GemmSpec, device: Device) -> str | None:
    """Say what a call lacks where this backend is there for the other form alone; else the whole is unavailable."""
    if _kinds(spec, device):
        return None  # refused for that
    operator = trtllm_ops.operator()
    if spec.form is Form.MOE:
        missing = None if isinstance(operator, Reason) else _layers()
    else:
        layers = "flashinfer" in sys.modules or importlib.util.find_spec("flashinfer") is not None
        missing = operator if layers and isinstance(operator, Reason) else None
    return missing.text if missing else None


def _aligned(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    if spec.form is Form.MOE and (sizes.n % _STEP or sizes.k % _STEP):
        return f"takes hidden and intermediate sizes that are multiples of {_STEP}; this call has {sizes.n}, {sizes.k}"
    return None


def _large(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    return None if spec.form is Form.MOE else trtllm_ops.too_large(sizes)


def _copied(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    if spec.form is not Form.MOE:
        return trtllm_ops.costs(sizes)
    cost = torch.Size(sizes.a_shape).numel() * spec.b_dtype.itemsize / 2**20
    return f"copies w_gate_up, {cost:.3g} MiB a call: it wants up before gate, contiguous along the summed dimension"


class TensorrtLlmGemm:
    """The GEMM backend `tensorrt_llm`: layers through FlashInfer, e4m3 products through ``torch.ops.trtllm``."""

    name = "tensorrt_llm"
    capability = GemmCapability(
        platforms=frozenset({"cuda"}),
        # What FlashInfer 0.7.2 generates its module for, of the GPUs with 16-bit products.
        compute_capabilities=frozenset({(8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}),
        dtypes=frozenset({torch.float16, torch.bfloat16, trtllm_ops.E4M3}),
        out_dtypes=frozenset({torch.bfloat16}),
        forms=frozenset({Form.DENSE, Form.MOE}),
        scalings=frozenset({UNSCALED, trtllm_ops.BLOCKS}),
        activations=frozenset({"silu"}),
        features=Feature.BIAS | Feature.DETERMINISTIC,
        # nvcc over a layer's kernels: minutes; not timed here. Products may compile too, but only on sm_90.
        first_call_seconds=300.0,
        rules=(Rule("kinds", _kinds), Rule("library", _half)),
        guards=(Guard("aligned", _aligned), Guard("sizes", _large)),
        size_notes=(Guard("copied", _copied),),
    )

    def version(self) -> str | None:
        """Return the version of FlashInfer, or of TensorRT-LLM where that alone is installed."""
        return installed_version(LIBRARY) or trtllm_ops.version()

    def unavailable_reason(self) -> Reason | None:
        """Say why neither half can be called. Imports FlashInfer where that has to answer, TensorRT-LLM never."""
        operator = trtllm_ops.operator()
        if not isinstance(operator, Reason):
            return None
        layers = _layers()
        if layers is None:
            return None
        absent = ("not_installed", "not_imported")
        telling = next((reason for reason in (layers, operator) if reason.code not in absent), layers)
        return Reason(telling.code, f"{layers.text}; {operator.text}")

    def bind(self, spec: GemmSpec, device: Device) -> Any:
        """Return the layer over FlashInfer, or the product over the registered operator."""
        if spec.form is Form.MOE:
            return TensorrtLlmMoe(require(self.name, look_up(LIBRARY))[_MOE], spec)
        operator = trtllm_ops.operator()
        if isinstance(operator, Reason):
            raise BackendUnavailableError(f"{self.name} cannot be bound", {self.name: (operator,)})
        return trtllm_ops.TrtllmProduct(operator, device)


class TensorrtLlmMoe:
    """Layers of one kind of call."""

    def __init__(self, fused_moe: object, spec: GemmSpec) -> None:
        self._call = fused_moe
        self._repeats = Feature.DETERMINISTIC in spec.features

    def forward(self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, args: MoeArgs) -> Tensor:
        """Return the layer's output."""
        experts, inner = w_down.shape[:2]
        ids = args.topk_ids
        nobody = (ids < 0) | (ids >= experts)
        bias = args.bias_gate_up
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._call(  # type: ignore[operator]
            input=x.contiguous(),
            token_selected_experts=ids.masked_fill(nobody, 0).to(torch.int32).contiguous(),
            token_final_scales=args.topk_weights.float().masked_fill(nobody, 0.0).contiguous(),
            fc1_expert_weights=w_gate_up.roll(inner, -1).mT.contiguous(),  # up before gate
            fc2_expert_weights=w_down.mT.contiguous(),
            output_dtype=x.dtype,
            quant_scales=[],
            fc1_expert_biases=None if bias is None else bias.roll(inner, -1).contiguous(),
            fc2_expert_biases=None if args.bias_down is None else args.bias_down.contiguous(),
            output=out,
            use_fused_finalize=not self._repeats,
        )
        return out


BACKEND = TensorrtLlmGemm()
