"""PyTorch's memory-efficient kernel: ``aten::_efficient_attention_forward`` and its backward, called directly.

It runs from V100 on, in fp32 too, and takes biases with gradients. Conventions, read in pytorch's
aten/src/ATen/native/transformers/cuda/attention.cu and attention_backward.cu: (B, S, H, D), packed as (1, T, H, D);
custom_mask_type 0 none, 1 causal top-left, 2 causal bottom-right; a window of W keys includes the diagonal and exists
with a causal mask alone; the backward kernel measures it from the top-left diagonal even under a bottom-right mask
(kernel_backward.h), so it is wrong wherever lengths differ; seed and offset of dropout are host tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends import aten
from vllm_accel.backends.cutlass_kernel import Call, CutlassKernel, Grads
from vllm_accel.backends.flash_attn_rules import GRID_HEADS, MAX_GRID
from vllm_accel.backends.gather import serve_paged, with_gather
from vllm_accel.dispatch.backend import TorchBackend
from vllm_accel.dispatch.capability import Capability, Guard, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation

_NO_MASK, _TOP_LEFT, _BOTTOM_RIGHT = 0, 1, 2

#: Strides are 32-bit in the kernel (ASSIGN_CHECK_OVERFLOW in attention.cu raises beyond).
_MAX_STRIDE = 2**31 - 1


def _bfloat16(spec: AttentionSpec, device: Device) -> str | None:
    cc = device.compute_capability
    if spec.dtype is torch.bfloat16 and cc is not None and cc < (8, 0):
        return f"takes bfloat16 from sm_80 on; {device.arch} has no bfloat16 kernels"
    return None


def _window_causal(spec: AttentionSpec, device: Device) -> str | None:
    sides = Feature.WINDOW_LEFT | Feature.WINDOW_RIGHT
    if spec.features & sides and Feature.CAUSAL not in spec.features:
        return "does windows with causal=True only"
    return None


def _window_backward(spec: AttentionSpec, device: Device) -> str | None:
    both = Feature.WINDOW_LEFT | Feature.GRAD
    if both & spec.features != both or spec.relation is Relation.EQUAL:
        return None
    if spec.relation is Relation.LONGER:
        return None  # causal: only the square at the bottom right sees keys, and that is all the kernel gets
    return (
        "its backward measures a window from the first key, which is right for equal lengths alone; this call has "
        f"{spec.relation.value}"
    )


def _batch(spec: AttentionSpec, sizes: Any) -> str | None:
    # A packed causal call of free lengths gives the kernel every sequence in two parts.
    split = Feature.VARLEN in spec.features and spec.relation is not Relation.EQUAL
    limit = MAX_GRID // 2 if split else MAX_GRID
    return f"up to {limit} sequences; this call has {sizes.batch}" if sizes.batch > limit else None


def _bias_rows(spec: AttentionSpec, sizes: Any) -> str | None:
    shape = sizes.bias_shape
    if not shape:
        return None
    if shape[3] == 1 < sizes.seqlen_k:
        return f"attn_bias {tuple(shape)} would have to be written out over {sizes.seqlen_k} keys"
    if Feature.BIAS_GRAD not in spec.features:
        return None
    if shape[2] == 1 < sizes.seqlen_q:
        return f"the gradient of attn_bias {tuple(shape)} would be written out over {sizes.seqlen_q} queries"
    shared = shape[0] == 1 < sizes.batch or shape[1] == 1 < spec.num_heads
    if shared and Feature.DROPOUT in spec.features:
        return "the gradient of a shared attn_bias is taken part by part, which changes the dropout mask"
    return None


def _strides(spec: AttentionSpec, sizes: Any) -> str | None:
    longest = max(sizes.seqlen_q, sizes.seqlen_k) * spec.num_heads * max(spec.head_dim, spec.head_dim_v)
    if (shape := sizes.bias_shape) and shape[0] > 1:
        longest = max(longest, shape[1] * shape[2] * shape[3])
    return f"strides up to {_MAX_STRIDE}; this call has {longest}" if longest > _MAX_STRIDE else None


BFLOAT16 = Rule("bfloat16", _bfloat16)

#: The kernel limits the keys before the diagonal of a causal mask, and nothing else.
WINDOW_CAUSAL = Rule("window", _window_causal)

#: No bias that would have to be written out, no gradient that would be larger than its bias.
BIAS_ROWS = Guard("bias_rows", _bias_rows)
GRID_BATCH = Guard("grid_batch", _batch)
STRIDES = Guard("strides", _strides)


class SdpaEfficientBackend(TorchBackend):
    """The backend `sdpa_efficient`."""

    name = "sdpa_efficient"
    capability = with_gather(
        Capability(
            platforms=frozenset({"cuda"}),
            # sdp_utils.cpp takes sm_50 to sm_121; these are the chips that torch's binaries are built for, and CARRIED
            # asks the very build.
            compute_capabilities=frozenset({(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}),
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
            | Feature.BIAS_GRAD
            | Feature.SINKS
            | Feature.SINKS_GRAD
            | Feature.DROPOUT
            | Feature.DETERMINISTIC
            | Feature.BATCH_INVARIANT
            | Feature.GQA
            | Feature.VALUE_DIM,
            rules=(
                aten.CARRIED,
                BFLOAT16,
                WINDOW_CAUSAL,
                Rule("window_backward", _window_backward),
                GRID_HEADS,
            ),
            guards=(GRID_BATCH, BIAS_ROWS, STRIDES),
        )
    )

    @serve_paged
    def bind(self, spec: AttentionSpec, device: Device) -> CutlassKernel:
        """Return the kernel over aten's operators."""
        return CutlassKernel(AtenLaunch(), spec)


class AtenLaunch:
    """The two operators, by keyword; their options exist since torch 2.4."""

    def __init__(self) -> None:
        self._forward = aten.operator("_efficient_attention_forward")
        self._backward = aten.operator("_efficient_attention_backward")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return out, lse padded to a multiple of 32, and (seed, offset) with dropout."""
        packed = call.packed
        out, lse, seed, offset, *_ = self._forward(
            query=q,
            key=k,
            value=v,
            bias=call.bias,
            cu_seqlens_q=None if packed is None else packed.cu_seqlens_q,
            cu_seqlens_k=None if packed is None else packed.cu_seqlens_k,
            max_seqlen_q=None if packed is None else packed.max_seqlen_q,
            max_seqlen_k=None if packed is None else packed.max_seqlen_k,
            dropout_p=call.dropout_p,
            custom_mask_type=_mask_type(call),
            compute_log_sumexp=call.need_lse,
            scale=call.softmax_scale,
            **_window(call),
        )
        # On the host, as aten wants them back; on the device while a CUDA graph is captured.
        return out, lse, torch.stack((seed.view(()), offset.view(()))) if call.dropout_p else None

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor | None, dout: Tensor, call: Call,
        bias_grad: bool,
    ) -> Grads:  # fmt: skip
        """Return the gradients."""
        packed = call.packed
        seed, offset = _seed_and_offset(rng)
        # One pass over the keys sums dq in a fixed order. Packed calls need it for another reason: with several, a
        # sequence without queries makes getQueryStartShift in kernel_backward.h divide by zero.
        one_pass = call.reproducible or (packed is not None and not call.square)
        dq, dk, dv, dbias = self._backward(
            grad_out_=dout,
            query=q,
            key=k,
            value=v,
            bias=call.bias,
            out=out,
            cu_seqlens_q=None if packed is None else packed.cu_seqlens_q,
            cu_seqlens_k=None if packed is None else packed.cu_seqlens_k,
            max_seqlen_q=q.shape[1] if packed is None else packed.max_seqlen_q,
            max_seqlen_k=k.shape[1] if packed is None else packed.max_seqlen_k,
            logsumexp=lse,
            dropout_p=call.dropout_p,
            philox_seed=seed,
            philox_offset=offset,
            custom_mask_type=_mask_type(call),
            bias_requires_grad=bias_grad,
            scale=call.softmax_scale,
            num_splits_key=1 if one_pass else None,
            **_window(call),
        )
        return dq, dk, dv, dbias if bias_grad else None


def _mask_type(call: Call) -> int:
    if not call.causal:
        return _NO_MASK
    return _TOP_LEFT if call.square else _BOTTOM_RIGHT


def _window(call: Call) -> dict[str, int]:
    return {"window_size": call.window} if call.window else {}


def _seed_and_offset(rng: Tensor | None) -> tuple[Tensor, Tensor]:
    if rng is None:
        unused = torch.empty((), dtype=torch.int64)  # not read without dropout
        return unused, unused
    if rng.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        rng = rng.cpu()  # aten reads both through host pointers
    return rng[0], rng[1]


BACKEND = SdpaEfficientBackend()
