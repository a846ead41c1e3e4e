"""The doctor's verdict and its table of backends: the same walk as a call, with a state and one action for each."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from vllm_accel.cli.advice import PACKAGES
from vllm_accel.dispatch import quarantine, registry
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.selection import Selection, State
from vllm_accel.dispatch.settings import settings
from vllm_accel.errors import Reason

#: Questions that the verdict asks about an operation; one that raises has no selection.
KINDS = {"attention": 3, "gemm": 1}
#: Reasons that no call on this device can get around.
DEVICE_CODES = frozenset({"platform", "compute_capability", "arch", "cuda_version"})


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong: what, the fix, and the exit code that it causes."""

    text: str
    fix: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class BackendState:
    """Where a backend stands on this device."""

    op: str
    name: str
    state: str
    version: str
    reason: str
    action: str


@dataclass(frozen=True, slots=True)
class Examined:
    """What was asked of the selector: typical kinds of work, and the state of every backend.

    Attributes:
        work: (kind of work, the selection, or the text of the error that such a call raises).
        backends: of every operation.
    """

    work: tuple[tuple[str, Selection | str], ...]
    backends: tuple[BackendState, ...]

    @staticmethod
    def of(device: Device | None) -> Examined:
        """Ask for a device; without one, for the CPU."""
        from vllm_accel.dispatch import device as devices

        where = device or devices.preset("cpu")
        work = tuple((kind, _ask(fn, tensors, where)) for kind, (fn, tensors) in _typical_work(where).items())
        selections = tuple(answer for _, answer in work if isinstance(answer, Selection))
        states = tuple(
            _state(op, name, where, tuple(s for s in selections if s.op == op))
            for op in registry.operations()
            for name in registry.names(op)
        )
        return Examined(work, states)

    def verdict_rows(self) -> list[dict[str, str]]:
        """Say in one row per kind of work what runs."""
        rows = []
        for kind, answer in self.work:
            if isinstance(answer, str):
                rows.append({"work": kind, "runs": "nothing: the call raises", "decided by": answer})
            else:
                rows.append({"work": kind, "runs": answer.chosen or "nothing", "decided by": answer.decided_by})
        return rows

    def backend_rows(self) -> list[dict[str, str]]:
        """Return one row per backend."""
        return [
            {
                "backend": s.name if s.op == "attention" else f"{s.op}: {s.name}",
                "state": s.state,
                "version": s.version,
                "reason": s.reason,
                "action": s.action,
            }
            for s in self.backends
        ]

    def problems(self) -> list[Problem]:
        """Return what is broken: a package, a request that cannot be met, or everything."""
        found = [Problem(f"{s.name} is broken: {s.reason}", s.action, 1) for s in self.backends if s.state == "BROKEN"]
        try:
            settings()
        except ValueError:  # then every call raises that, and the settings' own check reports it
            return found
        found += [
            Problem(f"asking about {kind} raises: {text}", "see the reasons below", 1) for kind, text in self._raised()
        ]
        selections = [(kind, answer) for kind, answer in self.work if isinstance(answer, Selection)]
        idle = [(kind, answer) for kind, answer in selections if answer.chosen is None]
        if not idle:
            return found
        kinds = ", ".join(kind for kind, _ in idle)
        if any(c.state in (State.NOT_ASKED, State.DISABLED) for _, answer in idle for c in answer.candidates):
            fix = "see the reasons below, name another backend, or unset the variable"
            return [*found, Problem(f"nothing can run {kinds} as asked ({idle[0][1].decided_by})", fix, 2)]
        works = any(answer.op == "attention" and answer.chosen for _, answer in selections)
        return [*found, Problem(f"no backend can run {kinds} here", "see the reasons below", 1 if works else 3)]

    def _raised(self) -> list[tuple[str, str]]:
        return [(kind, answer) for kind, answer in self.work if isinstance(answer, str)]


def _typical_work(device: Device) -> dict[str, tuple[Any, tuple[torch.Tensor, ...]]]:
    from vllm_accel import attention, gemm

    causal = functools.partial(attention, causal=True)
    capability = device.compute_capability
    # bf16 has no tensor cores before Ampere, and the libraries for older GPUs take fp16 only.
    half = torch.float16 if (capability and capability < (8, 0)) or device.type == "mps" else torch.bfloat16

    def make(*shapes: tuple[int, ...], grad: bool = False) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(s, dtype=half, device="meta", requires_grad=grad) for s in shapes)

    prefill, decode, keys = (1, 4096, 32, 128), (1, 1, 32, 128), (1, 4096, 8, 128)
    name = str(half).removeprefix("torch.")
    return {
        f"prefill ({name}, 4096 tokens)": (causal, make(prefill, keys, keys)),
        f"decode ({name}, 1 token over 4096)": (causal, make(decode, keys, keys)),
        f"training ({name}, 4096 tokens)": (causal, make(prefill, keys, keys, grad=True)),
        f"matrix product ({name}, 4096 x 4096 x 4096)": (functools.partial(gemm), make((4096, 4096), (4096, 4096))),
    }


def _ask(fn: Any, tensors: tuple[torch.Tensor, ...], device: Device) -> Selection | str:
    from vllm_accel import explain

    try:
        with _quiet():
            return explain(fn.func, *tensors, device=device, **fn.keywords)
    except Exception as error:  # a bad setting is what the report is for
        return str(error)


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep what libraries print and warn at import out of the report."""
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        yield


def _state(op: str, name: str, device: Device, selections: tuple[Selection, ...]) -> BackendState:
    def state(word: str, reason: str = "", action: str = "", version: str = "") -> BackendState:
        return BackendState(op, name, word, version, reason, action)

    if (op, name) in _disabled():
        return state("DISABLED", "named in VLLM_ACCEL_DISABLED_BACKENDS", "take it out of that variable to use it")
    try:
        with _quiet():
            return _examine(op, name, device, selections, state)
    except (Exception, SystemExit) as error:  # an adapter or a library may raise anything
        return state("BROKEN", f"asking it raised {type(error).__name__}: {error}", _repair(op, name))


def _examine(op: str, name: str, device: Device, selections: tuple[Selection, ...], state: Any) -> BackendState:
    backend = registry.get(op, name)
    candidates = [selection[name] for selection in selections]
    refused = [r.text for c in candidates[:1] for r in c.reasons if r.code in DEVICE_CODES]
    if refused:
        made: BackendState = state("UNSUPPORTED", "; ".join(refused), "nothing to do: not for this device")
        return made
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
        return state("QUARANTINED", held[0].reasons[0].text, action, version)  # type: ignore[no-any-return]
    if len(candidates) == KINDS.get(op) and all(c.state is State.UNSUPPORTED for c in candidates):
        text = "; ".join(r.text for r in candidates[0].reasons)
        return state("UNSUPPORTED", text, "nothing to do: other backends run", version)  # type: ignore[no-any-return]
    notes = [f"not taken automatically: {c.reasons[0].text}" for c in held[:1] if c.reasons]
    notes += [f"refused for some calls: {row.effect} ({row.link})" for row in rows]
    return state("OK", "; ".join(dict.fromkeys(notes)), "", version)  # type: ignore[no-any-return]


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
