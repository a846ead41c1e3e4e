"""What every check of a backend shares: it ran and was right, or it refused and said why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_accel.dispatch.backend import Backend
from vllm_accel.dispatch.device import Device
from vllm_accel.errors import Reason, UnsupportedCallError


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found: the backend ran the case and was right, or refused it for these reasons."""

    ran: bool
    reasons: tuple[Reason, ...] = ()


def outcome_of(backend: Backend, case: str, check: Callable[[], None]) -> Outcome:
    """Run a check of one backend; a refusal is an outcome if it has a reason.

    Raises:
        AssertionError: from the check, or because the backend refuses without a reason.
    """
    try:
        check()
    except UnsupportedCallError as refusal:
        reasons = refusal.reasons.get(backend.name, ())
        if not reasons:
            raise AssertionError(f"{backend.name} refuses {case} without a reason") from refusal
        return Outcome(False, reasons)
    return Outcome(True)


def bound(backend: Backend, spec: Any, sizes: Any, device: Device) -> Any:
    """Return the backend's kernel for a kind of call and these sizes, as the library would bind it.

    Raises:
        UnsupportedCallError: the backend refuses; carries its reasons.
    """
    reasons = backend.capability.unsupported_reasons(spec, device)
    reasons += backend.capability.guard_reasons(spec, sizes)
    if reasons:
        raise UnsupportedCallError(f"{backend.name} cannot run {spec}", {backend.name: reasons})
    return backend.bind(spec, device)
