"""The calls that users make: `attention` and `attention_varlen`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vllm_accel.dispatch import override
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.ops import compiled, transforms
from vllm_accel.ops.arguments import NO_WINDOW, Options
from vllm_accel.ops.extras import NO_EXTRAS, Extras, needs_grad, present, with_four_dims
from vllm_accel.ops.run import PLANS, Result, execute, make_plan, may_fall_back, other_lengths

# Bound once: each of these is looked up on every call, and the whole hot path has about a microsecond.
_last_plan = PLANS.last.get
_overridden = override.variable("attention").get
_grad_enabled = torch.is_grad_enabled
_tracing = torch.compiler.is_dynamo_compiling
_new = tuple.__new__
_N_EXTRAS = len(Extras._fields)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: str | Sequence[str] | None = None,
) -> Result:
    """Attend with the fastest implementation that is correct for these tensors on their device.

    Computes ``softmax(softcap(q @ k^T * softmax_scale) + bias) @ v`` (Vaswani et al. 2017) by exact, memory-efficient
    kernels (Dao et al. 2022); `explain(attention, ...)` tells which one, and why.

    Args:
        q: (B, Sq, H, D), fp16, bf16, fp32 or fp64. k: (B, Sk, Hkv, D). v: (B, Sk, Hkv, Dv). H is a multiple of Hkv,
            any strides. Under autocast they are cast first.
        causal: query i sees key j only if ``j <= i + Sk - Sq`` (aligned bottom-right).
        window_size: keys seen to the (left, right) of that diagonal, inclusive; -1 is unlimited.
        softmax_scale: positive float; None is ``D ** -0.5``.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0.0 is off.
        alibi_slopes: fp32 (H,) or (B, H); adds ``-slope * |i + Sk - Sq - j|``. Not differentiable.
        attn_bias: bool (True may attend), fp32 or q's dtype, broadcastable to (B, H, Sq, Sk), differentiable.
        sinks: (H,) fp32 or q's dtype, one extra logit per head in the softmax's denominator, differentiable.
        dropout_p: probability of dropping an attention weight, from the device's torch generator.
        q_descale, k_descale, v_descale: fp32 factors for q, k, v: scalar, (Hkv,) or (B, Hkv).
        return_lse: also return the log-sum-exp of the logits, differentiable.
        deterministic: the same bits on every run, backward included.
        batch_invariant: the bits of a sequence do not depend on what else is in the batch.
        backend: a name, alias or family, or a sequence of them: the first that can run, or an error.

    Returns:
        out (B, Sq, H, Dv), new and contiguous, in q's dtype; with `return_lse` ``(out, lse)``, lse fp32 (B, H, Sq),
        natural logarithm. A row that sees no key is 0 with lse -inf (or the sink).

    Raises:
        ValueError, TypeError: a wrong argument, by name, before any launch.
        UnsupportedCallError: no backend (or not the one asked for) can run this call; carries every reason.
        BackendUnavailableError: the backend asked for is not installed, broken or switched off.
    """
    if _tracing():
        extras = Extras(None, None, alibi_slopes, attn_bias, sinks, q_descale, k_descale, v_descale)
        options = Options(
            causal, window_size, softmax_scale, softcap, dropout_p, return_lse, deterministic, batch_invariant
        )
        return compiled.attention(q, k, v, extras, options, None, backend)
    if alibi_slopes is attn_bias is sinks is q_descale is k_descale is v_descale is None:
        key = (
            causal, window_size, softmax_scale, softcap, dropout_p, return_lse, deterministic, batch_invariant,
            backend, _overridden(), _grad_enabled(),
        )  # fmt: skip
        try:
            plan = _last_plan(key)
        except TypeError:  # a list where a tuple belongs
            plan = None
        if plan is not None and plan.direct and forward_ad._current_level < 0:
            if not plan.check(q, k, v):
                plan = other_lengths(plan, key, q, k, v)
            if plan is not None and plan.direct:
                try:
                    result = plan.forward(q, k, v, plan.args)
                except Exception as error:
                    if not may_fall_back(plan, error):
                        raise
                else:
                    return result[:2] if return_lse else result[0]  # type: ignore[no-any-return]
        extras = NO_EXTRAS
    else:
        extras = Extras(None, None, alibi_slopes, with_four_dims(attn_bias), sinks, q_descale, k_descale, v_descale)
    options = Options(
        causal, window_size, softmax_scale, softcap, dropout_p, return_lse, deterministic, batch_invariant
    )
    return _general(q, k, v, extras, options, None, backend)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: str | Sequence[str] | None = None,
) -> Result:
    """Attend within sequences packed one after another, with no padding between them.

    Args:
        q: (Tq, H, D). k: (Tk, Hkv, D). v: (Tk, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), first 0, on q's device: where each sequence starts and ends.
            Rows past the last entry come back as 0. Pass the same tensor twice for self-attention.
        max_seqlen_q, max_seqlen_k: Python ints, at least the longest sequence.
        The others: as `attention`; positions count within each sequence.

    Returns:
        out (Tq, H, Dv), with `return_lse` ``(out, lse)``, lse fp32 (H, Tq).

    Raises:
        As `attention`. The values of cu_seqlens are checked when they are on the CPU, on a GPU with
        VLLM_ACCEL_CHECK=1.
    """
    extras = Extras(cu_seqlens_q, cu_seqlens_k, alibi_slopes, None, sinks, q_descale, k_descale, v_descale)
    options = Options(
        causal, window_size, softmax_scale, softcap, dropout_p, return_lse, deterministic, batch_invariant
    )
    lengths = (max_seqlen_q, max_seqlen_k)
    if _tracing():
        return compiled.attention(q, k, v, extras, options, lengths, backend)
    return _general(q, k, v, extras, options, lengths, backend)


def _general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    options: Options,
    lengths: tuple[int, int] | None,
    backend: object,
) -> Result:
    """Run a call that has optional tensors, is packed, or is of another kind than the one before."""
    if isinstance(options.window_size, list):
        options = options._replace(window_size=(*options.window_size,))
    if isinstance(backend, list):
        backend = tuple(backend)
    overridden = _overridden()
    key: tuple[object, ...] = (*options, backend, overridden, _grad_enabled())
    given: tuple[Tensor, ...] = ()
    if extras is not NO_EXTRAS:
        # Which tensors are given, whether cu_seqlens is shared, and lengths belong to the kind of call.
        given = present(extras)
        key += (lengths, extras.cu_seqlens_q is extras.cu_seqlens_k, *[t is None for t in extras])
    plan, shapes = None, None
    try:
        plan = _last_plan(key)
        if plan is None or not plan.check(q, k, v, *given):
            shapes = (q.shape, k.shape)
            plan = PLANS.find(key, shapes, (q, k, v, *given))
    except (AttributeError, TypeError, RuntimeError):  # not plain tensors, or an option of a wrong type: named below
        plan = None
    if plan is None or forward_ad._current_level >= 0:
        if (redirected := transforms.redirect(q, k, v, extras)) is not None:
            return redirected(_general, compiled.attention, options, lengths, backend)  # type: ignore[no-any-return]
        grad = needs_grad(q, k, v, extras)
        plan, keep = make_plan(q, k, v, extras, options, lengths, grad, backend, overridden)
        if keep:
            PLANS.add(key, shapes or (q.shape, k.shape), plan)
    args = _new(AttentionArgs, extras + plan.args[_N_EXTRAS:]) if given else plan.args
    try:
        if plan.direct:
            result = plan.forward(q, k, v, args)
            return result[:2] if options.return_lse else result[0]  # type: ignore[no-any-return]
        return execute(plan, q, k, v, args, options.return_lse)
    except Exception as error:
        if not may_fall_back(plan, error):
            raise
    return _general(q, k, v, extras, options, lengths, backend)
