"""`benchmarks/gpu_session.sh`: every step runs, none stops the next, each has its limit and its log."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_session.sh"
STEPS = re.findall(r"^step (\w+) (\d+) ", SCRIPT.read_text(), re.MULTILINE)


def session(folder: Path, python: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a program in the place of Python."""
    fake = folder / "python"
    fake.write_text(f"#!/bin/sh\n{python}\n")
    fake.chmod(0o755)
    command = ["bash", str(SCRIPT), str(folder / "out"), str(fake)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environ}
    )


def test_it_ends_within_ten_minutes() -> None:
    assert len(STEPS) > 8
    assert sum(int(seconds) for _, seconds in STEPS) < 600


def test_a_failing_step_stops_nothing_and_every_module_exists(tmp_path: Path) -> None:
    done = session(tmp_path, 'echo "ran $@"; [ "$2" != benchmarks.gpu_triton ]')
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in (tmp_path / "out" / "summary.tsv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == [name for name, _ in STEPS]
    assert {row[0]: row[2] for row in rows} == {name: "1" if name == "triton" else "0" for name, _ in STEPS}
    for name, _ in STEPS:
        log = (tmp_path / "out" / f"{name}.log").read_text()
        module = log.split()[2]
        assert importlib.util.find_spec(module) is not None, f"{name} starts {module}, which is not there"


def test_a_step_that_hangs_is_cut_off(tmp_path: Path) -> None:
    done = session(tmp_path, "sleep 30", STEPS="known_bad", PERCENT="1")
    assert done.returncode == 0
    assert "exit 124 (cut off)" in done.stdout
    name, seconds, code = (tmp_path / "out" / "summary.tsv").read_text().splitlines()[1].split("\t")
    assert (name, code) == ("known_bad", "124")
    assert int(seconds) < 20
