"""Measure the backends on this machine, so that automatic choice takes the fastest.

The times go into a table of the device in your own folder (VLLM_ACCEL_TABLES), after every shape: interrupt it when you
like, start it again and it goes on. `vllm-accel explain` shows the times that a choice rests on.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_accel.cli import console

if TYPE_CHECKING:
    from vllm_accel.dispatch.device import Device
    from vllm_accel.tuning.problem import Problem
    from vllm_accel.tuning.trial import Measured
    from vllm_accel.tuning.tune import Report

FAILED, BROKEN_CONTEXT, INTERRUPTED = 1, 3, 130

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vllm-accel tune``."""
    from vllm_accel.tuning.families import TUNED

    add = parser.add_argument
    add("--op", metavar="OP[,OP]", help=f"{', '.join(TUNED)}; default: all of them")
    add("--budget", default="120s", metavar="TIME", help="such as 90s, 10m or 1h; default 120s, and rarely all is done")
    add("--shapes", type=Path, metavar="FILE", help="measure these calls instead of the built-in grid (docs/tuning.md)")
    add(
        "--device",
        metavar="NAME",
        help="such as cpu or cuda:1; default: this machine's GPU, else its CPU",
    )
    add("--again", action="store_true", help="measure what is already in the table once more")
    pin = parser.add_mutually_exclusive_group()
    pin.add_argument("--pin", action="store_true", help="freeze the choices of this device as they are now")
    pin.add_argument("--unpin", action="store_true", help="let the table of this device change again")


def run(given: argparse.Namespace) -> int:
    """Measure. Exit code 0, 1 if the table cannot be written, 2 for wrong use, 3 for a broken CUDA context, 130."""
    from vllm_accel.cli.machine import named_device
    from vllm_accel.dispatch.device import is_local
    from vllm_accel.dispatch.measured import user_file
    from vllm_accel.tuning.families import TUNED, problems, read

    try:
        device = named_device(given.device)
        if not is_local(device):
            raise ValueError(f"{given.device} is not a device of this machine; times of another one cannot be measured")
        path = user_file(device)
        if given.pin or given.unpin:
            return _pin(device, path) if given.pin else _unpin(path)
        seconds = budget(given.budget)
        if given.op is not None and given.shapes is not None:
            raise ValueError("--shapes names the operation of every shape, so --op has no meaning beside it")
        names = tuple(TUNED) if given.op is None else tuple(part.strip() for part in given.op.split(","))
        if unknown := [name for name in names if name not in TUNED]:
            raise ValueError(f"--op {unknown[0]!r} is not one of {', '.join(TUNED)}")
        listed = problems(names, device) if given.shapes is None else read(given.shapes)
    except (ValueError, OSError) as error:
        return console.wrong_use("tune", error)
    return _tune(device, path, listed, seconds, given.again)


def budget(text: str) -> float:
    """Read a time such as ``120s``, ``10m`` or ``1.5h``; a bare number is seconds.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|)\s*", text)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"--budget takes a time such as 90s, 10m or 1h, not {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def _tune(device: Device, path: Path, listed: Any, seconds: float, again: bool) -> int:
    from vllm_accel.dispatch import measured
    from vllm_accel.dispatch.table_file import PinnedError
    from vllm_accel.tuning.trial import PoisonedError
    from vllm_accel.tuning.tune import Job, tune

    where = torch.device(device.type, device.index) if device.type == "cuda" else torch.device(device.type)
    job = Job(listed, where, path, seconds, again, driver=_driver(device), provenance=_provenance(device))
    shown = console.hide(str(path))
    print(f"{device}: {len(listed)} shapes, at most {seconds:g} s; the table is {shown}")
    if warning := _busy():
        print(warning)
    code, text = 0, ""
    try:
        with _progress(len(listed), seconds) as report:
            done = tune(job, report)
        text = f"{done.measured} shapes measured" + (
            f", {done.left} left: start it again to go on" if done.left else ", none left"
        )
    except KeyboardInterrupt:
        code, text = INTERRUPTED, "interrupted; what was measured is in the table"
    except PinnedError as error:
        return console.wrong_use("tune", error)
    except OSError as error:
        code, text = FAILED, f"{shown} cannot be written: {error.strerror or error}; what it held is still there"
    except PoisonedError as error:
        code, text = BROKEN_CONTEXT, f"{error}. It is noted in the table; start again, and the rest is measured"
    measured.forget()
    print(text, file=sys.stderr if code else sys.stdout)
    return code


@contextlib.contextmanager
def _progress(total: int, seconds: float) -> Iterator[Report]:
    """Show a bar of the time on a terminal, and in either case one line for each shape."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    out = console.console()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f} s"))
    with Progress(*columns, TimeElapsedColumn(), console=out, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("measuring", total=seconds)

        def report(problem: Problem | None, found: Measured | None, text: str) -> None:
            if problem is None:
                bar.console.print(console.plain(text), soft_wrap=True)
            else:
                bar.console.print(console.plain(line(problem, found, text)), soft_wrap=True)
                bar.update(task, description=problem.name)
            bar.update(task, completed=min(bar.tasks[0].elapsed or 0.0, seconds))

        yield report


def line(problem: Problem, found: Measured | None, text: str) -> str:
    """Say on one line what was found of a problem: the backends, fastest first, and those that failed."""
    from vllm_accel.dispatch.estimate import duration

    if found is None:
        return f"{problem.name}: {text}"
    times = sorted(found.row.times.items(), key=lambda item: item[1].seconds)
    said = [f"{name} {duration(timing.seconds)} ±{timing.noise:.0%}" for name, timing in times]
    said += [f"{name} FAILED: {reason}" for name, reason in found.row.failed.items()]
    return f"{problem.name}: {', '.join(said) or 'no backend can run it'}"


def _pin(device: Device, path: Path) -> int:
    from vllm_accel.dispatch import measured
    from vllm_accel.dispatch.table_file import locked, save

    table = measured.effective(device)
    if table is None:
        return console.wrong_use("tune", f"there is no table of {device} to pin; measure first: {measured.COMMAND}")
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    try:
        with locked(path):
            save(replace(table, pinned=True, provenance={**table.provenance, "pinned": date}), path)
    except OSError as error:
        return _unwritable(path, error)
    measured.forget()
    print(f"pinned: {len(table.rows)} shapes in {console.hide(str(path))}, and no other table counts on this device")
    return 0


def _unpin(path: Path) -> int:
    from vllm_accel.dispatch import measured
    from vllm_accel.dispatch.table_file import locked, parse, save

    try:
        with locked(path):
            save(replace(parse(path.read_text(encoding="utf-8")), pinned=False), path)
    except FileNotFoundError:
        return console.wrong_use("tune", f"there is no {console.hide(str(path))}")
    except OSError as error:
        return _unwritable(path, error)
    measured.forget()
    print(f"no longer pinned: {console.hide(str(path))}")
    return 0


def _unwritable(path: Path, error: OSError) -> int:
    print(f"{console.hide(str(path))} cannot be written: {error.strerror or error}", file=sys.stderr)
    return FAILED


def _driver(device: Device) -> str:
    return ".".join(map(str, device.driver_version)) if device.driver_version else ""


def _provenance(device: Device) -> dict[str, Any]:
    import platform

    from vllm_accel import __version__

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["vllm-accel", *sys.argv[1:]]),
        "device": str(device),
        "vllm_accel": __version__,
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda or torch.version.hip or ""),
        "threads": torch.get_num_threads(),
    }


def _busy() -> str:
    """Say that other programs use the machine, empty if it is quiet."""
    import os

    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"warning: load average {load:.1f} on {cores} cores; times will be too high" if load > 0.6 * cores else ""
