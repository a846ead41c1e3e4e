"""Every plot of the report, machine by machine."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report import attention_plots, choice_plots, processor_plots, product_plots
from benchmarks.report.canvas import Plot
from benchmarks.report.files import Source

#: Each takes a machine and its files, and yields a plot for each file, or one for all of a kind, that has something.
MAKERS = (
    attention_plots.speed, attention_plots.roofline, attention_plots.lengths, attention_plots.memory,
    processor_plots.cpu_rows, processor_plots.generate, product_plots.gemm, choice_plots.regret, choice_plots.dispatch,
)  # fmt: skip


def draw(sources: Sequence[Source]) -> list[Plot]:
    """Draw everything that the files have. Of two plots of one name, from two runs on one machine, the later stays."""
    made: dict[str, Plot] = {}
    for hardware in dict.fromkeys(source.hardware for source in sources):
        own = [source for source in sources if source.hardware == hardware]
        for make in MAKERS:
            made.update((plot.name, plot) for plot in make(hardware, own))
    return list(made.values())
