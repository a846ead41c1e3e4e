"""Kernels that `vllm-accel tune` has compiled and that lie on disk, so that a later process need not compile them.

SPEC 4.8 keeps a backend that compiles for more than two seconds from automatic choice until something has built it.
What a process has built is known to `warm`; what outlives the process is known here. A record is made only after
another process than the one that compiled has made its first call in less than those two seconds, and it counts only
as long as the versions, the kernels' sources, the GPU and the cache are what they were.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import vllm_accel
from vllm_accel.dispatch import measured, plan, registry
from vllm_accel.dispatch import settings as settings_module
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec_json import SPECS, spec_from_json, spec_to_json
from vllm_accel.dispatch.table_file import locked, write_whole

#: So many entries of a compile cache are remembered; when one of them is gone, so are probably others.
_SAMPLE = 16
FORMAT = 1

logger = logging.getLogger("vllm_accel")


@dataclass(frozen=True, slots=True)
class Built:
    """One kind of call whose kernels are on disk.

    Attributes:
        op, backend: which. call: the `compile_kind` as plain data. seconds: the first call of a process that found the
            kernels compiled. stamp: `stamp_of` when it was made. cache: the directory. entries: some that it held.
    """

    op: str
    backend: str
    call: str
    seconds: float
    stamp: str
    cache: str
    entries: tuple[str, ...]


def cache_of(backend: Any) -> Path | None:
    """Return where a backend keeps what it compiled, None if that ends with the process."""
    ask = getattr(backend, "compile_cache", None)
    path: Path | None = None if ask is None else ask()
    return path


def stamp_of(backend: Any, device: Device) -> str:
    """Return what has to be equal for a compiled kernel to be found again."""
    parts = (str(torch.__version__), vllm_accel.__version__, backend.version(), device.name, device.arch, _sources())
    return "; ".join(str(part) for part in parts)


@functools.lru_cache(maxsize=1)
def _sources() -> str:
    """Return a digest of this library's kernels and tile tables, which are part of what was compiled."""
    found = hashlib.sha256()
    for path in sorted((Path(vllm_accel.__file__).parent / "kernels").rglob("*")):
        if path.suffix in (".py", ".json") and "__pycache__" not in path.parts:
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def file_of(device: Device) -> Path:
    """Return the file of the records for a device, beside the user's table."""
    return measured.user_directory() / f"{measured.table_name(device)}.built"


def is_built(op: str, name: str, spec: Any, device: Device) -> bool:
    """Tell whether a call of this kind finds its kernels on disk."""
    records = _read(file_of(device))
    if not records:
        return False
    backend = registry.get(op, name)
    found = records.get((op, name, _key(spec)))
    if found is None or (cache := cache_of(backend)) is None:
        return False
    if found.cache != str(cache) or found.stamp != stamp_of(backend, device):
        return False
    return all((cache / entry).exists() for entry in found.entries)


def record(op: str, name: str, spec: Any, device: Device, seconds: float) -> None:
    """Remember that a process found the kernels of a kind of call on disk, and what its first call then took.

    Raises:
        OSError: the folder cannot be written.
    """
    backend = registry.get(op, name)
    cache = cache_of(backend)
    if cache is None or not cache.is_dir():
        return
    held = sorted(entry.name for entry in cache.iterdir())
    sample = tuple(held[:: max(1, len(held) // _SAMPLE)][:_SAMPLE])
    if not sample:
        return
    made = Built(op, name, _key(spec), round(seconds, 3), stamp_of(backend, device), str(cache), sample)
    path = file_of(device)
    with locked(path):
        kept = {**_parse(path), (op, name, made.call): made}
        rows = ",\n  ".join(json.dumps(asdict(row)) for row in kept.values())
        write_whole(path, f'{{\n "format": {FORMAT},\n "built": [\n  {rows}\n ]\n}}\n')
    forget()


def forget() -> None:
    """Read the records again at the next question."""
    _read.cache_clear()
    plan.invalidate()


def _key(spec: Any) -> str:
    return json.dumps(spec_to_json(spec.compile_kind()), sort_keys=True)


@functools.lru_cache(maxsize=16)
def _read(path: Path) -> dict[tuple[str, str, str], Built]:
    return _parse(path)


def _parse(path: Path) -> dict[tuple[str, str, str], Built]:
    """Read the records; none where there is no file, or one that is not ours, which is said once."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r} is not {FORMAT}")
        return {(row.op, row.backend, row.call): row for row in _rows(data["built"])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is ignored: %s. %s writes it anew", path, error, measured.COMMAND)
        return {}


def _rows(data: Iterable[Any]) -> Iterable[Built]:
    for row in data:
        made = Built(**{**row, "entries": tuple(row["entries"])})
        if not all(type(text) is str for text in (made.op, made.backend, made.call, made.stamp, made.cache)):
            raise ValueError(f"{row!r:.80} is not a record")
        if any("/" in entry or "\\" in entry or entry in ("", "..") for entry in made.entries):
            raise ValueError("an entry of a cache is not a name")
        if made.op not in SPECS:
            raise ValueError(f"{made.op!r} is no operation")
        spec_from_json(made.op, json.loads(made.call))
        yield made


settings_module.on_reload(_read.cache_clear)
