"""One walk over the candidates. A call stops at the first that can run; `explain` walks to the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_accel.dispatch import preference, quarantine, registry, warm
from vllm_accel.dispatch.backend import Backend
from vllm_accel.dispatch.capability import Capability, Guard, refusals
from vllm_accel.dispatch.device import Device, is_local
from vllm_accel.dispatch.selection import Candidate, Selection, State
from vllm_accel.dispatch.settings import TRITON, Settings, changed_since_read, settings
from vllm_accel.dispatch.spec import Feature
from vllm_accel.errors import Reason

if TYPE_CHECKING:  # imported at the first choice: tables of times are no part of `import vllm_accel`
    from vllm_accel.dispatch.ranking import Ranking

#: A first call may compile this long before the backend has to be warmed up first (SPEC 4.8).
MAX_FIRST_CALL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be decided.

    Attributes:
        op, spec, device: the kind of call and where.
        asked: names asked for, in order, or None for automatic choice. asked_by: where that came from.
        capturing: a CUDA graph is being captured.
        assume_available: do not look for packages (the device is not on this machine).
        self_test: proves batch invariance of a backend on the device; None means do not launch anything.
    """

    op: str
    spec: Any
    device: Device
    asked: tuple[str, ...] | None = None
    asked_by: str = ""
    capturing: bool = False
    assume_available: bool = False
    self_test: Callable[[Backend, Device], bool] | None = None


class Verdict(NamedTuple):
    """A candidate with what a call needs of it."""

    candidate: Candidate
    backend: Backend
    guards: tuple[Guard, ...]


def ranked(question: Question, current: Settings, *, everything: bool) -> Ranking:
    """Return every backend of the operation in the order in which this question tries them, with measured times."""
    from vllm_accel.dispatch import measured
    from vllm_accel.dispatch.ranking import modelled, rank

    op = question.op
    automatic = registry.ordered(op, preference.shipped_order(op, question.device, question.spec))
    triton_first = op == "attention" and current.use_triton and question.device.type == "cuda"

    def takes(name: str) -> bool:
        if (op, name) in current.disabled:
            return False
        backend = registry.get(op, name)
        out = _static_reasons(backend.capability, question) or _found_broken(backend, question)
        return not out and _held_back(name, backend.capability, question, current) is None

    def version_of(name: str) -> str | None:
        if question.assume_available:
            return measured.newest_version(op, name, question.device)
        with contextlib.suppress(Exception):  # somebody else's backend may raise anything
            return registry.get(op, name).version()
        return None

    first = frozenset(preference.TRITON_BACKENDS) if triton_first else frozenset()
    ranking = rank(
        op, question.spec, question.device, automatic, takes=takes, version_of=version_of, first=first,
        everything=everything,
    )  # fmt: skip
    if everything:
        unknown = tuple(name for name in automatic if name not in ranking.estimates and takes(name))
        ranking = replace(ranking, modelled=modelled(op, question.spec, question.device, unknown, version_of))
    rest = tuple(name for name in registry.names(op) if name not in automatic)
    return replace(ranking, order=tuple(dict.fromkeys((*(question.asked or ()), *ranking.order, *rest))))


def walk(question: Question, *, everything: bool, ranking: Ranking | None = None) -> Iterator[Verdict]:
    """Judge the candidates in order. Without `everything`, those not asked for are left out."""
    from vllm_accel.dispatch.ranking import Ranking

    current = settings()
    if ranking is None:
        needed = question.asked is None or everything
        ranking = ranked(question, current, everything=False) if needed else Ranking(question.asked or ())
    for name in ranking.order:
        asked = question.asked is None or name in question.asked
        if asked or everything:
            yield _judge(name, question, current, asked=asked, everything=everything)


def _judge(name: str, question: Question, current: Settings, *, asked: bool, everything: bool) -> Verdict:
    op, spec, device = question.op, question.spec, question.device
    disabled = Reason("disabled", "named in VLLM_ACCEL_DISABLED_BACKENDS")
    if (op, name) in current.disabled:  # not even loaded: that may be why it is switched off
        return Verdict(Candidate(name, State.DISABLED, (disabled,)), registry.Broken(name, disabled), ())
    backend = registry.get(op, name)
    capability = backend.capability
    guards: tuple[Guard, ...] = ()

    def verdict(state: State, *reasons: Reason, version: str | None = None) -> Verdict:
        return Verdict(Candidate(name, state, reasons, version), backend, guards)

    if isinstance(backend, registry.Broken) and (broken := backend.unavailable_reason()):
        return verdict(State.UNAVAILABLE, broken)
    if reasons := _static_reasons(capability, question):
        return verdict(State.UNSUPPORTED, *reasons)
    version: str | None = None
    if not question.assume_available:
        if not everything and question.asked is None and (held := _held_back(name, capability, question, current)):
            return verdict(State.HELD_BACK, held)  # not worth importing a library for
        if question.asked is None and (found := _found_broken(backend, question)):
            return verdict(State.QUARANTINED, found)  # before its library is imported: that may be what fails
        try:
            missing, version = backend.unavailable_reason(), backend.version()
        except (Exception, SystemExit) as error:  # somebody else's backend may raise anything
            missing = Reason("broken", f"its availability check failed: {type(error).__name__}: {error}")
        if missing:
            return verdict(State.UNAVAILABLE, missing)
    guards = (
        *capability.guards,
        *quarantine.known_bad_guards(op, name, version, device, current.lifted),
    )
    if not asked:
        return verdict(State.NOT_ASKED, version=version)
    if question.asked is None:
        if failed := quarantine.reason_for(op, name, spec, device):
            return verdict(State.QUARANTINED, failed, version=version)
        if held := _held_back(name, capability, question, current):
            return verdict(State.HELD_BACK, held, version=version)
    if warm.needs_proof(op, spec):
        known = warm.self_test_verdict(warm.tested_as(op, spec), name, device)
        proven = question.self_test(backend, device) if question.self_test else known
        if proven is False:
            text = "declares reproducible bits, but its bitwise self-test failed on this device"
            return verdict(State.UNSUPPORTED, Reason("self_test", text), version=version)
    notes = capability.remarks(spec)
    if found := _found_broken(backend, question):  # asked for by name
        notes += (found.text,)
    return Verdict(Candidate(name, State.ABLE, (), version, notes), backend, guards)


def _static_reasons(capability: Capability, question: Question) -> tuple[Reason, ...]:
    reasons = capability.unsupported_reasons(question.spec, question.device)
    if question.capturing and not capability.capture_safe:
        reasons += (Reason("capture", "is not safe while a CUDA graph is captured"),)
    if question.capturing and (waits := capability.waits_for_device(question.spec, question.device)):
        reasons += (Reason("capture", f"{waits.text}: not possible while a CUDA graph is captured"),)
    return reasons


def _found_broken(backend: Backend, question: Question) -> Reason | None:
    """Say what the doctor's probe found wrong with a backend; nothing is known about a device that is not here."""
    if question.assume_available:
        return None
    from vllm_accel.dispatch import probed

    return probed.reason_for(question.op, backend, question.spec, question.device)


def _held_back(name: str, capability: Capability, question: Question, current: Settings) -> Reason | None:
    """Say why automatic choice passes over a backend that could run."""
    if name in preference.TRITON_BACKENDS and question.op == "attention" and current.use_triton is False:
        return Reason("use_triton", f"{TRITON}=0")
    if not capability.linear_memory:
        return Reason("memory", "takes O(Sq*Sk) memory; ask for it by name")
    if waits := capability.waits_for_device(question.spec, question.device):
        return Reason(waits.code, f"{waits.text}; ask for it by name")
    # Who asks for the Triton kernels has asked for their compilation too.
    asked = name in preference.TRITON_BACKENDS and question.op == "attention" and current.use_triton
    seconds, kind = capability.compile_seconds(question.spec), (question.op, name, question.spec, question.device)
    compiled = asked or warm.is_warm(*kind)
    if seconds > MAX_FIRST_CALL_SECONDS and not compiled:
        return Reason("first_call", f"would compile for about {seconds:g} s at this call; vllm_accel.warmup builds it")
    if seconds and question.capturing and not compiled and not warm.has_run(*kind):
        return Reason("capture", "may have to compile, and a CUDA graph is being captured; run the call once before")
    if capability.per_shape_cost and not _fixed_shape(question.spec):
        return Reason("per_shape", "builds a graph for every exact shape, and lengths change in this kind of work")
    return None


def _fixed_shape(spec: Any) -> bool:
    """Tell whether a kind of call repeats the same lengths: dense training does, inference does not."""
    features = getattr(spec, "features", Feature(0))
    return Feature.GRAD in features and Feature.VARLEN not in features


def select(question: Question, sizes: Any = None) -> Selection:
    """Walk every candidate and say which one the call runs, and why not the others.

    Args:
        question: what is to be decided.
        sizes: exact sizes for the guards; None judges the kind of call only.
    """
    candidates: list[Candidate] = []
    chosen: str | None = None
    ranking = ranked(question, settings(), everything=True)
    for candidate, _, guards in walk(question, everything=True, ranking=ranking):
        if candidate.state is State.ABLE:
            refused = refusals(guards, question.spec, sizes)
            if refused:
                state = State.QUARANTINED if refused[0].code.startswith("known_bad") else State.UNSUPPORTED
                candidate = replace(candidate, state=state, reasons=refused, notes=())
            elif chosen is None:
                chosen = candidate.name
                candidate = replace(candidate, state=State.CHOSEN)
        if candidate.state in (State.CHOSEN, State.ABLE):
            capability = registry.get(question.op, candidate.name).capability
            remarks = capability.exact_remarks(question.spec, sizes, question.device)
            candidate = replace(candidate, notes=(*candidate.notes, *remarks))
        if failure := ranking.failed.get(candidate.name):
            candidate = replace(candidate, notes=(*candidate.notes, f"failed when it was measured: {failure}"))
        estimate = ranking.estimates.get(candidate.name) or ranking.modelled.get(candidate.name)
        candidates.append(replace(candidate, estimate=estimate))
    return Selection(
        op=question.op,
        spec=question.spec,
        device=question.device,
        chosen=chosen,
        candidates=tuple(candidates),
        decided_by=_decided_by(question, chosen, ranking),
        settings=_settings_text(question),
        assumed=question.assume_available,
    )


def _decided_by(question: Question, chosen: str | None, ranking: Ranking) -> str:
    if question.asked is not None:
        return f"{question.asked_by}: {', '.join(question.asked)}"
    if question.op == "attention" and settings().use_triton and chosen in preference.TRITON_BACKENDS:
        return f"{TRITON}=1"
    if chosen in ranking.estimates:
        return f"measured table: {ranking.source}"
    if ranking.estimates:
        return f"shipped order; {chosen} was not measured near this call"
    return "shipped order; nothing measured near this call"


def _settings_text(question: Question) -> tuple[str, ...]:
    from vllm_accel.dispatch import measured, probed

    current = settings()
    changed = changed_since_read()
    lines = [f"{name}={value}" for name, value in current.raw]
    lines += measured.ignored(question.device)
    lines += filter(None, [probed.ignored()])
    lines += [f"{name} has changed since it was read; reload_settings() takes it over" for name in changed]
    if current.use_triton and question.device.type != "cuda":
        lines.append(f"{TRITON} has no effect on {question.device.type}: our Triton kernels are for GPUs")
    return tuple(lines)


def assumes_available(device: Device) -> bool:
    """Tell whether packages have to be taken as installed because the device is not on this machine."""
    return not is_local(device)
