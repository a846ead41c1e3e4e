"""What every plot of the report shares: looks of contestants, axes, and where the numbers come from."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.files import Source

BLUE, ORANGE, GREEN, PINK, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
GREY, DARK, FAINT = "#888888", "#333333", "#dddddd"
#: One colour and marker per contestant, in every plot; Okabe and Ito's colours, which the colour-blind can tell.
STYLE: dict[str, tuple[str, str]] = {
    "flash_attn_4": (ORANGE, "D"), "flash_attn_3": (ORANGE, "s"), "flash_attn_2": (ORANGE, "o"),
    "gluon_hopper": (BLUE, "D"), "triton": (BLUE, "o"), "cpu": (BLUE, "s"),
    "sdpa_cudnn": (GREEN, "D"), "sdpa_flash": (GREEN, "o"), "sdpa_efficient": (GREEN, "s"), "sdpa_cpu": (GREEN, "v"),
    "xformers": (PINK, "o"), "mslk": (PINK, "s"),
    "flashinfer": (AMBER, "o"), "tensorrt_llm": (AMBER, "s"), "cutlass": (AMBER, "D"), "deep_gemm": (PINK, "D"),
    "cublas": (GREEN, "D"), "torch_grouped": (GREEN, "o"), "torch": (GREEN, "s"),
    "reference": (GREY, "x"), "torch math": ("#444444", "+"), "torch sdpa by hand": (SKY, "P"),
    "attention()": ("#000000", "*"), "automatic": ("#000000", "*"),
    "torch._grouped_mm": (SKY, "P"), "a dense product": (DARK, "1"), "loop over experts": (DARK, "2"),
}  # fmt: skip
#: For contestants that are not listed.
_OTHERS = tuple((colour, marker) for marker in "^<>" for colour in (PINK, SKY, AMBER, ORANGE, GREEN, BLUE))


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure with what stands above and below it. name: of its file, without the ending; hardware: what ran."""

    name: str
    hardware: str
    title: str
    caption: str
    figure: Any


def slug(hardware: str) -> str:
    """Return a hardware's name as part of a file name."""
    words = "".join(c if c.isalnum() else " " for c in hardware.lower()).split()
    return "_".join(w for w in words if w not in ("nvidia", "amd", "intel", "r", "processor"))[:40] or "machine"


def name_of(source: Source, more: str = "") -> str:
    """Name the plot of one file: machine, file, and what else tells two plots of it apart."""
    stem = source.path.stem
    return "_".join(filter(None, (slug(source.hardware), stem, more if more not in stem else "")))


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each contestant of a plot; those that are not listed take theirs in turn."""
    unlisted = itertools.cycle(_OTHERS)
    return {name: STYLE.get(name) or next(unlisted) for name in dict.fromkeys(names)}


def lines(style: tuple[str, str]) -> dict[str, Any]:
    """Return the arguments of `plot` for a colour and a marker."""
    return {"color": style[0], "marker": style[1]}


def dots(style: tuple[str, str]) -> dict[str, Any]:
    """Return the arguments of `scatter` for a colour and a marker."""
    colour, marker = style
    edge = {} if marker in "x+12" else {"edgecolors": "white", "linewidths": 0.6}
    return {"c": colour, "marker": marker, "s": 90 if marker == "*" else 38, **edge}


def new(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a figure and its axes; needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
        one.set_axisbelow(True)
    return figure, axes


def finish(plot: Plot) -> None:
    """Write the title above a figure and where its numbers come from below, so that a copied picture keeps both."""
    figure = plot.figure
    width, height = figure.get_size_inches()
    columns = int(width * 17)
    lines = [
        part for line in plot.caption.splitlines() for part in textwrap.wrap(line, columns, subsequent_indent="  ")
    ]
    title = textwrap.wrap(plot.title, int(width * 11))
    below, above = 0.13 * len(lines) + 0.08, 0.19 * len(title) + 0.12
    figure.set_size_inches(width, height + below + above)
    total = height + below + above
    figure.get_layout_engine().set(rect=(0, below / total, 1, height / total))
    figure.text(0.01, 1 - 0.06 / total, "\n".join(title), fontsize=11.5, va="top", ha="left")
    figure.text(0.01, 0.04 / total, "\n".join(lines), fontsize=7, color="#666666", va="bottom", ha="left")


def rows_axis(axes: Any, names: Sequence[str], *, faint: Iterable[int] = ()) -> None:
    """Label rows from the top down, every second one on a grey band; `faint` are those not to be trusted."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [textwrap.shorten(name, 66, placeholder=" …") for name in names], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    for i in range(0, len(names), 2):
        axes.axhspan(i - 0.5, i + 0.5, color="#f3f3f3", lw=0, zorder=-1)
    labels = axes.get_yticklabels()
    for i in faint:
        labels[i].set_color(GREY)
        labels[i].set_style("italic")
    axes.grid(True, axis="x", color=FAINT)


def legend(axes: Any, **options: Any) -> None:
    """Put the legend to the right of the axes."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, **options)


def doubling_axis(axes: Any) -> None:
    """Make the x axis one of powers of two, with 4k for 4096."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=16))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))


def tokens(count: float) -> str:
    """Return 4096 as "4k"."""
    whole = round(count)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else f"{whole}"


def ordered(names: Iterable[str]) -> list[str]:
    """Return contestants in the order of `STYLE`."""
    order = list(STYLE)
    return sorted(set(names), key=lambda name: (order.index(name) if name in order else len(order), name))


def dodged(
    rows: Sequence[Mapping[str, float]], contestants: Sequence[str]
) -> dict[str, tuple[list[float], list[float]]]:
    """Return x and y of each contestant's dots, where row i is at y = i and equal values do not cover each other."""
    step = 0.62 / max(1, len(contestants) - 1)
    found: dict[str, tuple[list[float], list[float]]] = {}
    for place, name in enumerate(contestants):
        here = [(row[name], i - 0.31 + place * step) for i, row in enumerate(rows) if name in row]
        found[name] = ([x for x, _ in here], [y for _, y in here])
    return found


def captions(sources: Iterable[Source]) -> str:
    """Return where the numbers of some files come from, a line each."""
    return "\n".join(dict.fromkeys(source.caption() for source in sources))


def threads(source: Source) -> str:
    """Return "2 threads", empty where the file does not say."""
    count = source.about.get("threads")
    return f"{count} thread{'' if count == 1 else 's'}" if count else ""


def si(value: float) -> str:
    """Return 8.1e14 as "810 T", 1e-3 as "1 m"."""
    units = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))
    for factor, unit in units:
        if value >= factor * (1 - 1e-9):
            return f"{value / factor:.3g} {unit}"
    return f"{value:.1e} "


def binary(value: float) -> str:
    """Return 3.2e6 bytes as "3.05 MiB"."""
    for factor, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"
