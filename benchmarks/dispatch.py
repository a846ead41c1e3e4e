"""``python -m benchmarks.dispatch``: microseconds that a call costs beyond its kernel.

No-grad and eager unless a row says otherwise. "over" is the median, over rounds, of the difference to the baseline of
the same round; garbage collection is off inside a slice, as `timeit` has it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import contest, dispatch_contests, dispatch_products, machine, trivial
from benchmarks.contest import Comparison, Contest


@dataclasses.dataclass(slots=True)
class Row:
    """One line of the table.

    Attributes:
        name: what is measured. ours, base: contestants. bound: limit of `over` (or of `ratio`) in ``--check``.
        shows: whether the difference in microseconds or the ratio counts. goal: the bound is a wish, not a must.
        result, error: filled in by the run.
    """

    name: str
    ours: str
    base: str
    bound: float | None = None
    shows: Literal["over", "ratio"] = "over"
    goal: bool = False
    result: Comparison | None = None
    error: str = ""

    @property
    def passed(self) -> bool:
        """Tell whether the row meets its bound, if it has one."""
        if self.bound is None:
            return True
        return self.result is not None and float(getattr(self.result, self.shows)) < self.bound


@dataclasses.dataclass(slots=True)
class Section:
    """One contest and the rows read from it."""

    title: str
    build: Callable[[], Contest]
    rows: list[Row]
    rounds: int
    trivial: bool = False
    microseconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)


def sections(device: torch.device, rounds: int, quick: bool) -> list[Section]:
    """Return everything that is measured; bounds are those of SPEC section 5 and of the issue."""
    c = dispatch_contests
    few = max(3, rounds // 15)
    kinds = ("by name", "two shapes in turn", "return_lse", "sinks", "attn_bias", "varlen")
    hits = [
        Row("exact hit", "attention", "direct", 1.5),
        Row("exact hit, beside sdpa by hand", "attention", "sdpa by hand", 1.0, goal=True),
        Row("transformers' sdpa_attention_forward", "transformers", "sdpa by hand"),
        Row("diffusers' dispatch_attention_fn", "diffusers", "sdpa by hand"),
    ]
    gradient = [Row("forward, recorded", "attention", "direct")]
    gradient += [Row("forward and backward", "attention backward", "direct backward")]
    decode = [Row("growing over constant length", "growing", "constant", 1.3, "ratio")]
    decode += [Row("growing over the kernel alone", "growing", "direct")]
    miss = [Row("new length, known bucket", "attention", "direct", 8.0)]
    options = [Row(f"exact hit: {name}", name, f"direct {name}") for name in kinds[3:]]
    products = [Row(f"exact hit: {n}", n, f"direct {n}", us) for n, us in dispatch_products.BOUNDS.items()]
    nothing = [Row("exact hit", "attention", "direct", 1.5)]
    nothing += [Row(f"exact hit: {name}", name, "direct") for name in kinds]
    lengths, steps = (32, 20) if quick else (60, 500)
    compiler = "eager" if quick else "inductor"

    def copy(rows: list[Row]) -> list[Row]:
        return [dataclasses.replace(row) for row in rows]

    def section(title: str, rows: list[Row], count: int, build: Callable[..., Contest], *more: Any) -> Section:
        return Section(title, lambda: build(device, *more), rows, count, title.endswith("nothing"))

    return [
        section("real kernel", hits, rounds, c.exact_hit),
        section("real kernel, optional tensors", options, rounds, c.with_options),
        section("real kernel, products", products, rounds, dispatch_products.products),
        section("real kernel, gradients", gradient, rounds, c.gradients),
        section(f"real kernel, torch.compile ({compiler})", [Row("compiled", "attention", "sdpa by hand")], rounds,
                c.compiled, compiler),
        section("real kernel, miss", miss, rounds, c.bucket_hit, lengths),
        section(f"real kernel, decode, {c.LAYERS} layers, {steps} steps", decode, few, c.decode_loop, steps),
        section("a kernel that does nothing", nothing, rounds, c.trivial_hits),
        section("miss, a kernel that does nothing", copy(miss), rounds, c.bucket_hit, lengths),
        section(f"decode, {c.LAYERS} layers, {steps} steps, a kernel that does nothing", copy(decode), few,
                c.decode_loop, steps),
    ]  # fmt: skip


def measure(section: Section, device: torch.device) -> None:
    """Run a section's contest and fill in its rows; a failure becomes the rows' error, never the program's."""
    try:
        if section.trivial:
            with trivial.installed(device):
                section.microseconds = contest.run(section.build(), section.rounds, device)
        else:
            section.microseconds = contest.run(section.build(), section.rounds, device)
    except Exception as error:  # a missing compiler, a broken package: the other sections still count
        for row in section.rows:
            row.error = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        return
    for row in section.rows:
        missing = [name for name in (row.ours, row.base) if name not in section.microseconds]
        if missing:
            row.error = f"{missing[0]} is not installed here"
        else:
            row.result = contest.compare(section.microseconds[row.ours], section.microseconds[row.base])


def disturbed(measured: list[Section]) -> Iterator[str]:
    """Name the sections whose baseline was disturbed."""
    for section in measured:
        if any(row.result is not None and row.result.base_disturbed for row in section.rows):
            yield section.title


def show(measured: list[Section], facts: dict[str, Any], warnings: list[str]) -> None:
    """Print the table, where and when it was measured, and whether to believe it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(machine.describe(facts), highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("microseconds per call")
    for name in ("ours", "baseline", "over", "of the fastest", "±", "ratio", "must be under"):
        table.add_column(name, justify="right")
    for section in measured:
        table.add_row(f"[bold]{section.title}")
        for row in section.rows:
            table.add_row(*_cells(row))
    console.print(table)
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)


def _cells(row: Row) -> list[str]:
    name = f"  {row.name} [dim]- {row.base}"
    if row.result is None:
        return [name, f"[yellow]{row.error}"]
    r = row.result
    bound = ""
    if row.bound is not None:
        text = f"{row.bound:g}{'x' if row.shows == 'ratio' else ''}"
        text = f"{text} (goal)" if row.goal else text
        bound = f"[green]{text}" if row.passed else f"[red]{text} MISSED"
    numbers = [f"{n:.2f}" for n in (r.ours, r.base, r.over, r.over_min, r.spread)]
    return [name, *numbers, f"{r.ratio:.2f}x", bound]


def as_data(measured: list[Section], facts: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    """Return everything that was measured as plain data."""
    return {
        "about": facts,
        "warnings": warnings,
        "sections": [
            {
                "title": section.title,
                "rounds": {name: [round(us, 4) for us in values] for name, values in section.microseconds.items()},
                "rows": [{**dataclasses.asdict(row), "passed": row.passed} for row in section.rows],
            }
            for section in measured
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and with ``--check`` return 1 if a bound is missed.

    Raises:
        SystemExit: from argparse, for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatch", description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--rounds", type=int, default=300, help="rounds of each contest; decode takes a fifteenth")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; 0 leaves its default")
    parser.add_argument("--only", default="", help="only sections whose title contains this")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    parser.add_argument("--quick", action="store_true", help="few rounds, for the tests: numbers mean nothing")
    given = parser.parse_args(argv)
    device = machine.device(parser, given.device)
    before = machine.load()
    torch.manual_seed(0)
    with contest.threads(given.threads):
        facts = machine.about("benchmarks.dispatch", device)
        planned = sections(device, 4 if given.quick else given.rounds, given.quick)
        measured = [section for section in planned if given.only in section.title]
        for section in measured:
            measure(section, device)
    warnings = [text for text in (machine.busy(before, 1),) if text]
    warnings += [f"the baseline of {title!r} was disturbed: measure again" for title in disturbed(measured)]
    show(measured, facts, warnings)
    if given.json:
        given.json.write_text(json.dumps(as_data(measured, facts, warnings), indent=1) + "\n")
    missed = [row for section in measured for row in section.rows if not row.passed and not row.goal]
    return 1 if given.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
