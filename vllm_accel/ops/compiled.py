"""`torch.compile` and `torch.export`: one registered operator with a fake implementation and a backward.

Only traced calls use it (an eager call would pay the dispatcher for nothing). The backend is chosen when the operator
runs, by the same plans as eager calls, so lengths may change without recompilation. Defined with `Library.define`,
which costs 2 us per call where `custom_op` costs 8 (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vllm_accel.dispatch import override
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.plan import Plan
from vllm_accel.dispatch.spec import Feature
from vllm_accel.ops.arguments import Options
from vllm_accel.ops.extras import Extras, check_lengths, needs_grad, present, with_four_dims
from vllm_accel.ops.run import PLANS, make_plan, may_fall_back

_TENSORS = "Tensor q, Tensor k, Tensor v"
_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? attn_bias, Tensor? sinks, "
    "Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float? softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap, float dropout_p, "
    "bool return_lse, bool deterministic, bool batch_invariant, int grad, str backend"
)
_N_EXTRAS = len(Extras._fields)

_library = torch.library.Library("vllm_accel", "DEF")
_library.define(f"attention({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, Tensor rng, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    options: Options,
    lengths: tuple[int, int] | None,
    backend: str | Sequence[str] | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Call the operator; this is what Dynamo traces."""
    bias = with_four_dims(extras.attn_bias)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if bias is not None and bias.dtype not in (torch.bool, torch.float32):
            bias = bias.to(dtype)
    extras = extras._replace(attn_bias=bias)
    grad = needs_grad(q, k, v, extras)
    max_q, max_k = (-1, -1) if lengths is None else lengths
    names = backend if isinstance(backend, str) else ",".join(backend or ())
    left, right = options.window_size
    out: Tensor
    lse: Tensor
    out, lse, _ = torch.ops.vllm_accel.attention(
        q, k, v, *extras, max_q, max_k, options.softmax_scale, options.causal,
        left, right, options.softcap, options.dropout_p, options.return_lse, options.deterministic,
        options.batch_invariant, grad, names,
    )  # fmt: skip
    return (out, lse) if options.return_lse else out


def _plan(q: Tensor, k: Tensor, v: Tensor, rest: tuple[Any, ...]) -> tuple[Plan, AttentionArgs]:
    """Return the plan of an operator call, from the same cache as eager calls, and the kernel's arguments."""
    extras = Extras(*rest[:_N_EXTRAS])
    (
        max_q,
        max_k,
        scale,
        causal,
        left,
        right,
        softcap,
        dropout_p,
        return_lse,
        exact,
        invariant,
        grad,
        names,
    ) = rest[_N_EXTRAS:]
    options = Options(causal, (left, right), scale, softcap, dropout_p, return_lse, exact, invariant)
    lengths = None if max_q < 0 else (max_q, max_k)
    overridden = override.variable("attention").get()
    shared = extras.cu_seqlens_q is extras.cu_seqlens_k
    key = ("operator", *options, names, overridden, grad, lengths, *[t is None for t in extras], shared)
    shapes = (q.shape, k.shape)
    plan = PLANS.find(key, shapes, (q, k, v, *present(extras)))
    if plan is None:
        backend = tuple(names.split(",")) if names else None
        plan, keep = make_plan(q, k, v, extras, options, lengths, grad, backend, overridden)
        if keep:
            PLANS.add(key, shapes, plan)
    return plan, AttentionArgs(*extras, *plan.args[_N_EXTRAS:])


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    plan, args = _plan(q, k, v, rest)
    if args.cu_seqlens_q is not None and q.device.type == "cpu":
        check_lengths(args, q.shape[0], k.shape[0])
    try:
        with _without_autocast(q):
            out, lse, rng = plan.forward(*_unit_inner(plan, q, k, v), args)
    except Exception as error:
        if not may_fall_back(plan, error):
            raise
        return _forward(q, k, v, *rest)
    if lse is None or not args.need_lse:
        lse = q.new_empty(0, dtype=torch.float32)
    # A kernel may keep its random state on the host; the operator promises it on q's device.
    return out, lse, q.new_empty(0, dtype=torch.int64) if rng is None else rng.to(q.device)


def _without_autocast(q: Tensor) -> AbstractContextManager[Any]:
    """Keep a kernel's own products in their dtype; entering the context costs 3 us, so only where autocast is on."""
    if torch.is_autocast_enabled(q.device.type):
        return torch.autocast(q.device.type, enabled=False)
    return nullcontext()


def _unit_inner(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() if plan.copies and t.stride(-1) != 1 else t for t in (q, k, v))


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rng: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan, args = _plan(q, k, v, rest)
    with _without_autocast(q):
        grads = plan.kernel.backward(
            *_unit_inner(plan, q, k, v), args, out, lse, rng if rng.numel() else None, dout, dlse
        )
    wants_dbias, wants_dsinks = _wanted(rest)
    dbias = grads.dbias if wants_dbias and grads.dbias is not None else q.new_empty(0)
    dsinks = grads.dsinks if wants_dsinks and grads.dsinks is not None else q.new_empty(0)
    return grads.dq, grads.dk, grads.dv, dbias, dsinks


def _wanted(rest: Sequence[Any]) -> tuple[bool, bool]:
    """Read from the operator's flags whether attn_bias and sinks want gradients."""
    flags = rest[_N_EXTRAS + 11]
    return bool(flags & Feature.BIAS_GRAD.value), bool(flags & Feature.SINKS_GRAD.value)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *batch, tokens, heads, _ = q.shape
    dropout_p, return_lse, grad = rest[_N_EXTRAS + 7], rest[_N_EXTRAS + 8], rest[_N_EXTRAS + 11]
    dtype = q.dtype if q.dtype.itemsize > 1 else torch.bfloat16
    out = q.new_empty((*batch, tokens, heads, v.shape[-1]), dtype=dtype)
    lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    wants_lse = return_lse or grad
    lse = q.new_empty((*batch, heads, tokens), dtype=lse_dtype) if wants_lse else q.new_empty(0, dtype=torch.float32)
    return out, lse, q.new_empty(2 if dropout_p > 0 else 0, dtype=torch.int64)


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rng: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias, sinks = rest[3], rest[4]
    wants_dbias, wants_dsinks = _wanted(rest)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        bias.new_empty(bias.shape) if wants_dbias else q.new_empty(0),
        sinks.new_empty(sinks.shape) if wants_dsinks else q.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    out, lse, rng = output
    ctx.save_for_backward(q, k, v, out, lse, rng, *rest[:_N_EXTRAS])
    ctx.values = tuple(rest[_N_EXTRAS:])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _drng: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, rng, *extras = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dbias, dsinks = torch.ops.vllm_accel.attention_backward(
        dout, dlse, q, k, v, out, lse, rng, *extras, *ctx.values
    )
    grads: list[Any] = [dq, dk, dv, *(None,) * (_N_EXTRAS + len(ctx.values))]
    wants_dbias, wants_dsinks = _wanted((*extras, *ctx.values))
    grads[3 + 3] = dbias if wants_dbias else None
    grads[3 + 4] = dsinks if wants_dsinks else None
    return tuple(grads)


_library.impl("attention", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_accel::attention", _fake_forward, lib=_library)
torch.library.register_fake("vllm_accel::attention_backward", _fake_backward, lib=_library)
torch.library.register_autograd("vllm_accel::attention", _autograd_backward, setup_context=_setup_context, lib=_library)
