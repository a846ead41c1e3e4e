"""The doctor's probe: which backends and devices, what became of them, and what selection is told about it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_accel.cli.doctor_backends import Problem
from vllm_accel.cli.doctor_states import DEVICE_CODES
from vllm_accel.dispatch import probed, registry
from vllm_accel.dispatch.device import Device
from vllm_accel.probe import Outcome, census, probe

Name = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Probed:
    """The outcomes by device, where they were stored, and why they could not be."""

    outcomes: Mapping[Device, Mapping[Name, Outcome]] = field(default_factory=dict)
    stored: str = ""
    problem: str = ""

    def problems(self) -> list[Problem]:
        """Return what a person should do something about, besides the states of the backends."""
        if not self.problem:
            return []
        text = f"the probe's verdicts could not be stored, so selection does not know them: {self.problem}"
        return [Problem(text, "make that folder writable, or name another one in VLLM_ACCEL_TABLES", 1)]


def distinct(devices: Sequence[Device]) -> list[Device]:
    """Return one device of each kind: GPUs of the same name run the same code."""
    kinds: dict[tuple[str, str, str], Device] = {}
    for device in devices:
        kinds.setdefault((device.type, device.name, device.arch), device)
    return list(kinds.values())


def run(devices: Sequence[Device], names: Sequence[Name], seconds: float) -> Probed:
    """Probe backends on one device of each kind, store the verdicts, and keep this process from what killed a child."""
    found: dict[Device, dict[Name, Outcome]] = {}
    verdicts: list[probed.Verdict] = []
    for device in distinct(devices):
        where = f"{device.type}:{device.index}" if device.type == "cuda" else device.type
        wanted = [name for name in names if not _hopeless(name, device)]
        jobs = min(4, (os.cpu_count() or 1) // 4) if device.type == "cuda" else 1
        outcomes = probe(wanted, where, seconds=seconds, jobs=jobs, done=_say)
        found[device] = {(o.op, o.backend): o for o in outcomes}
        verdicts += [o.verdict(device) for o in outcomes if o.unavailable is None]
        for o in outcomes:
            if o.died and not o.imported:  # nothing in this process may try that again
                registry.condemn(o.op, o.backend, o.broken[probed.EVERYTHING])
    _say(None)
    try:
        return Probed(found, str(probed.record(verdicts)))
    except (OSError, ValueError) as error:
        return Probed(found, problem=f"{type(error).__name__}: {error}")


def spare_this_process(names: Sequence[Name]) -> None:
    """Import every backend in a child process first, and keep this one from those that end it or never come back."""
    for (op, name), text in census(names).items():
        registry.condemn(op, name, text)


def known_names(only: str = "") -> list[Name]:
    """Return (operation, backend) of what a fresh process knows too, which a run-time registration is not.

    Raises:
        ValueError: a name in `only` (comma separated, ``gemm:cublas`` style) is unknown.
    """
    names = [(op, name) for op in registry.operations() for name in registry.names(op)]
    names = [name for name in names if not registry.registered_at_run_time(*name)]
    if not only:
        return names
    wanted = []
    for item in filter(None, (part.strip() for part in only.split(","))):
        op, _, short = item.rpartition(":")
        wanted += [(op or "attention", name) for name in registry.resolve(op or "attention", short)]
    return [name for name in names if name in wanted]


def _hopeless(name: Name, device: Device) -> bool:
    """Tell whether an adapter of our own, which is safe to import, refuses every call on a device."""
    if name not in registry.BUILT_IN:
        return False
    return any(reason.code in DEVICE_CODES for reason in registry.get(*name).capability.device_reasons(device))


def _say(outcome: Outcome | None) -> None:
    """Show on a terminal what has just been probed; None clears the line."""
    if sys.stderr.isatty():
        text = "" if outcome is None else f"probed {outcome.op}:{outcome.backend} on {outcome.device}"
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
