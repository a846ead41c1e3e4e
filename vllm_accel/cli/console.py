"""What every command prints with: tables for people, JSON for programs, one line for an error, no private paths."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

#: Columns where the output is no terminal (a log, a pipe): wide enough that a reason rarely wraps.
PIPE_WIDTH = 140

STYLES = {
    "chosen": "bold green", "OK": "green", "OK-SLOW": "yellow", "NO": "bold red", "yes": "green",
    "could run": "green", "no": "yellow",
    "BROKEN": "bold red", "QUARANTINED": "red", "UNSUPPORTED": "dim", "ABSENT": "dim", "DISABLED": "yellow",
    "cannot run this call": "dim", "not available": "dim", "switched off": "yellow", "quarantined": "red",
    "not asked for": "dim", "could run, not chosen automatically": "yellow",
}  # fmt: skip


def console() -> Console:
    """Return a console on standard output."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPE_WIDTH if piped else None, highlight=False)


def plain(text: object, style: str = "") -> Text:
    """Return text that rich prints as it is: square brackets are not markup."""
    from rich.text import Text

    return Text(str(text), style=style)


def indented(text: str, columns: int) -> Padding:
    """Return text that keeps its indentation when it wraps."""
    from rich.padding import Padding

    return Padding(plain(text), (0, 0, 0, columns))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> Table:
    """Return a table whose cells are coloured where they hold a state."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for i, name in enumerate(columns):
        made.add_column(name, no_wrap=i == 0, overflow="fold")
    for row in rows:
        made.add_row(*(plain(cell, STYLES.get(str(cell), "")) for cell in row))
    return made


def print_json(data: object) -> None:
    """Print data as JSON."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table for an issue or a page."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def wrong_use(command: str, error: BaseException | str) -> int:
    """Print one line to standard error and return the exit code for wrong use."""
    text = " ".join(str(error).split())
    print(f"vllm-accel {command}: {text}", file=sys.stderr)
    return 2


def hide(text: str) -> str:
    """Replace home directories by ``~`` and the user's name in paths, so that a report can be posted."""
    home = os.path.expanduser("~")  # unlike Path.home, never raises
    if len(home) > 1:
        text = re.sub(re.escape(home) + r"(?=[/\\:;,\s'\")]|$)", "~", text)
    text = re.sub(r"(?:/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\:;,\s'\")]+", "~", text)
    user = os.environ.get("USER") or os.environ.get("USERNAME") or os.path.basename(home)
    if len(user) < 2 or user == "root":
        return text
    return re.sub(rf"(?<=[/\\_-]){re.escape(user)}(?=[/\\:;,\s'\")]|$)", "USER", text)  # /tmp/torchinductor_jane


def hide_all(data: Any) -> Any:
    """Apply `hide` to every string in nested lists and mappings."""
    if isinstance(data, str):
        return hide(data)
    if isinstance(data, Mapping):
        return {key: hide_all(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [hide_all(value) for value in data]
    return data
