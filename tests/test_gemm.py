"""Matrix products through the same registry, selector and explain as attention."""

from __future__ import annotations

import pytest
import torch

from vllm_accel import State, backends, explain, gemm, grouped_gemm, quantize_fp8, scaled_gemm, use_backend
from vllm_accel.dispatch import plan, quarantine
from vllm_accel.dispatch.gemm_spec import GemmSpec
from vllm_accel.ops import gemm_run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients(dtype: torch.dtype, bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in ((5, 7), (7, 3), (3,)))
    out = gemm(a, b, c if bias else None)
    want = a.double() @ b.double() + (c.double() if bias else 0)
    assert out.dtype is dtype
    bound = 8 * torch.finfo(dtype).eps * want.abs().max()
    assert (out - want).abs().max() <= bound
    leaves = [a, b, *([c] if bias else [])]
    for got, ref in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert (got - ref).abs().max() <= 8 * torch.finfo(dtype).eps * ref.abs().max()


def test_explain_speaks_of_products() -> None:
    selection = explain(gemm, torch.empty(1000, 64), torch.empty(64, 32), device="h100")
    assert selection.op == "gemm" and isinstance(selection.spec, GemmSpec)
    assert selection.chosen == "cublas" and {"cublas", "torch_grouped", "cpu", "reference"} <= set(backends("gemm"))
    assert "M ~896" in str(selection) and selection["reference"].state is State.ABLE
    assert explain(gemm, torch.empty(1000, 64), torch.empty(64, 32)).chosen == "cpu"


def test_requests_and_errors() -> None:
    a, b = torch.randn(4, 6), torch.randn(6, 2)
    with use_backend(gemm="reference"):
        assert explain(gemm, a, b).decided_by == "use_backend: reference"
        assert torch.equal(gemm(a, b), a @ b)
    with pytest.raises(ValueError, match="unknown gemm backend 'cublass'"):
        gemm(a, b, backend="cublass")
    with pytest.raises(ValueError, match=r"a must be \(M, K\)"):
        gemm(a, b.t())
    with pytest.raises(TypeError, match="one dtype"):
        gemm(a, b.half())
    with pytest.raises(ValueError, match="bias must have shape"):
        gemm(a, b, torch.zeros(3))
    with pytest.raises(RuntimeError, match="takes bfloat16"):
        gemm(a.int(), b.int())
    with pytest.raises(ValueError, match="is not an operation"):
        backends("conv")


def test_every_option_is_in_the_kind_of_the_call() -> None:
    a, b = torch.empty(64, 32, dtype=torch.bfloat16), torch.empty(4, 32, 16, dtype=torch.bfloat16)
    ends = torch.tensor([10, 20, 30, 64], dtype=torch.int32)
    plain = explain(grouped_gemm, a, b, ends).spec
    flips: tuple[dict[str, object], ...] = (
        {"bias": torch.zeros(4, 16, dtype=torch.bfloat16)}, {"out_dtype": torch.float32}, {"deterministic": True},
        {"batch_invariant": True}, {"a": a.clone().requires_grad_()}, {"a": a.t().contiguous().t()},
        {"b": b.mT.contiguous().mT}, {"a": a.half(), "b": b.half()}, {"a": a[:32], "offs": ends.clamp(max=32)},
        {"b": torch.cat([b, b]), "offs": torch.cat([ends, ends[-1:].expand(4)])},
    )  # fmt: skip
    specs = [explain(grouped_gemm, **{"a": a, "b": b, "offs": ends, **flip}).spec for flip in flips]
    assert plain not in specs and len(set(specs)) == len(flips)


@pytest.mark.parametrize(
    ("offs", "text"),
    [([5, 3, 10], "offs.1. = 3"), ([0, 4, 11], "offs.2. = 11"), ([-1, 4, 10], "offs.0. = -1")],
)
def test_offsets_that_lie_are_errors_on_the_cpu(offs: list[int], text: str) -> None:
    a, b, ends = torch.randn(10, 4), torch.randn(3, 4, 2), torch.tensor(offs, dtype=torch.int32)
    for fn in (grouped_gemm, torch.compile(grouped_gemm, backend="eager")):
        with pytest.raises(ValueError, match=f"{text}: group ends must not go down"):
            fn(a, b, ends)


def test_wrong_scales_are_errors_before_any_launch() -> None:
    x, w = (torch.zeros(n, 130).to(torch.float8_e4m3fn) for n in (6, 20))
    one = torch.ones(1)
    for change, error, text in (
        ({"scale_a": torch.ones(5)}, ValueError, r"scale_a must have shape \(6,\)"),
        ({"scale_b": torch.ones(20).double()}, TypeError, "scale_b must be float32"),
        ({"scale_recipe_b": "rows"}, ValueError, "is not a scaling"),
        ({"scale_recipe_a": 3}, TypeError, "is not a scaling"),
        ({"a": torch.zeros(6, 130)}, TypeError, "a and b must be float8"),
        ({"output_dtype": torch.int8}, TypeError, "output_dtype must be"),
        ({"bias": torch.zeros(20)}, TypeError, "bias must have the result's dtype"),
        ({"scale_recipe_a": "tensor", "scale_a": one.requires_grad_()}, NotImplementedError, "no derivative"),
    ):  # fmt: skip
        given = {
            "a": x,
            "b": w.t(),
            "scale_a": torch.ones(6, 1),
            "scale_recipe_a": torch.nn.functional.ScalingType.RowWise,
        }
        given |= {"scale_b": torch.ones(1, 20), "scale_recipe_b": "row"}
        with pytest.raises(error, match=text):
            scaled_gemm(**{**given, **change})
    assert not scaled_gemm(**given).any()


def test_a_second_call_takes_its_plan_and_still_looks() -> None:
    plan.invalidate()
    a, b, offs = torch.randn(6, 8), torch.randn(2, 8, 8), torch.tensor([2, 6], dtype=torch.int32)
    want = torch.cat([a[:2] @ b[0], a[2:] @ b[1]])
    for _ in range(2):
        torch.testing.assert_close(grouped_gemm(a, b, offs), want)
        torch.testing.assert_close(gemm(a, b[0], backend=["cpu", "reference"]), a @ b[0])
    assert len(gemm_run.PLANS) == 2
    with pytest.raises(ValueError, match="must not go down"):
        grouped_gemm(a, b, offs.flip(0))
    wide = torch.tensor([2, 0, 6, 0], dtype=torch.int32)[::2]
    torch.testing.assert_close(grouped_gemm(a, b, wide), want)
    with use_backend(gemm="reference"):
        gemm(a, b[0])
    assert [p.backend for p in gemm_run.PLANS.last.values()] == ["cpu", "cpu", "reference"]
    (a8, of_a), (b8, of_b) = quantize_fp8(a, scaling="row"), quantize_fp8(b[0], scaling="row")
    first = scaled_gemm(a8, b8.t(), of_a, ["row"], of_b, "ROW")
    for factors in (of_b, of_b.unsqueeze(0), of_b, of_b.unsqueeze(0)):
        assert torch.equal(scaled_gemm(a8, b8.t(), of_a, "row", factors, "row"), first)
    plan.invalidate()


@pytest.mark.parametrize("name", ["gemm", "grouped_gemm", "scaled_gemm"])
def test_a_plan_that_fails_on_a_hit_is_left(name: str) -> None:
    a, b, offs = torch.randn(6, 8), torch.randn(2, 8, 8), torch.tensor([2, 6], dtype=torch.int32)
    (a8, of_a), (b8, of_b) = quantize_fp8(a, scaling="row"), quantize_fp8(b[0], scaling="row")
    call = {
        "gemm": lambda: gemm(a, b[0]), "grouped_gemm": lambda: grouped_gemm(a, b, offs),
        "scaled_gemm": lambda: scaled_gemm(a8, b8.t(), of_a, "row", of_b, "row", output_dtype=torch.float32),
    }[name]  # fmt: skip
    plan.invalidate()
    want = call()
    (made,) = gemm_run.PLANS.last.values()

    def fails(*given: object) -> torch.Tensor:
        raise RuntimeError("a launch that failed")

    made.forward = fails
    try:
        torch.testing.assert_close(call(), want)
        (now,) = gemm_run.PLANS.last.values()
        assert now.backend != made.backend
    finally:
        quarantine.release()
        plan.invalidate()
