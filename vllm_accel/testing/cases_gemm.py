"""The cases that every backend of matrix products is held against: small, each with the reason why it exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_accel.ops.quantize import quantize_fp8, quantize_int8

Layout = Literal["row", "column", "slice", "strided"]
_QUANTISED = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class GemmCase:
    """One matrix product.

    Attributes:
        name: unique. why: the rule or the public report that it guards.
        m, n, k: sizes; m is taken from `groups` for tokens by expert, k for a weight gradient.
        groups: rows of each group; None for a dense product. form: which product the groups make.
        tail: rows (or summed elements) past the last group, filled with NaN.
        bias: give one. grad: check gradients too. layout_a, layout_b: memory order.
        scaling: (of a, of b) for quantised operands. formats: their dtypes, "e4m3", "e5m2" or "int8".
        wide: ask for a float32 result. options: deterministic, batch_invariant.
    """

    name: str
    why: str
    m: int = 24
    n: int = 32
    k: int = 48
    groups: tuple[int, ...] | None = None
    form: Literal["rows", "summed", "batched"] = "rows"
    tail: int = 0
    bias: bool = False
    grad: bool = True
    layout_a: Layout = "row"
    layout_b: Layout = "row"
    scaling: tuple[str, str] | None = None
    formats: tuple[str, str] = ("e4m3", "e4m3")
    wide: bool = False
    options: tuple[str, ...] = ()

    @property
    def grouped(self) -> bool:
        """Tell whether the call is `grouped_gemm` or the grouped form of `scaled_gemm`."""
        return self.groups is not None

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> GemmInputs:
        """Draw the tensors of the case; the same numbers on every device."""
        g = torch.Generator().manual_seed(seed)
        shape_a, shape_b, bias_shape = self._shapes()
        a, b = (torch.randn(shape, generator=g) for shape in (shape_a, shape_b))
        kwargs: dict[str, Any] = dict.fromkeys(self.options, True)
        bias = torch.randn(bias_shape, generator=g).to(dtype).to(device) if self.bias else None
        if self.scaling is not None:
            return self._quantised(a, b, bias, dtype, device, kwargs)
        a, b = a.to(dtype), b.to(dtype)
        if self.tail:
            (a if self.form == "rows" else a.t())[-self.tail :] = float("nan")
            if self.form == "summed":
                b[-self.tail :] = float("nan")
        a, b = _laid_out(a.to(device), self.layout_a), _laid_out(b.to(device), self.layout_b)
        if bias is not None:
            kwargs["bias"] = bias.float() if self.wide else bias
        if self.wide:
            kwargs["out_dtype"] = torch.float32
        if self.groups is not None and self.form != "batched":
            kwargs["offs"] = self._offs(device)
        return GemmInputs(a, b, kwargs, self)

    def _offs(self, device: torch.device | str) -> Tensor:
        assert self.groups is not None
        return torch.tensor(self.groups, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        m, n, k = self.m, self.n, self.k
        if self.groups is None:
            return (m, k), (k, n), (n,)
        rows, count = sum(self.groups) + self.tail, len(self.groups)
        if self.form == "rows":
            return (rows, k), (count, k, n), (count, n)
        return ((m, rows), (rows, n), (0,)) if self.form == "summed" else ((count, m, k), (count, k, n), (count, n))

    def _quantised(
        self, a: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype, device: Any, kwargs: dict[str, Any]
    ) -> GemmInputs:
        assert self.scaling is not None
        found = []
        for x, scaling, name in zip((a, b.mT), self.scaling, self.formats, strict=True):
            if name == "int8":
                found.append(quantize_int8(x, scaling=scaling))
            else:
                found.append(quantize_fp8(x, scaling=scaling, dtype=_QUANTISED[name]))
        (a_values, a_factors), (b_values, b_factors) = found
        if self.scaling[1].endswith("128"):
            b_factors = b_factors.mT
        if self.tail and a_values.dtype is not torch.int8:
            a_values[-self.tail :] = torch.full((), float("nan")).to(a_values.dtype)
        kwargs |= {
            "scale_a": a_factors.to(device), "scale_recipe_a": self.scaling[0], "scale_b": b_factors.to(device),
            "scale_recipe_b": self.scaling[1], "output_dtype": torch.float32 if self.wide else dtype,
        }  # fmt: skip
        if bias is not None:
            kwargs["bias"] = bias.to(kwargs["output_dtype"])
        if self.groups is not None and self.form != "batched":
            kwargs["offs"] = self._offs(device)
        return GemmInputs(_laid_out(a_values.to(device), self.layout_a), b_values.to(device).mT, kwargs, self)


@dataclass(frozen=True, slots=True)
class GemmInputs:
    """The tensors and keyword arguments of one drawn case."""

    a: Tensor
    b: Tensor
    kwargs: dict[str, Any]
    case: GemmCase

    def leaves(self) -> list[Tensor]:
        """Return the differentiable inputs."""
        return [self.a, self.b, *([self.kwargs["bias"]] if self.case.bias else [])]


def _laid_out(t: Tensor, layout: Layout) -> Tensor:
    """Return the same values with other strides."""
    if layout == "column":
        return t.mT.contiguous().mT
    if layout in ("slice", "strided"):  # of a wider tensor, off 16-byte boundaries, NaN around it
        step = 2 if layout == "strided" else 1
        fill = 0 if t.dtype is torch.int8 else float("nan")
        wide = torch.full((*t.shape[:-1], t.shape[-1] * step + 3), fill, device=t.device).to(t.dtype)
        view = wide[..., 1 : 1 + t.shape[-1] * step : step]
        view.copy_(t)
        return view
    return t


_UNEVEN = (5, 0, 17, 1, 9)

GEMM_CASES: tuple[GemmCase, ...] = (
    GemmCase("dense", ""),
    GemmCase("dense_bias", "", bias=True),
    GemmCase("dense_odd", "sizes that are multiples of nothing", m=19, n=29, k=37, bias=True),
    GemmCase("dense_column", "weights stored as (N, K)", layout_b="column", bias=True),
    GemmCase("dense_strided", "an innermost stride of 2", layout_a="strided", layout_b="strided"),
    GemmCase("dense_slice", "off 16-byte boundaries", layout_a="slice", layout_b="slice", bias=True),
    GemmCase("dense_one", "a single row, as in decoding", m=1, layout_b="column"),
    GemmCase("dense_wide", "16-bit operands into fp32", wide=True, bias=True),
    GemmCase("dense_deterministic", "", options=("deterministic",)),
    GemmCase("dense_invariant", "a row's bits do not depend on M", m=77, options=("batch_invariant",)),
    GemmCase("rows", "tokens by expert, one without tokens", groups=_UNEVEN),
    GemmCase("rows_bias", "a bias by expert", groups=_UNEVEN, bias=True),
    GemmCase("rows_tail", "rows past the last group are 0, whatever lies there", groups=_UNEVEN, tail=7, bias=True),
    GemmCase("rows_column", "weights stored as (E, N, K)", groups=_UNEVEN, layout_b="column"),
    GemmCase("rows_odd", "no 16-byte rows (transformers#48644, torchtitan#1651)", groups=_UNEVEN, n=29, k=37, tail=2),
    GemmCase("rows_slice", "", groups=_UNEVEN, layout_a="slice", layout_b="slice"),
    GemmCase("rows_strided", "", groups=_UNEVEN, layout_a="strided", layout_b="strided", bias=True),
    GemmCase("rows_transposed", "a column-major: a group starts at any address", groups=_UNEVEN, layout_a="column"),
    GemmCase("rows_none", "no expert has a token", groups=(0, 0, 0), tail=6, bias=True),
    GemmCase("rows_first_empty", "", groups=(0, 0, 21)),
    GemmCase("rows_last_empty", "", groups=(21, 0), tail=1),
    GemmCase("rows_single", "one group is a dense product", groups=(33,)),
    GemmCase("rows_long", "several row blocks in a group", groups=(150, 3, 0, 70), n=48, k=80),
    GemmCase("rows_wide", "", groups=_UNEVEN, wide=True),
    GemmCase("rows_deterministic", "", groups=_UNEVEN, options=("deterministic",)),
    GemmCase("rows_invariant", "an expert's tokens do not see the others", groups=_UNEVEN, options=("batch_invariant",)),
    GemmCase("summed", "the gradient of weights; an empty group is 0", groups=_UNEVEN, form="summed"),
    GemmCase("summed_column", "as it arises: the transposed view of activations", groups=_UNEVEN, form="summed", layout_a="column"),
    GemmCase("summed_tail", "what lies past the last group is left out", groups=_UNEVEN, form="summed", tail=5, layout_a="column"),
    GemmCase("summed_odd", "", groups=_UNEVEN, form="summed", m=21, n=27),
    GemmCase("summed_strided", "", groups=_UNEVEN, form="summed", layout_a="strided", layout_b="slice"),
    GemmCase("summed_deterministic", "", groups=_UNEVEN, form="summed", options=("deterministic",)),
    GemmCase("batched", "one product each", groups=(0,) * 3, form="batched"),
    GemmCase("batched_bias", "", groups=(0,) * 3, form="batched", bias=True, n=29, k=37),
    GemmCase("batched_column", "", groups=(0,) * 2, form="batched", layout_a="column", layout_b="column"),
    GemmCase("batched_strided", "", groups=(0,) * 2, form="batched", layout_a="strided", layout_b="slice", bias=True),
    GemmCase("fp8_tensor", "", scaling=("tensor", "tensor"), bias=True),
    GemmCase("fp8_row", "", scaling=("row", "row"), bias=True),
    GemmCase("fp8_row_tensor", "", scaling=("row", "tensor")),
    GemmCase("fp8_1x128", "both by blocks of K", scaling=("1x128", "1x128"), m=70, n=150, k=300),
    GemmCase("fp8_block", "DeepSeek-V3's weights", scaling=("1x128", "128x128"), bias=True, m=70, n=150, k=300),
    GemmCase("fp8_block_a", "", scaling=("128x128", "1x128"), m=270, n=40, k=130),
    GemmCase("fp8_odd", "K and N off 16", scaling=("row", "row"), m=19, n=29, k=37, bias=True),
    GemmCase("fp8_wide", "", scaling=("tensor", "tensor"), wide=True, bias=True),
    GemmCase("fp8_e5m2", "gradients are e5m2", scaling=("tensor", "tensor"), formats=("e5m2", "e4m3")),
    GemmCase("fp8_e5m2_twice", "cuBLASLt has no such kernel", scaling=("row", "row"), formats=("e5m2", "e5m2")),
    GemmCase("fp8_slice", "a off 16-byte boundaries", scaling=("row", "row"), layout_a="slice"),
    GemmCase("fp8_rows_tensor", "one factor by expert", scaling=("tensor", "tensor"), groups=_UNEVEN),
    GemmCase("fp8_rows_row", "", scaling=("row", "row"), groups=_UNEVEN, bias=True),
    GemmCase("fp8_rows_block", "", scaling=("1x128", "128x128"), groups=_UNEVEN, n=150, k=300, tail=3),
    GemmCase("fp8_rows_1x128", "", scaling=("1x128", "1x128"), groups=_UNEVEN, k=300),
    GemmCase("fp8_rows_odd", "", scaling=("row", "row"), groups=_UNEVEN, n=29, k=37, tail=2),
    GemmCase("fp8_batched", "", scaling=("row", "row"), groups=(0,) * 3, form="batched", bias=True),
    GemmCase("int8_row", "", scaling=("row", "row"), formats=("int8", "int8"), bias=True),
    GemmCase("int8_tensor", "sizes off 8", scaling=("tensor", "tensor"), formats=("int8", "int8"), m=5, n=29, k=37),
    GemmCase("int8_deep", "sums beyond 2^24 stay exact", scaling=("row", "row"), formats=("int8", "int8"), m=20, n=16, k=4096),
    GemmCase("int8_rows", "", scaling=("row", "row"), formats=("int8", "int8"), groups=_UNEVEN, bias=True),
)  # fmt: skip
