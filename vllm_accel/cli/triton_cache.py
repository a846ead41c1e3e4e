"""Triton's directory of compiled kernels: where it is, and emptying it without touching anything else."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from vllm_accel.cli import console

#: Triton names an entry by a SHA-256 in base 32 (runtime/cache.py in 3.7), older releases in base 16.
_ENTRY = re.compile(r"^(?:[A-Z2-7]{52}|[0-9a-f]{64})$")

DONE, REFUSED = 0, 2


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return Triton's cache directory, by the rules of triton/knobs.py; it need not exist."""
    if given := environ.get("TRITON_CACHE_DIR"):
        return Path(given)
    return Path(environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"


def describe(path: Path) -> str:
    """Return the path, and how much is in it."""
    if not path.is_dir():
        return f"{path} (does not exist)"
    return f"{path} ({len(_entries(path))} entries{', a symbolic link' if path.is_symlink() else ''})"


def clear(*, ask: bool, environ: Mapping[str, str] = os.environ) -> int:
    """Remove the entries of the cache, after a question if `ask`. Returns 0, or 2 where it is refused.

    Refuses a cache behind a symbolic link (its directory or the one above it), removes only what is named as Triton
    names its entries, and never follows a link inside.
    """
    path = cache_dir(environ)
    shown = console.hide(str(path))
    for part in (path, path.parent):
        if part.is_symlink():
            text = f"{console.hide(str(part))} is a symbolic link; clear its target yourself"
            return console.wrong_use("doctor", text)
    if not path.is_dir():
        print(f"Nothing to clear: {shown} does not exist.")
        return DONE
    entries = _entries(path)
    if not entries:
        print(f"Nothing to clear: {shown} holds no compiled kernels.")
        return DONE
    if ask and not _confirmed(f"Remove {len(entries)} compiled kernels from {shown}? [y/N] "):
        return console.wrong_use("doctor", "not confirmed; nothing was removed (--yes does not ask)")
    for entry in entries:
        shutil.rmtree(entry)
    left = sum(1 for _ in path.iterdir())
    print(f"Removed {len(entries)} compiled kernels from {shown}" + (f"; left {left} other entries." if left else "."))
    return DONE


def _entries(path: Path) -> list[Path]:
    """Return the real directories that carry a name as Triton gives it."""
    return sorted(p for p in path.iterdir() if _ENTRY.match(p.name) and stat.S_ISDIR(p.lstat().st_mode))


def _confirmed(question: str) -> bool:
    if not sys.stdin or not sys.stdin.isatty():
        return False
    return input(question).strip().lower() in ("y", "yes")
