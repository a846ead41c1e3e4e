"""Measured tables: how long each backend took for a kind of call on one kind of device, as JSON that people can read.

A table belongs to one device (`table_name`) and one minor version of torch. The user's own, written by ``vllm-accel
tune``, is read over the one shipped in ``vllm_accel/data/tables``: row by row, and within a row backend by backend.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_accel.dispatch import plan
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature, GemmSpec, Relation, feature_names

FORMAT = 1
#: Times outside of this range are not times of a kernel.
_SECONDS = (1e-8, 1e4)
_SHIPPED = Path(__file__).parents[1] / "data" / "tables"
_SPECS: dict[str, type[Any]] = {"attention": AttentionSpec, "gemm": GemmSpec}
COMMAND = "vllm-accel tune"

logger = logging.getLogger("vllm_accel")


@dataclass(frozen=True, slots=True)
class Timing:
    """One measurement.

    Attributes:
        seconds: median over rounds. noise: half of the interquartile range over the median.
        cold_seconds: what the first call of a shape costs beyond that (a graph, a plan); 0.0 where it costs nothing.
    """

    seconds: float
    noise: float
    cold_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of call and what each backend took for it."""

    op: str
    spec: Any
    times: Mapping[str, Timing]


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured on one device.

    Attributes:
        device: its `table_name`. torch: version. versions: "op:backend" -> version of the backend's library.
        provenance: date, command, driver, policy: for people. rows: by kind of call.
    """

    device: str
    torch: str
    versions: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()


def table_name(device: Device) -> str:
    """Name the table of a device: a GPU by its product name, a CPU by its model and torch's instruction set."""
    name = f"{_cpu_model()} {device.name}" if device.type == "cpu" else device.name or device.arch
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or device.type


@functools.lru_cache(maxsize=1)
def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def user_directory() -> Path:
    """Return where a user's own tables are; VLLM_ACCEL_TABLES names another folder."""
    if chosen := os.environ.get("VLLM_ACCEL_TABLES"):
        return Path(chosen)
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


def rows_for(op: str, device: Device) -> tuple[Row, ...]:
    """Return what is known of an operation on a device, the user's measurements over the shipped ones.

    Rows of tables made with another minor version of torch do not count. Read once per process; `forget` reads again.
    """
    return _rows(op, table_name(device))


def versions_for(op: str, device: Device) -> Mapping[str, tuple[str, ...]]:
    """Return the versions of each backend's library that the rows of `rows_for` were measured with."""
    found: dict[str, tuple[str, ...]] = {}
    for table in _tables(table_name(device)):
        for key, version in table.versions.items():
            if key.startswith(f"{op}:"):
                name = key.split(":", 1)[1]
                found[name] = (*found.get(name, ()), version)
    return found


def forget() -> None:
    """Read the tables again at the next question, and drop every plan made under the old ones."""
    _tables.cache_clear()
    _rows.cache_clear()
    plan.invalidate()


@functools.lru_cache(maxsize=64)
def _tables(name: str) -> tuple[Table, ...]:
    found = []
    for path in (_SHIPPED / f"{name}.json", user_directory() / f"{name}.json"):
        try:
            table = parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            logger.warning("%s is ignored: %s. Delete it, or measure again: %s", path, error, COMMAND)
            continue
        if table.device != name:
            logger.warning("%s is ignored: it is about %s. Measure here: %s", path, table.device, COMMAND)
        elif minor(table.torch) == minor(str(torch.__version__)):
            found.append(table)
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _rows(op: str, name: str) -> tuple[Row, ...]:
    merged: dict[Any, dict[str, Timing]] = {}
    for table in _tables(name):
        for row in table.rows:
            if row.op == op:
                merged.setdefault(row.spec, {}).update(row.times)
    return tuple(Row(op, spec, times) for spec, times in merged.items())


def minor(version: str) -> tuple[str, ...]:
    """Return the part of a version that has to agree: major and minor."""
    return tuple(version.split("+")[0].split(".")[:2])


def dump(table: Table) -> str:
    """Return a table as JSON, one row a line."""
    rows = [
        json.dumps(
            {
                "op": row.op,
                "call": spec_to_json(row.spec),
                "seconds": {
                    name: [float(f"{value:.4g}") for value in dataclasses.astuple(timing)]
                    for name, timing in sorted(row.times.items())
                },
            }
        )
        for row in table.rows
    ]
    head = {
        "format": FORMAT,
        "device": table.device,
        "torch": table.torch,
        "versions": dict(sorted(table.versions.items())),
        "provenance": dict(table.provenance),
        "legend": "seconds: backend -> [median, noise relative to it, cost of the first call of a shape]",
    }
    body = json.dumps(head, indent=1)[:-2]
    return body + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def save(table: Table, path: Path) -> None:
    """Write a table so that a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(dump(table))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def parse(text: str) -> Table:
    """Read a table and check everything in it.

    Raises:
        ValueError: not JSON, another format, or an entry of a wrong type or range; the message names it.
    """
    data: Any = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise ValueError(f"format {found!r} is not {FORMAT}")
    for name, kind in (("device", str), ("torch", str), ("versions", dict), ("provenance", dict), ("rows", list)):
        if not isinstance(data.get(name), kind):
            raise ValueError(f"{name} has to be a {kind.__name__}, not {data.get(name)!r:.60}")
    if bad := [key for key, value in data["versions"].items() if not isinstance(value, str)]:
        raise ValueError(f"versions: {bad[0]} has to be text")
    rows = tuple(_row(index, row) for index, row in enumerate(data["rows"]))
    return Table(data["device"], data["torch"], data["versions"], data["provenance"], rows)


def _row(index: int, row: Any) -> Row:
    where = f"row {index}"
    if not isinstance(row, dict) or row.get("op") not in _SPECS or not isinstance(row.get("seconds"), dict):
        raise ValueError(f"{where} has to have op ({', '.join(_SPECS)}), call and seconds")
    times = {}
    for name, entry in row["seconds"].items():
        numbers = isinstance(entry, list) and all(type(n) in (int, float) for n in entry)
        if not numbers or len(entry) != 3 or not _SECONDS[0] <= entry[0] <= _SECONDS[1]:
            raise ValueError(f"{where}: {name} has to be [seconds, noise, cold seconds], not {entry!r:.60}")
        if not 0 <= entry[1] <= 10 or not 0 <= entry[2] <= _SECONDS[1]:
            raise ValueError(f"{where}: noise or cold seconds of {name} are out of range: {entry!r:.60}")
        times[name] = Timing(*map(float, entry))
    try:
        spec = spec_from_json(row["op"], row["call"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: call is not one of {row['op']}: {error}") from None
    return Row(row["op"], spec, times)


def spec_to_json(spec: Any) -> dict[str, Any]:
    """Return a spec as plain data: dtypes, relation and features by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, Relation):
            return value.name.lower()
        return feature_names(value) if isinstance(value, Feature) else value

    return {f.name: plain(getattr(spec, f.name)) for f in dataclasses.fields(spec)}


def spec_from_json(op: str, data: Any) -> Any:
    """Build the spec of `spec_to_json`.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, unknown or of a wrong type.
    """
    kind = _SPECS[op]
    known = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(data, dict) or (unknown := set(data) - set(known)):
        raise ValueError(f"unknown fields {sorted(unknown)}" if isinstance(data, dict) else "it has to be an object")
    return kind(**{name: _field(str(known[name].type), name, value) for name, value in data.items()})


def _field(kind: str, name: str, value: Any) -> Any:
    if kind == "torch.dtype":
        dtype = getattr(torch, value, None) if isinstance(value, str) else None
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} is {value!r}, not a dtype")
        return dtype
    if kind == "Relation":
        return Relation[value.upper()]
    if kind == "Feature":
        flags = Feature(0)
        for item in value:
            flags |= Feature[item.upper()]
        return flags
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and type(value) is int and 0 <= value <= 1 << 40:
        return value
    raise ValueError(f"{name} is {value!r}, which is no {kind}")
