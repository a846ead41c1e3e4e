"""The answer to "which one, and why": data that a program can assert on and a person can read."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_accel.dispatch.device import Device
from vllm_accel.errors import Reason

if TYPE_CHECKING:
    from vllm_accel.dispatch.estimate import Estimate


class State(enum.Enum):
    """Where a candidate stands. Only ABLE candidates can be chosen."""

    CHOSEN = "chosen"
    ABLE = "could run"
    HELD_BACK = "could run, not chosen automatically"
    UNSUPPORTED = "cannot run this call"
    UNAVAILABLE = "not available"
    DISABLED = "switched off"
    QUARANTINED = "quarantined"
    NOT_ASKED = "not asked for"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One backend and what the selector found about it.

    Attributes:
        name, state, reasons, version. notes: remarks on a call that it can run.
        estimate: what the call takes on it by the measured tables, None if nothing near was measured.
    """

    name: str
    state: State
    reasons: tuple[Reason, ...] = ()
    version: str | None = None
    notes: tuple[str, ...] = ()
    estimate: Estimate | None = None

    @property
    def why(self) -> str:
        """Return the reasons and remarks as one line."""
        return "; ".join((*(reason.text for reason in self.reasons), *self.notes))

    @property
    def time(self) -> str:
        """Return the expected time and what it rests on, empty if nothing near was measured."""
        return "" if self.estimate is None else str(self.estimate)

    def __str__(self) -> str:
        said = "; ".join(part for part in (self.time, self.why) if part)
        return f"{self.name}: {self.state.value}" + (f" ({said})" if said else "")


@dataclass(frozen=True, slots=True)
class Selection:
    """What `explain` returns.

    Attributes:
        op: the operation. spec: the kind of call. device: where it would run.
        chosen: name of the backend that the call runs, None if none can.
        candidates: every backend, in the order tried.
        decided_by: what made the choice, in words.
        settings: environment variables in force, what changed since they were read, and files of measurements or
            verdicts that do not count.
        assumed: packages were not looked for, because the device is not on this machine.
    """

    op: str
    spec: Any
    device: Device
    chosen: str | None
    candidates: tuple[Candidate, ...]
    decided_by: str
    settings: tuple[str, ...] = ()
    assumed: bool = False

    def __getitem__(self, name: str) -> Candidate:
        """Return a candidate by name. Raises KeyError if there is no such backend."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise KeyError(name)

    def reasons(self) -> dict[str, tuple[Reason, ...]]:
        """Map every backend that was not chosen to its reasons."""
        return {c.name: c.reasons for c in self.candidates if c.state is not State.CHOSEN}

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain data, for JSON."""
        return {
            "op": self.op,
            "call": str(self.spec),
            "device": str(self.device),
            "chosen": self.chosen,
            "decided_by": self.decided_by,
            "packages_assumed_installed": self.assumed,
            "settings": list(self.settings),
            "candidates": [
                {
                    "name": c.name,
                    "state": c.state.name.lower(),
                    "version": c.version,
                    "reasons": [{"code": r.code, "text": r.text} for r in c.reasons],
                    "notes": list(c.notes),
                    "estimate": c.estimate
                    and {
                        "seconds": c.estimate.seconds,
                        "noise": c.estimate.noise,
                        "rests_on": c.estimate.rests_on,
                        "rows": c.estimate.rows,
                    },
                }
                for c in self.candidates
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.spec}",
            f"on {self.device}",
            f"-> {self.chosen or 'no backend'}   [{self.decided_by}]",
        ]
        width = max((len(c.name) for c in self.candidates), default=0)
        for c in self.candidates:
            mark = "*" if c.state is State.CHOSEN else " "
            said = "; ".join(part for part in (c.time, c.why) if part)
            lines.append(f" {mark} {c.name:<{width}}  {c.state.value}" + (f": {said}" if said else ""))
        if self.assumed:
            lines.append("   (this machine has no such device: every package is taken as installed)")
        lines += [f"   {text}" for text in self.remarks()]
        return "\n".join(lines)

    def remarks(self) -> list[str]:
        """Return `settings` as lines: a variable of ours is a setting, everything else a note."""
        return [f"{'setting' if text.startswith('VLLM_') else 'note:'} {text}" for text in self.settings]
