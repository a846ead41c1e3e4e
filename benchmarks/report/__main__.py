"""``python -m benchmarks.report FILES... --out DIR``: an HTML page and plots from result files or folders of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import canvas, figures, page, table
from benchmarks.report.files import read


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``index.html`` and a PNG a figure; return 1 if there was nothing to show.

    Raises:
        SystemExit: from argparse, for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="result files, or folders of them; later ones over earlier")
    parser.add_argument("--out", type=Path, required=True, help="folder for the page and the plots")
    parser.add_argument("--dpi", type=int, default=110)
    parser.add_argument("--markdown", action="store_true", help="also print the comparison table as markdown")
    given = parser.parse_args(argv)
    if missing := [str(path) for path in given.files if not path.exists()]:
        parser.error(f"no such file: {', '.join(missing)}")
    sources, rejected = read(given.files)
    given.out.mkdir(parents=True, exist_ok=True)
    made = []
    for plot in figures.draw(sources):
        path = given.out / f"{plot.name}.png"
        canvas.finish(plot)
        plot.figure.savefig(path, dpi=given.dpi)
        made.append((plot, path))
    (given.out / "index.html").write_text(page.build(sources, made, rejected), encoding="utf-8")
    for text in rejected:
        print(f"not read: {text}", file=sys.stderr)
    for _, path in made:
        print(path)
    print(given.out / "index.html")
    if given.markdown:
        for hardware, rows in table.table(sources).items():
            print(f"\n{hardware}\n\n{_markdown(rows)}")
    return 0 if made else 1


def _markdown(rows: Sequence[table.Row]) -> str:
    head = table.Row.HEAD
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in rows)])


if __name__ == "__main__":
    sys.exit(main())
