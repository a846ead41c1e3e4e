"""Examine this machine: what runs, what does not and why, and one thing to do about it; needs no GPU, never fails.

Every section is made on its own: what goes wrong in one becomes a line in the report. The report names no user and no
home directory, so it can be posted as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vllm_accel.cli import console, doctor_backends, doctor_machine, doctor_settings, triton_cache
from vllm_accel.cli.doctor_backends import Problem
from vllm_accel.dispatch.device import Device

#: What the exit code says.
ALL_WELL, SOMETHING_BROKEN, ASKED_FOR_BROKEN, NOTHING_WORKS = 0, 1, 2, 3

Row = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vllm-accel doctor``."""
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--json", action="store_true", help="print data instead of tables")
    one.add_argument(
        "--clear-triton-cache", action="store_true", help="remove Triton's compiled kernels, after compilation errors"
    )
    parser.add_argument("--yes", action="store_true", help="with --clear-triton-cache: do not ask")


def run(given: argparse.Namespace) -> int:
    """Print the report. Exit code 0 all well, 1 something is broken, 2 what was asked for is, 3 nothing works."""
    if given.clear_triton_cache:
        return triton_cache.clear(ask=not given.yes)
    if given.yes:
        return console.wrong_use("doctor", "--yes belongs to --clear-triton-cache")
    report = examine()
    if given.json:
        console.print_json(report)
    else:
        show(report)
    return int(report["exit_code"])


def examine() -> dict[str, Any]:
    """Return the whole report as data, without private paths."""
    from vllm_accel import __version__

    devices, lost = _attempt(doctor_machine.devices, [])
    device: Device | None = devices[0] if devices else None
    problems: list[Problem] = []
    if lost is not None:
        problems.append(Problem(f"no device could be read: {lost}", "", SOMETHING_BROKEN))
    examined, lost = _attempt(lambda: doctor_backends.Examined.of(device), None)
    if lost is not None:
        problems.append(Problem(f"the backends could not be examined: {lost}", "", NOTHING_WORKS))
    builders: dict[str, Callable[[], list[Row]]] = {
        "verdict": lambda: examined.verdict_rows() if examined else [],
        "device": lambda: doctor_machine.device_rows(devices),
        "requirements": lambda: doctor_machine.requirement_rows(device),
        "backends": lambda: examined.backend_rows() if examined else [],
        "torch": lambda: doctor_machine.torch_rows(device),
        "system": doctor_machine.system_rows,
        "toolchain": lambda: doctor_machine.toolchain_rows(device),
        "settings": doctor_settings.setting_rows,
        "other variables": doctor_settings.foreign_rows,
        "packages": doctor_settings.package_rows,
    }
    sections = {name: _section(build) for name, build in builders.items()}
    finders = [doctor_settings.problems, lambda: doctor_machine.problems(device)]
    if examined is not None:
        finders.insert(0, examined.problems)
    for find in finders:
        found, lost = _attempt(find, [])
        problems += found if lost is None else [Problem(f"a check failed: {lost}", "", SOMETHING_BROKEN)]
    report = {
        "version": __version__,
        "exit_code": max((problem.exit_code for problem in problems), default=ALL_WELL),
        "problems": [{"problem": p.text, "fix": p.fix} for p in sorted(problems, key=lambda p: -p.exit_code)],
        "sections": sections,
    }
    hidden: dict[str, Any] = console.hide_all(report)
    return hidden


def _attempt(build: Callable[[], Any], otherwise: Any) -> tuple[Any, str | None]:
    """Return what `build` returns, or `otherwise` and what went wrong."""
    try:
        return build(), None
    except Exception as error:  # a report that dies of what it should diagnose is worthless
        return otherwise, f"{type(error).__name__}: {error}"


def _section(build: Callable[[], list[Row]]) -> list[Row]:
    rows, lost = _attempt(build, [])
    return [{"name": "this section", "value": "could not be made", "note": lost}] if lost is not None else rows


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
    SOMETHING_BROKEN: "works, but a setting or a package is broken",
    ASKED_FOR_BROKEN: "something that was asked for is broken",
    NOTHING_WORKS: "nothing works",
}
