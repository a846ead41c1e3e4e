"""A stand-in on CPU tensors for xformers.ops.fmha 0.0.35 and mslk.attention.fmha 1.1.0.

Read in xformers/ops/fmha/{__init__, common, dispatch, cutlass, flash}.py (mslk's copies differ only in
``memory_efficient_attention_partial``). Both libraries delegate to PyTorch's kernels, and so does this: ``flash``
(from sm_80) and ``cutlass`` (to sm_90) run :mod:`fakes.aten`, and bring its conventions with them: **the log-sum-exp
depends on the operator chosen**. flash: exact length, packed (1, H, T) for block-diagonal masks, +inf in empty rows;
cutlass: padded to 32 in the last dimension, (sequences, H, ceil32(max)) for block-diagonal masks, 0.0 in empty rows.
Not modelled: FlashAttention 3, triton_splitk, CK, cute, and the check for a CUDA device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fakes import aten
from fakes import xformers_attn_bias as attn_bias
from fakes.xformers_attn_bias import (
    VARLEN_BIASES,
    AttentionBias,
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionMask,
    BlockDiagonalCausalLocalAttentionPaddedKeysMask,
    BlockDiagonalCausalMask,
    BlockDiagonalCausalWithOffsetPaddedKeysMask,
    BlockDiagonalLocalAttentionPaddedKeysMask,
    BlockDiagonalMask,
    BlockDiagonalPaddedKeysMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightLocalAttentionMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    LowerTriangularMaskWithTensorBias,
)

__version__ = "0.0.35"

# The GPU that this stand-in pretends to run on; a test may set it.
COMPUTE_CAPABILITY = (9, 0)


@dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Any = None
    p: float = 0.0
    scale: float | None = None
    output_dtype: torch.dtype | None = None
    is_partial: bool = False

    def validate_inputs(self) -> None:
        """common.py, Inputs.validate_inputs: what raises ValueError before any operator is chosen."""
        q, k, v, bias = self.query, self.key, self.value, self.attn_bias
        if q.ndim not in (3, 4, 5) or not q.ndim == k.ndim == v.ndim:
            raise ValueError("Query/Key/Value should all have BMGHK, BMHK or BMK shape.")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError("Query/Key/Value should all have the same dtype")
        if q.ndim == 3 and not (bias is None or type(bias) in (LowerTriangularMask, Tensor)):
            raise ValueError(f"Please provide inputs in BMHK format when using bias {type(bias).__name__}")
        tensor = _tensor_bias(bias)
        if q.ndim == 4 and tensor is not None:
            expected = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            if tuple(tensor.shape) != expected:
                raise ValueError(f"Invalid shape for attention bias: {tensor.shape} (expected {expected})")
        if isinstance(bias, BlockDiagonalMask) and any(x.shape[0] != 1 for x in (q, k, v)):
            raise ValueError("Expected batch_size=1 when using block-diagonal bias")
        if not 0.0 <= self.p <= 1.0:
            raise ValueError(f"Invalid dropout probability: p={self.p}")
        batch, keys = k.shape[:2]
        heads = q.shape[2:-1]
        shapes = ((batch, q.shape[1], *heads), (batch, keys, *heads), (batch, keys, *heads))
        right = [tuple(x.shape[:-1]) == shape for x, shape in zip((q, k, v), shapes, strict=True)]
        if not all(right) or k.shape[-1] != q.shape[-1]:
            raise ValueError(
                f"Incompatible shapes for attention inputs: {q.shape} {k.shape} {v.shape}\n"
                "HINT: We don't support broadcasting, please use `expand` yourself"
            )

    def normalize_bmhk(self) -> tuple[int, ...]:
        shape = (*self.query.shape[:-1], self.value.shape[-1])
        if self.query.ndim == 3:
            self.query, self.key, self.value = (x.unsqueeze(2) for x in (self.query, self.key, self.value))
            if isinstance(self.attn_bias, Tensor):
                self.attn_bias = self.attn_bias.unsqueeze(1)
        return shape


def _tensor_bias(bias: Any) -> Tensor | None:
    if isinstance(bias, LowerTriangularMaskWithTensorBias):
        return bias._bias
    return bias if isinstance(bias, Tensor) else None


def _common_reasons(op: Any, d: Inputs) -> list[str]:
    """common.py, AttentionOpBase.not_supported_reasons."""
    reasons, dims = [], (d.query.shape[-1], d.value.shape[-1])
    if not op.SUPPORTS_DIFFERENT_VALUE_EMBED and dims[0] != dims[1]:
        reasons.append("query.shape[-1] != value.shape[-1]")
    if max(dims) > op.SUPPORTED_MAX_K:
        reasons.append(f"max(query.shape[-1], value.shape[-1]) > {op.SUPPORTED_MAX_K}")
    if op.CUDA_MINIMUM_COMPUTE_CAPABILITY > COMPUTE_CAPABILITY:
        reasons.append(f"requires device with capability >= {op.CUDA_MINIMUM_COMPUTE_CAPABILITY}")
    if COMPUTE_CAPABILITY > op.CUDA_MAXIMUM_COMPUTE_CAPABILITY:
        reasons.append(f"requires device with capability <= {op.CUDA_MAXIMUM_COMPUTE_CAPABILITY}")
    if d.query.dtype not in op.SUPPORTED_DTYPES:
        reasons.append(f"dtype={d.query.dtype} (supported: {op.SUPPORTED_DTYPES})")
    if type(d.attn_bias) not in op.SUPPORTED_ATTN_BIAS_TYPES:
        reasons.append(f"attn_bias type is {type(d.attn_bias)}")
    if d.output_dtype is not None and d.output_dtype is not d.query.dtype:
        reasons.append("Custom output dtype not supported")
    if d.is_partial and not op.SUPPORTS_PARTIAL:
        reasons.append("Partial attention not supported")
    if d.query.dtype is torch.bfloat16 and COMPUTE_CAPABILITY < (8, 0):
        reasons.append("bf16 is only supported on A100+ GPUs")
    if not op.IS_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
        reasons.append("operator is non-deterministic, but `torch.use_deterministic_algorithms` is set")
    if not op.SUPPORTS_BMGHK and d.query.ndim == 5:
        reasons.append("operator does not support BMGHK format")
    return reasons


def _alignment_reasons(name: str, x: Tensor, alignment: int) -> list[str]:
    reasons = []
    if x.shape[-1] % alignment != 0:
        reasons.append(f"{name}.shape[-1] % {alignment} != 0")
    elif x.stride(-2) % alignment != 0:
        reasons.append(f"{name}.stride(-2) % {alignment} != 0 ({name}.stride() = {x.stride()})")
    if x.stride(-1) > 1:
        reasons.append(f"{name}.stride(-1) > 1 ({name}.stride() = {x.stride()})")
    return reasons


_BLOCK_MASKS = (
    BlockDiagonalMask,
    BlockDiagonalCausalMask,
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionMask,
)
_TRIANGLES = (type(None), LowerTriangularMask, LowerTriangularFromBottomRightMask)


class _Op:
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (5, 0)
    CUDA_MAXIMUM_COMPUTE_CAPABILITY = (99, 0)
    SUPPORTS_DROPOUT = SUPPORTS_CUSTOM_SCALE = IS_DETERMINISTIC = True
    SUPPORTS_DIFFERENT_VALUE_EMBED = SUPPORTS_PARTIAL = SUPPORTS_BMGHK = False

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        return _common_reasons(cls, d)

    @classmethod
    def supports(cls, d: Inputs) -> bool:
        return not cls.not_supported_reasons(d)


def _cutlass_alignment(dtype: torch.dtype) -> int:
    """cutlass.py, _minimum_gemm_alignment."""
    half = dtype.itemsize == 2
    if COMPUTE_CAPABILITY >= (8, 0):
        return 8 if half else 4
    return 8 if half and COMPUTE_CAPABILITY >= (7, 0) else 1


def _bias_reasons(bias: Any) -> list[str]:
    tensor = _tensor_bias(bias)
    if tensor is None:
        return []
    alignment = 16 // tensor.dtype.itemsize
    reasons = [
        f"attn_bias.stride(-2) % {alignment} != 0 (attn_bias.stride() = {tensor.stride()})"
        for d in range(tensor.ndim - 1)
        if tensor.stride(d) % alignment
    ]
    return reasons + (["attn_bias.stride(-1) > 1"] if tensor.stride(-1) > 1 else [])


def _cutlass_arguments(inp: Inputs) -> dict[str, Any]:
    bias, lengths = inp.attn_bias, {}
    packed = isinstance(bias, BlockDiagonalMask | BlockDiagonalCausalWithOffsetPaddedKeysMask)
    lengths["cu_seqlens_q"] = bias.q_seqinfo.seqstart if packed else None
    lengths["cu_seqlens_k"] = bias.k_seqinfo.seqstart if packed else None
    lengths["max_seqlen_q"] = bias.q_seqinfo.max_seqlen if packed else -1
    lengths["max_seqlen_k"] = bias.k_seqinfo.max_seqlen if packed else -1
    top_left = LowerTriangularMask | BlockDiagonalCausalMask
    bottom_right = (
        LowerTriangularFromBottomRightMask | BlockDiagonalCausalFromBottomRightMask
        | BlockDiagonalCausalWithOffsetPaddedKeysMask
    )  # fmt: skip
    kind = 1 if isinstance(bias, top_left) else 2 if isinstance(bias, bottom_right) else 0
    return {
        **lengths, "bias": _tensor_bias(bias), "custom_mask_type": kind, "scale": inp.scale, "dropout_p": inp.p,
        "window_size": getattr(bias, "_window_size", None),
    }  # fmt: skip


class _CutlassFw(_Op):
    NAME = "cutlassF-pt"
    CUDA_MAXIMUM_COMPUTE_CAPABILITY = (9, 0)
    SUPPORTED_DTYPES = {torch.float, torch.half, torch.bfloat16}  # noqa: RUF012
    SUPPORTED_MAX_K = 65536
    SUPPORTS_DIFFERENT_VALUE_EMBED = SUPPORTS_BMGHK = True
    VARLEN_LSE_PACKED = False
    SUPPORTED_ATTN_BIAS_TYPES = (
        *_TRIANGLES, Tensor, LowerTriangularFromBottomRightLocalAttentionMask, LowerTriangularMaskWithTensorBias,
        *_BLOCK_MASKS, BlockDiagonalCausalWithOffsetPaddedKeysMask,
        BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    )  # fmt: skip

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        alignment = _cutlass_alignment(d.query.dtype)
        return [
            *_common_reasons(cls, d), *_alignment_reasons("query", d.query, alignment),
            *_alignment_reasons("value", d.value, alignment), *_bias_reasons(d.attn_bias),
        ]  # fmt: skip

    @classmethod
    def apply(cls, inp: Inputs, needs_gradient: bool) -> tuple[Tensor, Tensor, Any]:
        if inp.query.ndim == 5:  # one call for each group
            parts = []
            for g in range(inp.query.shape[2]):
                bias = inp.attn_bias[:, g] if isinstance(inp.attn_bias, Tensor) else inp.attn_bias
                q, k, v = (x[:, :, g] for x in (inp.query, inp.key, inp.value))
                parts.append(cls.apply(Inputs(q, k, v, bias, inp.p, inp.scale), needs_gradient))
            return torch.stack([x[0] for x in parts], 2), torch.stack([x[1] for x in parts], 1), None
        padded = isinstance(inp.attn_bias, BlockDiagonalCausalWithOffsetPaddedKeysMask)
        out, lse, seed, offset, _, _ = aten._efficient_attention_forward(
            inp.query, inp.key, inp.value, compute_log_sumexp=needs_gradient,
            seqlen_k=inp.attn_bias.k_seqinfo.seqlen if padded else None, **_cutlass_arguments(inp),
        )  # fmt: skip
        return out, lse, (seed, offset)


class _CutlassBw(_Op):
    NAME = "cutlassB-pt"
    CUDA_MAXIMUM_COMPUTE_CAPABILITY = (9, 0)
    SUPPORTED_DTYPES = _CutlassFw.SUPPORTED_DTYPES
    SUPPORTED_MAX_K = 65536
    SUPPORTS_DIFFERENT_VALUE_EMBED = SUPPORTS_PARTIAL = True
    VARLEN_LSE_PACKED = False
    # Not the local bottom-right masks: see _efficient_visible in fakes/aten.py for why.
    SUPPORTED_ATTN_BIAS_TYPES = (*_TRIANGLES, Tensor, *_BLOCK_MASKS)

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        alignment, reasons = _cutlass_alignment(d.query.dtype), _common_reasons(cls, d)
        for name, x in (("query", d.query), ("key", d.key), ("value", d.value)):
            reasons += _alignment_reasons(name, x, alignment)
        return reasons + _bias_reasons(d.attn_bias)

    @classmethod
    def apply(cls, inp: Inputs, grad: Tensor, out: Tensor, lse: Tensor, rng: Any) -> tuple[Tensor | None, ...]:
        arguments = _cutlass_arguments(inp)
        pad = -lse.shape[2] % 32
        lse = torch.nn.functional.pad(lse, [0, pad], value=torch.inf) if pad else lse
        seed, offset = rng if inp.p else (torch.empty(0), torch.empty(0))
        needs_bias = arguments["bias"] is not None and arguments["bias"].requires_grad
        dq, dk, dv, db = aten._efficient_attention_backward(
            grad.to(inp.query.dtype), inp.query, inp.key, inp.value, out=out.to(inp.query.dtype), logsumexp=lse,
            philox_seed=seed, philox_offset=offset, bias_requires_grad=needs_bias, num_splits_key=None, **arguments,
        )  # fmt: skip
        return dq, dk, dv, db if needs_bias else None


def _flash_window(bias: Any) -> tuple[bool, int, int]:
    """flash.py, _is_causal and _window_size."""
    two_sided = LocalAttentionFromBottomRightMask | BlockDiagonalLocalAttentionPaddedKeysMask
    if isinstance(bias, two_sided):
        return False, bias.window_left, bias.window_right
    causal = not (bias is None or type(bias) in (BlockDiagonalMask, BlockDiagonalPaddedKeysMask))
    return causal, getattr(bias, "_window_size", 0) - 1, -1


def _flash_reasons(op: Any, d: Inputs) -> list[str]:
    reasons, bias = _common_reasons(op, d) + _alignment_reasons("query", d.query, 8), d.attn_bias
    if isinstance(bias, BlockDiagonalCausalMask) and bias.k_seqinfo.seqstart_py != bias.q_seqinfo.seqstart_py:
        reasons.append("Only support BlockDiagonalCausalMask if equal numbers of keys and queries")
    if isinstance(bias, LowerTriangularMask) and d.query.shape[1] != d.key.shape[1]:
        reasons.append("Only support LowerTriangularMask if equal number of keys and queries")
    return reasons


def _fold(x: Tensor) -> Tensor:
    """flash.py, _convert_input_format: groups and heads become one dimension, an expanded head just one head."""
    if x.ndim == 5:
        x = x[:, :, :, 0] if x.stride(3) == 0 else x.reshape(*x.shape[:2], -1, x.shape[4])
    return x


class _FlashFw(_Op):
    NAME = "fa2F@2.5.7-pt"
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (8, 0)
    SUPPORTED_DTYPES = {torch.half, torch.bfloat16}  # noqa: RUF012
    SUPPORTED_MAX_K = 256
    SUPPORTS_BMGHK = SUPPORTS_PARTIAL = True
    VARLEN_LSE_PACKED = True
    SUPPORTED_ATTN_BIAS_TYPES = (
        *_TRIANGLES, LowerTriangularFromBottomRightLocalAttentionMask, LocalAttentionFromBottomRightMask,
        *_BLOCK_MASKS, BlockDiagonalCausalLocalAttentionFromBottomRightMask,
        BlockDiagonalCausalLocalAttentionPaddedKeysMask, BlockDiagonalCausalWithOffsetPaddedKeysMask,
        BlockDiagonalPaddedKeysMask,
    )  # fmt: skip

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        return _flash_reasons(cls, d)

    @classmethod
    def apply(cls, inp: Inputs, needs_gradient: bool) -> tuple[Tensor, Tensor, Any]:
        bias, shape = inp.attn_bias, inp.query.shape
        q, k, v = _fold(inp.query), _fold(inp.key), _fold(inp.value)
        if k.stride(2) == 0 and v.stride(2) == 0:
            k, v = k[:, :, :1], v[:, :, :1]
        packed = isinstance(bias, VARLEN_BIASES)
        if not (q.numel() and k.numel()):
            lse_shape = (q.shape[2], q.shape[0] * q.shape[1]) if packed else (q.shape[0], q.shape[2], q.shape[1])
            lse = torch.full(lse_shape, -torch.inf if inp.is_partial else torch.nan)
            out, rng = torch.zeros(*shape[:-1], v.shape[-1], dtype=q.dtype), None
        else:
            causal, left, right = _flash_window(bias)
            arguments: tuple[Any, ...] = (None, None, q.shape[1], k.shape[1])
            used = None
            if packed:
                q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
                q_info, k_info = bias.q_seqinfo, bias.k_seqinfo
                arguments = (q_info.seqstart, k_info.seqstart, q_info.max_seqlen, k_info.max_seqlen)
                used = getattr(k_info, "seqlen", None)
            out, lse, rng, _, _ = aten._flash_attention_forward(
                q, k, v, *arguments, inp.p, causal, return_debug_mask=False, scale=inp.scale,
                window_size_left=left, window_size_right=right, seqused_k=used, alibi_slopes=None,
            )  # fmt: skip
            out = out.reshape(*shape[:-1], v.shape[-1])
        if len(shape) == 5:
            lse = lse.unflatten(0 if packed else 1, shape[2:4])
        return out, lse.unsqueeze(0) if packed else lse, rng


class _FlashBw(_Op):
    NAME = "fa2B@2.5.7-pt"
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (8, 0)
    SUPPORTED_DTYPES = _FlashFw.SUPPORTED_DTYPES
    SUPPORTED_MAX_K = 256
    SUPPORTS_PARTIAL, IS_DETERMINISTIC = True, False
    VARLEN_LSE_PACKED = True
    SUPPORTED_ATTN_BIAS_TYPES = (
        *_TRIANGLES, LowerTriangularFromBottomRightLocalAttentionMask, LocalAttentionFromBottomRightMask,
        *_BLOCK_MASKS, BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    )  # fmt: skip

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        return _flash_reasons(cls, d)

    @classmethod
    def apply(cls, inp: Inputs, grad: Tensor, out: Tensor, lse: Tensor, rng: Any) -> tuple[Tensor | None, ...]:
        bias, tensors = inp.attn_bias, (grad.contiguous(), inp.query, inp.key, inp.value, out)
        causal, left, right = _flash_window(bias)
        if isinstance(bias, VARLEN_BIASES):
            q_info, k_info = bias.q_seqinfo, bias.k_seqinfo
            info = (q_info.seqstart, k_info.seqstart, q_info.max_seqlen, k_info.max_seqlen)
            tensors, lse = tuple(x.reshape(-1, *x.shape[2:]) for x in tensors), lse[0]
        else:
            info = (None, None, inp.query.shape[1], inp.key.shape[1])
            lse = lse[:, :, : inp.query.shape[1]].contiguous()
        grads = aten._flash_attention_backward(
            *tensors, lse, *info, inp.p, causal, rng, rng, scale=inp.scale, window_size_left=left,
            window_size_right=right,
        )  # fmt: skip
        shapes = (inp.query.shape, inp.key.shape, inp.value.shape)
        return *(x.reshape(shape) for x, shape in zip(grads, shapes, strict=True)), None


class cutlass:
    FwOp, BwOp = _CutlassFw, _CutlassBw


class flash:
    FwOp, BwOp = _FlashFw, _FlashBw


def _choose(name: str, ops: tuple[Any, ...], inp: Inputs, op: Any = None) -> Any:
    """dispatch.py: the first operator without a reason; ValueError for one asked for by name."""
    if op is not None:
        reasons = op.not_supported_reasons(inp)
        if reasons:
            raise ValueError(f"Operator `{name}` does not support inputs:\n{op.NAME}: {'; '.join(reasons)}")
        return op
    all_reasons = []
    for candidate in ops:
        reasons = candidate.not_supported_reasons(inp)
        if not reasons:
            return candidate
        all_reasons.append(f"`{candidate.NAME}` is not supported because: {'; '.join(reasons)}")
    raise NotImplementedError(f"No operator found for `{name}` with inputs:\n" + "\n".join(all_reasons))


def _forward(inp: Inputs, op: Any, needs_gradient: bool) -> tuple[Tensor, Tensor, Any, Any]:
    inp.validate_inputs()
    shape = inp.normalize_bmhk()
    chosen = _choose("memory_efficient_attention_forward", (_FlashFw, _CutlassFw), inp, op)
    out, lse, rng = chosen.apply(inp, needs_gradient)
    return out.reshape(shape), lse, rng, chosen


def _lse_packed(lse: Tensor, inp: Inputs) -> bool | None:
    """__init__.py, _detect_lse_packed_or_raise."""
    q = inp.query
    if lse.ndim != q.ndim - 1 or lse.shape[1:-1] != q.shape[2:-1]:
        raise ValueError(f"Input tensors have incompatible shapes: lse {lse.shape}, query {q.shape}")
    sizes = [lse.shape[0], lse.shape[-1]]
    packed = sizes[0] == q.shape[0] and sizes >= [q.shape[0], q.shape[1]]
    if not isinstance(inp.attn_bias, VARLEN_BIASES):
        if not packed:
            raise ValueError(f"Input tensors have incompatible shapes: lse {lse.shape}, query {q.shape}")
        return None
    info = inp.attn_bias.q_seqinfo
    count = info.seqstart.shape[0] - 1
    padded = sizes[0] == count and sizes >= [count, info.max_seqlen]
    if not packed and not padded:
        raise ValueError(f"Input tensors have incompatible shapes: lse {lse.shape}, query {q.shape}")
    return None if packed and padded else packed


def _backward(inp: Inputs, grad: Tensor, out: Tensor, lse: Tensor, rng: Any, op: Any) -> tuple[Tensor | None, ...]:
    inp.validate_inputs()
    if grad.ndim != inp.query.ndim or grad.ndim != out.ndim:
        raise ValueError("All tensors should be either in BMK (ndim=3) or BMHK (ndim=4) format.")
    shapes = [x.shape for x in (inp.query, inp.key, inp.value)]
    bmk = inp.query.ndim == 3
    inp.normalize_bmhk()
    grad, out = (x.unsqueeze(2) if bmk else x for x in (grad, out))
    packed, ops = _lse_packed(lse, inp), (_FlashBw, _CutlassBw)
    if packed is not None:
        ops = tuple(x for x in ops if packed == x.VARLEN_LSE_PACKED)
        if op is not None and op not in ops:
            raise ValueError(f"Wrong LSE format for {op.NAME} in variable seqlen case.")
    chosen = _choose("memory_efficient_attention_backward", ops, inp, op)
    *grads, db = chosen.apply(inp, grad, out, lse, rng)
    return *(x.reshape(shape) for x, shape in zip(grads, shapes, strict=True)), db


class _fMHA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, p: float, scale: float | None):
        out, lse, rng, chosen = _forward(Inputs(q, k, v, bias, p, scale), ops[0], True)
        ctx.save_for_backward(q, k, v, out, lse)
        # With dropout only the same library's backward knows the mask.
        ctx.op = {_FlashFw: _FlashBw, _CutlassFw: _CutlassBw}[chosen] if p else ops[1]
        ctx.rest = (bias, p, scale, rng)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None):
        q, k, v, out, lse = ctx.saved_tensors
        bias, p, scale, rng = ctx.rest
        dq, dk, dv, db = _backward(Inputs(q, k, v, bias, p, scale), grad, out, lse, rng, ctx.op)
        return None, dq, dk, dv, db, None, None


def _refuse_dropout(p: float) -> None:
    if p != 0.0:
        raise NotImplementedError("dropout is not supported on the non-autograd API.")


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    if not any(x.requires_grad for x in (query, key, value)):
        forward_op = op[0] if op is not None else None
        return _forward(Inputs(query, key, value, attn_bias, p, scale, output_dtype), forward_op, False)[0]
    return _fMHA.apply(op or (None, None), query, key, value, attn_bias, p, scale)[0]


def memory_efficient_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return _forward(Inputs(query, key, value, attn_bias, p, scale, output_dtype), op, False)[0]


def memory_efficient_attention_forward_requires_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _refuse_dropout(p)
    return _forward(Inputs(query, key, value, attn_bias, p, scale, output_dtype), op, True)[:2]


def memory_efficient_attention_backward(
    grad: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of a tensor bias is not among the results, whatever was computed."""
    _refuse_dropout(p)
    return _backward(Inputs(query, key, value, attn_bias, p, scale), grad, output, lse, None, op)[:3]


def memory_efficient_attention_partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output is float32 only from operators that can choose it; flash returns the query's dtype."""
    _refuse_dropout(p)
    inp = Inputs(query, key, value, attn_bias, p, scale, output_dtype, is_partial=True)
    return _forward(inp, op[0] if isinstance(op, tuple) else op, True)[:2]


def mslk_memory_efficient_attention_partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
    _allow_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mslk's: with ``_allow_backward`` it is differentiable in the output, and ignores the LSE's gradient."""
    grad = _allow_backward and any(x.requires_grad for x in (query, key, value))
    if not grad or not torch.is_grad_enabled():
        return memory_efficient_attention_partial(
            query, key, value, attn_bias, p, scale, op=op, output_dtype=output_dtype
        )
    if query.ndim == 5:
        raise ValueError("gradients not supported for 5D tensors")
    return _fMHA.apply(op if isinstance(op, tuple) else (op, None), query, key, value, attn_bias, p, scale)


ALL_FW_OPS = [cutlass.FwOp, flash.FwOp]
ALL_BW_OPS = [cutlass.BwOp, flash.BwOp]
__all__ = ["AttentionBias", "BlockDiagonalMask", "LowerTriangularMask", "attn_bias", "memory_efficient_attention"]
