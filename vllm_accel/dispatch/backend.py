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
        """Return the kernel for calls of this spec: `AttentionKernel`, or a callable ``(a, b, bias)`` for GEMM."""
        ...


class TorchBackend:
    """A backend made of PyTorch's own operators: always installed, with torch's version."""

    def version(self) -> str | None:
        """Return torch's version."""
        return str(torch.__version__)

    def unavailable_reason(self) -> Reason | None:
        """Return None: torch is always there."""
        return None
