"""Plot of grouped products and layers: every contestant's rate beside the fastest one's, shape by shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gemm_shapes import GemmShape
from benchmarks.report import canvas
from benchmarks.report.canvas import Plot
from benchmarks.report.files import Source


@dataclass(frozen=True, slots=True)
class Product:
    """One shape: operations a second of each contestant, and what automatic choice took, "" if it did not choose."""

    name: str
    rates: dict[str, float]
    chosen: str = ""


def products(source: Source) -> list[Product]:
    """Return what a file of `benchmarks.gemm` or `benchmarks.gpu_gemm` timed; of a kernel's tiles, the fastest."""
    found = []
    for timed in source.data.get("timed", ()):  # gpu_gemm: "triton [128, 256, 8, 4]" is one tile of "triton"
        rates: dict[str, float] = {}
        for name, tflops in timed.get("tflops", {}).items():
            short = name.partition(" [")[0]
            rates[short] = max(tflops * 1e12, rates.get(short, 0.0))
        found.append(Product(timed["name"], rates))
    for report in source.data.get("shapes", ()):
        shape = GemmShape(**report["shape"])
        rates = {name: shape.flops() / seconds for name, seconds in report["seconds"].items()}
        found.append(Product(shape.name, rates, report.get("chosen", "")))
    return [product for product in found if product.rates]


def gemm(hardware: str, sources: Sequence[Source]) -> Iterator[Plot]:
    """Draw each shape's contestants as shares of the fastest."""
    for source in sources:
        found = products(source) if source.kind == "gemm" else []
        if not found:
            continue
        best = [max(product.rates.values()) for product in found]
        rows = [
            {name: rate / top for name, rate in product.rates.items()} for product, top in zip(found, best, strict=True)
        ]
        figure, axes = canvas.new(10.5, 0.7 + 0.4 * len(rows))
        looks = canvas.styles(canvas.ordered(name for row in rows for name in row))
        for name, (x, y) in canvas.dodged(rows, list(looks)).items():
            axes.scatter(x, y, label=name, clip_on=False, zorder=3, **canvas.dots(looks[name]))
        canvas.rows_axis(axes, [f"{p.name} -> {p.chosen}" if p.chosen else p.name for p in found])
        for i, top in enumerate(best):
            axes.annotate(f"{canvas.si(top)}FLOP/s", (1.04, i), va="center", fontsize=8.5, annotation_clip=False)
        axes.set_xlim(0, 1.03)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("of the fastest of the row, whose rate is at the right; after -> what was chosen")
        axes.legend(loc="upper left", bbox_to_anchor=(1.16, 1.0), frameon=False, fontsize=8.5)
        dtype = str(source.data.get("dtype", ""))
        title = f"Grouped products and layers on {hardware}" + (f", {dtype}" if dtype else "")
        title += f", {canvas.threads(source)}" if not source.about.get("gpu") and canvas.threads(source) else ""
        yield Plot(canvas.name_of(source), hardware, title, source.caption(), figure)
