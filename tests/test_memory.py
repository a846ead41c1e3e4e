"""Automatic choice takes O(Sq + Sk) memory: peak resident memory of child processes as the sequence doubles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import CASES, LENGTHS
from host import FIRST_ON_CPU, FIRST_WITH_SOFTCAP

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of a process")

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20

#: The backward's peak includes its forward; the others show that a forward alone takes no more.
QUICK = (
    "causal_bf16", "key_mask", "gqa",
    "causal_backward", "key_mask_backward", "causal_key_mask_backward", "gqa_backward", "softcap_backward",
)  # fmt: skip
SLOW = tuple(case.name for case in CASES if case.name not in QUICK)


def _measure(names: tuple[str, ...], path: Path) -> dict[str, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "benchmarks.memory", "--jobs", "2", "--json", str(path), "--cases"]
    done = subprocess.run([*command, ",".join(names)], cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(path.read_text())["measured"]:
        found.setdefault(row["case"], []).append(row)
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return _measure(QUICK, tmp_path_factory.mktemp("memory") / "quick.json")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return _measure(SLOW, tmp_path_factory.mktemp("memory") / "slow.json")


def _assert_linear(rows: list[dict[str, Any]]) -> None:
    assert [row["seqlen"] for row in rows] == list(LENGTHS)
    taken = {row["seqlen"]: row["extra"] for row in rows}
    # At least the output; less means that the measurement missed the call.
    assert all(extra >= n * 64 * 2 * 0.5 for n, extra in taken.items()), taken
    for n in LENGTHS[:-1]:
        # Linux counts pages in batches of 64 per thread, hence the constant.
        assert taken[2 * n] <= 2.3 * taken[n] + MIB, taken
    # Where a constant hides the growth: even a mask of one byte per score would add 3 * n * n here.
    assert taken[2 * n] - taken[n] < n * n, taken


@pytest.mark.parametrize("name", QUICK)
def test_memory_is_linear(name: str, quick: dict[str, list[dict[str, Any]]]) -> None:
    _assert_linear(quick[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_memory_is_linear_in_every_case(name: str, slow: dict[str, list[dict[str, Any]]]) -> None:
    _assert_linear(slow[name])


def test_the_cases_reach_both_cpu_backends(quick: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: rows[0]["backend"] for name, rows in quick.items()} == {
        name: FIRST_WITH_SOFTCAP if name.startswith("softcap") else FIRST_ON_CPU for name in QUICK
    }


QUADRATIC = """
import types
import torch
from benchmarks import memory

def attend(q, k, v, **options):
    return (torch.softmax(q[0, :, 0] @ k[0, :, 0].mT, -1) @ v[0, :, 0])[None, :, None]

memory.attention = attend
memory.explain = lambda *args, **options: types.SimpleNamespace(chosen="dense")
print([m.extra for m in memory.measure([(memory.CASES[0], n) for n in (1024, 2048, 4096)])])
"""


def test_the_measurement_sees_quadratic_memory() -> None:
    done = subprocess.run([sys.executable, "-c", QUADRATIC], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    small, middle, large = json.loads(done.stdout)
    # One matrix of fp32 scores and its softmax: 2 * 4 * n * n bytes.
    assert large == pytest.approx(8 * 4096**2, rel=0.1)
    assert large > 3 * middle > 6 * small
