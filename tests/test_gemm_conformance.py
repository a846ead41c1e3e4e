"""Every backend of matrix products that runs on this machine's CPU, through the public call, against the oracle."""

from __future__ import annotations

import pytest
import torch

from vllm_accel import UnsupportedCallError, explain
from vllm_accel.ops import gemm as gemm_ops
from vllm_accel.testing import GEMM_CASES, GemmCase, check_gemm_call
from vllm_accel.testing.conformance_gemm import public_call

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BACKENDS = ("reference", "cpu", "torch_grouped")
#: What each backend refuses on this CPU; anything else is a regression.
REFUSED = {
    "reference": set(),
    "cpu": {"dense_invariant", "rows_invariant"},
    "torch_grouped": {
        case.name
        for case in GEMM_CASES
        if not case.grouped or case.scaling or case.wide or "batch_invariant" in case.options
    },
}


def _takes(case: GemmCase, dtype: torch.dtype) -> bool:
    """Tell whether a case exists in a dtype: fp64 is never the result of quantised or 16-bit operands."""
    return not (dtype is torch.float64 and (case.scaling or case.wide)) and not (dtype is torch.float32 and case.wide)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case(backend: str, dtype: str) -> None:
    for case in GEMM_CASES:
        if not _takes(case, DTYPES[dtype]):
            continue
        call = public_call(case, backend=backend)
        if case.name in REFUSED[backend] or (backend == "torch_grouped" and dtype == "fp64"):
            _refuses(case, backend, DTYPES[dtype])
        else:
            check_gemm_call(call, case, dtype=DTYPES[dtype])


def _refuses(case: GemmCase, backend: str, dtype: torch.dtype) -> None:
    inputs = case.make(dtype)
    fn = gemm_ops.scaled_gemm if case.scaling else gemm_ops.grouped_gemm if case.grouped else gemm_ops.gemm
    shown = explain(fn, inputs.a, inputs.b, **inputs.kwargs)[backend]
    with pytest.raises(UnsupportedCallError) as refusal:
        public_call(case, backend=backend)(inputs.a, inputs.b, **inputs.kwargs)
    assert refusal.value.reasons[backend] == shown.reasons and shown.reasons


def test_automatic_choice_runs_everything() -> None:
    for case in GEMM_CASES:
        check_gemm_call(public_call(case), case, dtype=torch.bfloat16, seed=3)


@pytest.mark.parametrize("backend", ["cpu", "torch_grouped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [17, 29, 34, 38, 54, 68, 100])
def test_what_is_not_a_number_stays_in_its_row(dtype: torch.dtype, backend: str, k: int) -> None:
    """With AMX oneDNN reads past a row where K fills no tile: the next row, or what a view leaves out."""
    g = torch.Generator().manual_seed(0)
    wide = torch.full((34, k + 70), float("nan"), dtype=dtype)
    wide[:, :k] = torch.randn(34, k, generator=g).to(dtype)
    dense = wide[:, :k].contiguous()
    dense[5] = float("nan")
    b = torch.randn(2, k, 37, generator=g).to(dtype)
    offs = torch.tensor([17, 34], dtype=torch.int32)
    for a, rows in ((wide[:, :k], []), (dense, [5])):
        out = gemm_ops.grouped_gemm(a, b, offs, backend=backend)
        assert out.isnan().any(1).nonzero().flatten().tolist() == rows
        if backend == "cpu":
            assert gemm_ops.gemm(a, b[0], backend=backend).isnan().any(1).nonzero().flatten().tolist() == rows


@pytest.mark.parametrize("backend", ["cpu", "torch_grouped"])
def test_gradients_are_finite_whatever_memory_holds(backend: str) -> None:
    """K is 33 forward, 37 for dA: filled up to an even number only, rows were followed by memory that nobody wrote."""
    g = torch.Generator().manual_seed(0)
    kept: list[torch.Tensor] = []
    for turn in range(60):
        kept += [
            torch.full((n,), float("nan"), dtype=torch.bfloat16) for n in (1360, 1292, 1258, 986, 2146, 2204, 1024)
        ]
        del kept[turn % 3 :: 3]  # memory that held NaN is given out again
        b = torch.randn(2, 33, 37, generator=g).to(torch.bfloat16)
        a = torch.randn(34, 33, generator=g).to(torch.bfloat16).requires_grad_()
        out = gemm_ops.grouped_gemm(a, b, torch.tensor([17, 34], dtype=torch.int32), backend=backend)
        (grad,) = torch.autograd.grad(out, a, torch.ones_like(out))
        assert torch.isfinite(out).all() and torch.isfinite(grad).all()
