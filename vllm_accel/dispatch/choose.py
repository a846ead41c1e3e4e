"""From a kind of call to a bound kernel, remembered per kind, so that a new length costs one look-up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_accel.dispatch import device as devices
from vllm_accel.dispatch import plan, quarantine, warm
from vllm_accel.dispatch.backend import Backend
from vllm_accel.dispatch.capability import Guard, refusals
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.selection import State
from vllm_accel.dispatch.selector import Question, select, walk
from vllm_accel.errors import BackendUnavailableError, UnsupportedCallError


@dataclass(frozen=True, slots=True)
class OpFamily:
    """What an operation brings to the shared machinery.

    Attributes:
        name: the operation.
        make_spec: builds the spec from the tuple that the operation uses as the kind of a call.
        self_test: proves batch invariance of a backend on a device by comparing bits.
    """

    name: str
    make_spec: Callable[[tuple[Any, ...]], Any]
    self_test: Callable[[Backend, Device], bool] | None = None


class Bound:
    """A backend bound to a kind of call, with the guards that exact sizes still have to pass."""

    __slots__ = ("capture_safe", "guards", "kernel", "name")

    def __init__(self, name: str, kernel: Any, guards: tuple[Guard, ...], capture_safe: bool) -> None:
        self.name, self.kernel, self.guards, self.capture_safe = name, kernel, guards, capture_safe


class Choice:
    """The backends that can run one kind of call, best first, found and bound only as far as sizes demand."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.bound: list[Bound] = []
        self._walk: Iterator[Any] = walk(question, everything=False)
        self._lock = threading.RLock()

    def take(self, sizes: Any) -> Bound:
        """Return the first backend whose guards accept the sizes.

        Raises:
            UnsupportedCallError, BackendUnavailableError: none does; carries every reason.
        """
        for bound in self.bound:
            if not bound.guards or not refusals(bound.guards, self.question.spec, sizes):
                return bound
        with self._lock:
            return self._extend(sizes)

    def _extend(self, sizes: Any) -> Bound:
        for candidate, backend, guards in self._walk:
            if candidate.state is State.ABLE and (kernel := self._bind(backend)) is not None:
                capability = backend.capability
                waits = capability.waits_for_device(self.question.spec, self.question.device)
                safe = capability.capture_safe and waits is None
                self.bound.append(Bound(candidate.name, kernel, guards, safe))
                if not guards or not refusals(guards, self.question.spec, sizes):
                    if capability.compile_seconds(self.question.spec) and not self.question.capturing:
                        warm.note_run(self.question.op, candidate.name, self.question.spec, self.question.device)
                    break
        for bound in self.bound:  # another thread may have extended the list while this one waited
            if not refusals(bound.guards, self.question.spec, sizes):
                return bound
        raise nothing_can_run(self.question, sizes)

    def _bind(self, backend: Backend) -> Any:
        question = self.question
        try:
            return backend.bind(question.spec, question.device)
        except Exception as error:
            if question.asked is not None:
                raise
            quarantine.put(question.op, backend.name, question.spec, question.device, error)
            return None


_choices: dict[Any, Choice] = {}
_MAX_CHOICES = 4096
plan.on_invalidate(_choices.clear)


def choose(
    family: OpFamily,
    kind: tuple[Any, ...],
    device: torch.device,
    asked: tuple[str, ...] | None,
    asked_by: str,
    sizes: Any,
    capturing: bool,
) -> tuple[Bound, Question]:
    """Return the backend that runs a call, bound.

    Args:
        family: the operation. kind: hashable kind of the call, the arguments of its spec.
        device: of the tensors. asked, asked_by: an explicit request. sizes: for exact-size guards.
        capturing: a CUDA graph is being captured; nothing found now is kept.

    Raises:
        UnsupportedCallError, BackendUnavailableError: no backend can, or not the one asked for.
    """
    key = (family.name, kind, device, asked)
    choice = None if capturing else _choices.get(key)
    if choice is None:
        question = Question(
            op=family.name,
            spec=family.make_spec(kind),
            device=devices.detect(device),
            asked=asked,
            asked_by=asked_by,
            capturing=capturing,
            self_test=None if capturing else family.self_test,
        )
        choice = Choice(question)
        if not capturing:
            if len(_choices) >= _MAX_CHOICES:
                _choices.clear()
            _choices[key] = choice
    return choice.take(sizes), choice.question


def nothing_can_run(question: Question, sizes: Any) -> Exception:
    """Build the error for a call that no backend (asked for) can run."""
    selection = select(question, sizes)
    asked = question.asked
    shown = [c for c in selection.candidates if asked is None or c.name in asked]
    reasons = {c.name: c.reasons for c in shown}
    if asked is None:
        return UnsupportedCallError(f"no backend can run {question.spec} on {question.device}", reasons)
    others = select(Question(question.op, question.spec, question.device, self_test=None), sizes).chosen
    works = f"automatic choice would run {others!r}" if others else "no other backend either"
    gone = {State.UNAVAILABLE, State.DISABLED}
    kind = BackendUnavailableError if all(c.state in gone for c in shown) else UnsupportedCallError
    return kind(
        f"{question.asked_by} asks for {', '.join(asked)}, which cannot run {question.spec} on {question.device}",
        reasons,
        works=works,
        fix="leave the backend open, or name one that can" if others else "",
    )
