"""`python -m benchmarks.report`: what the files say is what the page and the plots say."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import attention_plots, canvas, choice_plots, figures, product_plots, table
from benchmarks.report.__main__ import main
from benchmarks.report.files import Source, growth, kind_of, points, read

pytest.importorskip("matplotlib")

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
ABOUT = {
    "command": "python -m benchmarks.x", "date": "2026-11-27T10:00:00+00:00", "gpu": "NVIDIA <Test>", "cpu": "c (X)",
    "torch": "2.11.0", "packages": {"triton": "3.6.0"}, "cores": 4, "threads": 2,
}  # fmt: skip
ON_CPU = {**ABOUT, "gpu": ""}
SHAPE = {"name": "prefill", "kind": "prefill", "seqlen_q": 1024, "seqlen_k": 1024, "heads": 8, "kv_heads": 8,
         "head_dim": 64, "causal": False, "lengths": [], "not_known_yet": 1}  # fmt: skip
FLOPS = 4 * 1024 * 1024 * 8 * 64
PRODUCT = {"name": "even", "kind": "grouped", "rows": 64, "k": 32, "n": 16, "experts": 4, "top_k": 1, "skewed": False}


def attention_file() -> dict[str, Any]:
    results = [
        {"name": "attention()", "seconds": 1e-3, "peak": 5},
        {"name": "sdpa_flash", "seconds": 2e-3, "peak": 200},
        {"name": "flash_attn_4", "seconds": 1e-3, "peak": 100},
        {"name": "xformers", "seconds": None, "error": "wrong"},
    ]
    shape = {"shape": SHAPE, "results": results, "matmul_tflops": FLOPS / 5e-4 * 1e-12, "copy_gbs": 1000.0}
    return {"about": ABOUT, "dtype": "bfloat16", "shapes": [shape]}


def regret_file() -> dict[str, Any]:
    calls = [
        {"name": "equal", "regret": 1.0, "fixed_regret": 1.0, "chosen": "cpu", "best": "cpu"},
        {"name": "won", "regret": 1.0, "fixed_regret": 2.0, "chosen": "sdpa_cpu", "best": "sdpa_cpu"},
        {"name": "lost", "regret": 1.1, "fixed_regret": 1.0, "chosen": "cpu", "best": "sdpa_cpu"},
        {"name": "failed", "regret": math.inf, "fixed_regret": 1.0, "chosen": "cpu", "best": "sdpa_cpu"},
        {"name": "not measured", "regret": math.nan, "fixed_regret": math.nan, "error": "out of memory"},
    ]
    return {"about": ABOUT, "calls": calls}


def cpu_row(name: str, disturbed: bool) -> dict[str, Any]:
    return {
        "name": name, "over": {"PyTorch": 2.5}, "over_wanted": {"PyTorch": 4.0}, "disturbed": disturbed,
        "of_machine": {"FMA peak": 0.6, "bf16 matmul": 30.0}, "of_machine_wanted": {"FMA peak": 0.7},
        "date": f"2026-11-27T1{int(disturbed)}:00",
    }  # fmt: skip


def files() -> dict[str, Any]:
    lengths = [
        {"backend": "sdpa_flash", "seqlen": 1024 << i, "seconds": 1e-4 * 4**i, "peak": 2048 * (1024 << i), "error": ""}
        for i in range(3)
    ]
    row = {"name": "exact hit", "shows": "over", "bound": 1.0, "result": {"over": 1.31, "base_disturbed": True}}
    conformance = [
        {"backend": "sdpa_flash", "case": "plain", "dtype": "bf16", "outcome": o} for o in ("ran", "refused", "failed")
    ]
    measured = [
        {"case": case, "seqlen": n, "extra": extra, "backend": "cpu", "seconds": 1.0, "error": ""}
        for case, extra in (("causal", 1 << 20), ("causal_backward", 1 << 22))
        for n in (2048, 4096)
    ]
    timed = {"automatic": 2e-6, "torch._grouped_mm": 1e-6, "loop over experts": 4e-6}
    return {
        "attention": attention_file(),
        "lengths": {"about": ABOUT, "dtype": "bfloat16", "memory": 1 << 34, "lengths": lengths,
                    "sizes": {"heads": 8, "kv_heads": 8, "head_dim": 64}},
        "dispatch": {"about": ABOUT, "sections": [{"title": "real kernel", "rounds": {}, "rows": [row]}]},
        "selection": regret_file(),
        "cpu": {"about": ON_CPU, "rows": [cpu_row("decode", False), cpu_row("noisy", True)]},
        "generate": {"about": ON_CPU, "rates": {"sdpa": [4.0, 6.0], "vllm_accel": [9.0, 11.0]}, "ratio": 2.0,
                     "parameters": 5e8, "dtype": "bf16", "context": 4096},
        "memory": {"about": ON_CPU, "measured": measured},
        "gpu_memory": {"about": ABOUT, "results": [
            {"name": "triton d64", "value": [{"seqlen": n, "forward": n * 8, "train": n * 64} for n in (64, 128)]}]},
        "gemm": {"about": ON_CPU, "dtype": "float32", "targets": {},
                 "shapes": [{"shape": PRODUCT, "chosen": "cpu", "seconds": timed, "failed": {}, "error": ""}]},
        "gpu_gemm": {"about": ABOUT, "checks": [], "timed": [
            {"name": "mixtral", "tflops": {"triton [128, 8]": 500.0, "triton [64, 4]": 600.0, "cublas_dense": 700.0}}]},
        "conformance": {"about": {**ABOUT, "gpu": "", "device": "cuda:0 (NVIDIA <Test>, sm_90)"},
                        "results": conformance},
        "gemm_conformance": {"about": ON_CPU, "cases": {
            "cpu": {"rows": "right", "fp8": "refused: takes no fp8", "bias": "FAILED AssertionError: 1"},
            "cublas": {"": "not available: needs a GPU"}}},
        "known_bad": {"about": ABOUT, "known_bad": [{"name": "n", "link": "https://github.com/a/b/issues/1",
                                                      "reproduced": True, "detail": "NaN", "ours": "fine"}]},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in files().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    (tmp_path / "cut.json").write_text("{")
    return tmp_path


class Page(html.parser.HTMLParser):
    """What a page has loaded or linked, and its text by heading."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.loaded += [found[name] or "" for name in ("src", "srcset", "data", "poster") if name in found]
        self.links += [found["href"] or ""] if "href" in found else []
        self.ids += [found["id"] or ""] if "id" in found else []


def test_the_page_has_every_plot_and_every_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib import image

    out = folder / "out"
    assert main([str(folder), "--out", str(out), "--dpi", "60", "--markdown"]) == 0
    assert sorted(path.stem for path in out.glob("*.png")) == [
        "c_x_cpu", "c_x_gemm", "c_x_generate", "c_x_memory", "test_dispatch", "test_gpu_gemm", "test_gpu_memory",
        "test_lengths", "test_lengths_memory", "test_roofline", "test_selection", "test_speed",
    ]  # fmt: skip
    for path in out.glob("*.png"):
        assert image.imread(path)[..., :3].std() > 0.01  # something is drawn
    told = capsys.readouterr()
    assert "not read: cut.json" in told.err
    assert "flash_attn_4 1.00x (1 shapes)" in told.out
    text = (out / "index.html").read_text()
    page = Page(text)
    assert len(page.loaded) == 12 and all(source.startswith("data:image/png;base64,") for source in page.loaded)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"} and "@import" not in text
    assert "url(" not in text
    assert page.links == ["#test", "#c_x", "https://github.com/a/b/issues/1"] and page.ids == ["test", "c_x"]
    assert "<Test>" not in text and "NVIDIA &lt;Test&gt;" in text
    assert "sdpa_flash 2.00x (1 shapes)" in text
    assert "sdpa_flash 1 / 1 / 1" in text
    assert "4 unseen calls, 1.032 in the geometric mean, 1.10 at worst, 1 failed; the shipped order: 1.189" in text
    # 3 tensors of 8 heads of 64 in 2 bytes, and 2048 bytes a token beyond them.
    assert f"{(1 << 34) / (2048 + 2 * 24 * 64) / 2**20:.1f}M tokens fit" in text
    assert "python -m benchmarks.x" in text and "torch 2.11.0" in text
    first, second = text.split("<h2 id='c_x'>")  # machines stay apart
    assert "Roofline" in first and "Our C++ kernels" not in first and "Our C++ kernels" in second


def drawn(data: dict[str, Any]) -> list[canvas.Plot]:
    return figures.draw([Source(Path("file.json"), kind_of(data), data)])


def legend_of(plot: canvas.Plot) -> list[str]:
    return [text.get_text() for axes in plot.figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]


def test_two_draws_on_one_machine_are_told_apart_by_their_seed() -> None:
    (plot,) = drawn({**regret_file(), "seed": 7})
    assert plot.title == "Regret on NVIDIA <Test>: 4 unseen calls of seed 7"
    (plot,) = drawn(regret_file())
    assert plot.title == "Regret on NVIDIA <Test>: 4 unseen calls"


def test_regret_has_a_row_for_each_call_that_differs() -> None:
    (plot,) = drawn(regret_file())
    (axes,) = plot.figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "failed: cpu, best sdpa_cpu", "won: sdpa_cpu", "lost: cpu, best sdpa_cpu",
        "the other 1 calls: the fastest, by both",
    ]  # fmt: skip
    fixed, ours = (axes.collections[i].get_offsets()[:, 0].tolist() for i in (0, 2))
    edge = axes.get_xlim()[1]
    assert fixed == [1.0, 2.0, 1.0, 1.0] and ours == [edge, 1.0, pytest.approx(1.1), 1.0]
    assert legend_of(plot)[:2] == [
        "shipped order: 1.189 in the geometric mean, 2.00 at worst",
        "automatic choice: 1.032 in the geometric mean, 1.10 at worst, 1 failed",
    ]
    assert choice_plots.summary([math.inf]) == "nothing measured, 1 failed"
    assert choice_plots.summary([math.nan, 2.0]) == "2.000 in the geometric mean, 2.00 at worst"


def test_disturbed_rows_are_marked() -> None:
    (plot,) = drawn(files()["cpu"])
    left, right = plot.figure.axes
    assert [label.get_style() for label in left.get_yticklabels()] == ["normal", "italic"]
    faces = [line.get_markerfacecolor() for line in left.lines if list(line.get_xdata()) == [2.5]]
    assert faces == [canvas.GREEN, "none"] and "disturbed" in plot.title
    assert "FMA peak" in legend_of(plot) and "bf16 matmul" not in legend_of(plot)  # 30 times slower: no yardstick
    assert right.get_xlim()[1] < 1.1 and "Rows of 2 runs" in plot.caption
    (quiet,) = drawn({**files()["cpu"], "rows": [cpu_row("decode", False)]})
    assert "disturbed" not in quiet.title and "runs" not in quiet.caption
    (dispatch,) = drawn(files()["dispatch"])
    assert "disturbed" in dispatch.title


def test_tokens_a_second_are_the_medians() -> None:
    (plot,) = drawn(files()["generate"])
    (axes,) = plot.figure.axes
    assert [bar.get_width() for bar in axes.patches if bar.get_height() == pytest.approx(0.6)] == [5.0, 10.0]
    assert "0.50 billion parameters, bf16, 4096 tokens in the cache, 2 threads; vllm_accel / sdpa 2.00" in plot.title


def test_products_are_shares_of_the_fastest() -> None:
    data = files()["gemm"]
    (product,) = product_plots.products(Source(Path("gemm.json"), kind_of(data), data))
    assert product.rates["automatic"] == pytest.approx(2.0 * 64 * 32 * 16 / 2e-6) and product.chosen == "cpu"
    (plot,) = drawn(data)
    shares = {c.get_label(): c.get_offsets()[0][0] for c in plot.figure.axes[0].collections}
    assert shares == {"automatic": 0.5, "torch._grouped_mm": 1.0, "loop over experts": 0.25}
    data = files()["gpu_gemm"]
    (product,) = product_plots.products(Source(Path("gemm.json"), kind_of(data), data))
    assert product.rates == {"triton": 6e14, "cublas_dense": 7e14}  # of the tiles, the fastest


def test_the_checks_of_products_count() -> None:
    data = files()["gemm_conformance"]
    source = Source(Path("gemm_conformance.json"), kind_of(data), data)
    assert source.on_cpu and table.outcomes(source) == [
        ("gemm:cpu", "ran"), ("gemm:cpu", "refused"), ("gemm:cpu", "failed"), ("gemm:cublas", "unavailable"),
    ]  # fmt: skip
    attention = Source(Path("a.json"), "shapes", {**attention_file(), "about": ON_CPU})
    data["cases"] = {"cutlass": data["cases"]["cpu"]}
    rows = {row.library: row for row in table.table([attention, source])["c (X)"]}
    assert rows["CUTLASS"].ran == "gemm:cutlass 1 / 1 / 1"


def test_memory_of_both_kinds_of_file() -> None:
    data = files()["memory"]
    assert growth(Source(Path("m.json"), kind_of(data), data)) == {
        "causal": [(2048, 1 << 20), (4096, 1 << 20)], "causal + backward": [(2048, 1 << 22), (4096, 1 << 22)],
    }  # fmt: skip
    data = files()["gpu_memory"]
    assert growth(Source(Path("m.json"), kind_of(data), data)) == {
        "triton d64": [(64, 512), (128, 1024)], "triton d64 + backward": [(64, 4096), (128, 8192)],
    }  # fmt: skip
    data["measured"] = [{"case": "c", "seqlen": 8, "extra": 0, "error": "ended with 9"}]
    assert set(growth(Source(Path("m.json"), "memory", data))) == {"triton d64", "triton d64 + backward"}


def test_two_machines_and_two_files_of_one_stay_apart(tmp_path: Path) -> None:
    for name, cpu in (
        ("a/cpu_one_thread", "A (AVX2)"),
        ("b/cpu_one_thread", "B (AVX512, AMX)"),
        ("b/cpu", "B (AVX512, AMX)"),
    ):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**files()["cpu"], "about": {**ON_CPU, "cpu": cpu}}))
    plots = figures.draw(read([tmp_path])[0])
    assert [plot.name for plot in plots] == ["a_avx2_cpu_one_thread", "b_avx512_amx_cpu", "b_avx512_amx_cpu_one_thread"]
    assert [plot.hardware for plot in plots] == ["A (AVX2)", "B (AVX512, AMX)", "B (AVX512, AMX)"]


def test_every_text_of_the_committed_results_can_be_read() -> None:
    """Nothing is cut off at the edge, no two labels of an axis lie on each other; each plot says where it is from."""
    sources, _ = read([RESULTS])
    plots = figures.draw(sources)
    assert len(plots) >= 8
    for plot in plots:
        canvas.finish(plot)
        plot.figure.draw_without_rendering()
        frame = plot.figure.bbox
        for text in plot.figure.findobj(lambda artist: hasattr(artist, "get_fontsize") and artist.get_visible()):
            if text.get_text():
                box = text.get_window_extent()
                inside = box.x0 >= -2 and box.y0 >= -2 and box.x1 <= frame.x1 + 2 and box.y1 <= frame.y1 + 2
                assert inside or not _shown(text, plot.figure), f"{plot.name}: {text.get_text()!r} is cut off"
        for axes in plot.figure.axes:
            for labels, low, high in ((axes.get_xticklabels(), "x0", "x1"), (axes.get_yticklabels(), "y0", "y1")):
                boxes = sorted(
                    ((getattr(b, low), getattr(b, high)) for b in (label.get_window_extent() for label in labels
                                                                  if label.get_text() and _shown(label, plot.figure))),
                )  # fmt: skip
                for (_, end), (start, _) in itertools.pairwise(boxes):
                    assert start > end - 1, f"{plot.name}: labels lie on each other"
        for word in (plot.hardware, "python -m"):
            assert word in plot.caption, plot.name


def test_every_picture_of_the_docs_is_one_of_the_report() -> None:
    docs = RESULTS.parent.parent / "docs"
    names = {plot.name for plot in figures.draw(read([RESULTS])[0])}
    shown = set(re.findall(r"\(img/(\w+)\.png\)", (docs / "benchmarks.md").read_text(encoding="utf-8")))
    assert shown == {path.stem for path in (docs / "img").glob("*.png")} and shown <= names


def _shown(text: Any, figure: Any) -> bool:
    """Tell whether a text is drawn: matplotlib keeps ticks outside of the limits as invisible labels."""
    for axes in figure.axes:
        for axis, low, high in ((axes.xaxis, *axes.get_xlim()), (axes.yaxis, *axes.get_ylim())):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if text in (tick.label1, tick.label2):
                    return bool(min(low, high) <= tick.get_loc() <= max(low, high)) and text.get_visible()
    return True


def test_what_a_file_is() -> None:
    assert {name: kind_of(data) for name, data in files().items()} == {
        "attention": "shapes", "lengths": "lengths", "dispatch": "sections", "selection": "selection", "cpu": "cpu",
        "generate": "generate", "memory": "memory", "gpu_memory": "memory", "gemm": "gemm", "gpu_gemm": "gemm",
        "gemm_conformance": "conformance", "conformance": "conformance", "known_bad": "known_bad",
    }  # fmt: skip
    found = {"results": [{"name": "triton plain bf16", "seconds_in_all": 1.0, "outcome": "ran"}]}
    assert kind_of(found) == "conformance"
    assert kind_of({"results": [{"name": "prefill", "shape": SHAPE, "results": []}]}) == "shapes"
    assert kind_of({"checks": [], "timed": []}) == "gemm"
    assert [kind_of(data) for data in ([], {}, {"rows": []}, {"results": [1]}, {"shapes": 1})] == ["other"] * 5


def test_shares_and_ratios(folder: Path) -> None:
    sources, _ = read([folder / "attention.json"])
    found = {p.backend: p for p in points(sources)}
    assert set(found) == {"attention()", "sdpa_flash", "flash_attn_4"}
    assert attention_plots.share_of(found["flash_attn_4"]) == pytest.approx(0.5)
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
