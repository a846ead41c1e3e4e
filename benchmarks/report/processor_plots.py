"""Plots of the C++ CPU kernels: beside PyTorch and beside what the machine gives, and a model's tokens a second."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.report import canvas
from benchmarks.report.canvas import Plot
from benchmarks.report.files import Source

_OTHERS = {"PyTorch": (canvas.GREEN, "o"), "PyTorch, transposed before": (canvas.GREEN, "v"),
           "folded": (canvas.GREEN, "s"), "enable_gqa": (canvas.GREEN, "x"), "FlexAttention": (canvas.ORANGE, "D"),
           "ONNX Runtime": (canvas.SKY, "P")}  # fmt: skip
_NAMES = {"folded": "PyTorch, heads folded", "enable_gqa": "PyTorch, enable_gqa"}
_STICKS = ((canvas.BLUE, "o"), (canvas.AMBER, "D"), (canvas.PINK, "s"), (canvas.SKY, "P"), (canvas.GREEN, "v"))


def cpu_rows(hardware: str, sources: Sequence[Source]) -> Iterator[Plot]:
    """Draw each row of `benchmarks.cpu`: times faster than the others, and the share of the machine's own rate."""
    for source in sources:
        rows = source.data["rows"] if source.kind == "cpu" else []
        rows = [_counting(row) for row in rows if row.get("over") or row.get("of_machine")]
        if not rows:
            continue
        figure, (left, right) = canvas.new(
            11.5, 0.9 + 0.29 * len(rows), 1, 2, sharey=True, gridspec_kw={"width_ratios": (3, 2)}
        )
        disturbed = [i for i, row in enumerate(rows) if row.get("disturbed")]
        _side(left, rows, "over", _look)
        _side(right, rows, "of_machine", dict(zip(_sticks(rows), _STICKS * 9, strict=False)).__getitem__)
        names = [row["name"] for row in rows]
        canvas.rows_axis(left, names, faint=disturbed)
        canvas.rows_axis(right, names)
        right.tick_params(axis="y", labelleft=False)
        left.axvline(1.0, color=canvas.DARK, lw=0.8)
        canvas.doubling_axis(left)
        left.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        left.set_xlabel("times faster than the other")
        top = max([1.0, *(v for row in rows for v in row["of_machine"].values())])
        right.set_xlim(0, math.ceil(top * 10) / 10 + 0.04)  # room for the last label
        right.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        right.set_xlabel("of what the machine gives")
        title = f"Our C++ kernels on {hardware}, {canvas.threads(source)}".rstrip(", ")
        if disturbed:
            title += "; hollow, in italics: disturbed by a neighbour"
        caption = source.caption() + _dates(source.data["rows"])
        yield Plot(canvas.name_of(source), hardware, title, caption, figure)


def _counting(row: Any) -> dict[str, Any]:
    """Return a row with the yardstick that counts, the first, and those others that are not slower than ours."""
    sticks = row.get("of_machine", {})
    kept = {name: share for i, (name, share) in enumerate(sticks.items()) if not i or share <= 1.2}
    return {**row, "over": row.get("over", {}), "of_machine": kept}


def _dates(rows: Sequence[Any]) -> str:
    """Say that the rows are of several runs, of which the command is the last: `--keep`."""
    dates = sorted({row["date"] for row in rows if row.get("date")})
    return f"\nRows of {len(dates)} runs, {dates[0]} to {dates[-1]}" if len(dates) > 1 else ""


def _side(axes: Any, rows: Sequence[Any], key: str, look: Callable[[str], tuple[str, str]]) -> None:
    """Draw one column of dots: hollow where the row was disturbed, with what is wanted as a black stroke."""
    for name in dict.fromkeys(name for row in rows for name in row[key]):
        colour, marker = look(name)
        for i, row in enumerate(rows):
            if name in row[key]:
                face = "none" if row.get("disturbed") and marker != "x" else colour
                pale = 0.5 if row.get("disturbed") else 1.0
                axes.plot(row[key][name], i, marker, ms=6, mec=colour, mfc=face, alpha=pale, zorder=3, clip_on=False)
        axes.plot([], [], marker, ms=6, color=colour, label=_NAMES.get(name, name))
    for i, row in enumerate(rows):
        for value in row.get(f"{key}_wanted", {}).values():
            axes.plot([value, value], [i - 0.42, i + 0.42], color=canvas.DARK, lw=1.4, zorder=2)
    axes.plot([], [], color=canvas.DARK, lw=1.4, label="wanted")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False, fontsize=8.5, ncols=2)


def _sticks(rows: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["of_machine"]))


def _look(name: str) -> tuple[str, str]:
    return _OTHERS.get(name, (canvas.PINK, "^"))


def generate(hardware: str, sources: Sequence[Source]) -> Iterator[Plot]:
    """Draw tokens a second of a model with each implementation, from `benchmarks.generate`."""
    for source in sources:
        rates = source.data["rates"] if source.kind == "generate" else {}
        if not rates:
            continue
        names = list(rates)
        figure, axes = canvas.new(9.5, 0.75 + 0.42 * len(names))
        for i, name in enumerate(names):
            median = statistics.median(rates[name])
            colour = canvas.BLUE if name == "vllm_accel" else canvas.GREEN
            axes.barh(i, median, height=0.6, color=colour, zorder=2)
            axes.scatter(rates[name], [i] * len(rates[name]), s=22, c="white", edgecolors=canvas.DARK, zorder=3)
            end = max(rates[name])
            axes.annotate(f"{median:.3g}", (end, i), (7, 0), textcoords="offset points", va="center", fontsize=9)
        canvas.rows_axis(axes, names)
        axes.set_xlim(0, 1.12 * max(max(values) for values in rates.values()))
        axes.set_xlabel("tokens a second: median, and the rounds (further right is faster)")
        data = source.data
        asked = [f"{data['parameters'] / 1e9:.2f} billion parameters"] if data.get("parameters") else []
        asked += [str(data["dtype"])] if data.get("dtype") else []
        asked += [f"{data['context']} tokens in the cache"] if data.get("context") else []
        asked += [threads] if (threads := canvas.threads(source)) else []
        title = f"A Llama in transformers on {hardware}: {', '.join(asked)}; vllm_accel / sdpa {data['ratio']:.2f}"
        yield Plot(canvas.name_of(source), hardware, title, source.caption(), figure)
