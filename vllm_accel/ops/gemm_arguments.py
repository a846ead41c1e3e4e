"""Check a matrix product once and describe its kind: everything here runs only where no plan is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.gemm_spec import Form, GemmSizes, GemmSpec, Layout, Scaling
from vllm_accel.dispatch.spec import Feature, bucket

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


class GemmOptions(NamedTuple):
    """What a caller asks of a product beside its tensors; hashable.

    scaling_a, scaling_b: as the caller named them, resolved by `scaling_of`. out_dtype: None is a's.
    """

    form: Form
    scaling_a: Any = Scaling.NONE
    scaling_b: Any = Scaling.NONE
    out_dtype: torch.dtype | None = None
    deterministic: bool = False
    batch_invariant: bool = False


class Described(NamedTuple):
    """A checked product: the fields of its spec, exact sizes, and whether there is nothing to multiply."""

    kind: tuple[Any, ...]
    sizes: GemmSizes
    empty: bool


def spec_of(kind: tuple[Any, ...]) -> GemmSpec:
    """Build the spec of a kind."""
    return GemmSpec(*kind)


def scaling_of(recipe: object, what: str) -> Scaling:
    """Return the scaling that a caller names: a `Scaling`, its value ("row", "1x128"), or torch's ScalingType.

    Raises:
        ValueError: no such scaling. TypeError: a list of recipes, or something else.
    """
    if isinstance(recipe, Scaling):
        return recipe
    if isinstance(recipe, (list, tuple)) and len(recipe) == 1:
        return scaling_of(recipe[0], what)
    named = recipe if isinstance(recipe, str) else _TORCH_NAMES.get(getattr(recipe, "name", ""))
    for scaling in Scaling:
        if named is not None and scaling.value.lower() == named.lower():
            return scaling
    allowed = ", ".join(repr(scaling.value) for scaling in Scaling if scaling is not Scaling.NONE)
    kind = ValueError if isinstance(recipe, str) or hasattr(recipe, "name") else TypeError
    raise kind(f"{what}={recipe!r} is not a scaling; use {allowed}, or torch's ScalingType of the same meaning")


_TORCH_NAMES = {"TensorWise": "tensor", "RowWise": "row", "BlockWise1x128": "1x128", "BlockWise128x128": "128x128"}


def describe(a: Tensor, b: Tensor, args: GemmArgs, options: GemmOptions, grad: bool) -> Described:
    """Check a product and describe its kind.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    form = options.form
    m, n, k, groups = _sizes(a, b, form)
    scaled = options.scaling_a is not Scaling.NONE
    out_dtype = _dtypes(a, b, options.out_dtype, scaled)
    _same_device(a, {"b": b, "offs": args.offs, "bias": args.bias, "scale_a": args.scale_a, "scale_b": args.scale_b})
    _offs(args.offs, form, groups)
    if form is Form.GROUPED_K and args.offs is not None:
        groups = args.offs.shape[0]
    if args.bias is not None:
        _bias(args.bias, form, groups, n, out_dtype)
    if scaled:
        _scales(a, b, args, options, groups)
    features = Feature(0)
    flags = (
        (args.bias is not None, Feature.BIAS), (grad, Feature.GRAD), (options.deterministic, Feature.DETERMINISTIC),
        (options.batch_invariant, Feature.BATCH_INVARIANT),
    )  # fmt: skip
    for given, flag in flags:
        features |= flag if given else Feature(0)
    kind = (
        form, a.dtype, b.dtype, out_dtype, bucket(m), bucket(n), bucket(k), groups, features, options.scaling_a,
        options.scaling_b, layout_of(a), layout_of(b),
    )  # fmt: skip
    sizes = GemmSizes(m, n, k, groups, tuple(a.shape), a.stride(), tuple(b.shape), b.stride())
    outs = m * n * (groups if form in (Form.GROUPED_K, Form.BATCHED) else 1)
    return Described(kind, sizes, outs == 0 or k == 0 or (groups == 0 and form is not Form.DENSE))


def layout_of(t: Tensor) -> Layout:
    """Return the memory order of the last two dimensions."""
    if t.stride(-1) == 1:
        return Layout.ROW
    return Layout.COLUMN if t.stride(-2) == 1 else Layout.STRIDED


def form_of(a: Tensor, b: Tensor) -> Form:
    """Return which grouped product the numbers of dimensions ask for.

    Raises:
        ValueError: none.
    """
    found = {(2, 3): Form.GROUPED_M, (2, 2): Form.GROUPED_K, (3, 3): Form.BATCHED}.get((a.dim(), b.dim()))
    if found is None:
        raise ValueError(
            "a and b must be (T, K) and (E, K, N), or (M, T) and (T, N) for a weight gradient, or (E, M, K) and "
            f"(E, K, N); got a {tuple(a.shape)}, b {tuple(b.shape)}"
        )
    return found


_SHAPES = {
    Form.DENSE: (2, 2, "a must be (M, K) and b (K, N)"),
    Form.GROUPED_M: (2, 3, "a must be (T, K) and b (E, K, N)"),
    Form.GROUPED_K: (2, 2, "a must be (M, T) and b (T, N)"),
    Form.BATCHED: (3, 3, "a must be (E, M, K) and b (E, K, N)"),
}


def _sizes(a: Tensor, b: Tensor, form: Form) -> tuple[int, int, int, int]:
    dims_a, dims_b, text = _SHAPES[form]
    fits = a.dim() == dims_a and b.dim() == dims_b and a.shape[-1] == b.shape[-2]
    if not fits or (form is Form.BATCHED and a.shape[0] != b.shape[0]):
        raise ValueError(f"{text}; got a {tuple(a.shape)}, b {tuple(b.shape)}")
    groups = b.shape[0] if dims_b == 3 else 0
    return a.shape[-2], b.shape[-1], a.shape[-1], groups


def _dtypes(a: Tensor, b: Tensor, wanted: torch.dtype | None, scaled: bool) -> torch.dtype:
    if scaled:
        if (
            a.dtype not in _QUANTISED
            or b.dtype not in _QUANTISED
            or (torch.int8 in (a.dtype, b.dtype)) != (a.dtype is b.dtype is torch.int8)
        ):
            raise TypeError(
                f"a and b must be float8_e4m3fn or float8_e5m2 each, or int8 both; got {a.dtype}, {b.dtype}"
            )
        out = wanted or torch.bfloat16
        if out not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"output_dtype must be bfloat16, float16 or float32; got {out}")
        return out
    if a.dtype is not b.dtype:
        raise TypeError(f"a and b must have one dtype; got {a.dtype}, {b.dtype}")
    if a.dtype in _QUANTISED:
        raise TypeError(f"a and b are {a.dtype}, which needs factors: scaled_gemm")
    out = wanted or a.dtype
    if out is not a.dtype and not (out is torch.float32 and a.dtype in (torch.float16, torch.bfloat16)):
        raise TypeError(f"out_dtype must be {a.dtype}, or float32 for 16-bit a; got {out}")
    return out


def _same_device(a: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != a.device:
            raise ValueError(f"{name} must be on a's device {a.device}; got {tensor.device}")


def _offs(offs: Tensor | None, form: Form, groups: int) -> None:
    if form in (Form.DENSE, Form.BATCHED):
        if offs is not None:
            raise ValueError(f"offs belongs to grouped products; this one is {form.value}")
        return
    if offs is None:
        raise ValueError(f"offs is missing: int32, the end of each group; the product is {form.value}")
    if offs.dtype is not torch.int32:
        raise TypeError(f"offs must be int32; got {offs.dtype}")
    if offs.dim() != 1 or (form is Form.GROUPED_M and offs.shape[0] != groups):
        raise ValueError(f"offs must have shape {(groups,) if groups else '(E,)'}; got {tuple(offs.shape)}")


def _bias(bias: Tensor, form: Form, groups: int, n: int, out_dtype: torch.dtype) -> None:
    if form is Form.GROUPED_K:
        raise ValueError("bias does not go with (M, T) x (T, N) by groups")
    shape = (n,) if form is Form.DENSE else (groups, n)
    if tuple(bias.shape) != shape:
        raise ValueError(f"bias must have shape {shape}; got {tuple(bias.shape)}")
    if bias.dtype is not out_dtype:
        raise TypeError(f"bias must have the result's dtype {out_dtype}; got {bias.dtype}")


def _scales(a: Tensor, b: Tensor, args: GemmArgs, options: GemmOptions, groups: int) -> None:
    scaling_a, scaling_b, form = options.scaling_a, options.scaling_b, options.form
    if form is Form.GROUPED_K:
        raise ValueError("scaled products are (M, K) x (K, N), (T, K) x (E, K, N) or (E, M, K) x (E, K, N)")
    if scaling_b is Scaling.NONE or (form is Form.GROUPED_M and scaling_a is Scaling.BLOCK_128x128):
        raise ValueError(
            f"scale_recipe_a={scaling_a.value!r}, scale_recipe_b={scaling_b.value!r}: both are needed, and blocks of "
            "128 rows of a would cross the groups of (T, K) x (E, K, N)"
        )
    lead_a = (groups,) if form is Form.BATCHED else ()
    lead_b = (groups,) if form is not Form.DENSE else ()
    for name, scale, wanted in (
        ("scale_a", args.scale_a, factor_shape(a.shape[-2:], scaling_a, lead_a, True)),
        ("scale_b", args.scale_b, factor_shape(b.shape[-2:], scaling_b, lead_b, False)),
    ):
        if scale is None or scale.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32; got {scale if scale is None else scale.dtype}")
        if tuple(scale.shape) != wanted:
            raise ValueError(f"{name} must have shape {wanted} for this scaling; got {tuple(scale.shape)}")


def factor_shape(matrix: Sequence[int], scaling: Scaling, lead: tuple[int, ...], of_a: bool) -> tuple[int, ...]:
    """Return the shape of an operand's factors: `matrix` is (M, K) of a or (K, N) of b, `lead` the groups before it."""
    rows, columns = matrix
    if scaling is Scaling.TENSOR:
        return lead or (1,)
    if scaling is Scaling.ROW:
        return (*lead, rows if of_a else columns)
    blocks = (-(-rows // 128), -(-columns // 128))
    if scaling is Scaling.BLOCK_128x128:
        return (*lead, *blocks)
    return (*lead, rows, blocks[1]) if of_a else (*lead, blocks[0], columns)


def canonical_scale(scale: Any, scaling: Scaling, matrix: Sequence[int], lead: tuple[int, ...], of_a: bool) -> Any:
    """Bring factors in the forms that torch takes, too, into the one that kernels see; copies nothing.

    A scalar for any number of groups; (M, 1) and (1, N) for rows.
    """
    if isinstance(scale, (list, tuple)) and len(scale) == 1:
        scale = scale[0]
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale_{'a' if of_a else 'b'} must be a tensor, not {type(scale).__name__}")
    wanted = factor_shape(matrix, scaling, lead, of_a)
    if tuple(scale.shape) == wanted:
        return scale
    if scaling is Scaling.TENSOR and scale.numel() == 1:
        return scale.reshape(1).expand(wanted)
    one = (*wanted, 1) if of_a else (*wanted[:-1], 1, wanted[-1])
    return scale.reshape(wanted) if scaling is Scaling.ROW and tuple(scale.shape) == one else scale


def check_offs(offs: Tensor, rows: int) -> None:
    """Look at the values of offsets.

    Raises:
        ValueError: not in order, negative, or past the end.
    """
    ends = offs.tolist()
    before = 0
    for group, end in enumerate(ends):
        if end < before or end > rows:
            what = f"offs[{group}] = {end}"
            raise ValueError(f"{what}: group ends must not go down and must lie within 0..{rows}; got {_some(ends)}")
        before = end


def _some(values: list[int]) -> str:
    return str(values) if len(values) <= 16 else f"{str(values[:16])[:-1]}, ...]"
