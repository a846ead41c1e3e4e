"""`benchmarks/gpu_session.sh` and `cpu_session.sh`: every step runs with a limit and a log, none stops the next."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine

FOLDER = Path(__file__).parent.parent / "benchmarks"
STEPS = {
    name: re.findall(r"^step (\w+) (\d+) (.*)$", (FOLDER / f"{name}_session.sh").read_text(), re.MULTILINE)
    for name in ("gpu", "cpu")
}
#: Seconds in all: of a lent GPU; and what the quiet of a machine can be had for.
LIMITS = {"gpu": 600, "cpu": 1300}


def session(name: str, folder: Path, python: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a script with a program in the place of Python."""
    fake = folder / "python"
    fake.write_text(f"#!/bin/sh\n{python}\n")
    fake.chmod(0o755)
    command = ["bash", str(FOLDER / f"{name}_session.sh"), str(folder / "out"), str(fake)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environ}
    )


@pytest.mark.parametrize("name", STEPS)
def test_it_ends_in_time(name: str) -> None:
    assert len(STEPS[name]) > 8
    assert sum(int(seconds) for _, seconds, _ in STEPS[name]) < LIMITS[name]
    assert name == "gpu" or all(int(seconds) < 180 for _, seconds, _ in STEPS[name])


@pytest.mark.parametrize(("name", "failing", "step"), [
    ("gpu", "benchmarks.gpu_triton", "triton"), ("cpu", "benchmarks.generate", "generate"),
])  # fmt: skip
def test_a_failing_step_stops_nothing_and_every_module_exists(
    name: str, failing: str, step: str, tmp_path: Path
) -> None:
    done = session(name, tmp_path, f'echo "ran $@"; [ "$2" != {failing} ]')
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in (tmp_path / "out" / "summary.tsv").read_text().splitlines()[1:]]
    names = [found for found, _, _ in STEPS[name]]
    assert {row[0]: row[2] for row in rows} == {found: "1" if found == step else "0" for found in names}
    assert [row[0] for row in rows] == names
    for found in names:
        log = (tmp_path / "out" / f"{found}.log").read_text()
        module = log.split()[2]
        assert importlib.util.find_spec(module) is not None, f"{found} starts {module}, which is not there"


@pytest.mark.parametrize("name", STEPS)
def test_every_option_of_a_step_exists(name: str) -> None:
    """A misspelt option would be found when the machine is lent, or quiet, and the time is spent."""
    for step, _, command in STEPS[name]:
        module, options = command.split()[2], re.findall(r"--[a-z-]+", command)
        source = importlib.util.find_spec(module if module != "vllm_accel.cli" else f"{module}.{command.split()[3]}")
        assert source is not None and source.origin is not None
        path = Path(source.origin)
        text = (path.with_name("__main__.py") if path.name == "__init__.py" else path).read_text()
        for option in options:
            assert f'"{option}"' in text, f"{step}: {module} has no {option}"


def test_a_step_that_hangs_is_cut_off(tmp_path: Path) -> None:
    done = session("gpu", tmp_path, "sleep 30", STEPS="known_bad", PERCENT="1")
    assert done.returncode == 0
    assert "exit 124 (cut off)" in done.stdout
    name, seconds, code = (tmp_path / "out" / "summary.tsv").read_text().splitlines()[1].split("\t")
    assert (name, code) == ("known_bad", "124")
    assert int(seconds) < 20


def test_a_recorded_command_names_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--json", "/home/jane/out/lengths.json", "--budget", "25", "a/b.json"])
    assert (
        machine.command("benchmarks.lengths") == "python -m benchmarks.lengths --json lengths.json --budget 25 a/b.json"
    )
