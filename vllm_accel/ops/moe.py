"""A mixture-of-experts layer: two grouped products on the backend that the dispatch finds, or a backend's own layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vllm_accel.dispatch import override
from vllm_accel.dispatch.backend import GemmArgs, MoeArgs
from vllm_accel.dispatch.device import detect
from vllm_accel.dispatch.gemm_spec import Form, Scaling
from vllm_accel.dispatch.guard import tensor_guard
from vllm_accel.dispatch.plan import Plan, PlanCache
from vllm_accel.dispatch.settings import settings
from vllm_accel.ops import gemm_compiled, gemm_transforms
from vllm_accel.ops.gemm_arguments import GemmOptions, canonical_scale, scaling_of, spec_of
from vllm_accel.ops.gemm_run import asked_for, bound_to, needs_grad, product
from vllm_accel.ops.moe_arguments import MoeOptions, check_dtypes, check_ids, describe_moe
from vllm_accel.ops.run import may_fall_back, on_device, outside_capture

PLANS: PlanCache[Plan] = PlanCache()
_NO_DERIVATIVE = "fused_moe with quantised weights has no derivative; use torch.no_grad()"

_overridden = override.variable("gemm").get
_grad_enabled = torch.is_grad_enabled
_tracing = torch.compiler.is_compiling


def fused_moe(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    bias_gate_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    scale_gate_up: Tensor | None = None,
    scale_down: Tensor | None = None,
    scale_recipe: object = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: str | Sequence[str] | None = None,
) -> Tensor:
    """Send each token through its experts: route, two grouped products with an activation between, weighted sum.

    Row t of the result is the sum over its k experts e of ``weight * ((act(x @ gate_e) * (x @ up_e)) @ down_e)``; the
    weights multiply the experts' outputs and are not renormalised. Differentiable in x, weights, biases and
    topk_weights, unless the weights are quantised. Nothing is read on the host on a GPU.

    Args:
        x: (T, D). w_gate_up: (E, D, 2I), the gate first. w_down: (E, I, D). Any strides: weights stored as (E, 2I, D)
            are passed as ``w.mT``. Same dtype as x; or float8_e4m3fn or int8 with the factors below.
        topk_weights: (T, k), float32 or x's dtype. topk_ids: (T, k), int32 or int64, in 0..E-1; E is nobody's and
            adds nothing, as expert parallelism needs it.
        activation: of the gate: ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"``.
        bias_gate_up: (E, 2I). bias_down: (E, D). In x's dtype.
        scale_gate_up, scale_down: fp32 factors of quantised weights, as `scaled_gemm` takes them for b.
        scale_recipe: what they cover. Rows of x are quantised to match: 1x128 for blocks, else one factor a row.
        deterministic, batch_invariant, backend: as `grouped_gemm`; a token does not see the others.

    Returns:
        (T, D) in x's dtype, new and contiguous; sums over experts are in fp32.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or devices, before any launch. The values of topk_ids are checked
        when they are on the CPU, on a GPU with VLLM_ACCEL_CHECK=1; there ids outside of 0..E-1 add nothing.
        UnsupportedCallError, BackendUnavailableError: as `grouped_gemm`.
    """
    args, options = arguments(
        w_gate_up, w_down, topk_weights, topk_ids, activation, bias_gate_up, bias_down, scale_gate_up, scale_down,
        scale_recipe, deterministic, batch_invariant,
    )  # fmt: skip
    if _tracing():
        return _composed(x, w_gate_up, w_down, args, options, backend, gemm_compiled.product)
    return _run(x, w_gate_up, w_down, args, options, tuple(backend) if isinstance(backend, list) else backend)


def arguments(
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    bias_gate_up: Tensor | None,
    bias_down: Tensor | None,
    scale_gate_up: Tensor | None,
    scale_down: Tensor | None,
    scale_recipe: object,
    deterministic: bool,
    batch_invariant: bool,
) -> tuple[MoeArgs, MoeOptions]:
    """Return the arguments of `fused_moe` as kernels and dispatch see them.

    Raises:
        ValueError, TypeError: a recipe that does not exist.
    """
    recipe = Scaling.NONE if scale_recipe is None else scaling_of(scale_recipe, "scale_recipe")
    if recipe is not Scaling.NONE and scale_gate_up is not None and scale_down is not None:
        scale_gate_up, scale_down = (
            canonical_scale(scale, recipe, w.shape[-2:], (w.shape[0],), False)
            for scale, w in ((scale_gate_up, w_gate_up), (scale_down, w_down))
        )
    args = MoeArgs(topk_weights, topk_ids, bias_gate_up, bias_down, scale_gate_up, scale_down)
    return args, MoeOptions(activation, recipe, deterministic, batch_invariant)


def _run(x: Tensor, w_gate_up: Tensor, w_down: Tensor, args: MoeArgs, options: MoeOptions, backend: Any) -> Tensor:
    given = [t for t in args if t is not None]
    key = (options, backend, _overridden(), _grad_enabled(), *[t is None for t in args[2:]])
    shapes = (x.shape, args.topk_ids.shape)
    try:
        plan = PLANS.last.get(key)
        if plan is None or not plan.check(x, w_gate_up, w_down, *given):
            plan = PLANS.find(key, shapes, (x, w_gate_up, w_down, *given))
    except (AttributeError, TypeError, RuntimeError):  # not plain tensors: named below
        plan = None
    if plan is None or forward_ad._current_level >= 0:
        special = gemm_transforms.look(x, w_gate_up, GemmArgs(args.topk_ids, args.topk_weights))
        if special == "traced":
            return _composed(x, w_gate_up, w_down, args, options, backend, gemm_compiled.product)
        if special is not None and options.scale_recipe is Scaling.NONE:
            biases = (t if t is None else t.to(special) for t in (args.bias_gate_up, args.bias_down))
            bias_gate_up, bias_down = biases
            weights = args.topk_weights.float() if args.topk_weights.dtype is x.dtype else args.topk_weights
            args = args._replace(bias_gate_up=bias_gate_up, bias_down=bias_down, topk_weights=weights)
            with torch.autocast(x.device.type, enabled=False):
                return _run(x.to(special), w_gate_up.to(special), w_down.to(special), args, options, backend)
        if plan is None:
            plan = _make_plan(x, w_gate_up, w_down, args, options, backend, key, shapes)
    if x.is_cpu or settings().check:
        check_ids(args.topk_ids, w_down.shape[0])
    try:
        if plan.grad:
            name = None if plan.backend == "empty" else plan.backend
            return _composed(x, w_gate_up, w_down, args, options, name, product)
        out: Tensor = plan.forward(x, w_gate_up, w_down, args)
        return out
    except Exception as error:
        if not may_fall_back(plan, error, "gemm"):
            raise
    return _run(x, w_gate_up, w_down, args, options, backend)


def _make_plan(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, args: MoeArgs, options: MoeOptions, backend: Any, key: Any,
    shapes: Any,
) -> Plan:  # fmt: skip
    grad = needs_grad(x, w_gate_up, w_down, args.topk_weights, args.bias_gate_up, args.bias_down)
    described = describe_moe(x, w_gate_up, w_down, args, options, grad)
    if grad and options.scale_recipe is not Scaling.NONE:
        raise NotImplementedError(_NO_DERIVATIVE)
    asked, asked_by = asked_for(backend, _overridden())
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    guard = tensor_guard(x, w_gate_up, w_down, *(t for t in args if t is not None))
    kernel: Any = _EMPTY
    name, spec, where = "empty", spec_of(described.kind), detect(x.device)
    if not described.empty:
        bound, question = bound_to(described, x.device, asked, asked_by, capturing)
        kernel, name, spec, where = bound.kernel, bound.name, question.spec, question.device
        if x.is_cuda and not bound.capture_safe:
            guard = outside_capture(guard)
    forward = on_device(kernel.forward, x.device) if x.is_cuda and torch.cuda.device_count() > 1 else kernel.forward
    somebody = min(args.topk_ids.shape[1], w_down.shape[0]) > 0
    plan = Plan(
        check=guard, forward=forward, args=None, direct=not grad, grad=grad and somebody, copies=False,
        kernel=kernel, backend=name, spec=spec, device=where, explicit=asked is not None,
    )  # fmt: skip
    if not capturing:
        PLANS.add(key, shapes, plan)
    return plan


class _Empty:
    """The answer where there is no token, no expert, or nothing between the products."""

    def forward(self, x: Tensor, w_gate_up: Tensor, w_down: Tensor, args: MoeArgs) -> Tensor:
        bias, ids, experts = args.bias_down, args.topk_ids, w_down.shape[0]
        if bias is None or not experts:
            return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0).contiguous()
        valid = ((ids >= 0) & (ids < experts)).unsqueeze(-1)
        rows = bias[ids.clamp(0, experts - 1)] * args.topk_weights.unsqueeze(-1)
        return torch.where(valid, rows, 0).sum(1).to(x.dtype)


_EMPTY = _Empty()


def _composed(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    args: MoeArgs,
    options: MoeOptions,
    backend: Any,
    multiply: Callable[..., Tensor],
) -> Tensor:
    """Run the layer as differentiable operators, each product through the dispatch."""
    from vllm_accel.backends.gemm.moe import activations_of, quantised
    from vllm_accel.kernels.torch.moe import gated, mixture

    check_dtypes(x, w_gate_up, w_down, args, options)
    weights = options.scale_recipe
    if weights is not Scaling.NONE and needs_grad(x, args.topk_weights, args.bias_gate_up, args.bias_down):
        raise NotImplementedError(_NO_DERIVATIVE)
    rows_as = activations_of(weights)
    out_dtype = None if weights is Scaling.NONE else x.dtype
    flags = options.deterministic, options.batch_invariant
    grouped = GemmOptions(Form.GROUPED_M, rows_as, weights, out_dtype, *flags)

    def by(experts: Tensor, bias: Tensor | None, scale: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(rows: Tensor, ends: Tensor, order: Tensor) -> Tensor:
            scale_a = None
            if weights is not Scaling.NONE:
                rows, scale_a = quantised(rows, rows_as, experts.dtype)
            return multiply(rows, experts, GemmArgs(ends, bias, scale_a, scale), grouped, backend)

        return run

    return mixture(
        x, args.topk_weights, args.topk_ids, w_down.shape[0], by(w_gate_up, args.bias_gate_up, args.scale_gate_up),
        gated(options.activation), by(w_down, args.bias_down, args.scale_down),
    )  # fmt: skip
