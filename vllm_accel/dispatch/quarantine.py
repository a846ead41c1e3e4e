"""Backends that must not run: rows shipped as data (known wrong results), and failures seen in this process."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass
from importlib import resources
from typing import Any

from vllm_accel.dispatch import plan
from vllm_accel.dispatch.capability import Guard
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import Feature
from vllm_accel.errors import Reason

logger = logging.getLogger("vllm_accel")


@dataclass(frozen=True, slots=True)
class KnownBad:
    """One shipped row of ``data/known_bad.json``: which backend gives wrong results, when, and where that is reported.

    Attributes:
        name: what a user puts in VLLM_ACCEL_LIFT_KNOWN_BAD to lift the row.
        versions: of the backend's library, as a version specifier.
        platforms: values of `Device.platform` concerned, empty for all.
        compute_capabilities: the GPUs concerned, None for all.
        features: all of these must be in the call.
        longer_than: a length, q or k, beyond which the row applies; None for every length.
        more_rows_than: batch or heads beyond which the row applies.
        fewer_kv_heads_than: key heads below which the row applies.
        effect, link: what happens, and the public thread.
        reproduced: where and when we saw it (`python -m benchmarks.known_bad`), empty where we have only the report.
    """

    name: str
    op: str
    backend: str
    effect: str
    link: str
    versions: str = ""
    compute_capabilities: tuple[tuple[int, int], ...] | None = None
    features: tuple[str, ...] = ()
    longer_than: int | None = None
    more_rows_than: int | None = None
    fewer_kv_heads_than: int | None = None
    platforms: tuple[str, ...] = ()
    reproduced: str = ""

    def concerns(self, op: str, backend: str, version: str | None, device: Device) -> bool:
        """Tell whether the row is about this backend, at this version, on this device."""
        if (self.op, self.backend) != (op, backend):
            return False
        if self.platforms and device.platform not in self.platforms:
            return False
        if self.compute_capabilities is not None and device.compute_capability not in self.compute_capabilities:
            return False
        if not self.versions or version is None:
            return True
        # Here because it costs a fifth of `import vllm_accel`, and most processes never ask.
        from packaging.specifiers import SpecifierSet
        from packaging.version import InvalidVersion, Version

        try:
            return Version(version) in SpecifierSet(self.versions, prereleases=True)
        except InvalidVersion:
            return True  # an unreadable version gets no benefit of the doubt

    def check(self, spec: Any, sizes: Any) -> str | None:
        """Return the refusal for a call that the row covers, else None."""
        wanted = functools.reduce(lambda flags, name: flags | Feature[name.upper()], self.features, Feature(0))
        if wanted & ~getattr(spec, "features", Feature(0)):
            return None
        if self.longer_than is not None and max(sizes.seqlen_q, sizes.seqlen_k) <= self.longer_than:
            return None
        if self.more_rows_than is not None and max(sizes.batch, spec.num_heads) <= self.more_rows_than:
            return None
        if self.fewer_kv_heads_than is not None and spec.num_kv_heads >= self.fewer_kv_heads_than:
            return None
        return f"known bad: {self.effect} ({self.link}); VLLM_ACCEL_LIFT_KNOWN_BAD={self.name} lifts this"


@functools.lru_cache(maxsize=1)
def known_bad_rows() -> tuple[KnownBad, ...]:
    """Read the shipped rows."""
    text = resources.files("vllm_accel").joinpath("data/known_bad.json").read_text(encoding="utf-8")
    rows = []
    for row in json.loads(text):
        chips = row.pop("compute_capabilities", None)
        row["compute_capabilities"] = None if chips is None else tuple(tuple(chip) for chip in chips)
        row["features"] = tuple(row.get("features", ()))
        row["platforms"] = tuple(row.get("platforms", ()))
        rows.append(KnownBad(**row))
    return tuple(rows)


def known_bad_guards(
    op: str, backend: str, version: str | None, device: Device, lifted: frozenset[str]
) -> tuple[Guard, ...]:
    """Return the rows that may refuse this backend here, as guards on exact sizes."""
    rows = (row for row in known_bad_rows() if row.name not in lifted)
    return tuple(
        Guard(f"known_bad:{row.name}", row.check) for row in rows if row.concerns(op, backend, version, device)
    )


_failed: dict[tuple[str, str, Any, Device], Reason] = {}


def put(op: str, backend: str, spec: Any, device: Device, error: BaseException) -> None:
    """Quarantine a backend for one kind of call on one device until the process ends, and log it once."""
    reason = Reason("failed_here", f"failed earlier in this process: {type(error).__name__}: {error}")
    if _failed.setdefault((op, backend, spec, device), reason) is reason:
        logger.warning("%s backend %r failed and is quarantined for %s on %s: %s", op, backend, spec, device, error)
    plan.invalidate()


def reason_for(op: str, backend: str, spec: Any, device: Device) -> Reason | None:
    """Return why a backend is quarantined for this kind of call, None if it is not."""
    return _failed.get((op, backend, spec, device))


def release() -> None:
    """Forget every failure of this process."""
    _failed.clear()
    plan.invalidate()
