"""Triton's directory of compiled kernels: what is in it, and emptying it without touching anything else."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from pathlib import Path

from vllm_accel.cli import console
from vllm_accel.kernels.triton import toolchain

#: Triton names an entry by a SHA-256 in base 32 (runtime/cache.py in 3.6 and 3.7), older releases in base 16.
_ENTRY = re.compile(r"^(?:[A-Z2-7]{52}|[0-9a-f]{64})$")
_MIB = 1024**2

DONE, FAILED, REFUSED = 0, 1, 2


def describe(path: Path | None) -> str:
    """Return the path, how much is in it, and where it lies."""
    if path is None:
        return "TRITON_CACHE_DIR is set to nothing"
    place = toolchain.existing(path)
    writable = "" if os.access(place, os.W_OK | os.X_OK) else "NOT writable, "
    where = toolchain.file_system(path) or "unknown file system"
    network = " (network)" if toolchain.is_network(where) else ""
    told = f"{writable}{toolchain.free_space(place) // _MIB} MiB free on {where}{network}"
    if not path.is_dir():
        return f"{path} (does not exist; {told})"
    entries, _ = _look(path)
    return f"{path} ({len(entries)} entries{', a symbolic link' if path.is_symlink() else ''}; {told})"


def clear(*, ask: bool) -> int:
    """Remove the entries of the cache in force, after a question if `ask`. Returns 0, 1 if some stay, 2 if refused.

    Refuses a cache behind a symbolic link (its directory or the one above it), a directory above the home directory,
    and one that holds anything that Triton does not name so. Never follows a link inside.
    """
    path = toolchain.cache_dir()
    if path is None:
        return console.wrong_use("doctor", "TRITON_CACHE_DIR is set to nothing")
    shown = console.hide(str(path))
    if (why := _refusal(path)) is not None:
        return console.wrong_use("doctor", f"{why}; nothing was removed")
    if not path.is_dir():
        print(f"Nothing to clear: {shown} does not exist.")
        return DONE
    entries, foreign = _look(path)
    if foreign:
        names = ", ".join(repr(p.name) for p in foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        text = f"{shown} holds what is not Triton's ({names}), so it may be no cache; nothing was removed"
        return console.wrong_use("doctor", text)
    if not entries:
        print(f"Nothing to clear: {shown} holds no compiled kernels.")
        return DONE
    if ask and not _confirmed(f"Remove {len(entries)} compiled kernels from {shown}? [y/N] "):
        return console.wrong_use("doctor", "not confirmed; nothing was removed (--yes does not ask)")
    return _remove(entries, shown)


def _refusal(path: Path) -> str | None:
    for part in (path, path.parent):
        if part.is_symlink():
            return f"{console.hide(str(part))} is a symbolic link; clear its target yourself"
    full, home = Path(os.path.realpath(path)), Path(os.path.realpath(os.path.expanduser("~")))
    if full == home or full in home.parents:
        return f"{console.hide(str(path))} is your home directory or above it, and no cache"
    if os.path.lexists(path) and not path.is_dir():
        return f"{console.hide(str(path))} is not a directory"
    return None


def _look(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the real directories that carry a name as Triton gives it, and everything else."""
    entries: list[Path] = []
    foreign: list[Path] = []
    for found in sorted(path.iterdir()):
        own = _ENTRY.match(found.name) and stat.S_ISDIR(found.lstat().st_mode)
        (entries if own else foreign).append(found)
    return entries, foreign


def _remove(entries: list[Path], shown: str) -> int:
    removed, size, lost = 0, 0, ""
    for entry in entries:
        taken = _bytes(entry)
        try:
            shutil.rmtree(entry)  # follows no link
        except OSError as error:  # another process writes into it, or it is another user's
            lost = f"{type(error).__name__}: {console.hide(str(error))}"
        else:
            removed, size = removed + 1, size + taken
    print(f"Removed {removed} compiled kernels ({size / _MIB:.1f} MiB) from {shown}.")
    if lost:
        print(f"vllm-accel doctor: {len(entries) - removed} could not be removed: {lost}", file=sys.stderr)
    return FAILED if lost else DONE


def _bytes(entry: Path) -> int:
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(entry) for name in names)


def _confirmed(question: str) -> bool:
    if not sys.stdin or not sys.stdin.isatty():
        return False
    return input(question).strip().lower() in ("y", "yes")
