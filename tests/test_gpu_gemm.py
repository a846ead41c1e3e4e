"""The look at products on a GPU, as far as a CPU goes: what refuses says so, what fails costs itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu_gemm
from benchmarks import gpu_gemm_engines as engines
from benchmarks.gpu_gemm_cases import CASES, E4M3, TIMED, Case, Timed, draw, exact
from vllm_accel.kernels.cutlass import build

CPU = torch.device("cpu")
DENSE_FP8 = Case("batch", (40,), 256, 128, E4M3, "blocks", along="k")


def _right(case: Case, given: engines.Inputs, *rest: object) -> Callable[[], Tensor]:
    return lambda: exact(case, given).to(case.out)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "DEVICE", CPU)
    monkeypatch.setattr(engines, "time_calls", lambda calls: {name: 1.0 for name, call in calls.items() if [call()]})
    monkeypatch.setattr(engines, "triton_call", _right)


def test_what_cutlass_does_not_take_is_a_reason_not_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = engines.contest(Timed("dense", DENSE_FP8, ((64, 64, 4, 2),)), True)
    assert found["refused"]["cutlass"] == "takes 16-bit rows, and e4m3 rows by blocks, without bias and gather"
    assert "triton [64, 64, 4, 2]" in found["us"] and found["error"]["triton [64, 64, 4, 2]"] < 0.01
    checked = engines.check("cutlass", DENSE_FP8)
    assert checked["ok"] and checked["refused"].startswith("takes 16-bit rows")
    monkeypatch.setattr(build, "path_of", lambda variant: tmp_path / "none.so")
    rows = Case("rows", (8, 0, 24), 64, 32, along="k")
    assert engines.check("cutlass", rows)["refused"].endswith("is not built")
    odd = Case("rows", (8, 0, 24), 63, 32, along="k")
    assert engines.check("cutlass", odd)["refused"].startswith("needs copies")


def test_a_wrong_product_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("rows", (8, 0, 24), 64, 32)
    monkeypatch.setattr(engines, "triton_call", lambda case, given, *rest: lambda: exact(case, given).to(case.out) + 1)
    found = engines.contest(Timed("rows", case, ((64, 64, 4, 2),)), False)
    assert found["refused"]["triton [64, 64, 4, 2]"].startswith("wrong by")
    assert "triton [64, 64, 4, 2]" not in found["us"] and "torch_grouped" in found["us"]
    assert not engines.check("triton", case)["ok"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_can_be_drawn_and_judged(case: Case) -> None:
    given = draw(case, CPU)
    wanted = exact(case, given)
    assert tuple(wanted.shape) == given.out_shape
    assert engines.cases.error(wanted.to(case.out), wanted) <= engines.cases.NEAR[case.out]


def test_the_list_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_gemm.main(["--out", "nowhere", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert all(timed.name in told for timed in TIMED)
