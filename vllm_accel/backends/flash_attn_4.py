"""FlashAttention 4: the package ``flash-attn-4``, compiled at the first call of every kind (CuTe DSL).

Conventions, read in flash-attn-4 4.0.0b36: flash_attn/cute/interface.py (``_flash_attn_fwd``, ``_flash_attn_bwd``: head
sizes, windows, copies of what is not aligned), flash_bwd_sm90.py, flash_bwd_sm100.py and
sm100_hd256_2cta_fmha_backward.py (limits of the backward), tile_scheduler.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends import flash_attn_rules as rules
from vllm_accel.backends.convert import (
    clear_past_end,
    minus_inf_to_empty_rows,
    pad_heads,
    round_up,
    sinks_grad,
    zero_past_end,
)
from vllm_accel.backends.library import Found, Function, Library, installed_version, look_up, require
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads, PagedKernel
from vllm_accel.dispatch.capability import Capability, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.errors import Reason

_OPTIONS = (
    "softmax_scale", "causal", "softcap", "window_size_left", "window_size_right", "cu_seqlens_q", "cu_seqlens_k",
    "max_seqlen_q", "max_seqlen_k",
)  # fmt: skip
_PAGED = ("page_table", "seqused_k", "num_splits")
_MODULE = "flash_attn.cute.interface"
_BACKWARD = ("out", "dout", "lse", "deterministic", "dq", "dk", "dv", "dlse")

LIBRARY = Library(
    label="flash-attn 4",
    functions=(
        Function(_MODULE, "_flash_attn_fwd", ("q", "k", "v", "learnable_sink", "return_lse", *_OPTIONS, *_PAGED)),
        Function(_MODULE, "_flash_attn_bwd", ("q", "k", "v", *_BACKWARD, *_OPTIONS)),
    ),
    # There are pre-releases only, and their private functions change; newer ones are held to the parameters above.
    versions=">=4.0.0b36,<4.1",
    # flash_attn.cute.__version__ is "0.0.0" whatever is installed (it asks for a distribution called fa4).
    distributions=("flash-attn-4",),
    absent_hint="`vllm-accel recommend` names the command",
)


def _is_blackwell(device: Device) -> bool:
    return device.compute_capability is not None and device.compute_capability >= (10, 0)


def _blackwell_256(spec: AttentionSpec, device: Device) -> str | None:
    # The dedicated backward for head size 256: interface.py and sm100_hd256_2cta_fmha_backward.py.
    if Feature.GRAD not in spec.features or not _is_blackwell(device):
        return None
    if max(_kernel_dims(spec.head_dim, spec.head_dim_v, blackwell=True)) <= 192:
        return None
    lacks = Feature.SOFTCAP | Feature.LSE_GRAD | Feature.WINDOW_LEFT | Feature.WINDOW_RIGHT
    if spec.features & lacks:
        return (
            f"its backward for head size 256 on {device.arch} takes no softcap, window or gradient of the log-sum-exp"
        )
    return None


def _paged_blackwell(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.PAGED not in spec.features or not _is_blackwell(device) or spec.head_dim <= 128:
        return None
    return f"over a paged cache takes head sizes up to 128 on {device.arch}; this call has {spec.head_dim}"


class FlashAttn4Backend:
    """The backend `flash_attn_4`."""

    name = "flash_attn_4"
    capability = Capability(
        platforms=frozenset({"cuda"}),
        # It also has kernels for sm_80, sm_110 and sm_120, forward only or with fewer options.
        compute_capabilities=frozenset({(9, 0), (10, 0)}),
        dtypes=rules.DTYPES,
        features=rules.COMMON | Feature.PAGED | Feature.FINITE_TAIL | Feature.DETERMINISTIC,
        max_head_dim=rules.MAX_HEAD_DIM,
        min_cuda=(12, 0),  # nvidia-cutlass-dsl comes for CUDA 12 and 13
        # A kernel compiles in 1 to 3 s (sm_90, cross-compiled on two cores, 2026-11).
        first_call_seconds=3.0,
        rules=(
            Rule("blackwell_256", _blackwell_256),
            rules.GRID_HEADS,
            rules.PAGED_HEADS,
            Rule("paged_blackwell", _paged_blackwell),
        ),
        guards=(rules.GRID_BATCH,),
    )

    def version(self) -> str | None:
        """Return the version of flash-attn-4."""
        return installed_version(LIBRARY)

    def compile_cache(self) -> Path | None:
        """Return where compiled kernels are kept for later processes: nowhere, unless its variables say so."""
        enabled = os.environ.get("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED") == "1"
        path = os.environ.get("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
        return Path(path) if enabled and path else None

    def unavailable_reason(self) -> Reason | None:
        """Say why the two functions cannot be called. Imports them and compiles nothing."""
        found = look_up(LIBRARY)
        return found if isinstance(found, Reason) else None

    def bind(self, spec: AttentionSpec, device: Device) -> FlashAttn4Kernel | PagedKernel:
        """Return the kernel over the installed library."""
        found, blackwell = require(self.name, look_up(LIBRARY)), _is_blackwell(device)
        if Feature.PAGED in spec.features:
            from vllm_accel.backends.flash_attn_4_paged import FlashAttn4Paged

            # Its heuristic splits long keys where there are few queries; sm_90 has no kernel that does.
            return FlashAttn4Paged(found, num_splits=0 if blackwell and spec.seqlen_q <= 8 else 1)
        return FlashAttn4Kernel(found, blackwell)


class FlashAttn4Kernel:
    """Dense and packed attention with the functions of one installed flash-attn-4."""

    def __init__(self, found: Found, blackwell: bool) -> None:
        self._call, self._blackwell = found, blackwell

    def forward(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor | None, None]:
        """Return out and lse (None unless needed)."""
        head_dim_v = v.shape[-1]
        size, size_v = _kernel_dims(q.shape[-1], head_dim_v, blackwell=self._blackwell)
        # The sink goes in with the scores: folded into a finished out, it would be rounded twice.
        v = zero_past_end(v, args.cu_seqlens_k)  # whole tiles are loaded, and a NaN times a probability of 0 stays
        out, lse, *_ = self._call["_flash_attn_fwd"](
            q=pad_heads(q, size), k=pad_heads(k, size), v=pad_heads(v, size_v), learnable_sink=args.sinks,
            return_lse=args.need_lse, **_options(args),
        )  # fmt: skip
        # Rows past the last sequence are left unwritten.
        out = clear_past_end(out[..., :head_dim_v].contiguous(), args.cu_seqlens_q)
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
        """Return the gradients. The library takes dlse; lse and out include the sink, so it need not know of one."""
        # Its own gradient of the sinks is missing for head size 256 on sm_100. Rows past the last sequence have lse
        # -inf, and +inf takes them out of the sum.
        dsinks = sinks_grad(args.sinks, out, minus_inf_to_empty_rows(lse), dout, dlse)
        head_dim, head_dim_v = q.shape[-1], v.shape[-1]
        grouped = q.shape[-2] != k.shape[-2]
        size, size_v = _kernel_dims(head_dim, head_dim_v, blackwell=self._blackwell, grouped_backward=grouped)
        if args.cu_seqlens_q is not None:
            # Packed, a head size of 48 left dq of the later rows at 0 (4.0.0b36, H200, 2026-11-23); 64 and 128 do not.
            size, size_v = round_up(size, 64), round_up(size_v, 64)
            q, dout = zero_past_end(q, args.cu_seqlens_q), zero_past_end(dout, args.cu_seqlens_q)
            k, v = zero_past_end(k, args.cu_seqlens_k), zero_past_end(v, args.cu_seqlens_k)
        q, k = pad_heads(q, size), pad_heads(k, size)
        v, out, dout = (pad_heads(t, size_v) for t in (v, out, dout))
        # Zeros where packed: rows past the last sequence are left unwritten.
        new = torch.empty if args.cu_seqlens_q is None else torch.zeros
        dq, dk, dv = (new(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        self._call["_flash_attn_bwd"](
            q=q, k=k, v=v, out=out, dout=dout, lse=lse, dlse=dlse, dq=dq, dk=dk, dv=dv,
            deterministic=args.deterministic, **_options(args),
        )  # fmt: skip
        return AttentionGrads(dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim_v], None, dsinks)


def _options(args: AttentionArgs) -> dict[str, Any]:
    """Name the options as the functions do. Causal is bottom-right there too, and a side without limit is None.

    -1 on one side alone would be taken as a bound (``_resolve_causal_local_window`` in interface.py).
    """
    left, right = (None if side < 0 else side for side in args.window_size)
    packed = args.cu_seqlens_q is not None  # the maxima are for packed calls
    return {
        "softmax_scale": args.softmax_scale,
        "causal": args.causal,
        "softcap": args.softcap,
        "window_size_left": left,
        "window_size_right": right,
        "cu_seqlens_q": args.cu_seqlens_q,
        "cu_seqlens_k": args.cu_seqlens_k,
        "max_seqlen_q": args.max_seqlen_q if packed else None,
        "max_seqlen_k": args.max_seqlen_k if packed else None,
    }


def _kernel_dims(head_dim: int, head_dim_v: int, *, blackwell: bool, grouped_backward: bool = False) -> tuple[int, int]:
    """Return the head sizes that the kernels get.

    ``_validate_head_dims`` in interface.py: on sm_100 both up to 128, or (192, 128), or (256, 256); on sm_90 anything
    up to 256, but tiles are sized by q's head alone, and the backward of grouped heads wants them equal.
    """
    if 128 < head_dim <= 192 and head_dim_v <= 128 and (blackwell or not grouped_backward):
        return 192, 128
    size = rules.one_head_dim(head_dim, head_dim_v)
    if blackwell and size > 128:
        size = 256
    return size, size


BACKEND = FlashAttn4Backend()
