"""tests/run.py and the rule of tests/conftest.py: which process runs which tests, and what the two return."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from run import combined

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("codes", "both"),
    [((0, 0), 0), ((0, 5), 0), ((5, 0), 0), ((5, 5), 5), ((1, 0), 1), ((5, 1), 1), ((2, 1), 2), ((0, -11), 11)],
)
def test_the_exit_codes_of_two_processes(codes: tuple[int, int], both: int) -> None:
    assert combined(*codes) == both


PLAIN, INTERPRETED = "tests/test_run.py", "tests/interpreted/test_patches.py"


def collected(interpret: str | None, *arguments: str) -> set[str]:
    """Return the files of which pytest collects tests."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret is not None:
        env["TRITON_INTERPRET"] = interpret
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    told = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    return {line.split("::")[0] for line in told.stdout.splitlines() if "::" in line}


@pytest.mark.parametrize(
    ("interpret", "arguments", "files"),
    [
        ("0", (PLAIN, INTERPRETED), {PLAIN}),
        ("1", (PLAIN, INTERPRETED), {INTERPRETED}),
        (None, (INTERPRETED,), {INTERPRETED}),  # named alone, it needs no variable
        (None, (PLAIN, INTERPRETED), {PLAIN}),
    ],
)
def test_each_process_collects_its_own(interpret: str | None, arguments: tuple[str, ...], files: set[str]) -> None:
    pytest.importorskip("triton")
    assert collected(interpret, *arguments) == files


def test_both_processes_report() -> None:
    """Run the program: the arguments reach both processes, and both report."""
    command = [sys.executable, "tests/run.py", "-q", PLAIN, INTERPRETED, "-k", "exit_codes or every_patch"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert told.returncode == 0, told.stdout
    plain, _, interpreted = told.stdout.partition("Triton kernels, interpreted (TRITON_INTERPRET=1):")
    assert "8 passed" in plain
    assert "1 passed" in interpreted
