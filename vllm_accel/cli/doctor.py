"""Examine this machine: what runs, what does not and why, and one thing to do about it; needs no GPU, never fails.

Every section is made on its own and within a time limit: what goes wrong in one becomes a line in the report. Libraries
that end a process when they are imported, or never come back, do so in a child process. With --probe every backend runs
on every device, and automatic choice remembers what was wrong (`vllm_accel.dispatch.probed`). The report names no user
and no home directory, so it can be posted as it is.
"""

from __future__ import annotations

import argparse
import math
import threading
from collections.abc import Callable
from typing import Any

from vllm_accel.cli import (
    console,
    doctor_backends,
    doctor_caches,
    doctor_machine,
    doctor_probe,
    doctor_settings,
    triton_cache,
)
from vllm_accel.cli.doctor_backends import Examined, Problem
from vllm_accel.cli.doctor_probe import Probed
from vllm_accel.dispatch.device import Device
from vllm_accel.probe.parent import SECONDS

#: What the exit code says.
ALL_WELL, SOMETHING_BROKEN, ASKED_FOR_BROKEN, NOTHING_WORKS = 0, 1, 2, 3
#: A section that takes longer hangs: a network file system, a program that waits.
SECTION_SECONDS = 60.0

Row = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vllm-accel doctor``."""
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--json", action="store_true", help="print data instead of tables")
    one.add_argument("--markdown", action="store_true", help="print tables to paste into an issue")
    one.add_argument(
        "--clear-triton-cache", action="store_true", help="remove Triton's compiled kernels, after compilation errors"
    )
    parser.add_argument("--yes", action="store_true", help="with --clear-triton-cache: do not ask")
    parser.add_argument(
        "--probe", action="store_true", help="run every backend on every device, each in a process of its own"
    )
    parser.add_argument("--backends", default="", metavar="NAMES", help="with --probe: only these, comma separated")
    parser.add_argument(
        "--seconds", type=float, default=None, help=f"with --probe: limit of one backend (default {SECONDS:g})"
    )


def run(given: argparse.Namespace) -> int:
    """Print the report. Exit code 0 all well, 1 something is broken or slow, 2 what was asked for, 3 nothing works."""
    if given.clear_triton_cache:
        return triton_cache.clear(ask=not given.yes)
    if given.yes:
        return console.wrong_use("doctor", "--yes belongs to --clear-triton-cache")
    if not given.probe and (given.backends or given.seconds is not None):
        return console.wrong_use("doctor", "--backends and --seconds belong to --probe")
    if given.seconds is not None and not 0 < given.seconds < math.inf:
        return console.wrong_use("doctor", f"--seconds takes a time above 0, not {given.seconds:g}")
    try:
        names = doctor_probe.known_names(given.backends)
    except ValueError as error:
        return console.wrong_use("doctor", error)
    probed = None
    if given.probe:
        devices, _ = _attempt(doctor_machine.devices, [])
        probed = doctor_probe.run(devices, names, given.seconds or SECONDS)
    else:
        doctor_probe.spare_this_process(names)
    report = examine(probed)
    if given.json:
        console.print_json(report)
    elif given.markdown:
        print(markdown(report))
    else:
        show(report)
    return int(report["exit_code"])


def examine(probed: Probed | None = None) -> dict[str, Any]:
    """Return the whole report as data, without private paths; with a probe's outcomes where there was one."""
    from vllm_accel import __version__

    devices, lost = _attempt(doctor_machine.devices, [])
    device: Device | None = devices[0] if devices else None
    problems: list[Problem] = list(probed.problems()) if probed else []
    if lost is not None:
        problems.append(Problem(f"no device could be read: {lost}", "", SOMETHING_BROKEN))
    found, lost = _attempt(lambda: _backends(device, devices, probed), [])
    if lost is not None:
        problems.append(Problem(f"the backends could not be examined: {lost}", "", NOTHING_WORKS))
    examined: list[Examined] = found
    sections = {name: _section(build) for name, build in _builders(device, devices, examined, probed).items()}
    for find in (
        *(each.problems for each in examined),
        doctor_settings.problems,
        lambda: doctor_machine.problems(device),
        lambda: doctor_caches.problems(device),
    ):
        more, lost = _attempt(find, [])
        problems += more if lost is None else [Problem(f"a check failed: {lost}", "", SOMETHING_BROKEN)]
    problems = list(dict.fromkeys(problems))
    report = {
        "version": __version__,
        "exit_code": max((problem.exit_code for problem in problems), default=ALL_WELL),
        "problems": [{"problem": p.text, "fix": p.fix} for p in sorted(problems, key=lambda p: -p.exit_code)],
        "sections": sections,
    }
    hidden: dict[str, Any] = console.hide_all(report)
    return hidden


def _backends(device: Device | None, devices: list[Device], probed: Probed | None) -> list[Examined]:
    """Examine the default device; with a probe, one of each kind."""
    if probed is None:
        return [Examined.of(device)]
    kinds = doctor_probe.distinct(devices)
    return [
        Examined.of(d, probed.outcomes.get(d), f"{d.type}:{d.index}" if d.type == "cuda" else d.type) for d in kinds
    ]


def _builders(
    device: Device | None, devices: list[Device], examined: list[Examined], probed: Probed | None
) -> dict[str, Callable[[], list[Row]]]:
    return {
        "verdict": lambda: [row for each in examined for row in each.verdict_rows()],
        "device": lambda: doctor_machine.device_rows(devices),
        "requirements": lambda: doctor_machine.requirement_rows(device),
        "backends": lambda: [row for each in examined for row in each.backend_rows()],
        "known bad here": lambda: doctor_backends.known_bad_rows(device),
        "torch": lambda: doctor_machine.torch_rows(device),
        "system": doctor_machine.system_rows,
        "toolchain": lambda: doctor_machine.toolchain_rows(device),
        "caches": doctor_caches.cache_rows,
        "settings": doctor_settings.setting_rows,
        "other variables": doctor_settings.foreign_rows,
        "packages": doctor_settings.package_rows,
    }


def _attempt(build: Callable[[], Any], otherwise: Any) -> tuple[Any, str | None]:
    """Return what `build` returns, or `otherwise` and what went wrong; in a thread that is left behind if it hangs."""
    answer: list[tuple[Any, str | None]] = []

    def work() -> None:
        try:
            answer.append((build(), None))
        except BaseException as error:  # a report that dies of what it should diagnose is worthless
            answer.append((otherwise, f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECTION_SECONDS)
    return answer[0] if answer else (otherwise, f"no answer within {SECTION_SECONDS:g} s")


def _section(build: Callable[[], list[Row]]) -> list[Row]:
    rows, lost = _attempt(build, [])
    return [{"name": "this section", "value": "could not be made", "note": lost}] if lost is not None else rows


def markdown(report: dict[str, Any]) -> str:
    """Return a report for an issue: problems and verdict first, the rest folded away."""
    lines = [f"**vllm-accel {report['version']} doctor**, exit code {report['exit_code']}", ""]
    for problem in report["problems"]:
        lines += [f"- {problem['problem']}" + (f" **Fix:** {problem['fix']}" if problem["fix"] else "")]
    for title, rows in report["sections"].items():
        if not rows:
            continue
        columns = list(dict.fromkeys(key for row in rows for key in row))
        made = console.markdown_table(columns, [[row.get(c, "") for c in columns] for row in rows])
        if title in ("verdict", "device", "backends"):
            lines += ["", f"### {title}", "", made]
        else:
            lines += ["", f"<details><summary>{title}</summary>", "", made, "", "</details>"]
    return "\n".join(lines)


def show(report: dict[str, Any]) -> None:
    """Print a report for people: the verdict first, then what it rests on."""
    out = console.console()
    out.print(console.plain(f"vllm-accel {report['version']} doctor", "bold"))
    for problem in report["problems"]:
        out.print(console.plain(f"PROBLEM  {problem['problem']}", "bold red"))
        if problem["fix"]:
            out.print(console.plain(f"FIX      {problem['fix']}"))
    for title, rows in report["sections"].items():
        if not rows:
            continue
        columns = list(dict.fromkeys(key for row in rows for key in row))
        out.print(console.table(columns, [[row.get(c, "") for c in columns] for row in rows], title.upper()))
    out.print(console.plain(f"exit code {report['exit_code']}: {_EXIT_TEXT[report['exit_code']]}"))


_EXIT_TEXT = {
    ALL_WELL: "all well",
    SOMETHING_BROKEN: "works, but a setting or a package is broken, or it is slower than it could be",
    ASKED_FOR_BROKEN: "something that was asked for is broken",
    NOTHING_WORKS: "nothing works",
}
