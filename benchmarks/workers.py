"""Tasks in processes of their own: one that hangs, dies or poisons its CUDA context costs itself and nothing else."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

#: What the message of an error has in it after which no CUDA call of a process works any more.
_POISON = ("CUDA error", "illegal memory access", "an illegal instruction", "unspecified launch failure")
NO_TIME, STOPPED = "not run: the time was up", "killed: the time was up"


class Task(NamedTuple):
    """A function of a module and its arguments, which travel to another process.

    Attributes:
        name: for people. limit: seconds after which its process is killed.
    """

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...] = ()
    limit: float = 60.0


class Done(NamedTuple):
    """What came of a task: its value, or why there is none."""

    task: Task
    value: Any = None
    error: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class _Worker:
    process: Any
    pipe: Connection
    task: Task | None = None
    since: float = 0.0


def run_all(
    tasks: Sequence[Task], processes: int, deadline: float, report: Callable[[Done], None] = lambda done: None
) -> list[Done]:
    """Run tasks, at most `processes` at a time; a process serves many tasks, and a new one follows on one that is lost.

    Args:
        deadline: of `time.monotonic`; what runs then is killed, what waits is not run.
        report: called for each task as it is done.
    """
    waiting, done = deque(tasks), []
    idle: list[_Worker] = []
    busy: list[_Worker] = []

    def finish(worker: _Worker, value: Any, error: str) -> None:
        assert worker.task is not None
        done.append(Done(worker.task, value, error, time.monotonic() - worker.since))
        worker.task = None
        busy.remove(worker)
        report(done[-1])

    try:
        while (waiting or busy) and time.monotonic() < deadline:
            while waiting and len(busy) < processes:
                worker = idle.pop() if idle else _start()
                worker.task, worker.since = waiting.popleft(), time.monotonic()
                busy.append(worker)
                worker.pipe.send((worker.task.call, worker.task.args))
            soonest = min(deadline, *(w.since + w.task.limit for w in busy if w.task))
            ready = wait([w.pipe for w in busy], timeout=max(0.0, min(soonest - time.monotonic(), 1.0)))
            for worker in [w for w in busy if w.pipe in ready]:
                value, error, poisoned = _receive(worker)
                finish(worker, value, error)
                _stop([worker]) if poisoned else idle.append(worker)
            for worker in [w for w in busy if w.task and time.monotonic() > w.since + w.task.limit]:
                limit = worker.task.limit if worker.task else 0.0
                finish(worker, None, f"killed after {limit:.0f} s")
                _stop([worker])
        for worker in list(busy):
            finish(worker, None, STOPPED)
            idle.append(worker)
    finally:
        _stop([*idle, *busy])
    for task in waiting:
        done.append(Done(task, error=NO_TIME))
        report(done[-1])
    return done


def _start() -> _Worker:
    context = multiprocessing.get_context("spawn")  # a process with CUDA in it must not fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _receive(worker: _Worker) -> tuple[Any, str, bool]:
    try:
        answer: tuple[Any, str, bool] = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(5)
        return None, f"its process ended with {worker.process.exitcode}", True
    return answer


def _stop(workers: Iterable[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
        worker.process.join(10)
        worker.pipe.close()


def _serve(pipe: Connection) -> None:
    """Run what comes through the pipe until it closes."""
    while True:
        try:
            call, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (call(*args), "", False)
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
            answer = (None, text, any(word in text for word in _POISON))
        pipe.send(answer)
