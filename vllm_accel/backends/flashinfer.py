"""FlashInfer: few query tokens over a paged cache with its FlashAttention 2 template, compiled at first use (nvcc).

What is not here, and why. Prefill of packed sequences: ``plan`` wants every query length on the host, which costs a
synchronisation at each call. Dense calls: what it offers there, flash_attn and sdpa offer with gradients. Multi-head
latent attention: its plan holds each sequence's key length. The TensorRT-LLM kernels that it carries take lengths on
the device and are the backend `tensorrt_llm`. Read in flashinfer 0.7.2 (flashinfer/prefill.py and the sources in
flashinfer/data).
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from vllm_accel.backends import flash_attn_rules
from vllm_accel.backends.library import Function, Library, installed_version, look_up, require
from vllm_accel.dispatch.backend import PagedKernel
from vllm_accel.dispatch.capability import Capability, Note, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.errors import Reason

_WRAPPER = "BatchPrefillWithPagedKVCacheWrapper"
_BUFFERS = (
    "float_workspace_buffer", "kv_layout", "use_cuda_graph", "qo_indptr_buf", "paged_kv_indptr_buf",
    "paged_kv_indices_buf", "paged_kv_last_page_len_buf", "backend",
)  # fmt: skip
_PLAN = (
    "qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "num_qo_heads", "num_kv_heads",
    "head_dim_qk", "page_size", "causal", "sm_scale", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type",
    "o_data_type",
)  # fmt: skip
_RUN = ("q", "paged_kv_cache", "out", "return_lse", "lse_base", "lse_layout")

LIBRARY = Library(
    label="FlashInfer",
    functions=(
        Function("flashinfer", f"{_WRAPPER}", _BUFFERS),
        Function("flashinfer", f"{_WRAPPER}.plan", ("self", *_PLAN)),
        Function("flashinfer", f"{_WRAPPER}.run", ("self", *_RUN)),
    ),
    # Not older: the kernels of earlier releases write finite numbers for minus infinity (include/flashinfer/math.cuh).
    versions=">=0.7.2,<0.8",
    version_modules=("flashinfer",),
    distributions=("flashinfer-python",),
    absent_hint="pip install flashinfer-python",
)

#: Most query tokens of a sequence; each is attended for on its own, so keys are read once for each.
MAX_QUERIES = 8


def no_compiler() -> Reason | None:
    """Say that nothing can build the kernels of this GPU machine: neither nvcc nor the package of built ones."""
    if not torch.cuda.is_available() or importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if shutil.which("nvcc") or os.path.exists(os.path.join(home, "bin", "nvcc")):
        return None
    text = "FlashInfer compiles its kernels at first use, and there is no nvcc; or install flashinfer-jit-cache"
    return Reason("no_compiler", text)


def _paged_only(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.PAGED in spec.features:
        return None
    return "is used for paged caches; dense and packed calls have other backends with the same kernels"


def _queries(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.PAGED not in spec.features:
        return None
    if spec.seqlen_q > MAX_QUERIES:
        return (
            f"takes up to {MAX_QUERIES} query tokens for each sequence, since planning for more needs their numbers on "
            f"the host; this call has up to {spec.seqlen_q}"
        )
    if spec.seqlen_q > 1 and Feature.WINDOW_LEFT in spec.features and Feature.CAUSAL not in spec.features:
        return "takes a left window for several query tokens with causal=True only"
    return None


def _lse(spec: AttentionSpec, device: Device) -> str | None:
    both = Feature.K_DESCALE | Feature.LSE
    if both & spec.features != both:
        return None
    return "multiplies q by k_descale in q's 16 bits, too coarse for the log-sum-exp; leave out return_lse or k_descale"


#: A factor of the keys reaches these kernels as one number on the host, so it goes into q.
SCALED_LSE = Rule("k_descale_lse", _lse)


def _sizes(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.PAGED not in spec.features or (spec.head_dim == spec.head_dim_v and spec.head_dim in (64, 128, 256)):
        return None
    return f"over a paged cache takes one head size of 64, 128 or 256; this call has {spec.head_dim}/{spec.head_dim_v}"


class FlashInferBackend:
    """The backend `flashinfer`."""

    name = "flashinfer"
    capability = Capability(
        platforms=frozenset({"cuda"}),
        # jit/attention/modules.py builds the FlashAttention 2 template for every GPU from sm_80 that it knows.
        compute_capabilities=frozenset({(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}),
        dtypes=flash_attn_rules.DTYPES,
        kv_dtypes=frozenset({torch.float8_e4m3fn, torch.float8_e5m2}),
        features=Feature.PAGED
        | Feature.LSE
        | Feature.CAUSAL
        | Feature.WINDOW_LEFT
        | Feature.WINDOW_RIGHT
        | Feature.SCALE
        | Feature.SOFTCAP
        | Feature.SINKS
        | Feature.K_DESCALE
        | Feature.V_DESCALE
        | Feature.DETERMINISTIC
        | Feature.GQA,
        min_cuda=(12, 0),
        # nvcc builds about a dozen files for each kind of call; minutes on few cores (estimated from their number).
        first_call_seconds=60.0,
        rules=(Rule("paged_only", _paged_only), Rule("queries", _queries), Rule("head_dim", _sizes), SCALED_LSE),
        notes=(
            flash_attn_rules.PAGED_ALIGNED,
            Note(Feature.PAGED, "divides the work as if every sequence had the maximum length, which the host knows"),
        ),
    )

    def version(self) -> str | None:
        """Return the version of FlashInfer."""
        return installed_version(LIBRARY)

    def unavailable_reason(self) -> Reason | None:
        """Say why its functions cannot be called. Imports them and compiles nothing."""
        found = look_up(LIBRARY)
        return found if isinstance(found, Reason) else no_compiler()

    def bind(self, spec: AttentionSpec, device: Device) -> PagedKernel:
        """Return the kernel over the installed library."""
        from vllm_accel.backends.flashinfer_paged import FlashInferPaged

        return FlashInferPaged(require(self.name, look_up(LIBRARY))[_WRAPPER])


BACKEND = FlashInferBackend()
