"""The doctor's verdict and its table of backends: the same walk as a call, with a state and one action for each."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch

from vllm_accel.cli.doctor_states import BackendState, Outcomes, measured, quiet, state_of
from vllm_accel.dispatch import quarantine, registry
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.selection import Selection, State
from vllm_accel.dispatch.settings import settings
from vllm_accel.dispatch.spec import Feature
from vllm_accel.probe.steps import half


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong: what, the fix, and the exit code that it causes."""

    text: str
    fix: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Examined:
    """What was asked of the selector: typical kinds of work, and the state of every backend.

    Attributes:
        work: (kind of work, the selection, or the text of the error that such a call raises).
        backends: of every operation. device: "" where only one device was examined.
    """

    work: tuple[tuple[str, Selection | str], ...]
    backends: tuple[BackendState, ...]
    device: str = ""

    @staticmethod
    def of(device: Device | None, outcomes: Outcomes | None = None, label: str = "") -> Examined:
        """Ask for a device; without one, for the CPU. outcomes: of the probe on that device."""
        from vllm_accel.dispatch import device as devices

        where = device or devices.preset("cpu")
        work = tuple((kind, _ask(fn, tensors, where)) for kind, (fn, tensors) in _typical_work(where).items())
        selections = tuple(answer for _, answer in work if isinstance(answer, Selection))
        states = tuple(
            state_of(op, name, where, tuple(s for s in selections if s.op == op), outcomes or {})
            for op in registry.operations()
            for name in registry.names(op)
        )
        return Examined(work, states, label)

    def verdict_rows(self) -> list[dict[str, str]]:
        """Say in one row per kind of work what runs."""
        rows = []
        for kind, answer in self.work:
            row = {"work": kind, **({"device": self.device} if self.device else {})}
            if isinstance(answer, str):
                rows.append({**row, "runs": "nothing: the call raises", "decided by": answer})
            else:
                rows.append({**row, "runs": answer.chosen or "nothing", "decided by": answer.decided_by})
        return rows

    def backend_rows(self) -> list[dict[str, str]]:
        """Return one row per backend."""
        return [
            {
                "backend": s.name if s.op == "attention" else f"{s.op}: {s.name}",
                **({"device": self.device} if self.device else {}),
                "state": s.state,
                "version": s.version,
                **measured(s.outcome),
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
        found += self._slow(selections)
        idle = [(kind, answer) for kind, answer in selections if answer.chosen is None]
        if not idle:
            return found
        kinds = ", ".join(kind for kind, _ in idle)
        states = {c.state for _, answer in idle for c in answer.candidates}
        if State.NOT_ASKED in states:
            fix = "see the reasons below, name another backend, or unset the variable"
            return [*found, Problem(f"nothing can run {kinds} as asked ({idle[0][1].decided_by})", fix, 2)]
        if State.DISABLED in states:
            fix = "take one that can out of that variable"
            return [*found, Problem(f"VLLM_ACCEL_DISABLED_BACKENDS leaves nothing that can run {kinds}", fix, 2)]
        works = any(answer.op == "attention" and answer.chosen for _, answer in selections)
        return [*found, Problem(f"no backend can run {kinds} here", "see the reasons below", 1 if works else 3)]

    def _slow(self, selections: list[tuple[str, Selection]]) -> list[Problem]:
        """Say where automatic choice takes a backend that the probe found slow at what it timed, a prefill."""
        slow = {s.name: s for s in self.backends if (s.op, s.state) == ("attention", "OK-SLOW")}
        for kind, answer in selections:
            if answer.op == "attention" and answer.chosen in slow and _is_prefill(answer.spec):
                text = f"{kind} runs on {answer.chosen}: {slow[answer.chosen].reason}"
                return [Problem(text, "`vllm-accel tune` measures, and automatic choice follows it", 1)]
        return []

    def _raised(self) -> list[tuple[str, str]]:
        return [(kind, answer) for kind, answer in self.work if isinstance(answer, str)]


def _is_prefill(spec: Any) -> bool:
    return spec.seqlen_q > 1 and Feature.GRAD not in spec.features


def _typical_work(device: Device) -> dict[str, tuple[Any, tuple[torch.Tensor, ...]]]:
    from vllm_accel import attention, fused_moe, gemm, grouped_gemm

    causal = functools.partial(attention, causal=True)
    dtype = half(device)  # the libraries for older GPUs take fp16 only

    def make(*shapes: tuple[int, ...], grad: bool = False) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(s, dtype=dtype, device="meta", requires_grad=grad) for s in shapes)

    prefill, decode, keys = (1, 4096, 32, 128), (1, 1, 32, 128), (1, 4096, 8, 128)
    name = str(dtype).removeprefix("torch.")
    return {
        f"prefill ({name}, 4096 tokens)": (causal, make(prefill, keys, keys)),
        f"decode ({name}, 1 token over 4096)": (causal, make(decode, keys, keys)),
        f"training ({name}, 4096 tokens)": (causal, make(prefill, keys, keys, grad=True)),
        f"matrix product ({name}, 4096 x 4096 x 4096)": (functools.partial(gemm), make((4096, 4096), (4096, 4096))),
        f"tokens by expert ({name}, 4096 tokens, 8 experts)": (
            functools.partial(grouped_gemm),
            (*make((4096, 4096), (8, 4096, 4096)), torch.empty(8, dtype=torch.int32, device="meta")),
        ),
        f"mixture of experts ({name}, 4096 tokens to 2 of 8)": (
            functools.partial(fused_moe),
            (
                *make((4096, 4096), (8, 4096, 8192), (8, 4096, 4096)),
                torch.empty(4096, 2, device="meta"),
                torch.empty(4096, 2, dtype=torch.int64, device="meta"),
            ),
        ),
    }


def _ask(fn: Any, tensors: tuple[torch.Tensor, ...], device: Device) -> Selection | str:
    from vllm_accel import explain

    try:
        with quiet():
            return explain(fn.func, *tensors, device=device, **fn.keywords)
    except Exception as error:  # a bad setting is what the report is for
        return str(error)


def known_bad_rows(device: Device | None) -> list[dict[str, str]]:
    """Return the rows of the known-bad list that concern a device, whatever is installed."""
    try:
        lifted = settings().lifted
    except ValueError:  # reported under settings
        lifted = frozenset()
    return [
        {
            "row": row.name,
            "backend": row.backend,
            "what happens": row.effect,
            "link": row.link,
            "seen by us": row.reproduced or "no: reported",
            "refused": "no: lifted by VLLM_ACCEL_LIFT_KNOWN_BAD" if row.name in lifted else "yes",
        }
        for row in quarantine.known_bad_rows()
        if device is not None
        and row.concerns(row.op, row.backend, _version(row.op, row.backend), device)
        and not registry.get(row.op, row.backend).capability.device_reasons(device)
    ]


def _version(op: str, name: str) -> str | None:
    with contextlib.suppress(Exception):
        return registry.get(op, name).version()
    return None
