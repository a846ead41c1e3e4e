"""The benchmark of matrix products: it runs, checks what it times, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gemm, gemm_shapes
from vllm_accel.backends.gemm import cpu
from vllm_accel.dispatch import plan
from vllm_accel.testing import cases_gemm


def test_quick_run_and_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gemm.json"
    assert gemm.main(["--quick", "--rounds", "2", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [shape["shape"]["name"] for shape in found["shapes"]] == ["quick", "quick_fp8", "quick_layer"]
    assert {"automatic", "cpu", "torch_grouped", "reference"} <= set(found["shapes"][0]["seconds"])
    assert found["targets"]["layer over the loop"]["shapes"] == 1
    assert "chosen cpu" in capsys.readouterr().out


def test_a_wrong_backend_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu.NativeProducts.forward
    plan.invalidate()  # plans hold the method as it was
    monkeypatch.setattr(cpu.NativeProducts, "forward", lambda self, *given: real(self, *given) * 1.01)
    report = gemm.measure(gemm_shapes.QUICK_SHAPES[0], torch.device("cpu"), torch.float32, 2, "cpu,torch_grouped")
    assert "wrong: an error of" in report.failed["cpu"] and "cpu" not in report.seconds
    assert "torch_grouped" in report.seconds
    monkeypatch.setattr(gemm, "GEMM_CASES", cases_gemm.GEMM_CASES[:1])
    assert gemm.main(["--check", "--backends", "cpu"]) == 1
    assert gemm.main(["--check", "--backends", "reference"]) == 0
    plan.invalidate()


def test_shapes_add_up() -> None:
    for shape in gemm_shapes.GPU_SHAPES:
        counts = shape.counts()
        assert sum(counts) == shape.rows and len(counts) == shape.experts
        assert (counts[0] > 2 * counts[-1]) is shape.skewed
    assert len({shape.name for shape in gemm_shapes.GPU_SHAPES}) == len(gemm_shapes.GPU_SHAPES)
    with pytest.raises(SystemExit):
        gemm.main(["--shapes", "nothing_of_that_name"])
