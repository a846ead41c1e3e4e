"""Measured tables: how long each backend took for a kind of call on one kind of device, shipped and the user's own.

A table belongs to one device (`table_name`) and one minor version of torch. The user's own, written by ``vllm-accel
tune``, is read over the one shipped in ``vllm_accel/data/tables``: row by row, and within a row backend by backend.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_accel.dispatch import plan
from vllm_accel.dispatch import settings as settings_module
from vllm_accel.dispatch.cost import LEAST_OF_ONE_SIZE, Fit, family_of, fitted
from vllm_accel.dispatch.device import Device, cpu_name
from vllm_accel.dispatch.estimate import class_of, device_seconds, place_of
from vllm_accel.dispatch.table_file import POLICY, Row, Table, merged, minor, parse

COMMAND = "vllm-accel tune"
_SHIPPED = Path(__file__).parents[1] / "data" / "tables"

logger = logging.getLogger("vllm_accel")


@dataclass(frozen=True, slots=True)
class Source:
    """A table, the file that it came from, and its rows by operation and by what has to be equal."""

    path: Path
    table: Table
    _by_class: Mapping[tuple[Any, ...], tuple[Row, ...]]
    _fits: dict[tuple[str, str, Any], Fit | None]

    @classmethod
    def made(cls, path: Path, table: Table) -> Source:
        """Index a table: a new kind of call looks at the rows that may be near, not at all of them."""
        index: dict[tuple[Any, ...], tuple[Row, ...]] = {}
        for row in table.rows:
            key = (row.op, *class_of(row.spec))
            index[key] = (*index.get(key, ()), row)
        return cls(path, table, index, {})

    def of(self, op: str, spec: Any) -> tuple[Row, ...]:
        """Return the rows that differ from a kind of call in lengths only."""
        return self._by_class.get((op, *class_of(spec)), ())

    def fit(self, op: str, backend: str, spec: Any, device: Device) -> Fit | None:
        """Return what a backend's rows of this family of calls say about its rates; None if they are too few."""
        family, size = family_of(spec), getattr(spec, "head_dim", 0)
        key = (op, backend, (*family, size))
        if key not in self._fits:
            rows = [row for row in self.table.rows if row.op == op and family_of(row.spec) == family]
            timed = [(row.spec, timing) for row in rows if (timing := row.times.get(backend)) is not None]
            alike = [pair for pair in timed if getattr(pair[0], "head_dim", 0) == size]
            known = alike if len(alike) >= LEAST_OF_ONE_SIZE else timed
            self._fits[key] = fitted(
                [(place_of(where, timing), device_seconds(timing)) for where, timing in known], device.sm_count or 0
            )
        return self._fits[key]

    def __str__(self) -> str:
        date = str(self.table.provenance.get("date", "an unknown date"))[:10]
        return f"{self.path.name} of {date}"


def table_name(device: Device) -> str:
    """Name the table of a device: a GPU by its product name, a CPU by its model, instructions and cores."""
    name = f"{cpu_name()} {_cores()} cores" if device.type == "cpu" else device.name or device.arch
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or device.type


def _cores() -> int:
    """Return the cores that this process may use: with another number the order of two backends is another one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def user_directory() -> Path:
    """Return where a user's own tables are; VLLM_ACCEL_TABLES names another folder."""
    if chosen := settings_module.settings().tables:
        return Path(os.path.expanduser(chosen))
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "vllm_accel" / "tables"


def user_file(device: Device) -> Path:
    """Return the file of the user's table for a device, which need not exist."""
    return user_directory() / f"{table_name(device)}.json"


def shipped_file(device: Device) -> Path:
    """Return the file of the shipped table for a device, which need not exist."""
    return _SHIPPED / f"{table_name(device)}.json"


def sources(device: Device) -> tuple[Source, ...]:
    """Return the tables that count for a device under this minor version of torch, the user's last.

    Read once per process; `forget` and `reload_settings` read again. A file that cannot be read is logged and ignored.
    Beside a pinned table no other counts.
    """
    return _read(table_name(device), shipped_file(device), user_file(device))[0]


def ignored(device: Device) -> tuple[str, ...]:
    """Say which of a device's files do not count, and why: sentences that name the file and what to do."""
    return _read(table_name(device), shipped_file(device), user_file(device))[1]


def effective(device: Device) -> Table | None:
    """Return the tables that count for a device as one, None without any."""
    found = [source.table for source in sources(device)]
    return functools.reduce(merged, found) if found else None


def newest_version(op: str, backend: str, device: Device) -> str | None:
    """Return the version of a backend's library that the last table of a device was measured with."""
    found = [source.table.versions.get(f"{op}:{backend}") for source in sources(device)]
    return next((version for version in reversed(found) if version is not None), None)


def forget() -> None:
    """Read the tables again at the next question, and drop every plan made under the old ones."""
    _read.cache_clear()
    plan.invalidate()


@functools.lru_cache(maxsize=64)
def _read(name: str, *paths: Path) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    found, ignored = [], []
    for path in paths:
        try:
            table = parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            ignored.append(f"{path} is ignored: {error}. Delete it, or measure again: {COMMAND}")
            continue
        if table.device != name:
            ignored.append(f"{path} is ignored: it is about {table.device}. Measure here: {COMMAND}")
        elif table.policy != POLICY:
            ignored.append(f"{path} is ignored: it was measured by another policy. Measure again: {COMMAND}")
        elif minor(table.torch) == minor(str(torch.__version__)):
            found.append(Source.made(path, table))
        elif table.pinned:
            ignored.append(f"{path} is pinned, and does not count: it is of torch {table.torch}")
    for text in ignored:
        logger.warning("%s", text)
    pinned = [source for source in found if source.table.pinned]
    return tuple(pinned[-1:] or found), tuple(ignored)


settings_module.on_reload(_read.cache_clear)
