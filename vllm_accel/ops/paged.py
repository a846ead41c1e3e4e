"""Attention over a paged cache: `attention_paged`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vllm_accel.dispatch import override
from vllm_accel.dispatch.backend import PagedArgs
from vllm_accel.dispatch.spec import ROUNDED_UP
from vllm_accel.ops import paged_compiled
from vllm_accel.ops.arguments import NO_WINDOW
from vllm_accel.ops.paged_arguments import PagedOptions, PagedTensors
from vllm_accel.ops.paged_run import NONE_GIVEN, PLANS, run_paged
from vllm_accel.ops.run import Result, may_fall_back

# Bound once, as in `attention`: a decode comes here once per layer and step, always with the same shapes.
_last_plan = PLANS.last.get
_overridden = override.variable("attention").get
_grad_enabled = torch.is_grad_enabled
_tracing = torch.compiler.is_dynamo_compiling
_new = tuple.__new__


def attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    block_table: Tensor,
    seqused_k: Tensor,
    max_seqlen_k: int,
    finite_tail: bool = False,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: str | Sequence[str] | None = None,
) -> Result:
    """Attend to keys and values that lie in blocks of a cache (Kwon et al. 2023), with packed queries.

    The keys and values of the queries' own tokens are already in the cache (`write_kv`) and counted in `seqused_k`.
    Serves decode, chunked prefill, speculative tokens and any mix of them; forward only.

    Args:
        q: (Tq, H, D), sequences packed one after another; fp16, bf16, fp32, fp64 or FP8.
        k_cache, v_cache: (num_blocks, block_size, Hkv, D / Dv), in q's dtype, or FP8 or int8 with `k_descale` and
            `v_descale`. Any strides with the innermost 1: a head-major cache is a transposed view.
        cu_seqlens_q: int32 (B + 1,), first 0: where each sequence's queries start and end. Rows of q past the last
            entry come back as 0.
        max_seqlen_q, max_seqlen_k: Python ints, at least the most queries and the most keys of a sequence. They count
            by quarter octave: a growing decode keeps its plan.
        block_table: int32 (B, max_blocks): the blocks of each sequence in order. Entries past
            ``ceil(seqused_k / block_size)`` are never read.
        seqused_k: int32 (B,): keys of each sequence; what lies past them in a block is never part of the result.
        finite_tail: promise that what lies there is finite, which some kernels need; a `PagedKVCache` keeps it.
        causal: query i of a sequence sees key j only if ``j <= i + seqused_k - Sq`` (needed with several query tokens;
            for one it makes no difference).
        k_descale, v_descale: fp32 factors of the cache: scalar, (Hkv,) or (B, Hkv). q_descale: likewise for q.
        The others: as `attention`; positions count within each sequence.

    Returns:
        out (Tq, H, Dv), new and contiguous, in q's dtype (bf16 for FP8); with `return_lse` ``(out, lse)``, lse fp32
        (H, Tq). A row that sees no key is 0 with lse -inf (or the sink).

    Raises:
        ValueError, TypeError: a wrong argument, by name, before any launch; also a tensor that requires a gradient
            while gradients are recorded. Values inside the integer tensors are checked when they are on the CPU, on a
            GPU with VLLM_ACCEL_CHECK=1.
        UnsupportedCallError, BackendUnavailableError: as `attention`.
    """
    tensors = _new(
        PagedTensors, (cu_seqlens_q, block_table, seqused_k, alibi_slopes, sinks, q_descale, k_descale, v_descale)
    )
    options = (
        causal, window_size, softmax_scale, softcap, return_lse, deterministic, batch_invariant, finite_tail, False,
    )  # fmt: skip
    if _tracing():
        named = PagedOptions(max_seqlen_q, max_seqlen_k, *options)
        return paged_compiled.attention_paged(q, k_cache, v_cache, tensors, named, backend)
    if alibi_slopes is sinks is q_descale is k_descale is v_descale is None:
        try:
            key = (
                *options, backend, _overridden(), _grad_enabled(), ROUNDED_UP[max_seqlen_q], ROUNDED_UP[max_seqlen_k],
                q.shape[0] > 0, NONE_GIVEN,
            )  # fmt: skip
            plan = _last_plan(key)
            hit = (
                plan is not None
                and plan.direct
                and plan.check(q, k_cache, v_cache, cu_seqlens_q, block_table, seqused_k)
                and forward_ad._current_level < 0
            )
        except (AttributeError, TypeError):  # an option or a tensor of a wrong type: named by `run_paged`
            hit = False
        if hit and plan is not None:
            try:
                result = plan.forward(q, k_cache, v_cache, _new(PagedArgs, tensors + plan.args))
            except Exception as error:
                if not may_fall_back(plan, error):
                    raise
            else:
                return result if return_lse else result[0]  # type: ignore[no-any-return]
    named = _new(PagedOptions, (max_seqlen_q, max_seqlen_k, *options))
    return run_paged(q, k_cache, v_cache, tensors, named, backend, paged_compiled.attention_paged)
