"""The tables of what runs where are what the command makes of capabilities and evidence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import support_matrix as matrix


def test_the_pages_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main([]) == 0, "run `python -m benchmarks.support_matrix --write`"
    assert "every page is current" in capsys.readouterr().out


def test_evidence_is_what_ran_and_was_right(tmp_path: Path) -> None:
    def write(name: str, device: str, *outcomes: tuple[str, str]) -> None:
        rows = [{"backend": backend, "case": "plain", "dtype": "bf16", "outcome": o} for backend, o in outcomes]
        (tmp_path / f"{name}.json").write_text(json.dumps({"about": {"device": device}, "results": rows}))

    write("a", "cuda:0 (NVIDIA A100, sm_80)", ("flash_attn_2", "ran"), ("xformers", "refused"), ("triton", "failed"))
    write("b", "cpu (AVX512)", ("cpu", "ran"))
    write("c", "cuda:0 (Some other GPU, sm_80)", ("sdpa_flash", "ran"))
    cases = {"triton": {"rows": "right"}, "cublas": {"rows": "refused: it is grouped"}, "cutlass": {"rows": "FAILED x"}}
    (tmp_path / "d.json").write_text(json.dumps({"about": {"gpu": "NVIDIA A100"}, "cases": cases}))
    checks = [{"engine": e, "ok": ok} for e, ok in (("cutlass", True), ("triton without TMA", False))]
    (tmp_path / "e.json").write_text(json.dumps({"about": {"gpu": "NVIDIA A100"}, "checks": checks, "timed": []}))
    found = matrix.evidence(tmp_path)
    assert found["a100"] == {"flash_attn_2", "gemm:triton", "gemm:cutlass"}
    assert found["cpu"] == {"cpu"}
    assert not any(found[name] for name in found if name not in ("a100", "cpu"))


def test_a_cell_says_the_best_that_is_known() -> None:
    ran = {name: {"triton"} if name == "h200" else set() for name in matrix.PRESETS}
    assert matrix.cell("attention", "triton", "h200", ran) == "yes*"
    assert matrix.cell("attention", "triton", "rtx4090", ran) == "yes+"
    assert matrix.cell("attention", "flash_attn_2", "a100", ran) == "yes"
    assert matrix.cell("attention", "flash_attn_2", "t4", ran) == ""
    ran["h200"] = {"gemm:cutlass"}
    assert matrix.cell("gemm", "cutlass", "h200", ran) == "yes*"
    assert matrix.cell("gemm", "triton", "h200", ran) == "yes"  # "triton" of attention is another backend


def test_a_page_without_its_marks_is_an_error() -> None:
    text = f"before {matrix.BEGIN} old {matrix.END} after"
    assert matrix.renewed(text, ["new"]) == f"before {matrix.BEGIN}\n\nnew\n\n{matrix.END} after"
    with pytest.raises(ValueError, match="needs 2 pairs of marks"):
        matrix.renewed(text, ["new", "newer"])
