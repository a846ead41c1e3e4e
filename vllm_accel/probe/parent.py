"""Start a child process for each backend and device, wait no longer than allowed, and read what it told."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_accel.dispatch import probed, settings
from vllm_accel.dispatch.device import Device

#: A backend that compiles needs tens of seconds for its kernels, one that hangs all of this.
SECONDS = 120.0
#: Without a sign of life for this long, an import hangs.
CENSUS_SECONDS = 60.0
#: Python and torch have to be there by then; this is not the backend's time.
START_SECONDS = 60.0
#: How often a child is looked at.
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the probe found of one backend on one device.

    Attributes:
        device: as torch names it. versions: of the library, as installed and as imported.
        unavailable: (code, text) of the reason, None where it could be asked to run.
        broken: part -> what happened there first. right, refused: how many steps. refusal: the first one's text.
        seconds, error: of the timed call, and its largest difference from float64; None if it was not timed.
        imported: its library was imported, or found absent. died: the process ended, or was ended, before it had told
            everything.
    """

    op: str
    backend: str
    device: str
    versions: tuple[str, ...] = ()
    unavailable: tuple[str, str] | None = None
    broken: dict[str, str] = field(default_factory=dict)
    right: int = 0
    refused: int = 0
    refusal: str = ""
    seconds: float | None = None
    error: float | None = None
    imported: bool = False
    died: bool = False

    def verdict(self, device: Device) -> probed.Verdict:
        """Return what selection remembers of it: what is broken, or that nothing is."""
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return probed.Verdict(
            op=self.op, backend=self.backend, versions=self.versions or ("",), broken=self.broken, date=date,
            **probed.environment(device),
        )  # fmt: skip


def probe(
    names: Sequence[tuple[str, str]],
    device: str,
    *,
    seconds: float = SECONDS,
    jobs: int = 1,
    done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run each backend on a device, each in a process of its own.

    Args:
        names: (operation, backend). device: as torch names it. seconds: that one process may take once it has started.
        jobs: processes at once; more than one disturbs the times on a CPU. done: called after each one.
    """

    def one(name: tuple[str, str]) -> Outcome:
        events, end = _child(device, [name], seconds, per_event=False)
        outcome = _read(name, device, events, end)
        done(outcome)
        return outcome

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return list(pool.map(one, names))


def census(names: Sequence[tuple[str, str]], seconds: float = CENSUS_SECONDS) -> dict[tuple[str, str], str]:
    """Import every backend in child processes and return those that end their process or do not come back, and how.

    Args:
        names: (operation, backend). seconds: without a sign of life; several slow imports may take longer together.
    """
    fatal: dict[tuple[str, str], str] = {}
    left = list(names)
    while left:
        events, end = _child("-", left, seconds, per_event=True)
        began = [(e["op"], e["name"]) for e in events if e["event"] == "begin"]
        ended = {(e["op"], e["name"]) for e in events if e["event"] == "end"}
        stuck = next((name for name in began if name not in ended), None)
        if stuck is None:
            return fatal  # all were asked, or the child could not even start: then nothing can be said
        fatal[stuck] = f"{_last_step(events)}: {end}"
        left = left[left.index(stuck) + 1 :]
    return fatal


def _child(
    device: str, names: Iterable[tuple[str, str]], seconds: float, *, per_event: bool
) -> tuple[list[dict[str, Any]], str]:
    """Run a child and return its events and how it ended, "" if all is told."""
    with tempfile.TemporaryDirectory(prefix="vllm-accel-probe-") as folder:
        path = Path(folder) / "events"
        command = [sys.executable, "-m", "vllm_accel.probe.child", str(path), device, *map(":".join, names)]
        with (Path(folder) / "output").open("w+b") as output:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=_environment(),
                start_new_session=True,
            )  # fmt: skip
            try:
                code, limit = _wait(child, path, seconds, per_event)
                end = f"no answer within {limit:g} s" if code is None else "" if code == 0 else _ending(code, output)
            finally:
                _kill(child)
        return _events(path), end


def _wait(child: subprocess.Popen[bytes], path: Path, seconds: float, per_event: bool) -> tuple[int | None, float]:
    """Wait until a child ends, at most `seconds` from its first event, or from its last one.

    Returns:
        Its exit code, None if it has not ended; and the limit that counted.
    """
    told, limit, deadline = 0, START_SECONDS, time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=_POLL_SECONDS), limit
        size = path.stat().st_size if path.exists() else 0
        if size > told and (per_event or not told):
            limit, deadline = seconds, time.monotonic() + seconds
        told = size
    return child.poll(), limit


def _environment() -> dict[str, str]:
    """Return this process's environment without our settings: a wrong one must not look like a broken backend."""
    ours = (*settings.NAMES,)
    return {
        name: value
        for name, value in os.environ.items()
        if name == settings.TABLES or not (name in ours or name.startswith(settings.PREFIX))
    }


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a child and everything that it started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    child.wait()


def _ending(code: int, output: Any) -> str:
    """Say how a process ended and what it said last."""
    output.seek(max(0, output.seek(0, os.SEEK_END) - 4096))
    lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"exit code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-code).name
    return f"the process ended with {how}" + (f": {lines[-1][:300]}" if lines else "")


def _events(path: Path) -> list[dict[str, Any]]:
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the line that a killed process was writing
                found.append(json.loads(line))
    return found


def _last_step(events: list[dict[str, Any]]) -> str:
    return next((str(e["name"]) for e in reversed(events) if e["event"] == "step"), "starting")


def _read(name: tuple[str, str], device: str, events: list[dict[str, Any]], end: str) -> Outcome:
    """Turn the events of one backend into its outcome."""
    outcome = Outcome(*name, device)
    broken: dict[str, str] = {}
    for event in events:
        kind = event["event"]
        if kind in ("version", "imported"):
            outcome = replace(outcome, versions=tuple(event["versions"]), imported=kind == "imported")
        elif kind == "unavailable":
            outcome = replace(outcome, unavailable=(event["code"], event["text"]))
        elif kind == "right":
            outcome = replace(outcome, right=outcome.right + 1)
        elif kind == "refused":
            outcome = replace(outcome, refused=outcome.refused + 1, refusal=outcome.refusal or event["text"])
        elif kind == "wrong":
            broken.setdefault(event["part"], f"{event['name']}: {event['text']}")
        elif kind == "timed":
            outcome = replace(outcome, seconds=event["seconds"], error=event["error"])
    told = any(event["event"] == "end" for event in events)
    if not told:
        broken[probed.EVERYTHING] = f"{_last_step(events)}: {end or 'the process ended before it had told everything'}"
    return replace(outcome, broken=broken, died=not told)
