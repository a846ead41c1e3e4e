"""Products for one look at a GPU: small ones with every option, to be compared with float64, and shapes to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: Largest error over the largest number: a few roundings of the result, fp32 sums.
NEAR = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2, torch.int32: 0.0}


@dataclass(frozen=True)
class Case:
    """One product.

    Attributes:
        form: "rows", "depth" or "batch". sizes: rows of each group (of the first only for "batch", which has as many
            groups as numbers). past: rows of no group. k, n: depth and columns (m and n for "depth").
        dtype: of a and b. scaling: "", "tensor", "rows" or "blocks". along: "k" or "n", b's contiguous dimension.
        bias, gather: whether there is one. native: FP8 products on FP8 tensor cores. out: dtype of the result.
    """

    form: str
    sizes: tuple[int, ...]
    k: int
    n: int
    dtype: torch.dtype = torch.bfloat16
    scaling: str = ""
    along: str = "n"
    past: int = 0
    bias: bool = False
    gather: bool = False
    native: bool = True
    out: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        flags = [name for name in ("bias", "gather") if getattr(self, name)] + ([] if self.native else ["widened"])
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([self.form, dtype, self.scaling or "plain", f"k{self.k} n{self.n} b:{self.along}", *flags])


_SIZES = (130, 0, 1, 64, 300, 0, 17)
CASES = [
    *(Case("rows", _SIZES, k, n, past=9, along=along) for k, n in ((512, 384), (200, 136)) for along in "nk"),
    Case("rows", _SIZES, 201, 77, past=9, bias=True),
    Case("rows", _SIZES, 512, 384, torch.float16, out=torch.float16, bias=True),
    Case("rows", _SIZES, 256, 192, torch.float32, out=torch.float32, past=3),
    Case("rows", (3, 0, 5, 1), 1024, 512, along="k"),
    Case("rows", (40, 64, 30), 1024, 512, along="k"),
    Case("rows", _SIZES, 512, 384, gather=True, past=5),
    *(Case("depth", _SIZES, k, n, past=9) for k, n in ((512, 384), (200, 77))),
    Case("depth", _SIZES, 256, 192, torch.float32, out=torch.float32),
    *(Case("batch", (200,) * 3, k, n, along=along) for k, n in ((512, 384), (200, 72)) for along in "nk"),
    *(
        Case("rows", _SIZES, k, n, E4M3, scaling, along="k", past=9)
        for scaling in ("tensor", "rows", "blocks")
        for k, n in ((1024, 384), (208, 144))
    ),
    Case("rows", (3, 0, 5, 1), 1024, 512, E4M3, "blocks", along="k"),
    Case("rows", (40, 64, 30), 1024, 512, E4M3, "blocks", along="k"),
    Case("rows", _SIZES, 1024, 384, E4M3, "blocks", along="k", native=False),
    Case("rows", _SIZES, 1024, 384, E4M3, "blocks", along="n"),
    Case("batch", (200,), 1024, 384, E5M2, "tensor", along="k"),
    Case("batch", (200,), 1024, 384, torch.int8, "rows", along="k"),
    Case("batch", (200,), 1024, 384, torch.int8, "", along="k", out=torch.int32),
]


class Inputs(NamedTuple):
    """Tensors of a product; factors as `grouped_gemm_launch.Scale` has them."""

    a: Tensor
    b: Tensor
    offs: Tensor | None
    bias: Tensor | None
    gather: Tensor | None
    a_factors: Tensor | None
    b_factors: Tensor | None
    out_shape: tuple[int, ...]


def draw(case: Case, device: torch.device) -> Inputs:
    """Return random tensors of a case, with 16-byte strides where its sizes allow them."""
    g = torch.Generator(device).manual_seed(sum(case.sizes) + case.k)

    def numbers(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        made = torch.randn(shape, generator=g, device=device)
        return (made * 20).round().clamp(-127, 127).to(dtype) if dtype is torch.int8 else made.to(dtype)

    groups, tokens = len(case.sizes), sum(case.sizes) + case.past
    offs = torch.tensor(case.sizes, device=device).cumsum(0).int() if case.form != "batch" else None
    gather = torch.randint(tokens, (tokens,), generator=g, device=device) if case.gather else None
    if case.form == "depth":
        return Inputs(
            numbers(tokens, case.k).t(), numbers(tokens, case.n), offs, None, None, None, None, (groups, case.k, case.n)
        )
    b = numbers(groups, case.k, case.n) if case.along == "n" else numbers(groups, case.n, case.k).transpose(1, 2)
    bias = numbers(groups, case.n, dtype=case.out) if case.bias else None
    rows = tokens if case.form == "rows" else case.sizes[0]
    a = numbers(rows, case.k) if case.form == "rows" else numbers(groups, rows, case.k)
    blocks, columns = -(-case.k // 128), -(-case.n // 128)
    shapes = {
        "": None,
        "tensor": ((1, 1, 1), (1, 1, 1)),
        "rows": ((1, rows, 1), (groups, 1, case.n)),
        "blocks": ((1, rows, blocks), (groups, blocks, columns)),
    }[case.scaling]
    factors = [None if shapes is None else torch.rand(s, generator=g, device=device) + 0.5 for s in shapes or (0, 0)]
    return Inputs(a, b, offs, bias, gather, factors[0], factors[1], (*a.shape[:-1], case.n))


def exact(case: Case, given: Inputs) -> Tensor:
    """Return the product in float64."""
    a, b = given.a.double(), given.b.double()
    ends = [] if given.offs is None else given.offs.tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if case.form == "depth":
        return torch.stack([a[:, s:e] @ b[s:e] for s, e in spans])
    if given.a_factors is not None and given.b_factors is not None:
        of_a, of_b = given.a_factors.double(), given.b_factors.double()
        if case.scaling == "blocks":
            of_a = of_a.repeat_interleave(128, 2)[..., : case.k]
            of_b = of_b.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, : case.k, : case.n]
        a, b = a * (of_a[0] if a.dim() == 2 else of_a), b * of_b
    if case.form == "batch":
        made = a @ b
        return made if given.bias is None else made + given.bias.double()[:, None]
    a = a if given.gather is None else a[given.gather]
    made = torch.zeros(given.out_shape, dtype=torch.float64, device=a.device)
    for e, (start, end) in enumerate(spans):
        made[start:end] = a[start:end] @ b[e] + (0 if given.bias is None else given.bias[e].double())
    return made


def error(made: Tensor, wanted: Tensor) -> float:
    """Return the largest difference over the largest number; infinite if a number is missing."""
    if not bool(made.double().isfinite().all()):
        return float("inf")
    return ((made.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


class Timed(NamedTuple):
    """A shape that is timed, and the tiles that compete for it: block_m, block_n, warps, stages."""

    name: str
    case: Case
    tiles: tuple[tuple[int, ...], ...]


def _spread(total: int, groups: int, skewed: bool) -> tuple[int, ...]:
    """Return rows of each group: equal, or falling as 1 / rank."""
    weights = [1 / (i + 1) if skewed else 1.0 for i in range(groups)]
    sizes = [int(total * w / sum(weights)) for w in weights]
    return (sizes[0] + total - sum(sizes), *sizes[1:])


_WIDE = ((128, 256, 8, 4), (128, 256, 8, 3), (128, 128, 4, 3), (128, 128, 8, 4), (256, 128, 8, 3))
_FEW = ((64, 128, 4, 4), (64, 128, 4, 8), (64, 256, 4, 4), (128, 128, 8, 4), (64, 64, 4, 6))
_LEAST = ((16, 128, 4, 5), (64, 64, 4, 6), (64, 128, 4, 4), (16, 256, 4, 4), (64, 128, 4, 8))
_DEEP = ((128, 256, 8, 3), (128, 128, 8, 4), (64, 256, 4, 3), (128, 256, 8, 4))
_BLOCKS = ((128, 128, 8, 4), (64, 128, 4, 4), (128, 64, 4, 4), (64, 64, 4, 5), (128, 128, 8, 5))
_FEW_BLOCKS = ((64, 128, 4, 4), (64, 64, 4, 5), (16, 128, 4, 5), (128, 128, 8, 4))


def _mixtral(rows: int, skewed: bool = False, k: int = 4096, n: int = 28672, along: str = "k") -> Case:
    return Case("rows", _spread(rows, 8, skewed), k, n, along=along)


def _deepseek(rows: int, skewed: bool = False, k: int = 7168, n: int = 4096, along: str = "k", **more: Any) -> Case:
    return Case("rows", _spread(rows, 64, skewed), k, n, along=along, **more)


#: Mixtral 8x7B (hidden 4096, expert 14336) and DeepSeek-V3 (7168, 2048; 64 of its experts), gate_up and down.
TIMED: tuple[Timed, ...] = (
    Timed("mixtral gate_up 8k rows", _mixtral(8192), _WIDE),
    Timed("deepseek gate_up 32k rows", _deepseek(32768), _WIDE),
    Timed("mixtral gate_up 8k rows skewed", _mixtral(8192, True), _WIDE[:3]),
    Timed("deepseek gate_up 4k rows", _deepseek(4096), _FEW),
    Timed("deepseek gate_up 32k rows fp8 blocks", _deepseek(32768, dtype=E4M3, scaling="blocks"), _BLOCKS),
    Timed("deepseek gate_up 512 rows", _deepseek(512), _LEAST),
    Timed("mixtral weight gradient 8k rows", Case("depth", _spread(8192, 8, False), 4096, 14336), _DEEP),
    Timed("deepseek gate_up 32k rows skewed, b along n", _deepseek(32768, True, along="n"), _WIDE[:3]),
    Timed("mixtral down 32k rows", _mixtral(32768, k=14336, n=4096), _WIDE[:3]),
    Timed("deepseek down 8k rows skewed", _deepseek(8192, True, k=2048, n=7168), (*_WIDE[:3], *_FEW[:2])),
    Timed("deepseek gate_up 512 rows fp8 blocks", _deepseek(512, dtype=E4M3, scaling="blocks"), _FEW_BLOCKS),
    Timed("deepseek gate_up 32k rows fp8 rows", _deepseek(32768, dtype=E4M3, scaling="rows"), _BLOCKS[:3]),
    Timed("mixtral gate_up 16 rows", _mixtral(16), _LEAST),
    Timed(
        "dense fp8 blocks 4096 x 7168 x 16384",
        Case("batch", (4096,), 7168, 16384, E4M3, "blocks", along="k"),
        _BLOCKS[:3],
    ),
)


def flops(case: Case) -> float:
    """Return additions and multiplications of a case."""
    return 2.0 * sum(case.sizes) * case.k * case.n


def torch_rivals(case: Case, given: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Return what PyTorch has for the same product, and a dense product of as many operations."""
    rivals: dict[str, Callable[[], Tensor]] = {}
    a, b, offs = given.a, given.b, given.offs
    if case.dtype is torch.bfloat16 and offs is not None:
        rivals["torch_grouped"] = lambda: torch._grouped_mm(a, b, offs=offs)
        rows = sum(case.sizes)
        if case.form == "rows":
            one = given.b[0]
            rivals["cublas_dense"] = lambda: a[:rows] @ one
        else:
            left, right = a[:, : rows // len(case.sizes)], b[: rows // len(case.sizes)]
            rivals["cublas_dense_of_one_group"] = lambda: left @ right
    if case.dtype is E4M3 and case.form == "rows" and given.a_factors is not None and given.b_factors is not None:
        of_a = given.a_factors[0, :, 0].contiguous()
        of_b = given.b_factors[:, 0, :1].expand(-1, case.n).contiguous()
        rivals["torch_scaled_grouped_by_rows"] = lambda: torch._scaled_grouped_mm(
            a, b, of_a, of_b, offs=offs, out_dtype=torch.bfloat16, use_fast_accum=False
        )
    if case.dtype is E4M3 and case.form == "batch":
        one = torch.ones((), device=a.device)
        rivals["cublas_by_tensor"] = lambda: torch._scaled_mm(
            a[0], b[0], one, one, out_dtype=torch.bfloat16, use_fast_accum=False
        )
    return rivals
