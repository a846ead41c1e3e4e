"""The GEMM backend `triton` over the interpreter: every form and scaling that it declares, as the library calls it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from vllm_accel.backends.gemm.triton import BACKEND
from vllm_accel.dispatch.backend import GemmArgs, MoeArgs
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.dispatch.gemm_spec import Form, Scaling
from vllm_accel.ops.gemm_arguments import GemmOptions, describe, factor_shape, spec_of
from vllm_accel.ops.moe_arguments import MoeOptions, describe_moe
from vllm_accel.testing import GEMM_CASES, GemmCase, moe_oracle
from vllm_accel.testing.conformance_gemm import check_gemm_backend

E4M3 = torch.float8_e4m3fn
#: (rows, columns) of one factor of a; those of b are the other way round.
BLOCK = {Scaling.TENSOR: (1 << 30, 1 << 30), Scaling.ROW: (1, 1 << 30), Scaling.BLOCK_1x128: (1, 128)}
OFFS = [3, 3, 21]


def run(a: Tensor, b: Tensor, args: GemmArgs, options: GemmOptions, gpu: str = "h200") -> Tensor:
    """Run the backend's kernel on a kind of call that it says yes to."""
    described = describe(a, b, args, options, False)
    spec, device = spec_of(described.kind), PRESETS[gpu]
    assert BACKEND.capability.unsupported_reasons(spec, device) == ()
    assert BACKEND.capability.guard_reasons(spec, described.sizes) == ()
    kernel = BACKEND.bind(spec, device)
    made = kernel.forward(a, b, args)
    assert made.is_contiguous() and made.dtype is spec.out_dtype
    return made


def product(form: Form, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in float64, group by group."""
    if form is Form.DENSE:
        return a @ b if bias is None else a @ b + bias.double()
    if form is Form.BATCHED:
        return torch.stack([x @ y for x, y in zip(a, b, strict=True)]) + (0 if bias is None else bias[:, None].double())
    spans = list(zip([0, *OFFS], OFFS, strict=False))
    if form is Form.GROUPED_K:
        return torch.stack([a[:, s:e] @ b[s:e] for s, e in spans])
    made = torch.zeros(a.shape[0], b.shape[-1], dtype=torch.float64)
    for group, (start, end) in enumerate(spans):
        made[start:end] = a[start:end] @ b[group] + (0 if bias is None else bias[group].double())
    return made


def operands(form: Form, k: int, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        Form.DENSE: ((24, k), (k, n)),
        Form.GROUPED_M: ((24, k), (3, k, n)),
        Form.GROUPED_K: ((k, 24), (24, n)),
        Form.BATCHED: ((3, 9, k), (3, k, n)),
    }[form]
    return torch.randn(shapes[0], generator=g), torch.randn(shapes[1], generator=g)


def assert_near(made: Tensor, wanted: Tensor, relative: float) -> None:
    assert (made.double() - wanted).abs().max() <= relative * wanted.abs().max()


@pytest.mark.parametrize("form", [Form.DENSE, Form.GROUPED_M, Form.GROUPED_K, Form.BATCHED])
@pytest.mark.parametrize(("dtype", "k", "n"), [(torch.bfloat16, 64, 48), (torch.float32, 21, 19)])
def test_plain_products(form: Form, dtype: torch.dtype, k: int, n: int) -> None:
    a, b = (t.to(dtype) for t in operands(form, k, n))
    bias = None
    if form is not Form.GROUPED_K:
        bias = torch.randn((n,) if form is Form.DENSE else (3, n)).to(dtype)
    offs = torch.tensor(OFFS, dtype=torch.int32) if form in (Form.GROUPED_M, Form.GROUPED_K) else None
    made = run(a, b, GemmArgs(offs, bias), GemmOptions(form))
    assert_near(made, product(form, a.double(), b.double(), bias), 8e-3 if dtype is torch.bfloat16 else 1e-6)


def spread(scale: Tensor, rows: int, columns: int, block: tuple[int, int]) -> Tensor:
    """Return the factor of every number, looked up one by one."""
    r, c = torch.arange(rows) // block[0], torch.arange(columns) // block[1]
    return scale.reshape(*scale.shape[:-2], scale.shape[-2], scale.shape[-1])[..., r[:, None], c[None, :]].double()


def scaled(form: Form, pair: tuple[Scaling, Scaling], gpu: str, dtype: torch.dtype) -> None:
    k, n = 144, 136
    a, b = ((t * 20).round().to(dtype) if dtype is torch.int8 else t.to(dtype) for t in operands(form, k, n))
    lead_a, lead_b = (3,) if form is Form.BATCHED else (), () if form is Form.DENSE else (3,)
    g = torch.Generator().manual_seed(1)
    scale_a, scale_b = (
        torch.rand(factor_shape(t.shape[-2:], scaling, lead, of_a), generator=g) + 0.5
        for t, scaling, lead, of_a in ((a, pair[0], lead_a, True), (b, pair[1], lead_b, False))
    )
    block_b = BLOCK[pair[1]][::-1] if pair[1] in BLOCK else (128, 128)
    rows, two = a.shape[-2], {Scaling.TENSOR: (1, 1), Scaling.ROW: (-1, 1)}
    wide_a = scale_a.reshape(*lead_a, *two[pair[0]]) if pair[0] in two else scale_a
    wide_b = scale_b.reshape(*lead_b, *two[pair[1]][::-1]) if pair[1] in two else scale_b
    wanted = product(
        form, a.double() * spread(wide_a, rows, k, BLOCK[pair[0]]), b.double() * spread(wide_b, k, n, block_b), None
    )
    offs = torch.tensor(OFFS, dtype=torch.int32) if form is Form.GROUPED_M else None
    made = run(a, b, GemmArgs(offs, None, scale_a, scale_b), GemmOptions(form, *pair, torch.float32), gpu)
    assert_near(made, wanted, 1e-5)


PAIRS = sorted((pair for pair in BACKEND.capability.scalings if Scaling.NONE not in pair), key=str)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(one.value for one in pair))
def test_scaled_products(pair: tuple[Scaling, Scaling]) -> None:
    """Every pair of scalings on tokens by expert; the other forms by some of them, below."""
    scaled(Form.GROUPED_M, pair, "h200", E4M3)


@pytest.mark.parametrize(
    ("form", "pair", "gpu", "dtype"),
    [
        (Form.DENSE, (Scaling.ROW, Scaling.ROW), "h200", torch.int8),
        (Form.DENSE, (Scaling.TENSOR, Scaling.TENSOR), "a100", E4M3),
        (Form.DENSE, (Scaling.BLOCK_1x128, Scaling.BLOCK_128x128), "h200", torch.float8_e5m2),
        (Form.BATCHED, (Scaling.BLOCK_1x128, Scaling.BLOCK_128x128), "a100", E4M3),
        (Form.BATCHED, (Scaling.TENSOR, Scaling.ROW), "h200", E4M3),
    ],
)
def test_scaled_products_of_other_forms(
    form: Form, pair: tuple[Scaling, Scaling], gpu: str, dtype: torch.dtype
) -> None:
    scaled(form, pair, gpu, dtype)


def test_one_factor_for_all_groups_is_an_expanded_view() -> None:
    a, b = (t.to(E4M3) for t in operands(Form.GROUPED_M, 32, 16))
    offs, one = torch.tensor(OFFS, dtype=torch.int32), torch.tensor([0.37])
    args = GemmArgs(offs, None, torch.tensor([2.0]), one.expand(3))
    made = run(a, b, args, GemmOptions(Form.GROUPED_M, Scaling.TENSOR, Scaling.TENSOR, torch.float32))
    assert_near(made, product(Form.GROUPED_M, a.double() * 2, b.double() * one.double(), None), 1e-5)


def test_a_layer_runs_on_two_products() -> None:
    g = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(s, generator=g) * 0.3 for s in ((9, 32), (4, 32, 48), (4, 24, 32)))
    args = MoeArgs(torch.rand(9, 2, generator=g), torch.randint(4, (9, 2), generator=g))
    spec = spec_of(describe_moe(x, up, down, args, MoeOptions(), False).kind)
    assert BACKEND.capability.unsupported_reasons(spec, PRESETS["h200"]) == ()
    made = BACKEND.bind(spec, PRESETS["h200"]).forward(x, up, down, args)
    given = {"w_gate_up": up, "w_down": down, "topk_weights": args.topk_weights, "topk_ids": args.topk_ids}
    assert_near(made, moe_oracle(x, **given), 1e-5)


def test_a_plan_follows_strides_and_offsets() -> None:
    """One kernel object, tensors of other strides: a launch for each kind, and offs are read at each call."""
    a, b = operands(Form.GROUPED_M, 32, 16)
    offs = torch.tensor(OFFS, dtype=torch.int32)
    described = describe(a, b, GemmArgs(offs), GemmOptions(Form.GROUPED_M), False)
    kernel = BACKEND.bind(spec_of(described.kind), PRESETS["h200"])
    turned = b.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = product(Form.GROUPED_M, a.double(), b.double(), None)
    for weights in (b, turned, b):
        assert_near(kernel.forward(a, weights, GemmArgs(offs)), wanted, 1e-6)
    assert len(kernel._bound) == 2
    offs.copy_(torch.tensor([24, 24, 24]))
    assert_near(kernel.forward(a, b, GemmArgs(offs)), a.double() @ b[0].double(), 1e-6)


def test_what_it_refuses_says_why() -> None:
    a, b = operands(Form.DENSE, 16, 16)
    for gpu, dtype, code in (("v100", torch.float16, "compute_capability"), ("h200", torch.float64, "dtype")):
        spec = spec_of(describe(a.to(dtype), b.to(dtype), GemmArgs(), GemmOptions(Form.DENSE), False).kind)
        reasons = BACKEND.capability.unsupported_reasons(spec, PRESETS[gpu])
        assert [reason.code for reason in reasons] == [code]
    many = describe(
        torch.empty(8, 16, device="meta"), torch.empty(5000, 16, 16, device="meta"),
        GemmArgs(torch.empty(5000, dtype=torch.int32, device="meta")), GemmOptions(Form.GROUPED_M), False,
    )  # fmt: skip
    reasons = BACKEND.capability.guard_reasons(spec_of(many.kind), many.sizes)
    assert [reason.code for reason in reasons] == ["counts"] and "5000" in reasons[0].text


def test_scalings_that_it_lacks_are_the_ones_with_blocks_of_rows_of_a() -> None:
    known = [scaling for scaling in Scaling if scaling is not Scaling.NONE]
    missing = set(itertools.product(known, known)) - BACKEND.capability.scalings
    assert {pair[0] for pair in missing} == {Scaling.BLOCK_128x128}


@pytest.mark.parametrize("case", GEMM_CASES, ids=lambda case: case.name)
def test_the_conformance_cases(case: GemmCase) -> None:
    """As on a Hopper GPU; what it refuses is a factor for blocks of rows of a."""
    outcome = check_gemm_backend(BACKEND, case, device=PRESETS["h200"])
    assert outcome.ran == (case.name != "fp8_block_a"), outcome


@pytest.mark.parametrize("form", [Form.DENSE, Form.GROUPED_M, Form.GROUPED_K, Form.BATCHED])
def test_a_prepared_product_takes_other_tensors(form: Form) -> None:
    """Other numbers, other strides, other alignments and other ends, in turn: as the general way has it."""
    first, second = (t.bfloat16() for t in operands(form, 64, 48))
    grouped = form in (Form.GROUPED_M, Form.GROUPED_K)
    offs = torch.tensor(OFFS, dtype=torch.int32) if grouped else None
    bias = None if form is Form.GROUPED_K else torch.randn((48,) if form is Form.DENSE else (3, 48)).bfloat16()
    args, options = GemmArgs(offs, bias), GemmOptions(form)
    kernel = BACKEND.bind(spec_of(describe(first, second, args, options, False).kind), PRESETS["h200"])
    forward = kernel.prepare(first, second, args)  # type: ignore[union-attr]
    other_ends = torch.tensor([24, 24, 24], dtype=torch.int32) if grouped else None
    off_16 = torch.zeros(first.numel() + 1, dtype=first.dtype)[1:].view(first.shape).copy_(first)
    turned = second.mT.contiguous().mT
    wide = torch.zeros(*first.shape[:-1], first.shape[-1] + 8, dtype=first.dtype)[..., : first.shape[-1]].copy_(first)
    for a, b, ends in (
        (first, second, offs), (first * 2, second, offs), (off_16, second, offs), (first, turned, offs),
        (first * 3, turned * 2, offs), (wide, second, offs), (first, second, other_ends), (first, second, offs),
    ):  # fmt: skip
        given = args._replace(offs=ends)
        made = forward(a, b, given)
        assert made.is_contiguous() and torch.equal(made, kernel.forward(a, b, given))  # type: ignore[arg-type]


def test_a_prepared_scaled_product_takes_other_factors() -> None:
    a, b = (t.to(E4M3) for t in operands(Form.GROUPED_M, 256, 128))
    blocks = (Scaling.BLOCK_1x128, Scaling.BLOCK_128x128)
    of_a, of_b = torch.rand(24, 2) + 0.5, torch.rand(3, 2, 1) + 0.5
    offs, options = torch.tensor(OFFS, dtype=torch.int32), GemmOptions(Form.GROUPED_M, *blocks, torch.bfloat16)
    args = GemmArgs(offs, None, of_a, of_b)
    kernel = BACKEND.bind(spec_of(describe(a, b, args, options, False).kind), PRESETS["h200"])
    forward = kernel.prepare(a, b, args)  # type: ignore[union-attr]
    columns = of_a.t().contiguous().t()
    for x, y in ((of_a, of_b), (of_a * 2, of_b), (columns, of_b), (columns * 3, of_b * 2), (of_a, of_b)):
        given = args._replace(scale_a=x, scale_b=y)
        assert torch.equal(forward(a, b, given), kernel.forward(a, b, given))  # type: ignore[arg-type]
    widened = BACKEND.bind(spec_of(describe(a, b, args, options, False).kind), PRESETS["a100"])
    assert widened.prepare(a, b, args) == widened.forward  # type: ignore[union-attr]
