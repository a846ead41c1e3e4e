"""The benchmark of matrix products: it runs, checks what it times, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gemm, gemm_shapes
from vllm_accel import State
from vllm_accel.backends.gemm import cpu
from vllm_accel.dispatch import plan
from vllm_accel.dispatch.selection import Candidate
from vllm_accel.errors import Reason
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


def test_targets_build_nothing_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU session runs: no warmup, only what the targets compare, the file complete after each shape."""
    path, real, seen = tmp_path / "gemm.json", gemm.measure, []

    def measure(*args: Any) -> gemm.Report:
        seen.append(json.loads(path.read_text()))
        return real(*args)

    monkeypatch.setattr(gemm, "measure", measure)
    monkeypatch.setattr(gemm, "warmup", lambda *args, **kwargs: pytest.fail("built something"))
    assert gemm.main(["--quick", "--rounds", "2", "--targets", "--json", str(path)]) == 0
    assert [len(data["shapes"]) for data in seen] == [0, 1, 2]
    assert seen[0]["left"] == ["quick", "quick_fp8", "quick_layer"] and seen[0]["about"]["date"]
    found = json.loads(path.read_text())
    timed = [set(shape["seconds"]) for shape in found["shapes"]]
    assert timed[0] == {gemm.AUTO, gemm.TORCH, gemm.DENSE, gemm.LOOP, "reference"}
    assert timed[2] == {gemm.AUTO, gemm.LOOP, "reference"} and found["left"] == []
    assert not list(tmp_path.glob("*.part"))


def test_the_budget_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = tmp_path / "gemm.json", [0.0]

    def measure(shape: gemm_shapes.GemmShape, *args: Any) -> gemm.Report:
        now[0] += 100
        return gemm.Report(shape, "cpu", {gemm.AUTO: 1.0, gemm.LOOP: 2.0})

    monkeypatch.setattr(gemm.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(gemm, "measure", measure)
    assert gemm.main(["--quick", "--budget", "150", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [shape["shape"]["name"] for shape in found["shapes"]] == ["quick", "quick_fp8"]
    assert found["left"] == ["quick_layer"] and found["targets"]["grouped over the loop"]["median"] == 2.0


def test_what_competes_for_a_target() -> None:
    shape = gemm_shapes.QUICK_SHAPES[1]
    able, chosen = Candidate("torch_grouped", State.ABLE), Candidate("triton", State.CHOSEN)
    waits = Candidate("cublas", State.HELD_BACK, (Reason("host_sync", "reads offs on the host"),))
    builds = Candidate("deep_gemm", State.HELD_BACK, (Reason("first_call", "would compile for 10 s"),))
    everything = (able, chosen, waits, builds, Candidate("reference", State.ABLE))
    fp8, plain = gemm.Report(shape), gemm.Report(gemm_shapes.QUICK_SHAPES[0])
    assert [c.name for c in everything if gemm._takes_part(c, fp8, True)] == ["torch_grouped", "cublas"]
    assert not [c.name for c in everything if gemm._takes_part(c, plain, True)]
    assert len([c.name for c in everything if gemm._takes_part(c, plain, False)]) == 4


def test_shapes_add_up() -> None:
    for shape in gemm_shapes.GPU_SHAPES:
        counts = shape.counts()
        assert sum(counts) == shape.rows and len(counts) == shape.experts
        assert (counts[0] > 2 * counts[-1]) is shape.skewed
    assert len({shape.name for shape in gemm_shapes.GPU_SHAPES}) == len(gemm_shapes.GPU_SHAPES)
    with pytest.raises(SystemExit):
        gemm.main(["--shapes", "nothing_of_that_name"])
