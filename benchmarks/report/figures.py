"""The plots of the report. Each takes result files and returns a figure, or None where they hold nothing for it."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.files import Point, Source, points

#: One colour and marker per backend, the same in every plot; colours of Okabe and Ito, which the colour-blind can tell.
STYLE: dict[str, tuple[str, str]] = {
    "flash_attn_4": ("#D55E00", "D"), "flash_attn_3": ("#D55E00", "s"), "flash_attn_2": ("#D55E00", "o"),
    "gluon_hopper": ("#0072B2", "D"), "triton": ("#0072B2", "o"), "cpu": ("#0072B2", "s"),
    "sdpa_cudnn": ("#009E73", "D"), "sdpa_flash": ("#009E73", "o"), "sdpa_efficient": ("#009E73", "s"),
    "sdpa_cpu": ("#009E73", "v"), "xformers": ("#CC79A7", "o"), "mslk": ("#CC79A7", "s"),
    "flashinfer": ("#E69F00", "o"), "tensorrt_llm": ("#E69F00", "s"), "reference": ("#888888", "x"),
    "torch math": ("#444444", "+"), "torch sdpa by hand": ("#56B4E9", "P"), "attention()": ("#000000", "*"),
}  # fmt: skip
#: Left out where single kernels are compared: they run one of the others.
_CHOICES = ("attention()",)


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure with what stands above and below it. name: of its file, without the ending."""

    name: str
    title: str
    caption: str
    figure: Any
    remark: str = ""


def draw(sources: Sequence[Source]) -> list[Plot]:
    """Draw everything that the files have."""
    made: list[Plot] = []
    for hardware in dict.fromkeys(source.hardware for source in sources):
        own = [source for source in sources if source.hardware == hardware]
        makers = (speed, roofline, lengths, memory_by_length, dispatch, regret, cpu_rows)
        made += [plot for make in makers if (plot := make(hardware, own)) is not None]
    return made


def slug(hardware: str) -> str:
    """Return a hardware's name as part of a file name."""
    words = "".join(c if c.isalnum() else " " for c in hardware.lower()).split()
    return "_".join(w for w in words if w not in ("nvidia", "amd", "intel", "r", "processor"))[:40] or "machine"


def style(backend: str) -> dict[str, Any]:
    """Return colour and marker of a backend."""
    colour, marker = STYLE.get(backend, ("#999999", "o"))
    return {"color": colour, "marker": marker}


def speed(hardware: str, sources: Sequence[Source]) -> Plot | None:
    """Draw, for each shape, what each backend reaches of a matrix product (decode: of a copy) of the same turns."""
    found = [p for p in points(sources) if p.backend not in _CHOICES]
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for p in found:  # later files over earlier ones; the fastest of two runs in one place would be a choice of luck
        share = share_of(p)
        if share is not None:
            rows[p.shape.name][p.backend] = share
    if not rows:
        return None
    figure, axes = _new(9.5, 1.4 + 0.36 * len(rows))
    names = list(rows)[::-1]
    for backend in _ordered({name for row in rows.values() for name in row}):
        places = [(rows[name][backend], i) for i, name in enumerate(names) if backend in rows[name]]
        axes.scatter(*zip(*places, strict=True), s=58, label=backend, zorder=3, alpha=0.9, **_scatter(backend))
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_xlim(0, max(1.05, 1.05 * max(max(row.values()) for row in rows.values())))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("of a matrix product of the same turns (decode: of a copy); further right is faster")
    axes.grid(True, axis="both", color="#dddddd", zorder=0)
    _legend(axes)
    used = list(dict.fromkeys(p.source for p in found))
    return Plot(f"speed_{slug(hardware)}", f"Attention on {hardware}", _captions(used), figure)


def share_of(p: Point) -> float | None:
    """Return a point's rate as a share of the yardstick that bounds it."""
    if p.shape.kind == "decode":
        return p.shape.bytes(p.dtype) / p.seconds / p.copy if p.copy else None
    return p.shape.flops() / p.seconds / p.matmul if p.matmul else None


def roofline(hardware: str, sources: Sequence[Source]) -> Plot | None:
    """Draw operations a second against operations a byte, under the roofs that the same runs measured."""
    found = [p for p in points(sources) if p.backend not in _CHOICES and p.matmul and p.copy]
    if not found:
        return None
    peak, bandwidth = max(p.matmul or 0.0 for p in found), max(p.copy or 0.0 for p in found)
    figure, axes = _new(9.5, 5.4)
    intensities = [p.shape.flops() / p.shape.bytes(p.dtype) for p in found]
    low, high = min(intensities) / 2, max(intensities) * 2
    ridge = peak / bandwidth
    axes.plot([low, ridge, max(high, ridge * 2)], [low * bandwidth, peak, peak], color="#333333", lw=1.5, zorder=2)
    axes.annotate(f"matrix product: {_si(peak)}FLOP/s", (ridge * 1.1, peak * 1.12), fontsize=9)
    middle = math.sqrt(low * ridge)
    axes.annotate(f"copy: {_si(bandwidth)}B/s", (middle, middle * bandwidth * 1.5), ha="right", fontsize=9)
    for backend in _ordered({p.backend for p in found}):
        own = [p for p in found if p.backend == backend]
        axes.scatter(
            [p.shape.flops() / p.shape.bytes(p.dtype) for p in own], [p.shape.flops() / p.seconds for p in own],
            s=42, label=backend, zorder=3, alpha=0.85, **_scatter(backend),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(top=peak * 2)
    axes.set_xlabel("operations for each byte that has to be read or written once")
    axes.set_ylabel("operations a second")
    axes.yaxis.set_major_formatter(lambda value, _: _si(value))
    axes.grid(True, color="#dddddd", zorder=0)
    _legend(axes)
    used = list(dict.fromkeys(p.source for p in found))
    return Plot(f"roofline_{slug(hardware)}", f"Roofline of {hardware}", _captions(used), figure)


def lengths(hardware: str, sources: Sequence[Source]) -> Plot | None:
    """Draw time against length for each backend, from `benchmarks.lengths`."""
    return _by_length(hardware, sources, "seconds", "lengths", "Time against length", "seconds of one call")


def memory_by_length(hardware: str, sources: Sequence[Source]) -> Plot | None:
    """Draw peak memory against length for each backend, from `benchmarks.lengths`."""
    label = "bytes beyond the inputs"
    return _by_length(hardware, sources, "peak", "memory", "Memory against length", label)


def _by_length(hardware: str, sources: Sequence[Source], key: str, name: str, title: str, label: str) -> Plot | None:
    files = [source for source in sources if source.kind == "lengths"]
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for source in files[-1:]:
        for one in source.data["lengths"]:
            if one.get(key):
                series[one["backend"]].append((one["seqlen"], one[key]))
    if not series:
        return None
    figure, axes = _new(9.5, 5.0)
    for backend in _ordered(series):
        x, y = zip(*sorted(series[backend]), strict=True)
        axes.plot(x, y, lw=1.6, ms=6, label=backend, **style(backend))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{int(value) // 1024}k" if value >= 1024 else f"{int(value)}")
    axes.yaxis.set_major_formatter(lambda value, _: _si(value))
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.grid(True, color="#dddddd")
    _legend(axes)
    sizes = files[-1].data.get("sizes", {})
    heads = f"{sizes.get('heads')} heads over {sizes.get('kv_heads')} of {sizes.get('head_dim')}"
    full = f"{title} on {hardware}: causal forward, batch 1, {heads}, {files[-1].data.get('dtype')}"
    return Plot(f"{name}_{slug(hardware)}", full, _captions(files[-1:]), figure)


def dispatch(hardware: str, sources: Sequence[Source]) -> Plot | None:
    """Draw what a call costs over the callable that its plan holds, from `benchmarks.dispatch`."""
    files = [source for source in sources if source.kind == "sections"]
    rows = [
        (f"{row['name']} ({section['title']})", row["result"]["over"], row["bound"] if row["shows"] == "over" else None)
        for source in files[-1:]
        for section in source.data["sections"]
        for row in section["rows"]
        if row.get("result") and row["shows"] == "over" and abs(row["result"]["over"]) < 100
    ]
    if not rows:
        return None
    figure, axes = _new(9.5, 1.2 + 0.3 * len(rows))
    names = [textwrap.shorten(name, 74, placeholder=" …") for name, _, _ in rows][::-1]
    values = [over for _, over, _ in rows][::-1]
    axes.barh(range(len(rows)), values, color="#0072B2", height=0.62, zorder=3)
    for i, (_, _, bound) in enumerate(rows[::-1]):
        if bound is not None:
            axes.plot([bound, bound], [i - 0.4, i + 0.4], color="#D55E00", lw=2, zorder=4)
    for i, value in enumerate(values):
        axes.annotate(f" {value:+.2f}", (max(value, 0.0), i), va="center", fontsize=8, zorder=5)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_xlim(min(0.0, *values) * 1.1, max(values) * 1.16)
    axes.axvline(0, color="#333333", lw=0.8)
    axes.set_xlabel("microseconds over the baseline (orange: what is allowed)")
    axes.grid(True, axis="x", color="#dddddd", zorder=0)
    return Plot(f"dispatch_{slug(hardware)}", f"What a call costs on {hardware}", _captions(files[-1:]), figure)


def regret(hardware: str, sources: Sequence[Source]) -> Plot | None:
    """Draw chosen over best on unseen shapes, ours and the fixed order's, from `benchmarks.selection`."""
    files = [source for source in sources if source.kind == "selection"]
    rows = [row for source in files[-1:] for row in regrets(source)]
    if not rows:
        return None
    figure, axes = _new(9.5, 4.2)
    for label, column, colour in (("fixed order", 1, "#999999"), ("automatic choice", 0, "#0072B2")):
        values = sorted(row[column] for row in rows if row[column] is not None)
        if values:
            mean = math.exp(sum(math.log(v) for v in values) / len(values))
            text = f"{label}: geometric mean {mean:.3f}, worst {values[-1]:.2f}"
            axes.plot(range(1, len(values) + 1), values, marker="o", ms=4, lw=1.2, color=colour, label=text)
    axes.axhline(1.15, color="#D55E00", lw=1, ls="--")
    axes.annotate("1.15, the worst allowed", (1, 1.155), fontsize=8, color="#D55E00")
    axes.set_xlabel("unseen shapes, sorted")
    axes.set_ylabel("time of the chosen backend over the fastest")
    if max(max(v for v in row if v is not None) for row in rows) > 4:
        axes.set_yscale("log")
    axes.grid(True, color="#dddddd")
    axes.legend(frameon=False, fontsize=9)
    return Plot(f"regret_{slug(hardware)}", f"Regret on {hardware}", _captions(files[-1:]), figure)


def regrets(source: Source) -> list[tuple[float, float | None]]:
    """Return (ours, the fixed order's) of each shape."""
    found = []
    for call in source.data["calls"]:
        ours, fixed = call.get("regret"), call.get("fixed_regret")
        if isinstance(ours, (int, float)) and math.isfinite(ours):  # a call that failed has none
            known = isinstance(fixed, (int, float)) and math.isfinite(fixed)
            found.append((float(ours), float(fixed) if known else None))
    return found


def cpu_rows(hardware: str, sources: Sequence[Source]) -> Plot | None:
    """Draw how many times faster our CPU kernels are than each other contestant, from `benchmarks.cpu`."""
    files = [source for source in sources if source.kind == "cpu"]
    rows = [
        (row["name"], row.get("over", {}), row.get("over_wanted", {})) for s in files[-1:] for row in s.data["rows"]
    ]
    rows = [row for row in rows if row[1]]
    if not rows:
        return None
    figure, axes = _new(9.5, 1.4 + 0.34 * len(rows))
    others = list(dict.fromkeys(name for _, over, _ in rows for name in over))
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
    for other, colour in zip(others, colours * (1 + len(others) // len(colours)), strict=False):
        places = [(over[other], i) for i, (_, over, _) in enumerate(rows[::-1]) if other in over]
        axes.scatter(*zip(*places, strict=True), s=50, label=f"over {other}", zorder=3, color=colour)
    for i, (_, _, wanted) in enumerate(rows[::-1]):
        for value in wanted.values():
            axes.plot([value, value], [i - 0.4, i + 0.4], color="#333333", lw=1.4, zorder=2)
    axes.axvline(1.0, color="#333333", lw=0.8, ls=":")
    axes.set_yticks(range(len(rows)), [textwrap.shorten(name, 60) for name, _, _ in rows][::-1], fontsize=8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("times faster than the other (black: what is wanted)")
    axes.grid(True, color="#dddddd", zorder=0)
    _legend(axes)
    return Plot(f"cpu_{slug(hardware)}", f"Our C++ kernels on {hardware}", _captions(files[-1:]), figure)


def _new(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _scatter(backend: str) -> dict[str, Any]:
    colour, marker = STYLE.get(backend, ("#999999", "o"))
    filled = marker not in "x+"
    return {"c": colour, "marker": marker, **({"edgecolors": "white", "linewidths": 0.6} if filled else {})}


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)


def _ordered(backends: Iterable[str]) -> list[str]:
    order = list(STYLE)
    return sorted(backends, key=lambda name: (order.index(name) if name in order else len(order), name))


def _captions(sources: Sequence[Source]) -> str:
    return "\n".join(dict.fromkeys(source.caption() for source in sources))


def _si(value: float) -> str:
    """Return 8.1e14 as "810 T", 1e-3 as "1 m"."""
    for factor, unit in (
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1.0, ""),
        (1e-3, "m"),
        (1e-6, "µ"),
    ):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.1e} "
