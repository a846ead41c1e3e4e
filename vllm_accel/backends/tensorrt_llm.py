"""The TensorRT-LLM kernels that FlashInfer carries: XQA (compiled at first use) and trtllm-gen (downloaded binaries).

Both read lengths and block tables on the device and need no plan. Which GPU runs which, read in flashinfer 0.7.2
(flashinfer/decode.py, xqa.py, jit/xqa.py, jit/attention/modules.py, mla/_core.py): sm_90 and sm_12x run XQA, for one
query token each; sm_100 and sm_103 run trtllm-gen; sm_120 and sm_121 alone run XQA for multi-head latent attention.
``trtllm_fmha_v2_prefill`` is not used: it wants K and V in one allocation, the values at a block-aligned distance.
"""

from __future__ import annotations

import torch

from vllm_accel.backends import flash_attn_rules
from vllm_accel.backends.flashinfer import SCALED_LSE, no_compiler
from vllm_accel.backends.library import Function, Library, installed_version, look_up, require
from vllm_accel.dispatch.backend import PagedKernel
from vllm_accel.dispatch.capability import Capability, Note, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.errors import Reason

_TABLES = ("query", "workspace_buffer", "block_tables", "seq_lens", "bmm1_scale", "bmm2_scale")
_PAGED = (*_TABLES, "kv_cache", "window_left", "kv_layout", "out")
_DECODE, _CONTEXT = "trtllm_batch_decode_with_kv_cache", "trtllm_batch_context_with_kv_cache"
_XQA, _MLA = "xqa_batch_decode_with_kv_cache", "trtllm_batch_decode_with_kv_cache_mla"
_LENGTHS = ("cum_seq_lens_q", "cum_seq_lens_kv", "max_q_len", "max_kv_len", "batch_size")
_RANKS = ("qk_nope_head_dim", "kv_lora_rank", "qk_rope_head_dim")

LIBRARY = Library(
    label="FlashInfer (TensorRT-LLM kernels)",
    functions=(
        Function("flashinfer.decode", _XQA, (*_PAGED, "sinks", "max_seq_len")),
        Function("flashinfer.decode", _DECODE, (*_PAGED, "backend", "return_lse", "max_seq_len")),
        Function("flashinfer.prefill", _CONTEXT, (*_PAGED, *_LENGTHS, "causal", "return_lse")),
        Function("flashinfer.mla", _MLA, (*_TABLES, *_RANKS, "kv_cache", "backend", "return_lse", "return_lse_base")),
    ),
    versions=">=0.7.2,<0.8",
    version_modules=("flashinfer",),
    distributions=("flashinfer-python",),
    absent_hint="pip install flashinfer-python",
)

#: GPUs whose attention runs from trtllm-gen's binaries; the others of the list compile XQA.
GEN = frozenset({(10, 0), (10, 3)})


def runs_gen(device: Device) -> bool:
    """Tell whether a GPU runs trtllm-gen, and XQA otherwise."""
    return device.compute_capability in GEN


def _paged_only(spec: AttentionSpec, device: Device) -> str | None:
    return None if Feature.PAGED in spec.features else "attends to paged caches only"


def _xqa(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.PAGED not in spec.features or Feature.MLA in spec.features or runs_gen(device):
        return None
    if spec.seqlen_q > 1:
        return f"XQA takes one query token for each sequence; this call has up to {spec.seqlen_q}"
    if Feature.LSE in spec.features:
        return "XQA returns no log-sum-exp"
    if spec.block_size not in (16, 32, 64, 128):
        return f"XQA takes blocks of 16, 32, 64 or 128 tokens; this cache has blocks of {spec.block_size}"
    if spec.head_dim != spec.head_dim_v or spec.head_dim % 16 or spec.head_dim > 256:
        return (
            f"XQA takes one head size, a multiple of 16 up to 256; this call has {spec.head_dim} and {spec.head_dim_v}"
        )
    if (group := spec.num_heads // spec.num_kv_heads) > 32:
        return f"XQA takes up to 32 query heads for each key head; this call has {group}"
    if spec.kv_dtype.itemsize == 1 and device.compute_capability == (9, 0):
        return "XQA computes in FP8 over an FP8 cache on sm_90, past the error that this library allows"
    return None


def _gen(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.PAGED not in spec.features or not runs_gen(device):
        return None
    if Feature.FINITE_TAIL not in spec.features:
        return "trtllm-gen loads whole blocks: needs finite_tail=True or a PagedKVCache"
    if Feature.MLA in spec.features:
        return None
    if spec.block_size not in (16, 32, 64):
        return f"trtllm-gen takes blocks of 16, 32 or 64 tokens; this cache has blocks of {spec.block_size}"
    if spec.head_dim != spec.head_dim_v or spec.head_dim not in (64, 128):
        return f"trtllm-gen takes one head size of 64 or 128; this call has {spec.head_dim} and {spec.head_dim_v}"
    if spec.seqlen_q == 1:
        return None
    if Feature.CAUSAL not in spec.features and spec.features & (Feature.WINDOW_LEFT | Feature.WINDOW_RIGHT):
        return "trtllm-gen takes windows for several query tokens with causal=True only"
    return None


def _mla(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.MLA not in spec.features:
        return None
    if device.compute_capability == (9, 0):
        return "has no multi-head latent attention for sm_90"
    if (spec.head_dim, spec.head_dim_v) != (576, 512):
        return f"takes MLA with head sizes 576 and 512; this call has {spec.head_dim} and {spec.head_dim_v}"
    if Feature.FINITE_TAIL not in spec.features:
        return "loads whole blocks with MLA: needs finite_tail=True or a PagedKVCache"
    if spec.features & (Feature.WINDOW_LEFT | Feature.WINDOW_RIGHT):
        return "takes no window with MLA"
    if spec.block_size not in (32, 64):
        return f"takes MLA blocks of 32 or 64 tokens; this cache has blocks of {spec.block_size}"
    if spec.seqlen_q > 8:
        return f"takes MLA with up to 8 query tokens for each sequence; this call has up to {spec.seqlen_q}"
    if spec.dtype is not torch.bfloat16 or spec.kv_dtype is not torch.bfloat16:
        return "takes MLA in bfloat16 only"
    if runs_gen(device):
        return None
    if spec.num_heads != 128:
        return f"XQA takes MLA with 128 heads; this call has {spec.num_heads}"
    if spec.features & (Feature.LSE | Feature.SINKS):
        return "XQA returns no log-sum-exp, which sinks need too"
    return None


class TensorRtLlmBackend:
    """The backend `tensorrt_llm`."""

    name = "tensorrt_llm"
    capability = Capability(
        platforms=frozenset({"cuda"}),
        compute_capabilities=frozenset({(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}),
        dtypes=flash_attn_rules.DTYPES,
        kv_dtypes=frozenset({torch.float8_e4m3fn}),
        features=Feature.PAGED
        | Feature.MLA
        | Feature.LSE
        | Feature.CAUSAL
        | Feature.WINDOW_LEFT
        | Feature.WINDOW_RIGHT
        | Feature.SCALE
        | Feature.SINKS
        | Feature.K_DESCALE
        | Feature.V_DESCALE
        | Feature.GQA
        | Feature.VALUE_DIM,
        min_cuda=(12, 3),  # nvcc's first with sm_90a as FlashInfer builds it
        # nvcc builds one large file for each kind of call, or binaries are downloaded (estimated, not measured).
        first_call_seconds=60.0,
        rules=(
            Rule("paged_only", _paged_only),
            Rule("xqa", _xqa),
            Rule("trtllm_gen", _gen),
            Rule("mla", _mla),
            SCALED_LSE,
        ),
        notes=(
            flash_attn_rules.PAGED_ALIGNED,
            Note(Feature.PAGED | Feature.K_DESCALE, "multiplies q by k_descale and rounds it once more"),
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
        from vllm_accel.backends import tensorrt_llm_paged as paged

        found = require(self.name, look_up(LIBRARY))
        if Feature.MLA in spec.features:
            return paged.Mla(found[_MLA], "trtllm-gen" if runs_gen(device) else "xqa")
        if runs_gen(device):
            return paged.TrtllmGen(found[_DECODE], found[_CONTEXT])
        return paged.Xqa(found[_XQA])


BACKEND = TensorRtLlmBackend()
