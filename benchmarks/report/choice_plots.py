"""Plots of the choice: what it costs over the best one (regret), and what the call costs that makes it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import canvas
from benchmarks.report.canvas import Plot
from benchmarks.report.files import Source

#: What the regret of the worst call may be.
MOST_WORST = 1.15
#: Calls that get a row of their own.
MOST_ROWS = 32


@dataclass(frozen=True, slots=True)
class Regret:
    """Chosen over best on one unseen call; infinite where the chosen backend failed. fixed: the shipped order's."""

    name: str
    ours: float
    fixed: float
    chosen: str
    best: str


def regrets(source: Source) -> list[Regret]:
    """Return the regret of each call that was measured."""
    found = []
    for call in source.data["calls"]:
        ours, fixed = _number(call.get("regret")), _number(call.get("fixed_regret"))
        if not call.get("error") and not math.isnan(ours):
            found.append(Regret(call.get("name", ""), ours, fixed, call.get("chosen", ""), call.get("best", "")))
    return found


def seed_of(source: Source) -> str:
    """Say which draw a selection file is of, as two of one machine are told apart; empty where it does not say."""
    seed = source.data.get("seed")
    return "" if seed is None else f" of seed {seed}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def summary(values: Sequence[float]) -> str:
    """Say the geometric mean and the worst, and how many calls failed; what is not known (NaN) does not count."""
    known = [value for value in values if math.isfinite(value)]
    infinite = sum(map(math.isinf, values))
    failed = f", {infinite} failed" if infinite else ""
    if not known:
        return f"nothing measured{failed}"
    mean = math.exp(math.fsum(math.log(value) for value in known) / len(known))
    return f"{mean:.3f} in the geometric mean, {max(known):.2f} at worst{failed}"


def regret(hardware: str, sources: Sequence[Source]) -> Iterator[Plot]:
    """Draw chosen over best, ours and the shipped order's, for each unseen call where either is more than 1."""
    for source in sources:
        found = regrets(source) if source.kind == "selection" else []
        if not found:
            continue
        apart = [r for r in found if r.ours > 1.0 or r.fixed > 1.0]
        apart.sort(key=lambda r: (-max(r.ours, r.fixed if not math.isnan(r.fixed) else 0.0), r.name))
        shown = apart[:MOST_ROWS]
        names = [f"{r.name}: {r.chosen}" + (f", best {r.best}" if r.best != r.chosen else "") for r in shown]
        equal = len(found) - len(apart)
        if equal or not shown:
            names.append(f"the other {equal} calls: the fastest, by both")
        figure, axes = canvas.new(9.5, 1.3 + 0.3 * len(names))
        top = max([MOST_WORST, *(v for r in shown for v in (r.ours, r.fixed) if math.isfinite(v))]) * 1.06
        series = (
            ("shipped order", [r.fixed for r in found], [r.fixed for r in shown], canvas.GREY, "s", 0.16),
            ("automatic choice", [r.ours for r in found], [r.ours for r in shown], canvas.BLUE, "o", -0.16),
        )
        for label, of_all, values, colour, marker, shift in series:
            x = [min(v, top) for v in [*values, *([1.0] if equal else [])]]  # a call that failed stands at the edge
            y = [i + shift for i in range(len(x))]
            axes.scatter(x, y, color=colour, marker=marker, s=34, zorder=3, clip_on=False)
            axes.scatter([], [], color=colour, marker=marker, s=34, label=f"{label}: {summary(of_all)}")
        canvas.rows_axis(axes, names)
        axes.axvline(MOST_WORST, color=canvas.ORANGE, lw=1, ls="--", label=f"{MOST_WORST}, the worst allowed")
        axes.axvline(1.0, color=canvas.DARK, lw=0.8)
        axes.set_xlim(0.98, top)
        if top > 6:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.set_xlabel("time of the chosen one over the fastest (1: within their noise)")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, fontsize=9, borderaxespad=0.2)
        hidden = f" (the {MOST_ROWS} worst of {len(apart)} that differ)" if len(apart) > MOST_ROWS else ""
        title = f"Regret on {hardware}: {len(found)} unseen calls{seed_of(source)}{hidden}"
        yield Plot(canvas.name_of(source), hardware, title, source.caption(), figure)


def dispatch(hardware: str, sources: Sequence[Source]) -> Iterator[Plot]:
    """Draw what a call costs over the callable that its plan holds, from `benchmarks.dispatch`."""
    for source in sources:
        rows = [
            (f"{row['name']} ({section['title']})", row["result"], row["bound"])
            for section in (source.data["sections"] if source.kind == "sections" else ())
            for row in section["rows"]
            if row.get("result") and row["shows"] == "over" and abs(row["result"]["over"]) < 100
        ]
        if not rows:
            continue
        figure, axes = canvas.new(9.5, 0.7 + 0.29 * len(rows))
        disturbed = [i for i, (_, result, _) in enumerate(rows) if result.get("base_disturbed")]
        for i, (_, result, bound) in enumerate(rows):
            over = result["over"]
            axes.barh(i, over, color=canvas.SKY if i in disturbed else canvas.BLUE, height=0.62, zorder=3)
            if bound is not None:
                axes.plot([bound, bound], [i - 0.42, i + 0.42], color=canvas.ORANGE, lw=2, zorder=4)
            end = max(over, 0.0, bound or 0.0)
            axes.annotate(f"{over:+.2f}", (end, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
        canvas.rows_axis(axes, [name for name, _, _ in rows], faint=disturbed)
        values = [result["over"] for _, result, _ in rows]
        axes.set_xlim(min(0.0, *values) * 1.1, max(values) * 1.16)
        axes.axvline(0, color=canvas.DARK, lw=0.8)
        axes.set_xlabel("microseconds over the baseline (orange: what is allowed)")
        title = f"What a call costs on {hardware}, {canvas.threads(source)}".rstrip(", ")
        title += "; pale, in italics: the baseline was disturbed" if disturbed else ""
        yield Plot(canvas.name_of(source), hardware, title, source.caption(), figure)
