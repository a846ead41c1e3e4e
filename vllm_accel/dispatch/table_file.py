"""The file of a measured table: JSON that people can read, one row a line, checked in full when it is read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_accel.dispatch.spec_json import SPECS, spec_from_json, spec_to_json

FORMAT = 1
#: How times are taken (`tuning.tune`). Changed whenever times before and after cannot be compared.
POLICY = "in turns, median of rounds, cold L2, the longer of device and host, 1"
#: Times outside of this range are not times of a kernel.
_SECONDS = (1e-8, 1e4)
_NOISE = (0.0, 10.0)


@dataclass(frozen=True, slots=True)
class Timing:
    """One measurement.

    Attributes:
        seconds: of one call among others, by which backends are ranked: of the device or of the host, whichever takes
            longer. noise: half of the interquartile range over the median of the rounds.
        new_length: what the first call at a new length costs beyond that (a graph, a plan). cold, warm: of the device,
            after the L2 cache was overwritten, and in a CUDA graph where nothing is overwritten. host: what Python and
            the launch take. Each None where it was not measured. at: the exact lengths of an attention call that it was
            measured at: sequences, and the longest query and key length; the kind of call holds for a range of them.
    """

    seconds: float
    noise: float
    new_length: float | None = None
    cold: float | None = None
    warm: float | None = None
    host: float | None = None
    at: tuple[int, int, int] | None = None


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
        policy: how it was measured; tables of two policies are not merged. driver: of a GPU.
        pinned: nothing may change it, and no other table counts beside it (`vllm-accel tune --pin`).
        provenance: date, command and machine, for people. rows: by kind of call.
    """

    device: str
    torch: str
    versions: Mapping[str, str] = field(default_factory=dict)
    policy: str = POLICY
    driver: str = ""
    pinned: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()


class PinnedError(ValueError):
    """A table that was frozen would have changed."""


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

    What `old` holds of another device, driver or policy, another minor version of torch or another version of a
    backend's library goes.
    """
    if any(getattr(old, name) != getattr(new, name) for name in ("device", "policy", "driver")):
        return new
    if minor(old.torch) != minor(new.torch):
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
    versions = {**old.versions, **new.versions}
    return replace(new, versions=versions, rows=tuple(rows.values()))


def update(path: Path, table: Table) -> tuple[Table, str]:
    """Merge a table into a file, so that of two processes that do so at once neither loses the other's rows.

    Returns:
        What the file holds now, and a remark: empty, or what became of a file that could not be read.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file is as it was.
        PinnedError: the file is pinned.
    """
    with locked(path):
        remark = ""
        try:
            old = parse(path.read_text(encoding="utf-8"))
            if old.pinned:
                raise PinnedError(f"{path.name} is pinned; `vllm-accel tune --unpin` lets it change")
            table = merged(old, table)
        except FileNotFoundError:
            pass
        except PinnedError:
            raise
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
        "policy": table.policy,
        "driver": table.driver,
        "pinned": table.pinned,
        "provenance": dict(table.provenance),
        "legend": "seconds: backend -> median, and where known the noise relative to it, what the first call of a new "
        "length adds, the device's time with a cold and with a warm L2 cache, the host's time, and at which lengths "
        "exactly (sequences, longest queries, longest keys)",
    }
    body = json.dumps(head, indent=1)[:-2]
    listed = "\n  " + ",\n  ".join(rows) + "\n " if rows else ""
    return f'{body},\n "rows": [{listed}]\n}}\n'


def _row_to_json(row: Row) -> dict[str, Any]:
    seconds = {
        name: {field: _rounded(value) for field, value in dataclasses.asdict(timing).items() if value is not None}
        for name, timing in sorted(row.times.items())
    }
    data = {"op": row.op, "call": spec_to_json(row.spec), "seconds": seconds}
    return {**data, "failed": dict(sorted(row.failed.items()))} if row.failed else data


def _rounded(value: float | tuple[int, ...]) -> float | list[int]:
    return list(value) if isinstance(value, tuple) else float(f"{value:.4g}")


def save(table: Table, path: Path) -> None:
    """Write a table so that a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file is as it was.
    """
    write_whole(path, dump(table))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, also if this process is killed meanwhile.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
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
    for name, kind in _HEAD.items():
        if not isinstance(data.get(name), kind):
            raise ValueError(f"{name} has to be a {kind.__name__}, not {data.get(name)!r:.60}")
    if bad := [key for key, value in data["versions"].items() if not isinstance(value, str)]:
        raise ValueError(f"versions: {bad[0]} has to be text")
    rows = tuple(_row(index, row) for index, row in enumerate(data["rows"]))
    return Table(**{name: data[name] for name in _HEAD if name != "rows"}, rows=rows)


_HEAD: dict[str, type] = {
    "device": str, "torch": str, "versions": dict, "policy": str, "driver": str, "pinned": bool, "provenance": dict,
    "rows": list,
}  # fmt: skip


def _row(index: int, row: Any) -> Row:
    where = f"row {index}"
    if not isinstance(row, dict) or row.get("op") not in SPECS or not isinstance(row.get("seconds"), dict):
        raise ValueError(f"{where} has to have op ({', '.join(SPECS)}), call and seconds")
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
    names = [f.name for f in dataclasses.fields(Timing)]
    if not isinstance(entry, dict) or not {"seconds", "noise"} <= set(entry) <= set(names):
        raise ValueError(f"{where} has to have seconds and noise, and may have {', '.join(names[2:])}: {entry!r:.80}")
    numbers, at = {name: value for name, value in entry.items() if name != "at"}, entry.get("at")
    for name, value in numbers.items():
        low, high = _NOISE if name == "noise" else (0.0, _SECONDS[1]) if name == "new_length" else _SECONDS
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"{where}: {name} {value!r} is not a number from {low:g} to {high:g}")
    if at is not None:
        if not (isinstance(at, list) and len(at) == 3 and all(type(n) is int and 0 < n < 2**31 for n in at)):
            raise ValueError(f"{where}: at {at!r:.60} is not a list of three lengths")
        at = (at[0], at[1], at[2])
    return Timing(**{name: float(value) for name, value in numbers.items()}, at=at)
