"""FlashAttention 2: the package ``flash-attn``, its registered forward and backward operators.

Conventions, read in flash-attn 2.8.3.post2: flash_attn/flash_attn_interface.py (operators), and in csrc/flash_attn
flash_api.cpp (checks, clamps of windows, the swap for one query), src/softmax.h (+inf for a row without keys),
src/alibi.h. The public functions cannot be used: their autograd drops the gradient of the log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends import flash_attn_rules as rules
from vllm_accel.backends.convert import (
    aligned,
    clear_past_end,
    empty_rows_to_minus_inf,
    fold_sinks,
    minus_inf_to_empty_rows,
    pad_heads,
    sinks_grad,
    unit_inner,
    window,
    with_dlse_column,
)
from vllm_accel.backends.library import Found, Function, Library, installed_version, look_up, matches, require
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads, PagedArgs, PagedKernel
from vllm_accel.dispatch.capability import Capability, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.errors import Reason

_OPTIONS = (
    "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes",
)  # fmt: skip
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "zero_tensors")
_BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "deterministic", "rng_state", *_OPTIONS)
_PAGED_LENGTHS = (*_LENGTHS, "block_table", "seqused_k")
_KVCACHE = (
    "q", "k_cache", "v_cache", "cache_seqlens", "block_table", "softmax_scale", "causal", "window_size", "softcap",
    "alibi_slopes", "num_splits", "return_softmax_lse",
)  # fmt: skip
_MODULE = "flash_attn.flash_attn_interface"

LIBRARY = Library(
    label="flash-attn 2",
    functions=(
        Function(_MODULE, "_flash_attn_forward", ("q", "k", "v", "return_softmax", *_OPTIONS)),
        Function(_MODULE, "_flash_attn_varlen_forward", ("q", "k", "v", "return_softmax", *_OPTIONS, *_PAGED_LENGTHS)),
        Function(_MODULE, "_flash_attn_backward", _BACKWARD),
        Function(_MODULE, "_flash_attn_varlen_backward", (*_BACKWARD, *_LENGTHS)),
        Function(_MODULE, "flash_attn_with_kvcache", _KVCACHE),
    ),
    # 2.7 made the operators take each side of the window, and return four results instead of eight.
    versions=">=2.7,<3",
    version_modules=("flash_attn",),
    distributions=("flash-attn",),
    absent_hint="`vllm-accel recommend` names a wheel that fits this torch",
)


def _blackwell(spec: AttentionSpec, device: Device) -> str | None:
    # setup.py adds sm_100 and sm_120 where nvcc is 12.8 or newer; TransformerEngine wants 2.7.3 there
    # (transformer_engine/pytorch/attention/dot_product_attention/utils.py).
    if device.compute_capability is None or device.compute_capability < (10, 0):
        return None
    if device.runtime_version and device.runtime_version < (12, 8):
        have = ".".join(map(str, device.runtime_version))
        return f"carries code for {device.arch} when built with CUDA 12.8 or newer; torch is built with CUDA {have}"
    version = installed_version(LIBRARY)
    if version and not matches(version, ">=2.7.3"):
        return f"carries code for {device.arch} from version 2.7.3; {version} is installed"
    return None


def _blocks(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.PAGED not in spec.features or spec.block_size % 256 == 0:
        return None
    return f"takes blocks of a multiple of 256 tokens; this cache has blocks of {spec.block_size}"


class FlashAttn2Backend:
    """The backend `flash_attn_2`."""

    name = "flash_attn_2"
    capability = Capability(
        platforms=frozenset({"cuda"}),
        # setup.py builds 80, 90, 100 and 120; code for sm_80 runs on every sm_8x. There is none for Turing.
        compute_capabilities=frozenset({(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)}),
        dtypes=rules.DTYPES,
        features=rules.COMMON | Feature.PAGED | Feature.ALIBI | Feature.DROPOUT | Feature.DETERMINISTIC,
        max_head_dim=rules.MAX_HEAD_DIM,
        min_cuda=(11, 8),  # the document's minimum, and the first CUDA with sm_90
        rules=(
            Rule("cuda_version", _blackwell),
            rules.DROPOUT_SOFTCAP,
            rules.DROPOUT_BACKWARD,
            rules.DLSE_COLUMN,
            rules.GRID_HEADS,
            Rule("block_size", _blocks),
            rules.PAGED_HEADS,
        ),
        guards=(rules.GRID_BATCH,),
        notes=(rules.PAGED_ALIGNED,),
    )

    def version(self) -> str | None:
        """Return the version of flash-attn."""
        return installed_version(LIBRARY)

    def unavailable_reason(self) -> Reason | None:
        """Say why the four operators cannot be called."""
        found = look_up(LIBRARY)
        return found if isinstance(found, Reason) else None

    def bind(self, spec: AttentionSpec, device: Device) -> FlashAttn2Kernel | PagedKernel:
        """Return the kernel over the installed library."""
        found = require(self.name, look_up(LIBRARY))
        if Feature.PAGED in spec.features:
            from vllm_accel.backends.flash_attn_2_paged import FlashAttn2Paged

            return FlashAttn2Paged(found)
        return FlashAttn2Kernel(found)


class FlashAttn2Kernel:
    """Dense and packed attention with the operators of one installed flash-attn."""

    def __init__(self, found: Found) -> None:
        self._call = found

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return out, lse (None unless needed) and the state of the random generator."""
        if args.cu_seqlens_q is None and open_right_is_cut(args):
            packed = AsPacked(q, k, args)
            out, lse, rng = self._forward(packed.rows(q), packed.rows(k), packed.rows(v), packed.args)
            return packed.dense(out), packed.dense_lse(lse), rng
        return self._forward(q, k, v, args)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        head_dim_v = v.shape[-1]
        size = rules.one_head_dim(q.shape[-1], head_dim_v)
        q, k, v = (aligned(pad_heads(t, size)) for t in (q, k, v))
        name = "_flash_attn_forward" if args.cu_seqlens_q is None else "_flash_attn_varlen_forward"
        out, lse, _, rng = self._call[name](
            q=q, k=k, v=v, return_softmax=False, **_options(args), **_lengths(args, q, k)
        )
        out = out[..., :head_dim_v]
        # The kernels write two uint64 numbers; the registered operator calls them int64.
        rng = rng.view(torch.int64) if args.dropout_p else None
        if not args.need_lse and args.sinks is None:
            return out.contiguous(), None, rng
        lse = empty_rows_to_minus_inf(lse)
        if args.alibi_slopes is not None:
            lse = lse - alibi_lse_shift(args, args.alibi_slopes, lse.shape[-1])
        out, lse = fold_sinks(out, lse, args.sinks)
        if args.sinks is not None and args.cu_seqlens_q is not None:
            lse = clear_past_end(lse, args.cu_seqlens_q, float("-inf"), dim=-1)  # no sink for rows of no sequence
        # The library allocates out with q's strides, which may be those of a transposed view.
        return out.contiguous(), lse, rng

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
        if args.cu_seqlens_q is None and open_right_is_cut(args):
            packed = AsPacked(q, k, args)
            q, k, v, out, dout = (packed.rows(t) for t in (q, k, v, out, dout))
            lse, dlse = packed.rows_of_lse(lse), None if dlse is None else packed.rows_of_lse(dlse)
            grads = self._backward(q, k, v, packed.args, out, lse, rng, dout, dlse)
            dq, dk, dv = (packed.dense(grad) for grad in grads[:3])
            return AttentionGrads(dq, dk, dv, None, grads.dsinks)
        return self._backward(q, k, v, args, out, lse, rng, dout, dlse)

    def _backward(
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
        # Rows past the last sequence have lse -inf, and +inf takes them out of the sum.
        dsinks = sinks_grad(args.sinks, out, minus_inf_to_empty_rows(lse), dout, dlse)
        head_dim, head_dim_v = q.shape[-1], v.shape[-1]
        size = rules.one_head_dim(head_dim, head_dim_v, dlse is not None)
        v, out, dout = with_dlse_column(v, out, dout, dlse, size)
        q, k, v, out, dout = (aligned(pad_heads(t, size)) for t in (q, k, v, out, dout))
        if args.alibi_slopes is not None:
            lse = lse + alibi_lse_shift(args, args.alibi_slopes, lse.shape[-1])
        lse = minus_inf_to_empty_rows(lse).contiguous()  # read as dense, unchecked
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        name = "_flash_attn_backward" if args.cu_seqlens_q is None else "_flash_attn_varlen_backward"
        self._call[name](
            dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv, deterministic=args.deterministic,
            rng_state=rng, **_options(args), **_lengths(args, q, k),
        )  # fmt: skip
        return AttentionGrads(dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim_v], None, dsinks)


def _options(args: AttentionArgs) -> dict[str, Any]:
    """Name the options as the operators do. Causal is bottom-right there too, and windows mean the same."""
    return {
        "dropout_p": args.dropout_p,
        "softmax_scale": args.softmax_scale,
        "causal": args.causal,
        "window_size_left": args.window_size[0],
        "window_size_right": args.window_size[1],
        "softcap": args.softcap,
        "alibi_slopes": None if args.alibi_slopes is None else unit_inner(args.alibi_slopes),
    }


def _lengths(args: AttentionArgs, q: Tensor, k: Tensor) -> dict[str, Any]:
    if args.cu_seqlens_q is None or args.cu_seqlens_k is None:
        return {}
    longest = args.max_seqlen_q
    if longest == 1 and q.shape[1] != k.shape[1]:
        # With 1 and grouped heads the library takes row b for sequence b and never reads cu_seqlens_q, which is wrong
        # as soon as one sequence is empty.
        longest = 2
    return {
        "cu_seqlens_q": args.cu_seqlens_q,
        "cu_seqlens_k": args.cu_seqlens_k,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest_k(args),
        "zero_tensors": True,  # rows past the last sequence, and gradients of those, are left unwritten otherwise
    }


def open_right_is_cut(args: AttentionArgs | PagedArgs) -> bool:
    """Tell whether the library would cut keys from a window that is open (or as good as) to the right.

    set_params_fprop in flash_api.cpp replaces an unlimited right side, and first any that is at least the key length,
    by the key length *from the diagonal*: a limit for the first queries where there are more queries than keys.
    """
    left, right = window(args)
    is_open = right >= args.max_seqlen_k or (right < 0 <= left)
    return is_open and args.max_seqlen_q > args.max_seqlen_k


def longest_k(args: AttentionArgs | PagedArgs) -> int:
    """Return the maximum key length to claim, from which the library derives its limits on windows."""
    return args.max_seqlen_q if open_right_is_cut(args) else args.max_seqlen_k


def alibi_lse_shift(args: AttentionArgs, slopes: Tensor, tokens: int) -> Tensor:
    """Return by how much the library's lse is larger than ours with ALiBi: slope * (i + Sk - Sq).

    Its purely causal kernel adds ``slope * j`` (alibi.h), the same for every query up to that constant; its other
    kernels add what we mean. Which one runs is decided by the window, not by the flag.
    """
    left, right = window(args)
    if right != 0 or 0 <= left < longest_k(args):
        return slopes.new_zeros(())
    if args.cu_seqlens_q is None or args.cu_seqlens_k is None:
        first = args.max_seqlen_k - args.max_seqlen_q
        return slopes.unsqueeze(-1) * torch.arange(first, first + tokens, device=slopes.device)
    rows = torch.arange(tokens, device=slopes.device)
    ends_q, ends_k = args.cu_seqlens_q[1:], args.cu_seqlens_k[1:]
    sequence = torch.searchsorted(ends_q, rows, right=True).clamp_(max=ends_q.shape[0] - 1)
    diagonal = rows - ends_q[sequence] + (ends_k - args.cu_seqlens_k[:-1])[sequence]
    shift: Tensor = (slopes[sequence].transpose(0, 1) if slopes.dim() == 2 else slopes.unsqueeze(-1)) * diagonal
    return shift


class AsPacked:
    """A dense call as a packed one: the packed operator lets us choose the key length that windows are clamped by."""

    def __init__(self, q: Tensor, k: Tensor, args: AttentionArgs) -> None:
        self.batch = q.shape[0]

        def ends(length: int) -> Tensor:
            return torch.arange(0, (self.batch + 1) * length, length, dtype=torch.int32, device=q.device)

        self.args = args._replace(cu_seqlens_q=ends(q.shape[1]), cu_seqlens_k=ends(k.shape[1]))

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1)

    def dense(self, rows: Tensor) -> Tensor:
        return rows.view(self.batch, -1, *rows.shape[1:])

    def rows_of_lse(self, lse: Tensor) -> Tensor:
        return lse.transpose(0, 1).flatten(1)

    def dense_lse(self, lse: Tensor | None) -> Tensor | None:
        return None if lse is None else lse.view(lse.shape[0], self.batch, -1).transpose(0, 1).contiguous()


BACKEND = FlashAttn2Backend()
