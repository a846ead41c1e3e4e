"""What a matrix product is, without its tensors: form, dtypes, scaling, memory order, sizes in buckets."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from vllm_accel.dispatch.spec import Feature, feature_names

_PLAIN = Feature(0)


class Form(enum.Enum):
    """Which product; E is the number of groups, `offs` int32 (E,) their ends (no leading zero)."""

    DENSE = "(M, K) x (K, N)"
    GROUPED_M = "(T, K) x (E, K, N), rows in groups"  # tokens by expert -> (T, N); rows past offs[-1] are 0
    GROUPED_K = "(M, T) x (T, N), the summed dimension in groups"  # weight gradient -> (E, M, N)
    BATCHED = "(E, M, K) x (E, K, N)"
    MOE = "mixture of experts"  # the whole layer: route, two grouped products, activation, combine


class Scaling(enum.Enum):
    """What one factor of a quantised operand covers: value = stored * factor. Factors are fp32.

    Of a (M, K) and b (K, N), with ceil(K / 128) = KB: TENSOR one number (b of grouped forms: or (E,)). ROW (M,) and
    (N,). BLOCK_1x128 (M, KB) and (KB, N): 128 along K. BLOCK_128x128 (ceil(M / 128), KB) and (KB, ceil(N / 128)).
    b of grouped forms has a leading E.
    """

    NONE = "none"
    TENSOR = "tensor"
    ROW = "row"
    BLOCK_1x128 = "1x128"
    BLOCK_128x128 = "128x128"


class Layout(enum.Enum):
    """Memory order of the last two dimensions of an operand; a hint for the choice, kernels take any strides."""

    ROW = "row-major"  # innermost stride 1
    COLUMN = "column-major"  # the stride before it is 1
    STRIDED = "strided"


@dataclass(frozen=True, slots=True)
class GemmSpec:
    """The kind of a matrix product. Sizes are bucket representatives (`bucket`), never the exact ones.

    Attributes:
        form: which product. dtype: of a (of x). b_dtype: of b (of the weights). out_dtype: of the result.
        m, n, k: of each group where groups share them; m is all T rows for GROUPED_M, k all T for GROUPED_K. For MOE m
            is tokens, n hidden size, k intermediate size of one half of gate and up.
        groups: E, 0 for DENSE. features: of `Feature`: BIAS, GRAD, DETERMINISTIC, BATCH_INVARIANT.
        scaling_a, scaling_b: of quantised operands. For MOE scaling_b is that of the weights.
        layout_a, layout_b: memory order (MOE: of w_gate_up and w_down).
        activation: MOE only, ``"silu"`` or ``"gelu"``, ... top_k: MOE only, experts of a token.
    """

    form: Form
    dtype: torch.dtype
    b_dtype: torch.dtype
    out_dtype: torch.dtype
    m: int
    n: int
    k: int
    groups: int
    features: Feature = _PLAIN
    scaling_a: Scaling = Scaling.NONE
    scaling_b: Scaling = Scaling.NONE
    layout_a: Layout = Layout.ROW
    layout_b: Layout = Layout.ROW
    activation: str = ""
    top_k: int = 0

    def compile_kind(self) -> GemmSpec:
        """Return the part that a compiled kernel depends on: everything but the sizes."""
        return replace(self, m=0, n=0, k=0, groups=0, top_k=0)

    def __str__(self) -> str:
        dtypes = "/".join(dict.fromkeys(_short(d) for d in (self.dtype, self.b_dtype)))
        if self.out_dtype is not self.dtype:
            dtypes += f" -> {_short(self.out_dtype)}"
        name = {Form.DENSE: "gemm", Form.MOE: "fused_moe"}.get(self.form, "grouped_gemm")
        sizes = f"M ~{self.m}, N ~{self.n}, K ~{self.k}"
        if self.form is Form.MOE:
            sizes = f"{self.m} tokens to {self.top_k} of {self.groups} experts, hidden ~{self.n}, inner ~{self.k}"
        elif self.groups:
            sizes = f"{self.form.value}: {sizes}, E {self.groups}"
        flags = feature_names(self.features) + ([self.activation] if self.activation else [])
        if self.scaling_b is not Scaling.NONE:
            flags.append(f"scaled {self.scaling_a.value} x {self.scaling_b.value}")
        orders = (("a", self.layout_a), ("b", self.layout_b))
        flags += [f"{name} {layout.value}" for name, layout in orders if layout is not Layout.ROW]
        return f"{name} {dtypes}, {sizes}: {', '.join(flags) or 'plain'}"


class GemmSizes(NamedTuple):
    """Exact sizes and strides of a product, for guards and remarks. Strides may differ on a later call of the plan."""

    m: int
    n: int
    k: int
    groups: int
    a_shape: tuple[int, ...]
    a_stride: tuple[int, ...]
    b_shape: tuple[int, ...]
    b_stride: tuple[int, ...]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
