"""One self-contained HTML page: every plot inside it, every number with its machine, versions, date and command."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.report import table
from benchmarks.report.canvas import Plot, slug
from benchmarks.report.files import Source

_INTRODUCTION = (
    "Each number comes from a result file named at the end; each figure names its hardware, versions, date and "
    "command. In one run the contestants took turns; a figure from several runs names them all."
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.6em } h2 { font-size: 1.35em; margin-top: 2.2em; border-top: 2px solid #222; padding-top: .6em }
h3 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .35em .7em; text-align: left; vertical-align: top }
img { max-width: 100% } .from { color: #666; font-size: 12px; white-space: pre-line }
.yes { color: #b00; font-weight: 600 }
"""


def build(sources: Sequence[Source], plots: Sequence[tuple[Plot, Path]], rejected: Sequence[str]) -> str:
    """Return the page."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>vllm_accel, measured</title>"
             f"<style>{_STYLE}</style><h1>vllm_accel, measured</h1>"]  # fmt: skip
    parts.append(f"<p>{_INTRODUCTION}</p>")
    tables = table.table(sources)
    machines = list(dict.fromkeys(s.hardware for s in sources if s.about))
    parts.append("<ul>" + "".join(f"<li><a href='#{slug(m)}'>{_text(m)}</a>" for m in machines) + "</ul>")
    for machine in machines:
        own = [source for source in sources if source.hardware == machine]
        parts.append(f"<h2 id='{slug(machine)}'>{_text(machine)}</h2>")
        if rows := tables.get(machine):
            parts.append("<h3>The document's comparison</h3>")
            parts.append(_table(table.Row.HEAD, (row.cells() for row in rows)))
            files = [s for s in own if s.kind in ("shapes", "lengths", "conformance")]
            parts.append(_from("\n".join(dict.fromkeys(source.caption() for source in files))))
        if line := table.regret_line(own):
            parts.append(f"<h3>Regret of automatic choice</h3><p>{_text(line)}</p>")
        parts += [_figure(plot, path) for plot, path in plots if plot.hardware == machine]
        parts += _known_bad(own)
    parts.append("<h2>Files</h2>")
    parts.append(_table(("file", "what", "where it comes from"), ((s.path.name, s.kind, s.caption()) for s in sources)))
    parts += [f"<p>Not read: {_text(text)}</p>" for text in rejected]
    return "\n".join(parts) + "\n"


def _figure(plot: Plot, path: Path) -> str:
    image = base64.b64encode(path.read_bytes()).decode()
    title = _text(plot.title)
    return f"<h3>{title}</h3><img alt='{title}' src='data:image/png;base64,{image}'>{_from(plot.caption)}"


def _known_bad(sources: Sequence[Source]) -> list[str]:
    parts = []
    for source in sources:
        if source.kind == "known_bad":
            words = {True: "yes", False: "no", None: "not tried"}
            rows = (
                (row["name"], row["link"], words[row["reproduced"]], row["detail"], row["ours"])
                for row in source.data["known_bad"]
            )
            parts.append("<h3>Public reports of wrong kernels, tried here</h3>")
            head = ("report", "link", "reproduced", "seen", "vllm_accel on the same call")
            parts += [_table(head, rows), _from(source.caption())]
    return parts


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    def line(tag: str, cells: Iterable[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_cell(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", head) + "".join(line("td", row) for row in rows) + "</table>"


def _cell(value: object) -> str:
    text = str(value)
    if text.startswith("https://"):
        return f"<a href='{_text(text)}'>{_text('/'.join(text.split('/')[3:]))}</a>"
    return "<span class=yes>yes</span>" if text == "yes" else _text(text)


def _from(caption: str) -> str:
    return f"<p class=from>{_text(caption)}</p>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
