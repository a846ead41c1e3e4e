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


class GemmArgs(NamedTuple):
    """Everything of a matrix product but a and b; what is fixed for a kind of call is in the spec.

    offs: int32 (E,), contiguous: ends of the groups (GROUPED_M, GROUPED_K). bias: (N,), or (E, N) for GROUPED_M and
    BATCHED, in the result's dtype. scale_a, scale_b: fp32, of the shapes that `Scaling` gives, any strides.
    full: offs are in order and within the rows, and nobody reads rows past offs[-1], so that those need not be zeroed.
    """

    offs: Tensor | None = None
    bias: Tensor | None = None
    scale_a: Tensor | None = None
    scale_b: Tensor | None = None
    full: bool = False


class GemmKernel(Protocol):
    """A bound matrix product, forward only: its backward is made of products. Stateless, safe from several threads.

    a and b have any strides and any alignment; a kernel that needs other ones copies, and its backend says so in
    `size_notes`. Groups may be empty. Sizes of 0 never come here. No host synchronisation on a GPU, unless the backend
    says so in `synchronises`. Offsets out of order or past the end may give wrong numbers, never an access outside.

    A kernel may also have ``prepare(a, b, args)``, which returns a `forward` for exactly these sizes and kinds of
    options; a plan then calls that one. Tensors, their strides and their alignment change from call to call.
    """

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return the product, new and contiguous, in the spec's out_dtype.

        GROUPED_M: (T, N), rows past offs[-1] are 0. GROUPED_K: (E, M, N), what is summed past offs[-1] is left out and
        an empty group gives 0. The sum is in fp32 (fp64 for fp64; exact for int8); bias is added before rounding.
        """
        ...


class MoeArgs(NamedTuple):
    """Everything of a mixture-of-experts layer but x and the weights.

    topk_weights: (T, k), fp32 or x's dtype. topk_ids: (T, k), int32 or int64; an id outside of 0..E-1 is nobody's: it
    adds nothing. bias_gate_up: (E, 2I). bias_down: (E, D). scale_gate_up, scale_down: fp32 factors of quantised
    weights, as `Scaling` gives them for b; the kernel then quantises what it multiplies: TENSOR and ROW weights take
    rows, BLOCK_128x128 weights take 1x128 blocks.
    """

    topk_weights: Tensor
    topk_ids: Tensor
    bias_gate_up: Tensor | None = None
    bias_down: Tensor | None = None
    scale_gate_up: Tensor | None = None
    scale_down: Tensor | None = None


class MoeKernel(Protocol):
    """A bound mixture-of-experts layer, forward only, on the device alone. Stateless, safe from several threads."""

    def forward(self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, args: MoeArgs) -> Tensor:
        """Return (T, D) in x's dtype, new and contiguous.

        x (T, D), w_gate_up (E, D, 2I) with the gate first, w_down (E, I, D), any strides (weights stored as
        (E, 2I, D) arrive as transposed views). Row t is the sum over its k experts e of
        ``topk_weights * ((act(x @ gate_e) * (x @ up_e)) @ down_e)``: the weight multiplies the expert's output.
        """
        ...


class Backend(Protocol):
    """One library's implementation of one operation.

    One that compiles at a first call may also have ``compile_cache()``, which returns the directory (a Path) where
    compiled kernels outlive the process, or None where they do not: `vllm-accel tune` builds there.
    """

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

        `AttentionKernel`; `PagedKernel` for a spec with Feature.PAGED; `GemmKernel` for a `GemmSpec`, `MoeKernel` for
        one of Form.MOE.
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
