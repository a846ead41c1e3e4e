"""Compile before timing, several kernels at once, in processes of their own: what one of them breaks, it breaks alone.

``python -m vllm_accel.tuning.build`` reads tasks from standard input, makes the first call of each, and prints one line
of JSON for each: the seconds that it took, or the error. Started again it finds the compiled kernels on disk, and the
seconds are those that a user's next process will see.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_accel.dispatch import registry
from vllm_accel.tuning import families
from vllm_accel.tuning.problem import Problem
from vllm_accel.tuning.timing import text_of

#: Processes that compile at once, at most: each holds a CUDA context.
MOST_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Task:
    """One first call to make: of a backend, for a kind of call."""

    op: str
    backend: str
    problem: Problem
    spec: Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a first call took, or how it failed; both empty if its process did not come so far."""

    task: Task
    seconds: float | None = None
    error: str = ""


def run(tasks: Iterable[Task], device: torch.device, seconds: float, workers: int | None = None) -> list[Outcome]:
    """Make the first call of every task, each in one of several processes, for at most this many seconds."""
    tasks = list(tasks)
    count = min(len(tasks), workers or max(1, min(MOST_WORKERS, (os.cpu_count() or 2) // 2)))
    shares = [tasks[i::count] for i in range(count)]
    deadline = time.monotonic() + seconds
    processes = [_start(share, device) for share in shares]
    found: list[Outcome] = []
    try:
        for share, process in zip(shares, processes, strict=True):
            found += _collect(share, process, deadline)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


def _start(tasks: list[Task], device: torch.device) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vllm_accel.tuning.build", str(device)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps([[task.backend, task.problem.to_json()] for task in tasks]))
        process.stdin.close()
    process.stdin = None
    return process


def _collect(tasks: list[Task], process: subprocess.Popen[str], deadline: float) -> list[Outcome]:
    try:
        out, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    said: dict[int, Outcome] = {}
    for line in out.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):  # a library may print what it likes
            data = json.loads(line)
            said[data["task"]] = Outcome(tasks[data["task"]], data["seconds"], data["error"])
    return [said.get(index, Outcome(task)) for index, task in enumerate(tasks)]


def first_call(op: str, backend: str, problem: Problem, device: torch.device) -> float:
    """Return the seconds of a call, its library imported before."""
    registry.get(op, backend).unavailable_reason()
    step = problem.step(problem.make(device), backend)
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """Make the first calls that standard input names."""
    device = torch.device(sys.argv[1])
    for index, (backend, data) in enumerate(json.loads(sys.stdin.read())):
        op, problem = families.parsed(data)
        seconds, error = None, ""
        try:
            seconds = first_call(op, backend, problem, device)
        except Exception as raised:  # told to the parent, which measures what is left
            error = text_of(raised)
        sys.stdout.write(json.dumps({"task": index, "seconds": seconds, "error": error}) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
