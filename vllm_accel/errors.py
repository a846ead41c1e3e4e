"""What can go wrong, as data: every error carries its reasons and prints what was asked, why not, and one way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """One measured fact that stands in the way.

    Attributes:
        code: stable identifier for programs, for example ``"compute_capability"``.
        text: one sentence for people, with the value found and the limit that it breaks.
    """

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


class VllmAccelError(Exception):
    """Base class of the errors that this library raises on purpose.

    Attributes:
        asked: what the caller wanted, in one phrase.
        reasons: backend name -> the reasons why it was not taken.
        fix: one thing that the caller can do, or ``""``.
    """

    def __init__(
        self,
        asked: str,
        reasons: Mapping[str, tuple[Reason, ...]] | None = None,
        *,
        works: str = "",
        fix: str = "",
    ) -> None:
        self.asked = asked
        self.reasons: dict[str, tuple[Reason, ...]] = dict(reasons or {})
        self.works = works
        self.fix = fix
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [self.asked]
        lines += [f"  {name}: " + "; ".join(reason.text for reason in why) for name, why in self.reasons.items()]
        if self.works:
            lines.append(f"Would work: {self.works}")
        if self.fix:
            lines.append(f"Fix: {self.fix}")
        return "\n".join(lines)


class BackendUnavailableError(VllmAccelError, RuntimeError):
    """Raise when a backend asked for by name is not installed, broken, switched off or quarantined."""


class UnsupportedCallError(VllmAccelError, RuntimeError):
    """Raise when no backend (or not the one asked for) can run this call on this device."""
