"""FlashAttention 3, for Hopper: the module ``flash_attn_interface`` that flash-attention's hopper/ builds.

Conventions, read in hopper/flash_attn_interface.py (today's registered operators, and the older functions of the 2.8.3
sdist), hopper/flash_api_stable.cpp (checks, clamps, head sizes of v) and hopper/cuda_check.h: on any other GPU than
sm_90 a failed launch calls exit(), so nothing here runs a kernel before the compute capability has been checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends import flash_attn_rules as rules
from vllm_accel.backends.convert import (
    aligned,
    clear_past_end,
    fold_sinks,
    minus_inf_to_empty_rows,
    pad_heads,
    round_up,
    sinks_grad,
    with_dlse_column,
)
from vllm_accel.backends.library import Found, Function, Library, accepts, first_usable, installed_version, require
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads, PagedKernel
from vllm_accel.dispatch.capability import Capability, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.errors import Reason

_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_PAGED = ("page_table", "seqused_k")
_FORWARD = ("q", "k", "v", "softmax_scale", "causal", "softcap", "num_splits", *_LENGTHS, *_PAGED)
_BACKWARD = (
    "dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "softmax_scale", "softcap", "deterministic",
    *_LENGTHS,
)  # fmt: skip
_SIDES = ("window_size_left", "window_size_right")

#: Arguments of the older functions that have no default, and that we never use.
_UNUSED_FORWARD: dict[str, None] = dict.fromkeys(
    ("k_new", "v_new", "qv", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "kv_batch_idx",
     "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale")
)  # fmt: skip
_UNUSED_BACKWARD: dict[str, None] = dict.fromkeys(("sequed_q", "sequed_k"))


def _library(module: str, forward: tuple[str, ...], backward: tuple[str, ...]) -> Library:
    return Library(
        label="flash-attn 3",
        functions=(
            Function(module, "_flash_attn_forward", (*_FORWARD, *forward)),
            Function(module, "_flash_attn_backward", (*_BACKWARD, *backward)),
        ),
        # The registry's flash-attn-3 0.0.0 is a placeholder with empty modules.
        versions=">=3.0.0b1,<4",
        version_modules=("flash_attn_3",),
        distributions=("flash-attn-3", "flash_attn_3"),
        absent_hint="`vllm-accel recommend` says where it comes from",
    )


LIBRARIES = tuple(
    _library(module, forward, backward)
    for module in ("flash_attn_interface", "flash_attn_3.flash_attn_interface")
    for forward, backward in (
        (_SIDES, ("is_causal", *_SIDES)),  # registered operators: one argument for each side of the window
        (("window_size", *_UNUSED_FORWARD), ("causal", "window_size", *_UNUSED_BACKWARD)),  # before that: a tuple
    )
)

_FLAGS = {
    Feature.GRAD: "BACKWARD",
    Feature.VARLEN: "VARLEN",
    Feature.PAGED: "PAGEDKV",
    Feature.SOFTCAP: "SOFTCAP",
    Feature.WINDOW_LEFT: "LOCAL",
    Feature.WINDOW_RIGHT: "LOCAL",
}
_PREFIX = "FLASHATTENTION_DISABLE_"

#: Today's builds say what they left out; older ones do not.
CONFIGS = tuple(
    Library(label="flash-attn 3's configuration", functions=(Function(module, "CONFIG"),))
    for module in ("flash_attn_config", "flash_attn_3.flash_attn_config")
)


def build_flags() -> frozenset[str]:
    """Return what the installed build was told to leave out, without the prefix; empty where it does not say."""
    found = first_usable(*CONFIGS)
    config: Any = found["CONFIG"] if isinstance(found, Found) else {}
    flags = config.get("build_flags", {}) if isinstance(config, dict) else {}
    return frozenset(name.removeprefix(_PREFIX) for name, value in flags.items() if value)


def _left_out(spec: AttentionSpec, device: Device) -> str | None:
    if device.compute_capability != (9, 0):
        return None  # nothing of the library is imported elsewhere
    flags = build_flags()
    wanted = {flag for feature, flag in _FLAGS.items() if feature in spec.features}
    if spec.dtype is torch.float16:
        wanted.add("FP16")
    if missing := sorted(wanted & flags):
        return f"this build was made with {', '.join(_PREFIX + flag for flag in missing)}"
    largest = max((n for n in (64, 96, 128, 192, 256) if f"HDIM{n}" not in flags), default=0)
    needed = max(spec.head_dim, spec.head_dim_v)
    return f"this build takes head sizes up to {largest}; this call has {needed}" if largest < needed <= 256 else None


def _deterministic_backward(spec: AttentionSpec, device: Device) -> str | None:
    both = Feature.DETERMINISTIC | Feature.GRAD
    if both & spec.features == both:
        return "its deterministic backward has given different bits: github.com/Dao-AILab/flash-attention/issues/2244"
    return None


class FlashAttn3Backend:
    """The backend `flash_attn_3`."""

    name = "flash_attn_3"
    capability = Capability(
        platforms=frozenset({"cuda"}),
        compute_capabilities=frozenset({(9, 0)}),  # exactly: it exits the process elsewhere
        dtypes=rules.DTYPES,
        features=rules.COMMON | Feature.PAGED | Feature.FINITE_TAIL | Feature.DETERMINISTIC,
        max_head_dim=rules.MAX_HEAD_DIM,
        min_cuda=(12, 3),  # hopper/setup.py
        rules=(
            Rule("deterministic_backward", _deterministic_backward),
            Rule("build_flags", _left_out),
            rules.DLSE_COLUMN,
            rules.GRID_HEADS,
            rules.PAGED_HEADS,
        ),
        guards=(rules.GRID_BATCH,),
        notes=(rules.PAGED_ALIGNED,),
    )

    def version(self) -> str | None:
        """Return the version of flash-attn 3, None where the build carries none."""
        return installed_version(LIBRARIES[0])

    def unavailable_reason(self) -> Reason | None:
        """Say why the two operators cannot be called. Imports them and runs nothing."""
        found = first_usable(*LIBRARIES)
        return found if isinstance(found, Reason) else None

    def bind(self, spec: AttentionSpec, device: Device) -> FlashAttn3Kernel | PagedKernel:
        """Return the kernel over the installed library."""
        found = require(self.name, first_usable(*LIBRARIES))
        # Its heuristic splits long keys where there are few queries; the registered operator's default is one.
        num_splits = 0 if spec.seqlen_q <= 8 else 1
        if Feature.PAGED in spec.features:
            from vllm_accel.backends.flash_attn_3_paged import FlashAttn3Paged

            return FlashAttn3Paged(found, num_splits, _UNUSED_FORWARD)
        return FlashAttn3Kernel(found, num_splits, mla="HDIMDIFF192" not in build_flags())


class FlashAttn3Kernel:
    """Dense and packed attention with one installed FlashAttention 3, in either form of its operators."""

    def __init__(self, found: Found, num_splits: int, mla: bool) -> None:
        self._call, self._num_splits, self._mla = found, num_splits, mla
        self._sides = accepts(found["_flash_attn_forward"], "window_size_left")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor | None, None]:
        """Return out and lse."""
        head_dim_v = v.shape[-1]
        head_dim, padded_v = _kernel_dims(q.shape[-1], head_dim_v, self._mla)
        q, k = (aligned(pad_heads(t, head_dim)) for t in (q, k))
        v = aligned(pad_heads(v, padded_v))
        out, lse, *_ = self._call["_flash_attn_forward"](
            q=q, k=k, v=v, causal=args.causal, num_splits=self._num_splits, **self._options(args),
            **({} if self._sides else _UNUSED_FORWARD),
        )  # fmt: skip
        out, lse = fold_sinks(out[..., :head_dim_v].contiguous(), lse, args.sinks)
        # Rows past the last sequence are left unwritten.
        out = clear_past_end(out, args.cu_seqlens_q)
        if not args.need_lse:
            return out, None, None
        return out, clear_past_end(lse, args.cu_seqlens_q, float("-inf"), dim=-1), None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        args: AttentionArgs,
        out: Tensor,
        lse: Tensor,
        rng: Tensor | None,
        dout: Tensor,
        dlse: Tensor | None,
    ) -> AttentionGrads:
        """Return the gradients."""
        # Rows past the last sequence have lse -inf, and +inf takes them out of the sum.
        dsinks = sinks_grad(args.sinks, out, minus_inf_to_empty_rows(lse), dout, dlse)
        head_dim, head_dim_v = q.shape[-1], v.shape[-1]
        size, size_v = _kernel_dims(head_dim, head_dim_v + (dlse is not None), self._mla)
        v, out, dout = with_dlse_column(v, out, dout, dlse, size_v)
        q, k = pad_heads(q, size), pad_heads(k, size)
        q, k, v, out, dout = (aligned(t) for t in (q, k, v, out, dout))
        # Zeros where packed: rows past the last sequence are left unwritten.
        new = torch.empty if args.cu_seqlens_q is None else torch.zeros
        dq, dk, dv = (new(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        causal = {"is_causal" if self._sides else "causal": args.causal}
        self._call["_flash_attn_backward"](
            dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse.contiguous(), dq=dq, dk=dk, dv=dv,
            deterministic=args.deterministic, **causal, **self._options(args),
            **({} if self._sides else _UNUSED_BACKWARD),
        )  # fmt: skip
        return AttentionGrads(dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim_v], None, dsinks)

    def _options(self, args: AttentionArgs) -> dict[str, Any]:
        """Name the options as the operators do; causal is bottom-right there too, and windows mean the same."""
        left, right = args.window_size
        sides = {"window_size_left": left, "window_size_right": right}
        packed = args.cu_seqlens_q is not None  # the maxima are for packed calls
        return {
            "softmax_scale": args.softmax_scale,
            "softcap": args.softcap,
            **(sides if self._sides else {"window_size": (left, right)}),
            "cu_seqlens_q": args.cu_seqlens_q,
            "cu_seqlens_k": args.cu_seqlens_k,
            "max_seqlen_q": args.max_seqlen_q if packed else None,
            "max_seqlen_k": args.max_seqlen_k if packed else None,
        }


def _kernel_dims(head_dim: int, head_dim_v: int, mla: bool) -> tuple[int, int]:
    """Return the head sizes that the kernels get: equal, but for D in (128, 192] with Dv up to 128 (MLA prefill).

    The library takes other pairs too, with a kernel for value heads of 512 that many builds lack.
    """
    if mla and 128 < head_dim <= 192 and head_dim_v <= 128:
        return round_up(head_dim, 8), 128
    size = rules.one_head_dim(head_dim, head_dim_v)
    return size, size


BACKEND = FlashAttn3Backend()
