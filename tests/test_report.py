"""`python -m benchmarks.report`: what the files say is what the page and the plots say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import figures, table
from benchmarks.report.__main__ import main
from benchmarks.report.files import kind_of, points, read

pytest.importorskip("matplotlib")

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"

ABOUT = {
    "command": "python -m benchmarks.x", "date": "2026-11-27T10:00:00+00:00", "gpu": "NVIDIA <Test>", "cpu": "c",
    "torch": "2.11.0", "packages": {"triton": "3.6.0"},
}  # fmt: skip
SHAPE = {"name": "prefill", "kind": "prefill", "seqlen_q": 1024, "seqlen_k": 1024, "heads": 8, "kv_heads": 8,
         "head_dim": 64, "causal": False, "lengths": [], "not_known_yet": 1}  # fmt: skip
FLOPS = 4 * 1024 * 1024 * 8 * 64


def attention_file() -> dict[str, Any]:
    results = [
        {"name": "attention()", "seconds": 1e-3, "peak": 5},
        {"name": "sdpa_flash", "seconds": 2e-3, "peak": 200},
        {"name": "flash_attn_4", "seconds": 1e-3, "peak": 100},
        {"name": "xformers", "seconds": None, "error": "wrong"},
    ]
    shape = {"shape": SHAPE, "results": results, "matmul_tflops": FLOPS / 5e-4 * 1e-12, "copy_gbs": 1000.0}
    return {"about": ABOUT, "dtype": "bfloat16", "shapes": [shape]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lengths = [
        {"backend": "sdpa_flash", "seqlen": 1024 << i, "seconds": 1e-4 * 4**i, "peak": 2048 * (1024 << i), "error": ""}
        for i in range(3)
    ]
    row = {"name": "exact hit", "shows": "over", "bound": 1.0, "result": {"over": 1.31}}
    conformance = [
        {"backend": "sdpa_flash", "case": "plain", "dtype": "bf16", "outcome": o} for o in ("ran", "refused", "failed")
    ]
    files = {
        "attention": attention_file(),
        "lengths": {"about": ABOUT, "dtype": "bfloat16", "memory": 1 << 34, "lengths": lengths,
                    "sizes": {"heads": 8, "kv_heads": 8, "head_dim": 64}},
        "dispatch": {"about": ABOUT, "sections": [{"title": "real kernel", "rounds": {}, "rows": [row]}]},
        "selection": {"about": ABOUT, "calls": [{"regret": r, "fixed_regret": f} for r, f in ((1.0, 2.0), (1.1, 1.0))]},
        "cpu": {"about": {**ABOUT, "gpu": ""}, "rows": [{"name": "decode", "over": {"torch": 2.5}, "of_machine": {}}]},
        "conformance": {"about": {**ABOUT, "device": "cuda:0 (NVIDIA <Test>, sm_90)"}, "results": conformance},
        "known_bad": {"about": ABOUT, "known_bad": [{"name": "n", "link": "https://github.com/a/b/issues/1",
                                                      "reproduced": True, "detail": "NaN", "ours": "fine"}]},
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    (tmp_path / "cut.json").write_text("{")
    return tmp_path


def test_the_page_has_every_plot_and_every_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib import image

    out = folder / "out"
    assert main([str(folder), "--out", str(out), "--dpi", "60", "--markdown"]) == 0
    plots = sorted(path.stem.removesuffix("_test") for path in out.glob("*.png"))
    assert plots == ["cpu_c", "dispatch", "lengths", "memory", "regret", "roofline", "speed"]
    for path in out.glob("*.png"):
        assert image.imread(path)[..., :3].std() > 0.01  # something is drawn
    told = capsys.readouterr()
    assert "not read: cut.json" in told.err
    assert "flash_attn_4 1.00x (1 shapes)" in told.out
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(plots)
    assert "<Test>" not in page and "NVIDIA &lt;Test&gt;" in page
    assert "sdpa_flash 2.00x (1 shapes)" in page
    assert "sdpa_flash 1 / 1 / 1" in page
    assert "2 unseen shapes, 1.049 in the geometric mean, 1.10 at worst" in page
    # 3 tensors of 8 heads of 64 in 2 bytes, and 2048 bytes a token beyond them.
    assert f"{(1 << 34) / (2048 + 2 * 24 * 64) / 2**20:.1f}M tokens fit" in page
    assert "python -m benchmarks.x" in page and "torch 2.11.0" in page


def test_what_a_file_is() -> None:
    assert kind_of(attention_file()) == "shapes"
    assert (
        kind_of({"results": [{"name": "triton plain bf16", "seconds_in_all": 1.0, "outcome": "ran"}]}) == "conformance"
    )
    assert kind_of({"results": [{"name": "prefill", "shape": SHAPE, "results": []}]}) == "shapes"
    assert kind_of({"checks": [], "timed": []}) == "gemm"
    assert [kind_of(data) for data in ([], {}, {"rows": []}, {"results": [1]})] == ["other"] * 4


def test_shares_and_ratios(folder: Path) -> None:
    sources, _ = read([folder / "attention.json"])
    found = {p.backend: p for p in points(sources)}
    assert set(found) == {"attention()", "sdpa_flash", "flash_attn_4"}
    assert figures.share_of(found["flash_attn_4"]) == pytest.approx(0.5)
    rows = {row.library: row for row in table.table(sources)["NVIDIA <Test>"]}
    assert rows["Flash Attention"].memory == "flash_attn_4 1.00x (1 shapes)"
    assert rows["PyTorch (not in its table)"].time == "sdpa_flash 2.00x (1 shapes)"
    assert rows["xFormers"].time == ""
    assert math.isclose(found["sdpa_flash"].seconds, 2e-3)


def test_nothing_to_show_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("[]")
    assert main([str(tmp_path / "other.json"), "--out", str(tmp_path / "out")]) == 1
    with pytest.raises(SystemExit):
        main([str(tmp_path / "gone.json"), "--out", str(tmp_path / "out")])
    assert "no such file" in capsys.readouterr().err


def test_each_folder_of_results_is_one_machine() -> None:
    folders: dict[Path, set[str]] = {}
    sources, rejected = read([RESULTS])
    for source in sources:
        if source.about:
            folders.setdefault(source.path.parent, set()).add(source.hardware)
    assert not rejected and len(folders) >= 3
    assert {folder.name: names for folder, names in folders.items() if len(names) > 1} == {}
    machines = [name for names in folders.values() for name in names]
    assert len(set(machines)) == len(machines) and RESULTS not in folders
