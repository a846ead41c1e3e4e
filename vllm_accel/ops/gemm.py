"""The public matrix products: dense, by groups, and of quantised operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vllm_accel.dispatch import override
from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.gemm_spec import Form, Scaling
from vllm_accel.dispatch.plan import Plan
from vllm_accel.ops import gemm_compiled
from vllm_accel.ops.gemm_arguments import GemmOptions, canonical_scale, form_of, scaling_of
from vllm_accel.ops.gemm_run import PLANS, needs_grad, product
from vllm_accel.ops.run import may_fall_back

# Bound once: each of these is looked up on every call.
_last_plan = PLANS.last.get
_overridden = override.variable("gemm").get
_grad_enabled = torch.is_grad_enabled
_tracing = torch.compiler.is_compiling
_new = tuple.__new__
_NO_ARGS = GemmArgs()
Backend = str | Sequence[str] | None


def gemm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: Backend = None,
) -> Tensor:
    """Multiply two matrices: ``a @ b + bias``, differentiable.

    Args:
        a: (M, K). b: (K, N), same dtype and device: fp16, bf16, fp32 or fp64; any strides.
        bias: (N,) in the result's dtype.
        out_dtype: of the result, a's by default; float32 for 16-bit a and b.
        deterministic: the same bits on every run. batch_invariant: the bits of a row do not depend on M or on the
            other rows. Both only on backends that passed a bitwise self-test on this device.
        backend: a name, alias or family, or a sequence of them: the first that can run, or an error.

    Returns:
        (M, N), new and contiguous. Sums are in fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or devices, before any launch.
        UnsupportedCallError, BackendUnavailableError: as `attention`.
    """
    key: Any = None
    args = _NO_ARGS if bias is None else _new(GemmArgs, (None, bias, None, None, False))
    if not _tracing():
        key = ("gemm", out_dtype, deterministic, batch_invariant, backend, _overridden(), _grad_enabled(), bias is None)
        plan = _hit(key, a, b) if bias is None else _hit(key, a, b, bias)
        if plan is not None:
            try:
                out: Tensor = plan.forward(a, b, args)
                return out
            except Exception as error:
                if not may_fall_back(plan, error, "gemm"):
                    raise
    options = GemmOptions(Form.DENSE, Scaling.NONE, Scaling.NONE, out_dtype, deterministic, batch_invariant)
    return _run(a, b, args, options, backend, key)


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: Backend = None,
) -> Tensor:
    """Multiply group by group, as `torch.nn.functional.grouped_mm` does: tokens by expert; differentiable.

    Args:
        a, b: (T, K) and (E, K, N): the rows of group e, which end at ``offs[e]``, times ``b[e]``.
            (M, T) and (T, N): a product for each group of the summed dimension, as the gradient of weights needs it.
            (E, M, K) and (E, K, N): one product each, without offs. Any strides, any sizes; 0 is fine.
        offs: int32 (E,), ends of the groups, no leading zero, on a's device. Rows past ``offs[-1]`` give 0.
        bias: (E, N) in the result's dtype; not for the second form.
        The others: as `gemm`.

    Returns:
        (T, N), (E, M, N) or (E, M, N), new and contiguous.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or devices, before any launch. The values of offs are checked when
        they are on the CPU, on a GPU with VLLM_ACCEL_CHECK=1. The others: as `gemm`.
    """
    key: Any = None
    if not _tracing():
        key = (
            "grouped_gemm", out_dtype, deterministic, batch_invariant, backend, _overridden(), _grad_enabled(),
            offs is None, bias is None,
        )  # fmt: skip
        if bias is None:
            plan = _hit(key, a, b) if offs is None else _hit(key, a, b, offs)
        else:
            plan = _hit(key, a, b, bias) if offs is None else _hit(key, a, b, offs, bias)
        if plan is not None:
            try:
                out: Tensor = plan.forward(a, b, _new(GemmArgs, (offs, bias, None, None, False)))
                return out
            except Exception as error:
                if not may_fall_back(plan, error, "gemm"):
                    raise
    options = GemmOptions(form_of(a, b), Scaling.NONE, Scaling.NONE, out_dtype, deterministic, batch_invariant)
    return _run(a, b, GemmArgs(_contiguous(offs), bias), options, backend, key)


def scaled_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_recipe_a: object,
    scale_b: Tensor,
    scale_recipe_b: object,
    *,
    bias: Tensor | None = None,
    offs: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.bfloat16,
    deterministic: bool = False,
    batch_invariant: bool = False,
    backend: Backend = None,
) -> Tensor:
    """Multiply quantised operands, as `torch.nn.functional.scaled_mm` and `scaled_grouped_mm` do.

    Args:
        a: (M, K), float8_e4m3fn, float8_e5m2 or int8. b: (K, N) (usually the transposed view of weights (N, K)); or, by
            groups, a (T, K) with b (E, K, N) and offs, or (E, M, K) with (E, K, N).
        scale_a, scale_b: fp32 factors, value = stored * factor; see `Scaling` for shapes. `quantize_fp8` makes them.
        scale_recipe_a, scale_recipe_b: what a factor covers: ``"tensor"``, ``"row"``, ``"1x128"``, ``"128x128"``, a
            `Scaling`, or torch's ScalingType. Each backend says which pairs it does.
        bias: (N,) or (E, N) in the result's dtype. output_dtype: bfloat16, float16 or float32.
        offs and the others: as `grouped_gemm`.

    Returns:
        The product in output_dtype, new and contiguous; not differentiable.

    Raises:
        NotImplementedError: an argument requires a gradient. The others: as `grouped_gemm`.
    """
    key: Any = None
    if not _tracing():
        key = (
            "scaled_gemm", scale_recipe_a, scale_recipe_b, output_dtype, deterministic, batch_invariant, backend,
            _overridden(), _grad_enabled(), offs is None, bias is None,
        )  # fmt: skip
        # Factors that fit here have the shapes that kernels see: nothing is left to bring into form.
        if offs is None:
            plan = _hit(key, a, b, scale_a, scale_b) if bias is None else _hit(key, a, b, bias, scale_a, scale_b)
        elif bias is None:
            plan = _hit(key, a, b, offs, scale_a, scale_b)
        else:
            plan = _hit(key, a, b, offs, bias, scale_a, scale_b)
        if plan is not None:
            try:
                out: Tensor = plan.forward(a, b, _new(GemmArgs, (offs, bias, scale_a, scale_b, False)))
                return out
            except Exception as error:
                if not may_fall_back(plan, error, "gemm"):
                    raise
    args, options = scaled_arguments(
        a, b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, bias, offs, output_dtype, deterministic, batch_invariant
    )
    if needs_grad(bias, args.scale_a, args.scale_b):
        raise NotImplementedError("scaled_gemm has no derivative; detach() the bias and the factors")
    return _run(a, b, args, options, backend, key)


def scaled_arguments(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_recipe_a: object,
    scale_b: Tensor,
    scale_recipe_b: object,
    bias: Tensor | None,
    offs: Tensor | None,
    output_dtype: torch.dtype | None,
    deterministic: bool,
    batch_invariant: bool,
) -> tuple[GemmArgs, GemmOptions]:
    """Return the arguments of `scaled_gemm` as kernels and dispatch see them.

    Raises:
        ValueError, TypeError: a recipe that does not exist, or an operand of another number of dimensions.
    """
    recipe_a = scaling_of(scale_recipe_a, "scale_recipe_a")
    recipe_b = scaling_of(scale_recipe_b, "scale_recipe_b")
    form = Form.DENSE if offs is None and a.dim() == b.dim() == 2 else form_of(a, b)
    lead_b = (b.shape[0],) if b.dim() == 3 else ()
    lead_a = lead_b if form is Form.BATCHED else ()
    scale_a = canonical_scale(scale_a, recipe_a, a.shape[-2:], lead_a, True)
    scale_b = canonical_scale(scale_b, recipe_b, b.shape[-2:], lead_b, False)
    options = GemmOptions(form, recipe_a, recipe_b, output_dtype, deterministic, batch_invariant)
    return GemmArgs(_contiguous(offs), bias, scale_a, scale_b), options


def arguments(**given: Any) -> tuple[GemmArgs, GemmOptions]:
    """Return the arguments of any product here, from all of its own (but the backend) by name."""
    if "scale_recipe_a" in given:
        return scaled_arguments(**given)
    form = form_of(given["a"], given["b"]) if "offs" in given else Form.DENSE
    flags = (given["out_dtype"], given["deterministic"], given["batch_invariant"])
    args = GemmArgs(_contiguous(given.get("offs")), given["bias"])
    return args, GemmOptions(form, Scaling.NONE, Scaling.NONE, *flags)


def _hit(key: Any, *tensors: Any) -> Plan | None:
    """Return the last plan of a kind of call if it is for these tensors and leaves nothing to do but to run it."""
    try:
        plan = _last_plan(key)
        if plan is not None and plan.direct and plan.check(*tensors) and forward_ad._current_level < 0:
            return plan
    except (AttributeError, TypeError, RuntimeError):  # a list of backends, or not plain tensors: named later
        pass
    return None


def _run(a: Tensor, b: Tensor, args: GemmArgs, options: GemmOptions, backend: Backend, key: Any) -> Tensor:
    if key is None:
        return gemm_compiled.product(a, b, args, options, backend)
    try:
        hash(key)
    except TypeError:  # a list of backends or recipes
        key = None
    return product(a, b, args, options, tuple(backend) if isinstance(backend, list) else backend, key=key)


def _contiguous(offs: Tensor | None) -> Tensor | None:
    return offs if offs is None or offs.is_contiguous() else offs.contiguous()
