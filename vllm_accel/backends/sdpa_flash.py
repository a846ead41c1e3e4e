"""PyTorch's FlashAttention 2: ``aten::_flash_attention_forward`` and its backward, called directly.

Unlike F.scaled_dot_product_attention they take (B, S, H, D), packed sequences and windows, and align
causal bottom-right; and they check next to nothing. (Slopes are in the schema and not in torch's builds:
"This flash attention build does not support alibi", torch 2.11 on an H200, 2026-11-23.) Conventions, read in pytorch's
aten/src/ATen/native/transformers/cuda/attention.cu, attention_backward.cu, flash_attn/flash_api.cpp and sdp_utils.cpp:
+inf in rows without keys; reproducible gradients only under the process-wide
torch.use_deterministic_algorithms; on AMD another kernel with the same name and less in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends import aten
from vllm_accel.backends import flash_attn_rules as rules
from vllm_accel.backends.convert import empty_rows_to_minus_inf
from vllm_accel.backends.flash_kernel import FlashCall, FlashKernel
from vllm_accel.backends.gather import COPY, serve_paged, with_gather
from vllm_accel.backends.sdpa_flash_paged import SdpaFlashPaged, reads_blocks
from vllm_accel.dispatch.backend import AttentionArgs, PagedKernel, TorchBackend
from vllm_accel.dispatch.capability import Capability, Rule
from vllm_accel.dispatch.device import KIB, Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation, feature_names
from vllm_accel.errors import Reason

#: What is used of the kernels on AMD: what scaled_dot_product_attention itself asks of them. None of it ran here.
_ROCM = Feature.GRAD | Feature.CAUSAL | Feature.SCALE | Feature.GQA


#: What needs more than one call of the operator.
_CONVERTED = (
    Feature.VARLEN
    | Feature.WINDOW_LEFT
    | Feature.WINDOW_RIGHT
    | Feature.ALIBI
    | Feature.SINKS
    | Feature.DROPOUT
    | Feature.VALUE_DIM
)


def _rocm(spec: AttentionSpec, device: Device) -> str | None:
    if device.platform != "rocm":
        return None
    if more := spec.features & ~_ROCM:
        return f"on AMD plain, causal and grouped dense calls only; this call has {', '.join(feature_names(more))}"
    if Feature.CAUSAL in spec.features and spec.relation is not Relation.EQUAL and spec.seqlen_q > 1:
        return f"on AMD causal with equal lengths or one query only; this call has {spec.relation.value}"
    return None


def _dropout(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.DROPOUT in spec.features and "rng_state" not in aten.parameters("_flash_attention_backward"):
        return f"torch {torch.__version__} keeps the state of dropout another way than this adapter knows"
    return None


def _deterministic(spec: AttentionSpec, device: Device) -> str | None:
    both = Feature.DETERMINISTIC | Feature.GRAD
    if both & spec.features != both:
        return None
    return (
        "its gradients are reproducible only under torch.use_deterministic_algorithms, which is for the whole process"
    )


def small_memory(device: Device) -> bool:
    """Tell whether a chip is one of those whose backward lacks head sizes 193 to 224 (sdp_utils.cpp)."""
    known = device.shared_memory_per_block
    return known < 144 * KIB if known else device.compute_capability in {(8, 6), (8, 9), (12, 0)}


class SdpaFlashBackend(TorchBackend):
    """The backend `sdpa_flash`."""

    name = "sdpa_flash"
    capability = with_gather(
        Capability(
            platforms=frozenset({"cuda", "rocm"}),
            compute_capabilities=frozenset({(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}),
            archs=frozenset({"gfx90a", "gfx942"}),
            dtypes=rules.DTYPES,
            features=Feature.VARLEN
            | Feature.GRAD
            | Feature.LSE
            | Feature.LSE_GRAD
            | Feature.CAUSAL
            | Feature.WINDOW_LEFT
            | Feature.WINDOW_RIGHT
            | Feature.SCALE
            | Feature.SINKS
            | Feature.SINKS_GRAD
            | Feature.DROPOUT
            | Feature.DETERMINISTIC
            | Feature.GQA
            | Feature.VALUE_DIM,
            max_head_dim=rules.MAX_HEAD_DIM,
            rules=(
                aten.CARRIED,
                Rule("rocm", _rocm),
                Rule("dropout_schema", _dropout),
                Rule("deterministic_backward", _deterministic),
                rules.DROPOUT_BACKWARD,
                rules.DLSE_COLUMN,
                rules.GRID_HEADS,
            ),
            guards=(rules.GRID_BATCH,),
        ),
        f"{COPY}, but for blocks of a multiple of 256 tokens where torch's operator takes a block table (2.13 does)",
    )

    def unavailable_reason(self) -> Reason | None:
        """Say that this build of torch has no flash kernels (as on Windows at times)."""
        return aten.not_built(
            "FlashAttention kernels", getattr(torch.backends.cuda, "is_flash_attention_available", None)
        )

    def bind(self, spec: AttentionSpec, device: Device) -> FlashKernel | PagedKernel:
        """Return the kernel over aten's operators, with copies of a paged cache where they do not read its blocks."""
        if Feature.PAGED in spec.features and reads_blocks(spec, device):
            return SdpaFlashPaged()
        kernel: FlashKernel | PagedKernel = self._packed(spec, device)
        return kernel

    @serve_paged
    def _packed(self, spec: AttentionSpec, device: Device) -> FlashKernel:
        """Return the kernel of dense and packed calls; a short way forward where one call of the operator does it."""
        launch = AtenFlash(device.platform == "rocm")
        if spec.features & _CONVERTED or spec.head_dim % 8:
            return FlashKernel(launch, small_memory(device))
        return DirectSdpaFlash(launch, small_memory(device), spec)


class AtenFlash:
    """The two operators, by keyword."""

    def __init__(self, rocm: bool) -> None:
        self._forward = aten.operator("_flash_attention_forward")
        self._backward = aten.operator("_flash_attention_backward")
        # torch 2.4 to 2.6 call the last two tensors otherwise.
        names = aten.parameters("_flash_attention_backward")
        self._rng_names = ("rng_state", "unused") if "rng_state" in names else ("philox_seed", "philox_offset")
        self._rng_dtype = torch.int64 if rocm else torch.uint64

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: FlashCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return out, lse and the state of the random generator with dropout."""
        out, lse, rng, *_ = self._forward(query=q, key=k, value=v, return_debug_mask=False, **_shared(call))
        return out, lse if call.need_lse else None, rng.view(torch.int64) if call.dropout_p else None

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor | None, dout: Tensor,
        call: FlashCall,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return the gradients. GQA is native."""
        if rng is None:
            state = torch.empty((), dtype=self._rng_dtype, device=q.device)  # not read without dropout
        else:
            state = rng.view(self._rng_dtype)
        dq, dk, dv = self._backward(
            grad_out=dout, query=q, key=k, value=v, out=out, logsumexp=lse, **_shared(call),
            **dict.fromkeys(self._rng_names, state),
        )  # fmt: skip
        return dq, dk, dv


class DirectSdpaFlash(FlashKernel):
    """Dense calls of one head size without windows, sinks or dropout: 2 us over the operator, not 12.

    (Contiguous tensors, a stub for the operator, 2-core EPYC, 2026-11-23.)
    """

    def __init__(self, launch: AtenFlash, small_memory: bool, spec: AttentionSpec) -> None:
        super().__init__(launch, small_memory)
        self._operator = aten.operator("_flash_attention_forward")
        # One query at the end sees every key: nothing to mask, and on AMD the mask would be aligned top-left.
        self._causal = Feature.CAUSAL in spec.features and spec.seqlen_q > 1
        self._empty_rows = self._causal and spec.relation is Relation.LONGER

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return out and lse (None unless needed)."""
        out, lse, *_ = self._operator(
            query=aten.ready(q),
            key=aten.ready(k),
            value=aten.ready(v),
            cum_seq_q=None,
            cum_seq_k=None,
            max_q=args.max_seqlen_q,
            max_k=args.max_seqlen_k,
            dropout_p=0.0,
            is_causal=self._causal,
            return_debug_mask=False,
            scale=args.softmax_scale,
        )
        if not args.need_lse:
            return out.contiguous(), None, None
        return out.contiguous(), empty_rows_to_minus_inf(lse) if self._empty_rows else lse, None


def _shared(call: FlashCall) -> dict[str, Any]:
    return {
        "cum_seq_q": call.cu_seqlens_q,
        "cum_seq_k": call.cu_seqlens_k,
        "max_q": call.max_seqlen_q,
        "max_k": call.max_seqlen_k,
        "dropout_p": call.dropout_p,
        "is_causal": call.causal,
        "scale": call.softmax_scale,
        # None and not -1 for no limit: on AMD a number of any kind selects a windowed kernel.
        "window_size_left": None if call.window_left < 0 else call.window_left,
        "window_size_right": None if call.window_right < 0 else call.window_right,
    }


BACKEND = SdpaFlashBackend()
