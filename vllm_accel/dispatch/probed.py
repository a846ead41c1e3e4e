"""What `vllm-accel doctor --probe` found wrong on this machine, kept in a file and used by automatic choice.

A backend that crashed, hung or gave wrong numbers in the probe is refused automatically from then on, for the parts
that failed, by every process with the same versions. It still runs when it is asked for by name, as after a failure in
the process itself (SPEC 4.6): somebody may want to look at it. `explain` says so in both cases. Another version of
torch, of the backend's library, of the driver or of this library makes a verdict void, and so does the next probe.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_accel.dispatch import measured, plan
from vllm_accel.dispatch import settings as settings_module
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_spec import Form
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.dispatch.table_file import locked
from vllm_accel.errors import Reason

COMMAND = "vllm-accel doctor --probe"
FORMAT = 1
#: A failure that no part of a backend can be trusted after: it ended the process or did not come back.
EVERYTHING = "everything"

logger = logging.getLogger("vllm_accel")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the probe found wrong with one backend on one kind of device.

    Attributes:
        device: `measured.table_name`. driver: newest CUDA that the driver takes. versions: of the backend's library,
            as installed and as imported. broken: part (see `parts_of`) -> what happened. date: of the probe.
    """

    op: str
    backend: str
    device: str
    torch: str
    python: str
    library: str
    driver: str
    versions: tuple[str, ...]
    broken: Mapping[str, str] = field(default_factory=dict)
    date: str = ""


def environment(device: Device) -> dict[str, str]:
    """Return what has to be the same for a verdict to count, besides the version of the backend's library."""
    from vllm_accel import __version__

    return {
        "device": measured.table_name(device),
        "torch": str(torch.__version__),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "library": __version__,
        "driver": ".".join(map(str, device.driver_version or ())),
    }


def parts_of(op: str, spec: Any) -> tuple[str, ...]:
    """Name the parts of a backend that a kind of call needs, as the probe tells them apart."""
    features = getattr(spec, "features", Feature(0))
    if not isinstance(spec, AttentionSpec):
        form = op if getattr(spec, "form", Form.DENSE) is Form.DENSE else "grouped"
        return (form, "gradients") if Feature.GRAD in features else (form,)
    if Feature.PAGED in features:
        return ("mla",) if Feature.MLA in features else ("paged",)
    form = "varlen" if Feature.VARLEN in features else "dense"
    return (form, "gradients") if Feature.GRAD in features else (form,)


def reason_for(op: str, backend: Any, spec: Any, device: Device) -> Reason | None:
    """Return why the probe's verdict speaks against a kind of call, None if it does not."""
    verdicts, _ = _read(user_file())
    verdict = verdicts.get((op, backend.name, measured.table_name(device))) if verdicts else None
    if verdict is None or any(getattr(verdict, name) != now for name, now in environment(device).items()):
        return None
    part = next((part for part in (EVERYTHING, *parts_of(op, spec)) if part in verdict.broken), None)
    if part is None or str(backend.version() or "") not in verdict.versions:
        return None
    when = f" on {verdict.date[:10]}" if verdict.date else ""
    text = f"the probe{when} found it broken ({part}): {verdict.broken[part]}; after a repair: {COMMAND}"
    return Reason("probe", text)


def user_file() -> Path:
    """Return the file of the verdicts: beside the user's measured tables."""
    return measured.user_directory() / "probed.json"


def record(verdicts: Iterable[Verdict]) -> Path:
    """Store verdicts over earlier ones about the same backend and device; one without a broken part removes those.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file is as it was.
    """
    path = user_file()
    with locked(path):
        forget()
        kept = dict(_read(path)[0])
        for verdict in verdicts:
            kept.pop((verdict.op, verdict.backend, verdict.device), None)
            if verdict.broken:
                kept[verdict.op, verdict.backend, verdict.device] = verdict
        data = {"format": FORMAT, "written by": COMMAND, "verdicts": [asdict(verdict) for verdict in kept.values()]}
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".probed.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(data, file, indent=1)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    forget()
    return path


def forget() -> None:
    """Read the verdicts again at the next question, and drop every plan made under the old ones."""
    _read.cache_clear()
    plan.invalidate()


def ignored() -> str | None:
    """Say why the file of verdicts does not count, None if it does or is not there."""
    return _read(user_file())[1]


@functools.lru_cache(maxsize=8)
def _read(path: Path) -> tuple[Mapping[tuple[str, str, str], Verdict], str | None]:
    try:
        return _parse(path.read_text(encoding="utf-8")), None
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError) as error:
        text = f"{path} is ignored: {error}. Delete it, or probe again: {COMMAND}"
        logger.warning("%s", text)
        return {}, text


def _parse(text: str) -> dict[tuple[str, str, str], Verdict]:
    """Read and check a file. Raises ValueError naming what is wrong."""
    try:
        data: Any = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("verdicts"), list):
        raise ValueError(f"it is not a list of verdicts in format {FORMAT}")
    found = {}
    for row in data["verdicts"]:
        try:
            verdict = Verdict(**{**row, "versions": tuple(row["versions"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"a verdict has other entries: {error}") from None
        texts = [getattr(verdict, name) for name in _TEXTS]
        parts = verdict.broken if isinstance(verdict.broken, dict) else {"": None}
        if not all(isinstance(value, str) for value in (*texts, *verdict.versions, *parts, *parts.values())):
            raise ValueError("a verdict holds something that is not text")
        found[verdict.op, verdict.backend, verdict.device] = verdict
    return found


_TEXTS = ("op", "backend", "device", "torch", "python", "library", "driver", "date")
settings_module.on_reload(_read.cache_clear)
