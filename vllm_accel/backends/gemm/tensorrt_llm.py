"""TensorRT-LLM's fused mixture of experts on CUTLASS, as FlashInfer carries it: the whole layer, 16-bit.

Conventions, read in flashinfer 0.7.2 (fused_moe/core.py; data/csrc/fused_moe/cutlass_backend: the checks of
flashinfer_cutlass_fused_moe_binding.cu, doGatedActivation of cutlass_fused_moe_kernels.cuh): weights are (E, 2I, D) and
(E, D, I), contiguous, with up before gate; ids int32, factors fp32; D and I are multiples of 8. The kernel is compiled
at the first call. The default epilogue adds with atomics, so the other one is asked for where bits have to repeat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_accel.backends.flashinfer import no_compiler
from vllm_accel.backends.library import Function, Library, installed_version, look_up, require
from vllm_accel.dispatch.backend import MoeArgs
from vllm_accel.dispatch.capability import Guard
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_capability import GemmCapability
from vllm_accel.dispatch.gemm_spec import Form, GemmSizes, GemmSpec
from vllm_accel.dispatch.spec import Feature
from vllm_accel.errors import Reason

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


def _aligned(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    if sizes.n % _STEP or sizes.k % _STEP:
        return f"takes hidden and intermediate sizes that are multiples of {_STEP}; this call has {sizes.n}, {sizes.k}"
    return None


def _copied(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    cost = torch.Size(sizes.a_shape).numel() * spec.b_dtype.itemsize / 2**20
    return f"copies w_gate_up, {cost:.3g} MiB a call: it wants up before gate, contiguous along the summed dimension"


class TensorrtLlmGemm:
    """The GEMM backend `tensorrt_llm`."""

    name = "tensorrt_llm"
    capability = GemmCapability(
        platforms=frozenset({"cuda"}),
        # What FlashInfer 0.7.2 generates its module for, of the GPUs with 16-bit products.
        compute_capabilities=frozenset({(8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        forms=frozenset({Form.MOE}),
        activations=frozenset({"silu"}),
        features=Feature.BIAS | Feature.DETERMINISTIC,
        first_call_seconds=300.0,  # nvcc over TensorRT-LLM's kernels: minutes; not timed here
        guards=(Guard("aligned", _aligned),),
        size_notes=(Guard("copied", _copied),),
    )

    def version(self) -> str | None:
        """Return the version of FlashInfer."""
        return installed_version(LIBRARY)

    def unavailable_reason(self) -> Reason | None:
        """Say why its function cannot be called. Imports it and compiles nothing."""
        found = look_up(LIBRARY)
        return found if isinstance(found, Reason) else no_compiler()

    def bind(self, spec: GemmSpec, device: Device) -> TensorrtLlmMoe:
        """Return the layer over the installed library."""
        return TensorrtLlmMoe(require(self.name, look_up(LIBRARY))[_MOE], spec)


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
