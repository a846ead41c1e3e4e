"""Find or make the plan of a paged attention call and run it: what `run` is to dense calls, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vllm_accel.dispatch import override
from vllm_accel.dispatch.backend import PagedArgs
from vllm_accel.dispatch.choose import OpFamily, choose
from vllm_accel.dispatch.device import detect
from vllm_accel.dispatch.guard import Free, guard_but, tensor_guard
from vllm_accel.dispatch.plan import Plan, PlanCache
from vllm_accel.dispatch.settings import settings
from vllm_accel.dispatch.spec import ROUNDED_UP
from vllm_accel.ops import selftest
from vllm_accel.ops.arguments import spec_of
from vllm_accel.ops.empty import EMPTY_PAGED
from vllm_accel.ops.paged_arguments import PagedOptions, PagedTensors, check_paged_values, describe_paged
from vllm_accel.ops.run import Result, asked_for, may_fall_back, on_device, outside_capture
from vllm_accel.ops.transforms import refuse_transforms

#: Paged calls are the operation "attention", told apart by features; the same names and settings choose for them.
FAMILY = OpFamily(name="attention", make_spec=spec_of, self_test=selftest.paged_batch_invariance)
MLA_FAMILY = OpFamily(name="attention", make_spec=spec_of, self_test=selftest.mla_batch_invariance)
PLANS: PlanCache[Plan] = PlanCache()

#: The part of a key that says which optional tensors there are, where there is none.
NONE_GIVEN = ()
_grad_enabled = torch.is_grad_enabled
_overridden = override.variable("attention").get
_new = tuple.__new__
_NOTHING: frozenset[int] = frozenset()
#: Of q, the caches, cu_seqlens_q, block_table, seqused_k: a step changes the tokens and the width of the table.
_FREE: Free = (frozenset({0}), _NOTHING, _NOTHING, _NOTHING, frozenset({1}), _NOTHING)


def make_plan(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tensors: PagedTensors,
    options: PagedOptions,
    backend: object,
    overridden: override.Request,
) -> tuple[Plan, bool]:
    """Check the call, choose and bind a backend.

    Returns:
        The plan, whose args are the values of `PagedArgs` (tensors come with each call), and whether it may be kept.

    Raises:
        ValueError, TypeError: a wrong argument. UnsupportedCallError, BackendUnavailableError: nothing can run it.
    """
    described = describe_paged(q, k_cache, v_cache, tensors, options)
    asked, asked_by = asked_for(backend, overridden)
    device, on_gpu = q.device, q.is_cuda
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    given = (q, k_cache, v_cache, *present(tensors))
    if described.empty:
        check = tensor_guard(*given)
        kernel, name, spec, where = EMPTY_PAGED, "empty", spec_of(described.kind), detect(device)
    else:
        check = guard_but((*_FREE, *(_NOTHING,) * (len(given) - len(_FREE))), *given)
        family = MLA_FAMILY if options.mla else FAMILY
        bound, question = choose(family, described.kind, device, asked, asked_by, described.sizes, capturing)
        kernel, name, spec, where = bound.kernel, bound.name, question.spec, question.device
        if on_gpu and not bound.capture_safe:
            check = outside_capture(check)
    forward = kernel.forward
    if on_gpu and torch.cuda.device_count() > 1:
        forward = on_device(forward, device)
    copies = q.stride(-1) != 1
    plan = Plan(
        check=check, forward=forward, args=described.values,
        direct=not (copies or described.empty or q.is_cpu or settings().check), grad=False, copies=copies,
        kernel=kernel, backend=name, spec=spec, device=where, explicit=asked is not None,
    )  # fmt: skip
    return plan, not capturing


def present(tensors: PagedTensors) -> tuple[Tensor, ...]:
    """Return the tensors that are given; a factor that serves two of q, k and v counts once."""
    return _kinds(tensors)[1]


def _kinds(tensors: PagedTensors) -> tuple[tuple[bool, ...], tuple[Tensor, ...]]:
    """Return what a plan's key says of the tensors, and those that its guard looks at."""
    ends, table, used, slopes, sinks, q_descale, k_descale, v_descale = tensors
    if slopes is sinks is q_descale is k_descale is v_descale is None:
        return NONE_GIVEN, (ends, table, used)
    one, two, three = v_descale is k_descale, q_descale is k_descale, q_descale is v_descale
    given = (slopes is None, sinks is None, q_descale is None, k_descale is None, v_descale is None, one, two, three)
    differing = (slopes, sinks, k_descale, None if one else v_descale, None if two or three else q_descale)
    return given, (ends, table, used, *[t for t in differing if t is not None])


def run_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tensors: PagedTensors,
    options: PagedOptions,
    backend: object,
    traced: Callable[..., Any],
) -> Result:
    """Run a paged call; `traced` runs it instead for fake tensors."""
    if isinstance(options.window_size, list):
        options = options._replace(window_size=(*options.window_size,))
    if isinstance(backend, list):
        backend = tuple(backend)
    plan, key = None, None
    try:
        kinds, others = _kinds(tensors)
        most_q, most_k, *rest = options
        key = (
            *rest, backend, _overridden(), _grad_enabled(), ROUNDED_UP[most_q], ROUNDED_UP[most_k], q.shape[0] > 0,
            kinds,
        )  # fmt: skip
        given = (q, k_cache, v_cache, *others)
        plan = PLANS.last.get(key)
        if plan is None or not plan.check(*given):
            shapes = (q.shape[1:], k_cache.shape, v_cache.shape, tensors.seqused_k.shape)
            plan = PLANS.find(key, shapes, given)
    except (AttributeError, TypeError, RuntimeError):  # not plain tensors, or an option of a wrong type: named below
        plan = None
    if plan is None or forward_ad._current_level >= 0:
        names = ("q", "kv_cache" if options.mla else "k_cache", "v_cache")
        casts = refuse_transforms(dict(zip(names, (q, k_cache, v_cache), strict=True)), tensors)
        if casts == "traced":
            return traced(q, k_cache, v_cache, tensors, options, backend)  # type: ignore[no-any-return]
        if casts is not None:
            with torch.autocast(q.device.type, enabled=False):
                return run_paged(q.to(casts), k_cache, v_cache, tensors, options, backend, traced)
        plan, keep = make_plan(q, k_cache, v_cache, tensors, options, backend, _overridden())
        if keep:
            PLANS.add(key, (q.shape[1:], k_cache.shape, v_cache.shape, tensors.seqused_k.shape), plan)
    try:
        return execute(plan, q, k_cache, v_cache, tensors, options)
    except Exception as error:
        if not may_fall_back(plan, error):
            raise
    return run_paged(q, k_cache, v_cache, tensors, options, backend, traced)


def execute(
    plan: Plan, q: Tensor, k_cache: Tensor, v_cache: Tensor, tensors: PagedTensors, options: PagedOptions
) -> Result:
    """Run a plan, with values checked where the call says so and q copied where its layout asks for it."""
    if not plan.direct:
        if q.is_cpu or (settings().check and not (q.is_cuda and torch.cuda.is_current_stream_capturing())):
            check_paged_values(tensors, options, q.shape[0], k_cache.shape[0], k_cache.shape[1])
        if plan.copies:
            q = q.contiguous()
    out, lse = plan.forward(q, k_cache, v_cache, _new(PagedArgs, tensors + plan.args))
    return (out, lse) if options.return_lse else out
