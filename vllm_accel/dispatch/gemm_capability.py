"""What a backend of matrix products declares beyond `Capability`: forms, scalings, dtypes of b and of the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_accel.dispatch.capability import Capability
from vllm_accel.dispatch.gemm_spec import Form, GemmSpec, Scaling
from vllm_accel.dispatch.spec import Feature, feature_names
from vllm_accel.errors import Reason

UNSCALED = (Scaling.NONE, Scaling.NONE)
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


@dataclass(frozen=True, slots=True)
class GemmCapability(Capability):
    """Declare a backend of matrix products. Closed world: what is not listed is refused.

    Attributes:
        forms: products it runs. scalings: pairs of (a, b); unscaled products unless said otherwise.
        b_dtypes: of b where it differs from a's dtype. out_dtypes: of the result where it differs from a's dtype.
        activations: of the form MOE. weight_dtypes, weight_scalings: of its quantised weights.
        The other attributes are those of `Capability`.

    A backend that declares GRAD runs the products of a backward pass too: GROUPED_M with b transposed, GROUPED_K.
    """

    forms: frozenset[Form] = frozenset({Form.DENSE})
    scalings: frozenset[tuple[Scaling, Scaling]] = frozenset({UNSCALED})
    b_dtypes: frozenset[torch.dtype] = frozenset()
    out_dtypes: frozenset[torch.dtype] = frozenset()
    activations: frozenset[str] = frozenset()
    weight_dtypes: frozenset[torch.dtype] = frozenset()
    weight_scalings: frozenset[Scaling] = frozenset()

    def _spec_reasons(self, spec: Any) -> Iterator[Reason]:
        yield from self._dtype_reasons(spec)
        if not isinstance(spec, GemmSpec):
            yield Reason("operation", f"runs matrix products, not {type(spec).__name__}")
            return
        if spec.form not in self.forms:
            yield Reason(f"form:{spec.form.name.lower()}", f"does not do {spec.form.value}")
        layer = spec.form is Form.MOE
        if spec.b_dtype is not spec.dtype and spec.b_dtype not in (self.weight_dtypes if layer else self.b_dtypes):
            yield Reason("b_dtype", f"does not take {_short(spec.dtype)} with {_short(spec.b_dtype)}")
        if spec.out_dtype is not spec.dtype and spec.out_dtype not in self.out_dtypes:
            yield Reason("out_dtype", f"does not give {_short(spec.out_dtype)} for {_short(spec.dtype)}")
        pair = (spec.scaling_a, spec.scaling_b)
        if spec.scaling_b not in (Scaling.NONE, *self.weight_scalings) if layer else pair not in self.scalings:
            text = " x ".join(one.value for one in pair)
            yield Reason("scaling", f"does not do the scaling {text} (of a x of b)")
        if spec.activation and spec.activation not in self.activations:
            yield Reason("activation", f"does not do the activation {spec.activation}")
        for name in feature_names(spec.features & ~self.features):
            yield Reason(f"feature:{name}", f"does not do {_FEATURE_TEXT.get(name, name)}")


_FEATURE_TEXT = {
    "bias": "a bias",
    "grad": "gradients",
    "deterministic": "deterministic=True",
    "batch_invariant": "batch_invariant=True",
}

#: What a backend made of plain products does without further ado.
PLAIN_FEATURES = Feature.BIAS | Feature.GRAD


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
