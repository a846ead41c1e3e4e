"""tests/run.py and the rule of tests/conftest.py: which process runs which tests, and what they return together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from run import BEHIND, combined

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("codes", "worst"),
    [((0, 0), 0), ((0, 5), 0), ((5, 0), 0), ((5, 5), 5), ((1, 0), 1), ((5, 1), 1), ((2, 1), 2), ((0, -11), 11)],
)
def test_the_exit_codes_of_two_processes(codes: tuple[int, int], worst: int) -> None:
    assert combined(*codes) == worst


PLAIN, INTERPRETED, COMPILED = (
    "tests/test_run.py", "tests/interpreted/test_patches.py", "tests/test_grouped_gemm_compile.py",
)  # fmt: skip


def collected(interpret: str | None, group: str | None, *arguments: str) -> set[str]:
    """Return the files of which pytest collects tests."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TEST_GROUP")}
    env |= {name: x for name, x in (("TRITON_INTERPRET", interpret), ("TEST_GROUP", group)) if x is not None}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    told = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    return {line.split("::")[0] for line in told.stdout.splitlines() if "::" in line}


@pytest.mark.parametrize(
    ("interpret", "group", "arguments", "files"),
    [
        ("1", None, (PLAIN, INTERPRETED, COMPILED), {INTERPRETED}),
        (None, None, (INTERPRETED,), {INTERPRETED}),  # named alone, it needs no variable
        (None, None, (PLAIN, INTERPRETED, COMPILED), {PLAIN, COMPILED}),
        ("0", "others", (PLAIN, INTERPRETED, COMPILED), {PLAIN}),
        ("0", "compiled", (PLAIN, INTERPRETED, COMPILED), {COMPILED}),
    ],
)
def test_each_process_collects_its_own(
    interpret: str | None, group: str | None, arguments: tuple[str, ...], files: set[str]
) -> None:
    pytest.importorskip("triton")
    assert collected(interpret, group, *arguments) == files


def test_every_group_reports() -> None:
    """Run the program: the arguments reach all processes, and all report."""
    arguments = ["-q", PLAIN, INTERPRETED, COMPILED, "-k", "exit_codes or every_patch or no_such_test"]
    told = subprocess.run(
        [sys.executable, "tests/run.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert told.returncode == 0, told.stdout
    others, _, behind = told.stdout.partition(BEHIND["compiled"])
    compiled, _, interpreted = behind.partition(BEHIND["interpreted"])
    assert "8 passed" in others
    assert "deselected" in compiled
    assert "1 passed" in interpreted
