"""Find or make the plan of an attention call, run it, and recover from a backend that fails at launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_accel.dispatch import override, quarantine, registry
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.capability import Guard, refusals
from vllm_accel.dispatch.choose import OpFamily, choose
from vllm_accel.dispatch.device import detect
from vllm_accel.dispatch.guard import TensorGuard, kin_of, tensor_guard
from vllm_accel.dispatch.plan import Plan, PlanCache
from vllm_accel.dispatch.settings import ATTENTION, settings
from vllm_accel.dispatch.spec import Feature
from vllm_accel.ops import selftest
from vllm_accel.ops.arguments import LENGTHS, AttentionSizes, Options, describe, length_kind, spec_of
from vllm_accel.ops.autograd import AttentionFunction
from vllm_accel.ops.empty import EMPTY
from vllm_accel.ops.extras import NO_EXTRAS, Extras, check_lengths, present

FAMILY = OpFamily(
    name="attention",
    make_spec=spec_of,
    self_test=selftest.batch_invariance,
)
PLANS: PlanCache[Plan] = PlanCache()

Result = Tensor | tuple[Tensor, Tensor]


def asked_for(backend: object, overridden: override.Request) -> tuple[tuple[str, ...] | None, str]:
    """Return the backends that a call asks for, and what asked: the argument, the context, the environment."""
    if backend is not None:
        return registry.resolve("attention", backend), "backend="
    if overridden is not None:
        return overridden, "use_backend"
    return settings().request("attention"), ATTENTION


def make_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    options: Options,
    lengths: tuple[int, int] | None,
    grad: int,
    backend: object,
    overridden: override.Request,
) -> tuple[Plan, bool]:
    """Check the call, choose and bind a backend.

    Returns:
        The plan, and whether it may be kept (not when made while a CUDA graph is captured).

    Raises:
        ValueError, TypeError: a wrong argument. UnsupportedCallError, BackendUnavailableError: nothing can run it.
    """
    max_q, max_k = lengths or (None, None)
    described = describe(q, k, v, extras, options, max_q, max_k, grad)
    asked, asked_by = asked_for(backend, overridden)
    device, on_gpu = q.device, q.is_cuda
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    guard, kin = tensor_guard(q, k, v, *present(extras)), None
    guards: tuple[Guard, ...] = ()
    checks_values = lengths is not None and (q.is_cpu or settings().check)
    copies = q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1
    direct = not (grad or checks_values or copies)
    if described.empty:
        kernel, name, spec, where = EMPTY, "empty", FAMILY.make_spec(described.kind), detect(device)
    else:
        bound, question = choose(FAMILY, described.kind, device, asked, asked_by, described.sizes, capturing)
        kernel, name, spec, where, guards = bound.kernel, bound.name, question.spec, question.device, bound.guards
        if on_gpu and not bound.capture_safe:
            guard = outside_capture(guard)
        elif direct and extras is NO_EXTRAS:
            kin = kin_of(q, k, v)
    plan = Plan(
        check=guard,
        forward=_forward_of(kernel, copies, q, k, v, described.args),
        args=described.args,
        direct=direct,
        grad=bool(grad),
        copies=copies,
        kernel=kernel,
        backend=name,
        spec=spec,
        device=where,
        explicit=asked is not None,
        kin=kin,
        bucket=described.kind[LENGTHS],
        guards=guards,
    )
    return plan, not capturing


def other_lengths(last: Plan, options: Any, q: Tensor, k: Tensor, v: Tensor) -> Plan | None:
    """Return the plan for tensors that the last plan of these options does not fit: a known one, or a stretched one."""
    try:
        shapes = (q.shape, k.shape)
        plan = PLANS.find(options, shapes, (q, k, v))
        if plan is None and (plan := _stretched(last, q, k, v)) is not None:
            PLANS.add(options, shapes, plan)
    except (AttributeError, TypeError, RuntimeError):  # not plain tensors: named by `describe` and `redirect`
        return None
    return plan


def _stretched(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Plan | None:
    """Make the plan of a dense call from that of a call which differs in lengths within one bucket, else None.

    A decode comes here once a step: one check in C++ stands for everything that `make_plan` looks at but lengths.
    """
    kin = plan.kin
    if kin is None or not kin.check(q, k, v) or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    batch, seqlen_q, _, _ = q.shape
    batch_k, seqlen_k, _, _ = k.shape
    batch_v, seqlen_v, _, _ = v.shape
    if not batch == batch_k == batch_v or seqlen_k != seqlen_v:
        return None
    if length_kind(batch, seqlen_q, seqlen_k) != plan.bucket:
        return None
    if plan.guards and refusals(plan.guards, plan.spec, AttentionSizes(batch, seqlen_q, seqlen_k)):
        return None
    args = plan.args
    args = _new(AttentionArgs, (*args[:_MAX_SEQLEN_Q], seqlen_q, seqlen_k, *args[_MAX_SEQLEN_Q + 2 :]))
    other = plan.at_other_lengths(kin.guard(q, k, v), args)
    if hasattr(plan.kernel, "prepare"):
        other.forward = _forward_of(plan.kernel, False, q, k, v, args)
    return other


def _forward_of(kernel: Any, copies: bool, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> Callable[..., Any]:
    """Return what a plan calls: the kernel's forward, or what its `prepare` makes of the exact sizes and strides."""
    prepare = None if copies else getattr(kernel, "prepare", None)  # copies have other strides
    forward: Callable[..., Any] = kernel.forward if prepare is None else prepare(q, k, v, args)
    return on_device(forward, q.device) if q.is_cuda and torch.cuda.device_count() > 1 else forward


_MAX_SEQLEN_Q = AttentionArgs._fields.index("max_seqlen_q")
_new = tuple.__new__


def execute(plan: Plan, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, return_lse: bool) -> Result:
    """Run a plan: values checked where the call says so, gradients recorded where one is needed."""
    if args.cu_seqlens_q is not None and not plan.direct and (q.device.type == "cpu" or settings().check):
        check_lengths(args, q.shape[0], k.shape[0])
    if plan.copies:
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if plan.grad:
        out, lse = AttentionFunction.apply(  # type: ignore[no-untyped-call]
            q, k, v, args.attn_bias, args.sinks, plan, args, return_lse
        )
    else:
        out, lse, _ = plan.forward(q, k, v, args)
    return (out, lse) if return_lse else out


def may_fall_back(plan: Plan, error: Exception, op: str = "attention") -> bool:
    """Quarantine the backend of a plan that failed at launch, if another one may run the call instead.

    Not for out of memory, wrong arguments, an explicit or reproducible choice, or an error that has poisoned the
    CUDA context (SPEC 4.6). True means: make another plan and run again.
    """
    if plan.explicit or plan.backend == "empty":
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, ValueError, TypeError)):
        return False
    if plan.spec.features & (Feature.DETERMINISTIC | Feature.BATCH_INVARIANT):
        return False
    if plan.device.type == "cuda" and _poisoned(error):
        return False
    quarantine.put(op, plan.backend, plan.spec, plan.device, error)
    return True


def _poisoned(error: Exception) -> bool:
    """Tell whether CUDA reported an error that every later call on this context repeats."""
    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        return True
    text = str(error)
    return "CUDA error" in text and "no kernel image" not in text and "invalid configuration" not in text


def outside_capture(guard: TensorGuard) -> TensorGuard:
    """Keep a plan from being taken while a CUDA graph is captured: its backend is not safe there."""
    return lambda *tensors: guard(*tensors) and not torch.cuda.is_current_stream_capturing()


def on_device(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Launch on the tensors' device: kernels that are not torch's own use the current one."""
    index = device.index

    @functools.wraps(forward)
    def launch(*args: Any) -> Any:
        if torch.cuda.current_device() == index:
            return forward(*args)
        with torch.cuda.device(index):
            return forward(*args)

    return launch
