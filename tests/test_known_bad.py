"""The list of wrong kernels: what can be reproduced without a GPU is, and the library's own answer is right there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import known_bad
from benchmarks.known_bad_cases import CASES


@pytest.mark.parametrize("case", [c for c in CASES if c.device == "cpu"], ids=lambda c: c.name)
def test_a_report_about_the_cpu_is_reproduced_and_the_library_is_right(case: known_bad.Case) -> None:
    found = case.run(torch.device("cpu"))
    assert found.wrong, f"torch {torch.__version__} no longer does this: the adapter's workaround may go"
    assert "WRONG" not in found.ours


def test_every_report_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert known_bad.main(["--only", "cpu-empty-row", "--json", str(tmp_path / "found.json")]) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())["known_bad"]
    assert row["reproduced"] is True
    assert row["detail"] == "log-sum-exp 0"
    (gone,) = [known_bad._in_child(case, 30.0) for case in CASES if case.name == "cudnn-mask-backward"]
    assert (gone.reproduced, gone.detail) == (None, "needs a GPU")


def test_a_report_that_hangs_or_dies_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.device == "cpu")
    assert known_bad._in_child(case, 0.05).detail == "no answer within 0.05 s"
    monkeypatch.setattr(known_bad.sys, "executable", "/bin/false")
    assert known_bad._in_child(case, 10.0).detail.startswith("the process ended with 1: ")
