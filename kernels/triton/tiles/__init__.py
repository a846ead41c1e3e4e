"""Tile sizes, one table per kernel, so that no call is ever the one that tunes.

`tiles/<kernel>.json` is shipped. A file of the same form in the user's cache directory, written by
``python -m benchmarks.tile_search --write``, is read over it, entry by entry:

    {"provenance": {"how": "..."}, "sm_90": {"d128_causal": [128, 64, 8, 2, 128], "d128": [128, 128, 8, 2]}}

An entry is block_m, block_n, num_warps, num_stages and, if it is not 0, maxnreg.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Tile(NamedTuple):
    """How a kernel is cut up.

    Attributes:
        block_m: rows of q in one block. block_n: keys in one step.
        num_warps, num_stages: as Triton takes them.
        maxnreg: registers per thread that the compiler may use, 0 for no limit: fewer let more blocks share a
            multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int = 0


Table = Mapping[str, Mapping[str, Tile]]  # arch -> key -> tile

_SHIPPED = Path(__file__).parent
_ARCH = re.compile(r"sm_\d{2,3}|gfx[0-9a-f]{3,4}")
_POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: 16 is the least that tl.dot takes; 255 the most registers that a thread of an NVIDIA GPU can have.
_ALLOWED: dict[str, tuple[str, Callable[[int], bool]]] = {
    "block_m": ("a power of two from 16 to 256", lambda n: n in _POWERS[4:]),
    "block_n": ("a power of two from 16 to 256", lambda n: n in _POWERS[4:]),
    "num_warps": ("1, 2, 4, 8 or 16", lambda n: n in _POWERS[:5]),
    "num_stages": ("from 1 to 8", lambda n: 1 <= n <= 8),
    "maxnreg": ("0 or from 24 to 255", lambda n: n == 0 or 24 <= n <= 255),
}
COMMAND = "python -m benchmarks.tile_search --write"
#: Where the rule of `nearest` would go elsewhere: sm_110 has sm_100's matrix unit and shared memory.
_TWINS = {"sm_110": "sm_100", "gfx940": "gfx942", "gfx941": "gfx942", "gfx950": "gfx942"}
#: Its 99 KiB of shared memory are the least that any GPU from Ampere on has.
_SMALLEST = "sm_86"


def lookup(kernel: str, arch: str, keys: Sequence[str]) -> Tile:
    """Return the tile of `kernel` on `arch`: the entry of the first of `keys` that the table has.

    Args:
        kernel: name of a table, such as ``"forward"``.
        arch: ``"sm_90"`` or ``"gfx942"`` style, also as torch and ptxas write it (``"sm_90a"``, ``"gfx942:xnack-"``).
            One that the table lacks takes the row of `nearest`.
        keys: the most exact first, such as ``["d128_causal", "d128"]``.

    Raises:
        LookupError: no table, no row for such a GPU, or none of the keys.
    """
    return _lookup(kernel, arch, tuple(keys))


@functools.lru_cache(maxsize=1024)
def _lookup(kernel: str, arch: str, keys: tuple[str, ...]) -> Tile:
    table = _merged(kernel)
    row = table[nearest(arch, tuple(table))]
    for key in keys:
        if key in row:
            return row[key]
    raise LookupError(f"the tiles of {kernel!r} for {arch} have none of {', '.join(keys)}; they have {', '.join(row)}")


def nearest(arch: str, known: Sequence[str]) -> str:
    """Return the row that serves an architecture: its own, or that of the nearest relative.

    On NVIDIA GPUs the highest of `known` with the same major version that is not newer, so sm_87 takes sm_86, sm_103
    sm_100 and sm_121 sm_120; of another generation sm_86, which asks for the least shared memory. An AMD
    architecture has its own row or a twin's (gfx950 takes gfx942).

    Raises:
        LookupError: nothing in `known` would run there.
    """
    name = re.sub(r"(?<=\d)[af]$", "", arch.split(":")[0]) if arch.startswith("sm_") else arch.split(":")[0]
    name = name if name in known else _TWINS.get(name, name)
    if name in known:
        return name
    own = _version(name)
    relatives = [have for have in known if own and (v := _version(have)) and v[0] == own[0]]
    if own and relatives:
        older = [have for have in relatives if (_version(have) or own) <= own]
        return max(older, key=_version_or_zero) if older else min(relatives, key=_version_or_zero)
    if own and own >= (8, 0) and _SMALLEST in known:
        return _SMALLEST
    raise LookupError(f"no tiles for {arch}; there are some for {', '.join(known) or 'no architecture'}")


def smaller(tile: Tile) -> Tile | None:
    """Return the tile to try where `tile` takes too much shared memory; None where there is no smaller one.

    Stages are halved first, then block_n, then block_m: what a tile loses in speed by each is in that order.
    """
    if tile.num_stages > 1:
        return tile._replace(num_stages=(tile.num_stages + 1) // 2)
    if tile.block_n > 16:
        return tile._replace(block_n=tile.block_n // 2)
    if tile.block_m > 16:
        # Two warpgroups want 64 rows each; half the rows keep half of them busy.
        warps = tile.num_warps // 2 if tile.num_warps > 4 else tile.num_warps
        return tile._replace(block_m=tile.block_m // 2, num_warps=warps)
    return None


def shipped(kernel: str) -> Table:
    """Return the table that is part of the package.

    Raises:
        LookupError: there is no such table.
        ValueError: the file is wrong, which a test rules out.
    """
    path = _SHIPPED / f"{kernel}.json"
    if not path.is_file():
        raise LookupError(f"no tiles for a kernel {kernel!r}; there are {', '.join(kernels()) or 'none'}")
    return parse(path.read_text(encoding="utf-8"))


def kernels() -> tuple[str, ...]:
    """Return the names of the shipped tables."""
    return tuple(sorted(path.stem for path in _SHIPPED.glob("*.json")))


def user_directory() -> Path:
    """Return where a user's own tables are: the system's directory for caches, which need not exist."""
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "vllm_accel" / "tiles"


def forget() -> None:
    """Read the tables again at the next look-up; they are read once per process."""
    _lookup.cache_clear()
    _merged.cache_clear()


@functools.lru_cache(maxsize=64)
def _merged(kernel: str) -> Table:
    table = {arch: dict(row) for arch, row in shipped(kernel).items()}
    path = user_directory() / f"{kernel}.json"
    try:
        own = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return table
    except (OSError, ValueError) as error:
        text = "%s is ignored, and the shipped tiles are used: %s. Delete it, or search again: %s"
        logging.getLogger("vllm_accel").warning(text, path, error, COMMAND)
        return table
    for arch, row in own.items():
        table.setdefault(arch, {}).update(row)
    return table


def parse(text: str) -> Table:
    """Read a table and check every entry.

    Raises:
        ValueError: not JSON, or not of the form that the module describes; the message names the entry.
    """
    data: Any = json.loads(text)
    if not isinstance(data, dict) or not isinstance(data.get("provenance"), dict):
        raise ValueError('it has to be an object with "provenance", itself an object')
    table: dict[str, dict[str, Tile]] = {}
    for arch, row in data.items():
        if arch == "provenance":
            continue
        if not _ARCH.fullmatch(arch):
            raise ValueError(f"{arch!r} is not an architecture such as sm_90 or gfx942")
        if not isinstance(row, dict) or not row:
            raise ValueError(f"{arch} has to be an object with entries")
        table[arch] = {key: _tile(f"{arch} {key}", entry) for key, entry in row.items()}
    return table


def _tile(where: str, entry: Any) -> Tile:
    integers = isinstance(entry, list) and all(type(n) is int for n in entry)
    if not integers or len(entry) not in (4, 5):
        raise ValueError(f"{where} has to be 4 or 5 integers, not {entry!r}")
    tile = Tile(*entry)
    for name, number in tile._asdict().items():
        text, allowed = _ALLOWED[name]
        if not allowed(number):
            raise ValueError(f"{where}: {name} is {number} and has to be {text}")
    return tile


def _version(arch: str) -> tuple[int, int] | None:
    digits = arch.removeprefix("sm_") if arch.startswith("sm_") else ""
    return (int(digits[:-1]), int(digits[-1])) if digits.isdigit() and len(digits) > 1 else None


def _version_or_zero(arch: str) -> tuple[int, int]:
    return _version(arch) or (0, 0)
