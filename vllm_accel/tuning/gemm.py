"""Matrix products for the tuner: dense, grouped and quantised, forward only, as problems, with their grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_accel.dispatch import override
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.selection import Selection
from vllm_accel.ops.explain import explain
from vllm_accel.ops.gemm import gemm, grouped_gemm, scaled_gemm
from vllm_accel.ops.quantize import quantize_fp8
from vllm_accel.ops.warmup import warmup
from vllm_accel.testing.oracle_gemm import product_oracle
from vllm_accel.testing.tolerance import assert_close
from vllm_accel.tuning.problem import dtype_of, plain

#: Rows of the result that are compared with the oracle.
_ROWS = 64
_MOST_WORK = {"cuda": 5e12, "cpu": 1e10}
_SCALINGS = ("tensor", "row", "1x128", "128x128")


@dataclass(frozen=True, slots=True)
class Product:
    """One product to time: (m, k) x (k, n), or with groups (m, k) x (groups, k, n), m rows over all groups.

    Attributes:
        name: unique. m, n, k: sizes. groups: experts, 0 for a dense product.
        scaling: of both operands, quantised to FP8; empty for none: tensor, row, 1x128, or 128x128 (of b, a 1x128).

    Raises:
        ValueError: sizes or a scaling that make no product.
    """

    name: str
    m: int
    n: int
    k: int
    groups: int = 0
    scaling: str = ""

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.k) < 1 or self.groups < 0:
            raise ValueError(f"{self.name}: sizes have to be positive")
        if self.scaling and self.scaling not in _SCALINGS:
            raise ValueError(f"{self.name}: scaling {self.scaling!r} is not one of {', '.join(_SCALINGS)}")


class Operands(NamedTuple):
    """The tensors of a product, and the arguments after them."""

    a: Tensor
    b: Tensor
    rest: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class GemmProblem:
    """A product in a dtype: of a and b, of the result where they are quantised."""

    shape: Product
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Return the product's name."""
        return self.shape.name

    @property
    def work(self) -> float:
        """Return the operations."""
        return 2.0 * self.shape.m * self.shape.n * self.shape.k

    @property
    def size(self) -> float:
        """Return the bytes of a, b and the result."""
        s = self.shape
        return float((s.m * s.k + max(s.groups, 1) * s.k * s.n + s.m * s.n) * self.dtype.itemsize)

    @property
    def grad(self) -> bool:
        """Return False: products are timed forward."""
        return False

    @property
    def at(self) -> None:
        """Return None: the model takes a product's sizes as those of its kind."""
        return None

    @property
    def varies(self) -> bool:
        """Return True: the number of tokens changes from call to call."""
        return True

    def make(self, device: torch.device) -> Operands:
        """Draw the tensors; weights lie as linear layers keep them, (n, k) transposed."""
        s, lead = self.shape, (self.shape.groups,) if self.shape.groups else ()
        if device.type == "meta":
            a = torch.empty(s.m, s.k, dtype=self.dtype, device=device)
            b = torch.empty(*lead, s.n, s.k, dtype=self.dtype, device=device)
        else:
            generator = torch.Generator(device).manual_seed(0)
            a, b = (
                torch.randn(*sizes, generator=generator, device=device).to(self.dtype)
                for sizes in ((s.m, s.k), (*lead, s.n, s.k))
            )
        b = b.transpose(-1, -2)
        options: dict[str, Any] = {}
        if s.groups:
            options["offs"] = torch.tensor(_ends(s.m, s.groups), dtype=torch.int32).to(device)
        if not s.scaling:
            return Operands(a, b, (), options)
        recipe_a = "1x128" if s.scaling == "128x128" else s.scaling
        a, scale_a = quantize_fp8(a, scaling=recipe_a)
        # Factors of b cover its columns: those of the rows of its transposed view.
        b_t, scale_b = quantize_fp8(b.transpose(-1, -2).contiguous(), scaling=s.scaling)
        options["output_dtype"] = self.dtype
        return Operands(
            a, b_t.transpose(-1, -2), (scale_a, recipe_a, _transposed(scale_b, s.scaling), s.scaling), options
        )

    def explain(self, inputs: Operands, device: Device | None = None) -> Selection:
        """Say who could run the call."""
        return explain(self._call(), inputs.a, inputs.b, *inputs.rest, device=device, **inputs.options)

    def step(self, inputs: Operands, backend: str | None) -> Callable[[], list[Tensor]]:
        """Return the product on one backend by its registry name, None for any."""
        fn, variable = self._call(), override.variable("gemm")
        wanted = None if backend is None else (backend,)

        def product() -> list[Tensor]:
            token = variable.set(wanted)
            try:
                with torch.no_grad():
                    return [fn(inputs.a, inputs.b, *inputs.rest, **inputs.options)]
            finally:
                variable.reset(token)

        return product

    def warm_up(self, inputs: Operands) -> tuple[str, ...]:
        """Build what is held back until it is built."""
        return warmup(self._call(), inputs.a, inputs.b, *inputs.rest, **inputs.options)

    def truth(self, inputs: Operands) -> tuple[Tensor, Tensor, Tensor]:
        """Compute some rows in float64, and as plain PyTorch would."""
        m = self.shape.m
        rows = torch.unique(torch.linspace(0, m - 1, min(m, _ROWS), dtype=torch.float64).round().long())
        given: dict[str, Any] = {}
        if self.shape.groups:
            ends = inputs.options["offs"].cpu()
            given["offs"] = torch.searchsorted(rows, ends.long()).to(torch.int32)
        if self.shape.scaling:
            scale_a, recipe_a, scale_b, recipe_b = inputs.rest
            scale_a = scale_a if recipe_a == "tensor" else scale_a[rows.to(scale_a.device)]
            given |= {"scale_a": scale_a, "scale_recipe_a": recipe_a, "scale_b": scale_b, "scale_recipe_b": recipe_b}
        part = (
            inputs.a.view(torch.uint8)[rows.to(inputs.a.device)].view(inputs.a.dtype)
            if self.shape.scaling
            else (inputs.a[rows.to(inputs.a.device)])
        )
        want, rough = (product_oracle(part, inputs.b, dtype=dtype, **given) for dtype in (torch.float64, torch.float32))
        return rows, want, rough.to(self.dtype)

    def verify(self, found: list[Tensor], truth: tuple[Tensor, Tensor, Tensor]) -> None:
        """Compare those rows."""
        rows, want, rough = truth
        assert_close(found[0][rows.to(found[0].device)], want, rough, what=self.name)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return plain(self, "gemm")

    def _call(self) -> Callable[..., Any]:
        if self.shape.scaling:
            return scaled_gemm
        return grouped_gemm if self.shape.groups else gemm


def _transposed(factors: Tensor, scaling: str) -> Tensor:
    """Turn factors of (n, k) rows into those of (k, n) columns; one number, or one a column, stays."""
    return factors.transpose(-1, -2) if scaling in ("1x128", "128x128") else factors


def _ends(m: int, groups: int) -> list[int]:
    """Share rows out unevenly, as routers do: some groups get twice what others get."""
    shares = [1.0 + (i * 0.6180339887) % 1.0 for i in range(groups)]
    ends = [round(m * part / sum(shares)) for part in itertools.accumulate(shares)]
    return [*ends[:-1], m]


def parse(data: Mapping[str, Any]) -> GemmProblem:
    """Build a problem from the fields of a `Product`, a dtype, and optionally a name.

    Raises:
        ValueError, TypeError: a field is unknown, missing or of a wrong type, or the sizes make no product.
    """
    given = {name: value for name, value in data.items() if name not in ("op", "dtype")}
    known = {f.name for f in fields(Product)}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(sorted(known))}")
    for name, value in given.items():
        wanted: type = str if name in ("name", "scaling") else int
        if type(value) is not wanted:
            raise ValueError(f"{name} has to be {wanted.__name__}, not {value!r}")
    dtype = dtype_of(data)
    given.setdefault("name", _label(Product(**{**given, "name": "-"}), dtype))
    return GemmProblem(Product(**given), dtype)


def _label(p: Product, dtype: torch.dtype) -> str:
    parts = ["gemm", str(dtype).removeprefix("torch."), f"{p.m}x{p.n}x{p.k}"]
    parts += [f"{p.groups} groups"] if p.groups else []
    return " ".join([*parts, *([f"fp8 {p.scaling}"] if p.scaling else [])])


def gemm_grid(device: Device) -> tuple[GemmProblem, ...]:
    """Return the products to measure on a device, most telling first."""
    cpu = device.type == "cpu"
    tokens = (16, 4, 64, 256) if cpu else (64, 1024, 16, 4096)
    layers = ((1024, 1024), (4096, 1024)) if cpu else ((4096, 4096), (14336, 4096), (4096, 14336))
    experts = ((8, 512, 512), (8, 2048, 512)) if cpu else ((8, 14336, 4096), (8, 4096, 14336), (64, 2048, 2048))
    dtypes = (torch.float32, torch.bfloat16) if cpu else (torch.bfloat16,)
    found = []
    for m, dtype in itertools.product(tokens, dtypes):
        made = [Product("-", m, n, k) for n, k in layers]
        made += [Product("-", m * 4, n, k, groups) for groups, n, k in experts]
        if not cpu:
            made += [Product("-", m, n, k, scaling=scaling) for n, k in layers[:2] for scaling in ("row", "128x128")]
        found += [GemmProblem(replace(product, name=_label(product, dtype)), dtype) for product in made]
    most = _MOST_WORK.get(device.type, _MOST_WORK["cpu"])
    return tuple(problem for problem in found if problem.work <= most)
