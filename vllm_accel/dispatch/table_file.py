"""The file of a measured table: JSON that people can read, one row a line, checked in full when it is read."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_accel.dispatch.gemm_spec import Form, GemmSpec, Layout, Scaling
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation, feature_names

FORMAT = 1
#: Times outside of this range are not times of a kernel.
_SECONDS = (1e-8, 1e4)
_ENUMS: dict[str, type[enum.Enum]] = {kind.__name__: kind for kind in (Relation, Form, Scaling, Layout)}
_SPECS: dict[str, type[Any]] = {"attention": AttentionSpec, "gemm": GemmSpec}


@dataclass(frozen=True, slots=True)
class Timing:
    """One measurement.

    Attributes:
        seconds: median over rounds. noise: half of the interquartile range over the median.
        cold_seconds: what the first call of a shape costs beyond that (a graph, a plan), None if that is not known.
    """

    seconds: float
    noise: float
    cold_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of call, what each backend took for it, and why those that failed or were wrong have no time."""

    op: str
    spec: Any
    times: Mapping[str, Timing]
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured on one device.

    Attributes:
        device: its `measured.table_name`. torch: version. versions: "op:backend" -> version of the backend's library.
        provenance: date, command, driver, policy: for people. rows: by kind of call.
    """

    device: str
    torch: str
    versions: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()


def minor(version: str) -> tuple[str, ...]:
    """Return the part of torch's version that has to agree: major and minor."""
    return tuple(version.split("+")[0].split(".")[:2])


def is_current(table: Table, op: str, backend: str, installed: str | None) -> bool:
    """Tell whether a table's times of a backend were measured with what is installed; torch's own by minor version."""
    recorded = table.versions.get(f"{op}:{backend}")
    if recorded is None or installed is None:
        return False
    torchs_own = recorded == table.torch and installed == str(torch.__version__)
    return recorded == installed or (torchs_own and minor(recorded) == minor(installed))


def merged(old: Table, new: Table) -> Table:
    """Return both tables as one, `new` over `old`.

    What `old` holds of another device, another minor version of torch or another version of a backend's library goes.
    """
    if old.device != new.device or minor(old.torch) != minor(new.torch):
        return new
    stale = {key for key, version in new.versions.items() if old.versions.get(key, version) != version}
    rows: dict[Any, Row] = {}
    for row in old.rows:
        times = {name: timing for name, timing in row.times.items() if f"{row.op}:{name}" not in stale}
        failed = {name: text for name, text in row.failed.items() if f"{row.op}:{name}" not in stale}
        if times or failed:
            rows[row.spec] = Row(row.op, row.spec, times, failed)
    for row in new.rows:
        before = rows.get(row.spec, Row(row.op, row.spec, {}))
        times = {n: t for n, t in before.times.items() if n not in row.failed} | dict(row.times)
        failed = {n: t for n, t in before.failed.items() if n not in row.times} | dict(row.failed)
        rows[row.spec] = Row(row.op, row.spec, times, failed)
    return Table(new.device, new.torch, {**old.versions, **new.versions}, new.provenance, tuple(rows.values()))


def update(path: Path, table: Table) -> tuple[Table, str]:
    """Merge a table into a file, so that of two processes that do so at once neither loses the other's rows.

    Returns:
        What the file holds now, and a remark: empty, or what became of a file that could not be read.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file is as it was.
    """
    with locked(path):
        remark = ""
        try:
            table = merged(parse(path.read_text(encoding="utf-8")), table)
        except FileNotFoundError:
            pass
        except ValueError as error:
            aside = path.with_name(f"{path.name}.unreadable")
            os.replace(path, aside)
            remark = f"{path.name} could not be read ({error}); it is now {aside.name}"
        save(table, path)
    return table, remark


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is about to be rewritten; the system lets go of it when a process dies.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8") as handle:
        # A file system without locks: the rename is still atomic, and only simultaneous writers can lose rows.
        with contextlib.suppress(OSError):
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)
            else:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def dump(table: Table) -> str:
    """Return a table as JSON, one row a line."""
    rows = [json.dumps(_row_to_json(row)) for row in table.rows]
    head = {
        "format": FORMAT,
        "device": table.device,
        "torch": table.torch,
        "versions": dict(sorted(table.versions.items())),
        "provenance": dict(table.provenance),
        "legend": "seconds: backend -> [median, noise relative to it, cost of the first call of a shape or null]",
    }
    body = json.dumps(head, indent=1)[:-2]
    return body + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def _row_to_json(row: Row) -> dict[str, Any]:
    seconds = {
        name: [None if value is None else float(f"{value:.4g}") for value in dataclasses.astuple(timing)]
        for name, timing in sorted(row.times.items())
    }
    data = {"op": row.op, "call": spec_to_json(row.spec), "seconds": seconds}
    return {**data, "failed": dict(sorted(row.failed.items()))} if row.failed else data


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
    try:
        data: Any = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply to be a table") from None
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
    failed = row.get("failed", {})
    if not isinstance(failed, dict) or not all(isinstance(text, str) for text in failed.values()):
        raise ValueError(f"{where}: failed has to map backends to text, not {failed!r:.60}")
    times = {name: _timing(f"{where}: {name}", entry) for name, entry in row["seconds"].items()}
    try:
        spec = spec_from_json(row["op"], row["call"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: call is not one of {row['op']}: {error}") from None
    return Row(row["op"], spec, times, failed)


def _timing(where: str, entry: Any) -> Timing:
    if not isinstance(entry, list) or len(entry) != 3 or not all(type(n) in (int, float) for n in entry[:2]):
        raise ValueError(f"{where} has to be [seconds, noise, cold seconds], not {entry!r:.60}")
    seconds, noise, cold = entry
    if not _SECONDS[0] <= seconds <= _SECONDS[1]:
        raise ValueError(f"{where}: {seconds!r} seconds are not the time of a kernel")
    if not 0 <= noise <= 10:
        raise ValueError(f"{where}: noise {noise!r} is not from 0 to 10")
    if cold is not None and not (type(cold) in (int, float) and 0 <= cold <= _SECONDS[1]):
        raise ValueError(f"{where}: cold seconds {cold!r} are out of range")
    return Timing(float(seconds), float(noise), None if cold is None else float(cold))


def spec_to_json(spec: Any) -> dict[str, Any]:
    """Return a spec as plain data: dtypes, relation and features by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, enum.Enum) and not isinstance(value, Feature):
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
    spec = kind(**{name: _field(str(known[name].type), name, value) for name, value in data.items()})
    if isinstance(spec, AttentionSpec):
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        if not min(heads, kv_heads, spec.head_dim, spec.head_dim_v) or heads % kv_heads:
            raise ValueError(f"{heads} heads over {kv_heads} of {spec.head_dim}/{spec.head_dim_v} do not exist")
    return spec


def _field(kind: str, name: str, value: Any) -> Any:
    if kind == "torch.dtype":
        dtype = getattr(torch, value, None) if isinstance(value, str) else None
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} is {value!r}, not a dtype")
        return dtype
    if kind in _ENUMS and isinstance(value, str):
        return next(member for member in _ENUMS[kind] if member.name.lower() == value)
    if kind == "Feature" and isinstance(value, list):
        flags = Feature(0)
        for item in value:
            flags |= Feature[item.upper()]
        return flags
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "int" and type(value) is int and 0 <= value <= 1 << 40:
        return value
    raise ValueError(f"{name} is {value!r}, which is no {kind}")
