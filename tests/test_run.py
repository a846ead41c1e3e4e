"""tests/run.py and the rule of tests/conftest.py: which process runs which tests, and what they return together."""

from __future__ import annotations

import os
import shutil
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


PLAIN, INTERPRETED, COMPILED = "tests/test_plain.py", "tests/interpreted/test_patches.py", "tests/test_x_compile.py"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project's rules with a test of each group that imports nothing: what is asked is where a file belongs."""
    root = tmp_path_factory.mktemp("tree")
    for path in (PLAIN, INTERPRETED, COMPILED):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        name = Path(path).stem
        (root / path).write_text(
            f"import os\n\n\ndef {name}():\n    print('interprets', os.environ['TRITON_INTERPRET'])\n"
        )
    # What the fixture for all tests touches, without torch.
    for path, text in (("kernels/triton/tiles", "def user_directory(): ..."), ("dispatch/measured", "_SHIPPED = None")):
        file = root / "vllm_accel" / f"{path}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    for path in ("tests/conftest.py", "tests/run.py", "pyproject.toml"):
        shutil.copy(ROOT / path, root / path)
    return root


def program(tree: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the small tree."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TEST_GROUP")}
    env |= {"PYTHONPATH": str(tree), **environ}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("environ", "arguments", "files"),
    [
        ({"TRITON_INTERPRET": "1"}, (), {INTERPRETED}),
        ({"TRITON_INTERPRET": "1"}, (PLAIN, INTERPRETED, COMPILED), {INTERPRETED}),
        ({}, (INTERPRETED,), {INTERPRETED}),  # named alone, it needs no variable
        ({}, (PLAIN, INTERPRETED, COMPILED), {PLAIN, COMPILED}),
        ({"TRITON_INTERPRET": "0", "TEST_GROUP": "others"}, (), {PLAIN}),
        ({"TRITON_INTERPRET": "0", "TEST_GROUP": "others"}, (PLAIN, INTERPRETED, COMPILED), {PLAIN}),
        ({"TRITON_INTERPRET": "0", "TEST_GROUP": "compiled"}, (), {COMPILED}),
    ],
)
def test_each_process_collects_its_own(
    tree: Path, environ: dict[str, str], arguments: tuple[str, ...], files: set[str]
) -> None:
    told = program(tree, "-m", "pytest", "--collect-only", "-q", *(arguments or ("tests",)), **environ)
    assert {line.split("::")[0] for line in told.stdout.splitlines() if "::" in line} == files, told.stdout


def test_every_group_reports(tree: Path) -> None:
    """Run the program: the arguments reach all processes, each has its variable, and all report."""
    told = program(tree, "tests/run.py", "-q", "-s", "-k", "plain or patches or no_such_test")
    assert told.returncode == 0, told.stdout + told.stderr
    others, _, behind = told.stdout.partition(BEHIND["compiled"])
    compiled, _, interpreted = behind.partition(BEHIND["interpreted"])
    assert "1 passed" in others and "interprets 0" in others
    assert "1 deselected" in compiled
    assert "1 passed" in interpreted and "interprets 1" in interpreted


def test_the_groups_are_of_real_files() -> None:
    """What the small tree stands for: both directories, and the names by which a file is of the compiled ones."""
    assert list((ROOT / "tests" / "interpreted").glob("test_*.py")) and list((ROOT / "tests").glob("test_*_compile.py"))
