"""What a probe's child process does: ask one backend, run its steps, and write each event before and after it.

Events are lines of JSON in a file, because what a library prints may be anything. The last line of a process that died
or was killed tells where.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tell = Callable[..., None]


def main(argv: list[str]) -> int:
    """Run as ``python -m vllm_accel.probe.child FILE DEVICE OP:NAME``, or with DEVICE "-" to ask only, many names."""
    path, device, *names = argv
    with Path(path).open("a", encoding="utf-8") as file:

        def tell(event: str, **facts: Any) -> None:
            file.write(json.dumps({"event": event, **facts}) + "\n")
            file.flush()

        for full in names:
            op, _, name = full.partition(":")
            tell("begin", op=op, name=name)
            if (backend := _ask(op, name, tell)) is not None and device != "-":
                _run(op, backend, device, tell)
            tell("end", op=op, name=name)
    return 0


def _ask(op: str, name: str, tell: Tell) -> Any:
    """Load the adapter and ask whether its library is usable; None if it is not."""
    from vllm_accel.dispatch import registry

    tell("step", part="everything", name="importing its adapter")
    backend = registry.get(op, name)
    before = _version(backend)
    tell("version", versions=[before])  # what selection can know before it imports the library
    tell("step", part="everything", name="importing its library")
    try:
        missing = backend.unavailable_reason()
    except (Exception, SystemExit) as error:  # somebody else's backend may raise anything
        tell("unavailable", code="broken", text=f"its availability check failed: {_text(error)}")
        return None
    tell("imported", versions=sorted({before, _version(backend)}))
    if missing is not None:
        tell("unavailable", code=missing.code, text=missing.text)
        return None
    return backend


def _version(backend: Any) -> str:
    try:
        return str(backend.version() or "")
    except Exception:  # a version that cannot be told is none
        return ""


def _run(op: str, backend: Any, where: str, tell: Tell) -> None:
    """Run every step on a device; a step that fails does not stop the next."""
    import torch

    from vllm_accel.dispatch import device as devices
    from vllm_accel.errors import UnsupportedCallError
    from vllm_accel.probe import steps

    target = torch.device(where)
    device = devices.detect(target)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny calls: threads cost more than they bring, ten times more on a busy machine
    for step in steps.steps(op, backend, device, target):
        tell("step", part=step.part, name=step.name)
        try:
            step.run()
        except UnsupportedCallError as refusal:
            reasons = refusal.reasons.get(backend.name, ())
            tell("refused", text="; ".join(reason.text for reason in reasons) or str(refusal))
        except (Exception, SystemExit) as error:
            tell("wrong", part=step.part, name=step.name, text=_text(error))
            if target.type == "cuda" and "CUDA error" in str(error):
                return  # the context is lost, and every later call would say the same
        else:
            tell("right")
    torch.set_num_threads(threads)
    tell("step", part="everything", name="the call that is timed")
    try:
        found = steps.timed(op, backend, device, target)
    except (Exception, SystemExit) as error:
        tell("wrong", part="dense", name="the call that is timed", text=_text(error))
    else:
        if found is not None:
            tell("timed", seconds=found[0], error=found[1])


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
