"""Check a mixture-of-experts layer once and describe its kind."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import MoeArgs
from vllm_accel.dispatch.gemm_spec import Form, GemmSizes, Scaling
from vllm_accel.dispatch.spec import Feature, bucket
from vllm_accel.ops.gemm_arguments import Described, factor_shape, layout_of

#: Names that `activation` takes.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class MoeOptions(NamedTuple):
    """What a caller asks of a layer beside its tensors; hashable. scale_recipe: of quantised weights."""

    activation: str = "silu"
    scale_recipe: Scaling = Scaling.NONE
    deterministic: bool = False
    batch_invariant: bool = False


def describe_moe(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, args: MoeArgs, options: MoeOptions, grad: bool
) -> Described:
    """Check a layer and describe its kind.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    tokens, hidden, inner, experts, top_k = _sizes(x, w_gate_up, w_down, args)
    check_dtypes(x, w_gate_up, w_down, args, options)
    for name, tensor in {"w_gate_up": w_gate_up, "w_down": w_down, **args._asdict()}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {tensor.device}")
    if options.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {options.activation!r}")
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "bias_gate_up": (args.bias_gate_up, (experts, 2 * inner)),
        "bias_down": (args.bias_down, (experts, hidden)),
    }
    if options.scale_recipe is not Scaling.NONE:
        for name, scale, weights in (
            ("scale_gate_up", args.scale_gate_up, w_gate_up), ("scale_down", args.scale_down, w_down),
        ):  # fmt: skip
            shapes[name] = scale, factor_shape(weights.shape[-2:], options.scale_recipe, (experts,), False)
    for name, (given, shape) in shapes.items():
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(given.shape)}")
    features = Feature(0)
    flags = (
        (args.bias_gate_up is not None or args.bias_down is not None, Feature.BIAS), (grad, Feature.GRAD),
        (options.deterministic, Feature.DETERMINISTIC), (options.batch_invariant, Feature.BATCH_INVARIANT),
    )  # fmt: skip
    for given_flag, flag in flags:
        features |= flag if given_flag else Feature(0)
    kind = (
        Form.MOE, x.dtype, w_gate_up.dtype, x.dtype, bucket(tokens), bucket(hidden), bucket(inner), experts, features,
        Scaling.NONE, options.scale_recipe, layout_of(w_gate_up), layout_of(w_down), options.activation, top_k,
    )  # fmt: skip
    sizes = GemmSizes(
        tokens, hidden, inner, experts, tuple(w_gate_up.shape), w_gate_up.stride(), tuple(w_down.shape),
        w_down.stride(),
    )  # fmt: skip
    return Described(kind, sizes, min(tokens, hidden, inner, experts, top_k) == 0)


def _sizes(x: Tensor, w_gate_up: Tensor, w_down: Tensor, args: MoeArgs) -> tuple[int, int, int, int, int]:
    ids, weights = args.topk_ids, args.topk_weights
    if x.dim() != 2 or w_gate_up.dim() != 3 or w_down.dim() != 3:
        raise ValueError(
            "x must be (T, D), w_gate_up (E, D, 2I), w_down (E, I, D); got "
            f"{tuple(x.shape)}, {tuple(w_gate_up.shape)}, {tuple(w_down.shape)}"
        )
    (tokens, hidden), (experts, inner, _) = x.shape, w_down.shape
    if tuple(w_gate_up.shape) != (experts, hidden, 2 * inner) or w_down.shape[2] != hidden:
        raise ValueError(
            f"w_gate_up must be (E, D, 2I) and w_down (E, I, D) with D = {hidden} of x; got "
            f"{tuple(w_gate_up.shape)}, {tuple(w_down.shape)}"
        )
    if ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] != tokens:
        raise ValueError(
            f"topk_weights and topk_ids must be (T, k) with T = {tokens} of x; got {tuple(weights.shape)}, "
            f"{tuple(ids.shape)}"
        )
    return tokens, hidden, inner, experts, ids.shape[1]


def check_dtypes(x: Tensor, w_gate_up: Tensor, w_down: Tensor, args: MoeArgs, options: MoeOptions) -> None:
    """Look at everything but sizes, which may be symbols in a trace.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    if x.dtype not in _FLOATS:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64; got {x.dtype}")
    if args.topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids must be int32 or int64; got {args.topk_ids.dtype}")
    if args.topk_weights.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"topk_weights must be float32 or {x.dtype} as x; got {args.topk_weights.dtype}")
    scales: dict[str, Any] = {"scale_gate_up": args.scale_gate_up, "scale_down": args.scale_down}
    if options.scale_recipe is Scaling.NONE:
        if w_gate_up.dtype is not x.dtype or w_down.dtype is not x.dtype:
            raise TypeError(
                f"w_gate_up and w_down must be {x.dtype} as x (or quantised, with scale_gate_up, scale_down and "
                f"scale_recipe); got {w_gate_up.dtype}, {w_down.dtype}"
            )
        if any(scale is not None for scale in scales.values()):
            raise ValueError('scale_recipe is missing: "tensor", "row", "1x128" or "128x128"')
    else:
        if w_gate_up.dtype is not w_down.dtype or w_down.dtype not in (torch.float8_e4m3fn, torch.int8):
            raise TypeError(
                f"quantised weights must be float8_e4m3fn or int8 both; got {w_gate_up.dtype}, {w_down.dtype}"
            )
        if w_down.dtype is torch.int8 and options.scale_recipe not in (Scaling.TENSOR, Scaling.ROW):
            raise ValueError(f'scale_recipe of int8 weights is "tensor" or "row"; got {options.scale_recipe.value!r}')
        for name, scale in scales.items():
            if scale is None or scale.dtype is not torch.float32:
                raise TypeError(f"{name} must be float32; got {scale if scale is None else scale.dtype}")
    for name, bias in (("bias_gate_up", args.bias_gate_up), ("bias_down", args.bias_down)):
        if bias is not None and bias.dtype is not x.dtype:
            raise TypeError(f"{name} must be {x.dtype} as x; got {bias.dtype}")


def check_ids(topk_ids: Tensor, experts: int) -> None:
    """Look at the values of ids.

    Raises:
        ValueError: not in 0..E; E itself is nobody's.
    """
    if topk_ids.numel() == 0:
        return
    low, high = (int(n) for n in torch.aminmax(topk_ids))
    if low < 0 or high > experts:
        raise ValueError(
            f"topk_ids must be in 0..{experts - 1}, or {experts} for nobody's; got values from {low} to {high}"
        )
