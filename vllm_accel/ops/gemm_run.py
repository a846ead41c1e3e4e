"""Find or make the plan of a matrix product and run it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vllm_accel.dispatch import override, registry
from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.choose import OpFamily, choose
from vllm_accel.dispatch.device import detect
from vllm_accel.dispatch.gemm_spec import Form
from vllm_accel.dispatch.guard import tensor_guard
from vllm_accel.dispatch.plan import Plan, PlanCache
from vllm_accel.dispatch.settings import GEMM, settings
from vllm_accel.dispatch.spec import Feature
from vllm_accel.ops import gemm_selftest, gemm_transforms
from vllm_accel.ops.gemm_arguments import Described, GemmOptions, check_offs, describe, spec_of
from vllm_accel.ops.gemm_empty import EMPTY
from vllm_accel.ops.run import may_fall_back, on_device, outside_capture

FAMILY = OpFamily(name="gemm", make_spec=spec_of)
PLANS: PlanCache[Plan] = PlanCache()

_overridden = override.variable("gemm").get
_grad_enabled = torch.is_grad_enabled
_new = tuple.__new__
_PROVEN = Feature.DETERMINISTIC | Feature.BATCH_INVARIANT


def asked_for(backend: object, overridden: override.Request) -> tuple[tuple[str, ...] | None, str]:
    """Return the backends that a call asks for, and what asked: the argument, the context, the environment."""
    if backend is not None:
        return registry.resolve("gemm", backend), "backend="
    if overridden is not None:
        return overridden, "use_backend"
    return settings().request("gemm"), GEMM


def family_of(spec: Any) -> OpFamily:
    """Return the operation for a kind of call, with the proof of its bits where it asks for one."""
    if not spec.features & _PROVEN:
        return FAMILY
    proof = functools.partial(gemm_selftest.same_bits, spec)
    return OpFamily(name="gemm", make_spec=spec_of, self_test=proof)


def bound_to(
    described: Described, device: torch.device, asked: tuple[str, ...] | None, asked_by: str, capturing: bool
) -> Any:
    """Choose and bind; returns what `choose` does."""
    family = family_of(spec_of(described.kind))
    return choose(family, described.kind, device, asked, asked_by, described.sizes, capturing)


def product(
    a: Tensor, b: Tensor, args: GemmArgs, options: GemmOptions, backend: Any, checked: bool = False, key: Any = None
) -> Tensor:
    """Run a product of eager tensors.

    Args:
        a, b, args: tensors. options, backend: hashable. checked: the values of offs are known to be in order.
        key: under which a plan is kept; it says as much as options, backend, and which tensors are given.

    Raises:
        ValueError, TypeError: a wrong argument. UnsupportedCallError, BackendUnavailableError: nothing can run it.
    """
    if key is None:
        key = _key(args, options, backend, checked, _grad_enabled())
    try:
        plan = _known(key, a, b, args)
    except (AttributeError, TypeError, RuntimeError):  # not plain tensors: named below
        plan = None
    if plan is None or forward_ad._current_level >= 0:
        special = gemm_transforms.look(a, b, args)
        if special == "traced":
            from vllm_accel.ops import gemm_compiled

            return gemm_compiled.product(a, b, args, options, backend)
        if special is not None:
            return _autocast(special, a, b, args, options, backend, checked)
        if plan is None:
            grad = needs_grad(a, b, args.bias, args.scale_a, args.scale_b)
            plan = _make_plan(a, b, args, options, backend, checked, key, grad)
    try:
        return plan.forward(a, b, args) if plan.direct else _execute(plan, a, b, args, options)
    except Exception as error:
        if not may_fall_back(plan, error, "gemm"):
            raise
    return product(a, b, args, options, backend, checked, key)


def run_traced(a: Tensor, b: Tensor, args: GemmArgs, options: GemmOptions, backend: Any, grad: bool) -> Tensor:
    """Run a product below autograd, as the registered operator does; `grad`: a gradient will be wanted."""
    key = _key(args, options, backend, False, "operator with gradients" if grad else "operator")
    plan = _known(key, a, b, args)
    if plan is None:
        plan = _make_plan(a, b, args, options, backend, False, key, grad)
    try:
        with torch.autocast(a.device.type, enabled=False):
            out: Tensor = plan.forward(a, b, args)
            return out
    except Exception as error:
        if not may_fall_back(plan, error, "gemm"):
            raise
    return run_traced(a, b, args, options, backend, grad)


def _key(args: GemmArgs, options: GemmOptions, backend: Any, checked: bool, mode: object) -> tuple[object, ...]:
    offs, bias, scale_a, _, _ = args
    return options, backend, _overridden(), mode, checked, offs is None, bias is None, scale_a is None


def _known(key: Any, a: Tensor, b: Tensor, args: GemmArgs) -> Plan | None:
    """Return the plan of a call, if there is one."""
    given = [t for t in args[:-1] if t is not None]
    plan = PLANS.last.get(key)
    if plan is None or not plan.check(a, b, *given):
        return PLANS.find(key, (a.shape, b.shape), (a, b, *given))
    return plan


def needs_grad(*tensors: Tensor | None) -> bool:
    """Tell whether a gradient has to be recorded."""
    return _grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _make_plan(
    a: Tensor, b: Tensor, args: GemmArgs, options: GemmOptions, backend: Any, checked: bool, key: Any, grad: bool
) -> Plan:
    """Check the call, choose and bind a backend; keep the plan, unless a CUDA graph is being captured."""
    described = describe(a, b, args, options, grad)
    asked, asked_by = asked_for(backend, _overridden())
    on_gpu = a.is_cuda
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    guard = tensor_guard(a, b, *(t for t in args[:-1] if t is not None))
    checks = args.offs is not None and not checked and (a.is_cpu or settings().check)
    kernel: Any = None
    if described.empty:
        spec = spec_of(described.kind)
        kernel, name, where = EMPTY.at(spec), "empty", detect(a.device)
    else:
        bound, question = bound_to(described, a.device, asked, asked_by, capturing)
        kernel, name, spec, where = bound.kernel, bound.name, question.spec, question.device
        if on_gpu and not bound.capture_safe:
            guard = outside_capture(guard)
    prepare = getattr(kernel, "prepare", None)
    forward = kernel.forward if prepare is None else prepare(a, b, args)
    if on_gpu and torch.cuda.device_count() > 1:
        forward = on_device(forward, a.device)
    if checks:
        forward = _with_checked_ends(forward, a.shape[1] if options.form is Form.GROUPED_K else a.shape[0])
    plan = Plan(
        check=guard, forward=forward, args=args[:0], direct=not grad, grad=grad, copies=False,
        kernel=kernel, backend=name, spec=spec, device=where, explicit=asked is not None,
    )  # fmt: skip
    if not capturing:
        PLANS.add(key, (a.shape, b.shape), plan)
    return plan


def _with_checked_ends(forward: Callable[..., Tensor], rows: int) -> Callable[..., Tensor]:
    """Look at the values of offs before each call; `rows` is how many they divide, the same in all calls of a plan."""

    def checked(a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        assert args.offs is not None
        check_offs(args.offs, rows)
        return forward(a, b, args)

    return checked


def _autocast(
    dtype: torch.dtype, a: Tensor, b: Tensor, args: GemmArgs, options: GemmOptions, backend: Any, checked: bool
) -> Tensor:
    """Cast as `torch.matmul` does under autocast, then run with autocast off."""
    if args.bias is not None:
        args = args._replace(bias=args.bias.to(options.out_dtype or dtype))
    with torch.autocast(a.device.type, enabled=False):
        return product(a.to(dtype), b.to(dtype), args, options, backend, checked)


def _execute(plan: Plan, a: Tensor, b: Tensor, args: GemmArgs, options: GemmOptions) -> Tensor:
    from vllm_accel.ops.gemm_autograd import GemmFunction

    found: Tensor = GemmFunction.apply(a, b, args.bias, plan, args, options)  # type: ignore[no-untyped-call]
    return found
