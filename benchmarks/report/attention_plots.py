"""Plots of attention: what each backend reaches by shape, the roofline, and time and memory as a sequence grows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.report import canvas
from benchmarks.report.canvas import Plot
from benchmarks.report.files import Point, Source, growth, points

#: Left out where single kernels are compared: it runs one of the others.
_CHOICES = ("attention()",)


def speed(hardware: str, sources: Sequence[Source]) -> Iterator[Plot]:
    """Draw, for each shape, what each backend reaches of a matrix product (decode: of a copy) of the same turns."""
    found = [p for p in points(sources) if p.backend not in _CHOICES and share_of(p) is not None]
    shares: dict[str, dict[str, float]] = defaultdict(dict)
    for p in found:  # later files over earlier ones; the fastest of two runs in one place would be a choice of luck
        shares[_label(p)][p.backend] = share_of(p) or 0.0
    if not shares:
        return
    kinds = {_label(p): (bool(p.shape.block_size), p.shape.kind, bool(p.shape.lengths)) for p in found}
    names = sorted(shares, key=lambda name: (kinds[name][0], _KINDS.index(kinds[name][1]), kinds[name][2]))
    rows = [shares[name] for name in names]
    backends = canvas.ordered(name for row in rows for name in row)
    looks = canvas.styles(backends)
    figure, axes = canvas.new(9.5, 0.7 + 0.4 * len(rows))
    for backend, (x, y) in canvas.dodged(rows, backends).items():
        axes.scatter(x, y, label=backend, clip_on=False, zorder=3, **canvas.dots(looks[backend]))
    canvas.rows_axis(axes, names)
    axes.set_xlim(0, max(1.05, 1.05 * max(max(row.values()) for row in rows)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("of a matrix product of the same turns (shapes marked *: of a copy); further right is faster")
    canvas.legend(axes)
    used = dict.fromkeys(p.source for p in found)
    yield Plot(f"{canvas.slug(hardware)}_speed", hardware, f"Attention on {hardware}", canvas.captions(used), figure)


_KINDS = ("prefill", "train", "decode")


def _label(p: Point) -> str:
    return f"{p.shape.name} *" if p.shape.kind == "decode" else p.shape.name


def share_of(p: Point) -> float | None:
    """Return a point's rate as a share of the yardstick that bounds it."""
    if p.shape.kind == "decode":
        return p.shape.bytes(p.dtype) / p.seconds / p.copy if p.copy else None
    return p.shape.flops() / p.seconds / p.matmul if p.matmul else None


def roofline(hardware: str, sources: Sequence[Source]) -> Iterator[Plot]:
    """Draw operations a second against operations a byte, under the roofs that the same runs measured."""
    found = [p for p in points(sources) if p.backend not in _CHOICES and p.matmul and p.copy]
    if not found:
        return
    peak, bandwidth = max(p.matmul or 0.0 for p in found), max(p.copy or 0.0 for p in found)
    figure, axes = canvas.new(9.5, 5.2)
    intensities = [p.shape.flops() / p.shape.bytes(p.dtype) for p in found]
    low, high = min(intensities) / 2, max(intensities) * 2
    ridge = peak / bandwidth
    axes.plot([low, ridge, max(high, ridge * 2)], [low * bandwidth, peak, peak], color=canvas.DARK, lw=1.5, zorder=2)
    axes.annotate(f"matrix product: {canvas.si(peak)}FLOP/s", (ridge * 1.1, peak * 1.12), fontsize=9)
    middle = math.sqrt(low * ridge)
    axes.annotate(f"copy: {canvas.si(bandwidth)}B/s", (middle, middle * bandwidth * 1.5), ha="right", fontsize=9)
    for backend, look in canvas.styles(canvas.ordered(p.backend for p in found)).items():
        own = [p for p in found if p.backend == backend]
        axes.scatter(
            [p.shape.flops() / p.shape.bytes(p.dtype) for p in own], [p.shape.flops() / p.seconds for p in own],
            label=backend, zorder=3, alpha=0.85, **canvas.dots(look),
        )  # fmt: skip
    canvas.doubling_axis(axes)
    axes.set_yscale("log")
    axes.set_ylim(top=peak * 2)
    axes.set_xlabel("operations for each byte that has to be read or written once")
    axes.set_ylabel("operations a second")
    axes.yaxis.set_major_formatter(lambda value, _: canvas.si(value))
    axes.grid(True, color=canvas.FAINT)
    canvas.legend(axes)
    used = dict.fromkeys(p.source for p in found)
    title = f"Roofline of {hardware}"
    yield Plot(f"{canvas.slug(hardware)}_roofline", hardware, title, canvas.captions(used), figure)


def lengths(hardware: str, sources: Sequence[Source]) -> Iterator[Plot]:
    """Draw time against length for each backend, from `benchmarks.lengths`."""
    for source in sources:
        series = _series(source, "seconds")
        if source.kind == "lengths" and series:
            figure, axes = canvas.new(9.5, 5.0)
            for backend, look in canvas.styles(canvas.ordered(series)).items():
                x, y = zip(*series[backend], strict=True)
                axes.plot(x, y, lw=1.6, ms=6, label=backend, **canvas.lines(look))
            _growing(axes, "seconds of one call")
            axes.yaxis.set_major_formatter(lambda value, _: f"{canvas.si(value)}s")
            title = f"Time against length on {hardware}: {_of(source)}"
            yield Plot(canvas.name_of(source), hardware, title, source.caption(), figure)


def memory(hardware: str, sources: Sequence[Source]) -> Iterator[Plot]:
    """Draw peak memory against length, of each backend or of each kind of call; dashed with the backward."""
    for source in sources:
        series = _series(source, "peak") if source.kind == "lengths" else growth(source)
        if not series:
            continue
        figure, axes = canvas.new(9.5, 5.0)
        names = canvas.ordered(series)
        looks = canvas.styles(name.removesuffix(_BACKWARD) for name in names)
        for place, name in enumerate(names):
            x, y = zip(*series[name], strict=True)
            look = canvas.lines(looks[name.removesuffix(_BACKWARD)])
            look |= {"ls": "--", "mfc": "white"} if name.endswith(_BACKWARD) else {}
            under = (len(names) - 1 - place) / len(names)  # equal lines lie on each other: the lower one is the wider
            axes.plot(x, y, lw=1.4 + 3 * under, ms=5 + 5 * under, label=name, alpha=0.9, **look)
        _growing(axes, "peak beyond the inputs")
        _linear(axes, series)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: canvas.binary(value))
        of = _of(source) if source.kind == "lengths" else _MEMORY_OF["results" in source.data]
        title = f"Memory against length on {hardware}: {of}"
        yield Plot(canvas.name_of(source, "memory"), hardware, title, source.caption(), figure)


_BACKWARD = " + backward"
#: What the two kinds of memory files measure: of `benchmarks.memory`, and of `benchmarks.gpu_triton`.
_MEMORY_OF = ("batch 1, 1 or 2 heads of 64, whole process", "causal, batch 1, 8 heads, bfloat16, of torch's allocator")


def _series(source: Source, key: str) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for one in source.data["lengths"] if source.kind == "lengths" else ():
        if one.get(key):
            found[one["backend"]].append((one["seqlen"], one[key]))
    return {name: sorted(values) for name, values in found.items()}


def _of(source: Source) -> str:
    sizes = source.data.get("sizes", {})
    heads = f"{sizes.get('heads')} heads over {sizes.get('kv_heads')} of {sizes.get('head_dim')}"
    return f"causal forward, batch 1, {heads}, {source.data.get('dtype')}"


def _growing(axes: Any, label: str) -> None:
    canvas.doubling_axis(axes)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.grid(True, color=canvas.FAINT)
    canvas.legend(axes)


def _linear(axes: Any, series: dict[str, list[tuple[int, float]]]) -> None:
    """Draw what twice the memory for twice the length looks like."""
    values = [value for points in series.values() for _, value in points]
    lengths_ = [length for points in series.values() for length, _ in points]
    first, last = min(lengths_), max(lengths_)
    if last > first:
        low = min(values) / 2
        axes.plot([first, last], [low, low * last / first], color=canvas.GREY, lw=1, ls=":", zorder=1)
        axes.annotate("in proportion", (last, low * last / first), fontsize=8, color=canvas.GREY, ha="right", va="top")
