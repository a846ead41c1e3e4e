"""Where each backend stands on a device: one state, its reason, and one action."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_accel.cli.advice import PACKAGES
from vllm_accel.dispatch import quarantine, registry
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.selection import Selection, State
from vllm_accel.dispatch.settings import settings
from vllm_accel.errors import Reason
from vllm_accel.probe import Outcome

#: Questions that the verdict asks about an operation; one that raises has no selection.
KINDS = {"attention": 3, "gemm": 3}
#: Reasons that no call on this device can get around.
DEVICE_CODES = frozenset({"platform", "compute_capability", "arch", "cuda_version"})
#: A backend this much slower than the fastest one is OK-SLOW; less is within what one short call can tell.
SLOW = 2.0
Outcomes = Mapping[tuple[str, str], Outcome]


@dataclass(frozen=True, slots=True)
class BackendState:
    """Where a backend stands on this device; outcome: of the probe, None without one."""

    op: str
    name: str
    state: str
    version: str
    reason: str
    action: str
    outcome: Outcome | None = None


@contextlib.contextmanager
def quiet() -> Any:
    """Keep what libraries print and warn at import out of the report."""
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        yield


def state_of(op: str, name: str, device: Device, selections: tuple[Selection, ...], outcomes: Outcomes) -> BackendState:
    """Examine one backend: with what the probe found, else by asking it as a call would."""
    outcome = outcomes.get((op, name))

    def state(word: str, reason: str = "", action: str = "", version: str = "") -> BackendState:
        return BackendState(op, name, word, version, reason, action, outcome)

    if (op, name) in _disabled():
        return state("DISABLED", "named in VLLM_ACCEL_DISABLED_BACKENDS", "take it out of that variable to use it")
    try:
        with quiet():
            return _examine(op, name, device, selections, state, outcomes)
    except (Exception, SystemExit) as error:  # an adapter or a library may raise anything
        return state("BROKEN", f"asking it raised {type(error).__name__}: {error}", _repair(op, name))


def _examine(
    op: str, name: str, device: Device, selections: tuple[Selection, ...], state: Any, outcomes: Outcomes
) -> BackendState:
    backend = registry.get(op, name)
    candidates = [selection[name] for selection in selections]
    # Without a selection, where a wrong setting makes every call raise, the capability is asked itself.
    reasons = candidates[0].reasons if candidates else backend.capability.device_reasons(device)
    refused = [r.text for r in reasons if r.code in DEVICE_CODES]
    if refused:
        made: BackendState = state("UNSUPPORTED", "; ".join(refused), "nothing to do: not for this device")
        return made
    outcome = outcomes.get((op, name))
    if outcome is not None and outcome.broken:
        version = (outcome.versions or ("",))[-1]
        text = "; ".join(f"{part}: {what}" for part, what in outcome.broken.items())
        return state("BROKEN", text, _repair(op, name), version)  # type: ignore[no-any-return]
    missing: Reason | None = backend.unavailable_reason()
    version = backend.version() or ""
    if missing is not None and missing.code == "not_installed":
        return state("ABSENT", missing.text, f"optional: {_install(op, name)}", version)  # type: ignore[no-any-return]
    if missing is not None:
        return state("BROKEN", missing.text, _repair(op, name), version)  # type: ignore[no-any-return]
    held = [c for c in candidates if c.state in (State.HELD_BACK, State.QUARANTINED)]
    rows = [r for r in quarantine.known_bad_rows() if r.concerns(op, name, version or None, device)]
    if candidates and len(held) == len(candidates) and held[0].state is State.QUARANTINED:
        action = f"another backend runs; VLLM_ACCEL_LIFT_KNOWN_BAD={rows[0].name} lifts it" if rows else ""
        action = action or "another backend runs; `vllm-accel doctor --probe` after a repair"
        return state("QUARANTINED", held[0].reasons[0].text, action, version)  # type: ignore[no-any-return]
    idle = outcome is not None and outcome.refused and not outcome.right
    if outcome is not None and idle:
        return state("UNSUPPORTED", outcome.refusal, "nothing to do: other backends run", version)  # type: ignore[no-any-return]
    ran = outcome is not None and outcome.right > 0
    if not ran and len(candidates) == KINDS.get(op) and all(c.state is State.UNSUPPORTED for c in candidates):
        text = "; ".join(r.text for r in candidates[0].reasons)
        return state("UNSUPPORTED", text, "nothing to do: other backends run", version)  # type: ignore[no-any-return]
    notes = [f"not taken automatically: {c.reasons[0].text}" for c in held[:1] if c.reasons]
    notes += [f"refused for some calls: {row.effect} ({row.link})" for row in rows]
    best = fastest(outcomes, op)
    if outcome is not None and outcome.seconds and best and best.seconds and outcome.seconds > SLOW * best.seconds:
        times = f"{outcome.seconds * 1e3:.3g} ms for the probe's call, {best.backend} {best.seconds * 1e3:.3g} ms"
        action = f"nothing to do, as long as {best.backend} runs the calls that matter"
        return state("OK-SLOW", "; ".join((times, *dict.fromkeys(notes))), action, version)  # type: ignore[no-any-return]
    return state("OK", "; ".join(dict.fromkeys(notes)), "", version)  # type: ignore[no-any-return]


def fastest(outcomes: Outcomes, op: str) -> Outcome | None:
    """Return the fastest backend of an operation that was right in every step."""
    times = [o for o in outcomes.values() if o.op == op and o.seconds is not None and not o.broken]
    return min(times, key=lambda o: o.seconds or 0.0, default=None)


def measured(outcome: Outcome | None) -> dict[str, str]:
    """Return the columns that only a probe fills."""
    if outcome is None:
        return {}
    return {
        "right/refused": f"{outcome.right}/{outcome.refused}",
        "max error": "" if outcome.error is None else f"{outcome.error:.1e}",
        "ms": "" if outcome.seconds is None else f"{outcome.seconds * 1e3:.3g}",
    }


def _disabled() -> frozenset[tuple[str, str]]:
    try:
        return settings().disabled
    except ValueError:  # reported under settings
        return frozenset()


def _package(op: str, name: str) -> str | None:
    return next((p.command for p in PACKAGES.values() if p.backends[:1] == (f"{op}:{name}",)), None)


def _install(op: str, name: str) -> str:
    command = _package(op, name)
    if command is None:
        return "the reason names the package"
    # What flash-attn to take depends on torch, CUDA and Python: one command would be wrong for most.
    return "`vllm-accel recommend` prints the command" if "flash-attn" in command or "{" in command else command


def _repair(op: str, name: str) -> str:
    if _package(op, name) is None:
        return f"reinstall it, or hide it: VLLM_ACCEL_DISABLED_BACKENDS={op}:{name}"
    return f"reinstall it (`vllm-accel recommend`), or hide it: VLLM_ACCEL_DISABLED_BACKENDS={op}:{name}"
