"""The two protocols that a backend author implements, and the values that travel between dispatch and kernels."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vllm_accel.dispatch.capability import Capability
from vllm_accel.dispatch.device import Device
from vllm_accel.errors import Reason


class AttentionArgs(NamedTuple):
    """Everything of an attention call but q, k, v. A named tuple because it is built on the hot path (0.2 us).

    Tensors first (None where not given), then the values, already validated and resolved: `softmax_scale` is a
    float, `window_size` a pair of ints with -1 for unlimited, lengths are ints (of the longest sequence).
    `need_lse` is set when the caller or the backward pass wants the log-sum-exp.
    """

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    alibi_slopes: Tensor | None
    attn_bias: Tensor | None
    sinks: Tensor | None
    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    dropout_p: float
    need_lse: bool
    deterministic: bool
    batch_invariant: bool


class AttentionGrads(NamedTuple):
    """Gradients of one attention call; None where the input was not given or needs none."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    dsinks: Tensor | None = None


class AttentionKernel(Protocol):
    """A bound attention implementation. Stateless between calls, safe from several threads.

    q, k and v arrive with innermost stride 1 (copied before, where they had another); other strides are free.

    A kernel may also have ``prepare(q, k, v, args)``, which returns a `forward` for exactly these sizes, strides and
    kinds of options; a plan then calls that one. Tensors, their alignment, and the floats in args change from call to
    call.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return out, lse and rng, in the library's conventions.

        out: q's shape with Dv, contiguous. lse: fp32 (B, H, Sq) or (H, Tq), natural logarithm, -inf for a row without
        keys; may be None unless `need_lse`. rng: int64 (2,) that reproduces the dropout mask, on q's device or the
        host; None without dropout.
        """
        ...

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
        """Return the gradients, given what `forward` returned and the gradients of out and lse (None for zero)."""
        ...


class PagedArgs(NamedTuple):
    """Everything of a paged attention call but q and the caches; tensors first, values validated and resolved.

    cu_seqlens_q: int32 (B + 1,), contiguous. block_table: int32 (B, max_blocks), innermost stride 1, any row stride.
    seqused_k: int32 (B,), contiguous. Both maxima are upper bounds, rounded up, and may even lie beyond the table:
    a kernel takes any maximum that is at least the true one. For MLA k_descale and v_descale are one tensor.
    """

    cu_seqlens_q: Tensor
    block_table: Tensor
    seqused_k: Tensor
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    need_lse: bool
    deterministic: bool
    batch_invariant: bool


class PagedKernel(Protocol):
    """A bound attention implementation over a paged cache, forward only. Stateless, safe from several threads.

    q (Tq, H, D) and the caches (num_blocks, block_size, Hkv, D or Dv) have innermost stride 1, other strides are free
    (a head-major cache is a transposed view), and offsets into a cache can pass 2^31. For MLA v_cache is the view
    ``k_cache[..., :Dv]`` with Hkv = 1. Causal masks, windows and ALiBi are aligned bottom-right per sequence: query i
    of sequence b stands at key ``i + seqused_k[b] - Sq``. Sequences with no query, no key, or more queries than keys
    occur; a call without any query, block or sequence never comes here.

    Nothing past ``seqused_k`` in a block, and no table entry past ``ceil(seqused_k / block_size)``, may reach the
    result: there may be NaN in the one and any integer in the other (unless the backend declares FINITE_TAIL, for the
    first). Lengths and block ids are clamped to the table and the cache: wrong ones may give wrong numbers, never an
    access outside.
    """

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
        """Return out (Tq, H, Dv), contiguous, in q's dtype (bf16 for FP8), and lse.

        lse: fp32 (H, Tq) (fp64 for fp64 q), natural logarithm, -inf for a row without keys (or its sink); may be None
        unless `need_lse`. Rows past the last entry of cu_seqlens_q are 0 and -inf.
        """
        ...


class Backend(Protocol):
    """One library's implementation of one operation."""

    @property
    def name(self) -> str:
        """Registry name, for example ``"flash_attn_2"``."""
        ...

    @property
    def capability(self) -> Capability:
        """What it declares. May depend on the installed version; must not need the package to be installed."""
        ...

    def version(self) -> str | None:
        """Version of the library behind it, None if it is not installed."""
        ...

    def unavailable_reason(self) -> Reason | None:
        """Say why the library cannot be used here, after importing the functions that the adapter calls."""
        ...

    def bind(self, spec: Any, device: Device) -> Any:
        """Return the kernel for calls of this spec.

        `AttentionKernel`; `PagedKernel` for a spec with Feature.PAGED; a callable ``(a, b, bias)`` for GEMM.
        """
        ...


class TorchBackend:
    """A backend made of PyTorch's own operators: always installed, with torch's version."""

    def version(self) -> str | None:
        """Return torch's version."""
        return str(torch.__version__)

    def unavailable_reason(self) -> Reason | None:
        """Return None: torch is always there."""
        return None
