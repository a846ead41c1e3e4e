"""The example package under examples/, installed and used as its author would: entry point, refusals, conformance."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from host import FIRST_ON_CPU

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "third_party_backend"

BROKEN = {
    "vllm_accel_broken.py": "raise OSError('undefined symbol: _ZN3foo')\n",
    "vllm_accel_broken-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm-accel-broken\nVersion: 1.0\n",
    "vllm_accel_broken-1.0.dist-info/entry_points.txt": (
        "[vllm_accel.backends]\nattention.broken = vllm_accel_broken:BACKEND\n"
    ),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example with pip into a folder of its own, and beside it a package that does not import."""
    base = tmp_path_factory.mktemp("example")
    source, site = base / "source", base / "site"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(site), str(source)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for name, text in BROKEN.items():
        path = site / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return site


def run(site: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=site, env=env, capture_output=True, text=True, timeout=240
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


USE = """
import dataclasses, json, logging
import torch
import vllm_accel
from vllm_accel import UnsupportedCallError, attention, attention_varlen, explain, register_backend
from vllm_accel.testing import CASES, check_backend

listed = vllm_accel.backends()
q, k, v = (torch.randn(2, 9, h, 16) for h in (4, 2, 2))
found = explain(attention, q, k, v, causal=True)
error = (attention(q, k, v, causal=True, backend="dense") - attention(q, k, v, causal=True)).abs().max().item()
try:
    attention(q, k, v, backend="broken")
    broken = ""
except vllm_accel.BackendUnavailableError as refusal:
    broken = str(refusal)

import vllm_accel_dense
from vllm_accel.dispatch import registry

assert registry.get("attention", "dense") is vllm_accel_dense.BACKEND
cases = {}
for case in CASES:
    outcome = check_backend(vllm_accel_dense.BACKEND, case)
    inputs = case.make(torch.float32)
    call = attention_varlen if case.varlen else attention
    for leaf in inputs.leaves():
        leaf.requires_grad_(case.grad)
    try:
        call(inputs.q, inputs.k, inputs.v, backend="dense", **inputs.options)
        forced = None
    except UnsupportedCallError as refusal:
        forced = [reason.text for reason in refusal.reasons["dense"]]
    shown = explain(call, inputs.q, inputs.k, inputs.v, backend="dense", **inputs.options)["dense"].reasons
    cases[case.name] = [outcome.ran, [r.text for r in outcome.reasons], forced, [r.text for r in shown]]

class Local(vllm_accel_dense.DenseBackend):
    name = "local"
    capability = dataclasses.replace(vllm_accel_dense.DenseBackend.capability, linear_memory=True)

register_backend("attention", Local())
last = [explain(attention, q, k, v, **options).chosen for options in ({}, {"softcap": 2.0})]
register_backend("attention", Local(), before="cpu")
first = [explain(attention, q, k, v, **options).chosen for options in ({}, {"softcap": 2.0})]
ran = torch.equal(attention(q, k, v), attention(q, k, v, backend="dense"))
print(json.dumps({
    "listed": listed, "chosen": found.chosen, "state": found["dense"].state.name,
    "version": found["dense"].version, "reasons": [[r.code, r.text] for r in found["dense"].reasons],
    "printed": str(found), "error": error, "broken": [found["broken"].state.name, broken], "cases": cases,
    "last": last, "first": first, "ran": ran,
}))
"""


@pytest.fixture(scope="module")
def seen(installed: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(installed, "-c", USE).splitlines()[-1])
    return found


def test_it_is_found_through_its_entry_point(seen: dict[str, Any]) -> None:
    assert "dense" in seen["listed"]
    assert seen["version"] == "1.0"


def test_automatic_choice_passes_over_it_because_of_its_memory(seen: dict[str, Any]) -> None:
    assert (seen["chosen"], seen["state"]) == (FIRST_ON_CPU, "HELD_BACK")
    ((code, text),) = seen["reasons"]
    assert code == "memory" and "O(Sq*Sk)" in text
    assert f"could run, not chosen automatically: {text}" in seen["printed"]
    assert f"could run, not chosen automatically: {text}" in (EXAMPLE / "README.md").read_text()


def test_it_runs_by_name(seen: dict[str, Any]) -> None:
    assert seen["error"] < 1e-5


def test_every_conformance_case_is_right_or_refused_for_the_reason_that_explain_gives(seen: dict[str, Any]) -> None:
    for name, (ran, reasons, forced, shown) in seen["cases"].items():
        assert ran == (not reasons) == (forced is None), name
        # The kit asks without gradients first, so a refusal there has no reasons about them.
        assert set(reasons) <= set(forced or []), name
        assert (forced or []) == shown, name
    ran = {name for name, case in seen["cases"].items() if case[0]}
    assert {"causal_longer", "window_empty_rows", "softcap", "gqa", "mask_full", "value_dim_larger"} <= ran
    assert not {"varlen", "alibi", "sinks", "descale"} & ran


def test_a_package_that_does_not_import_is_a_reason_and_not_a_crash(seen: dict[str, Any]) -> None:
    state, message = seen["broken"]
    assert state == "UNAVAILABLE" and "undefined symbol: _ZN3foo" in message


def test_registration_at_run_time_says_where_it_stands(seen: dict[str, Any]) -> None:
    # Just before the reference, which has softcap, and after what is compiled and has it too.
    assert seen["last"] == [FIRST_ON_CPU, "cpu" if FIRST_ON_CPU == "cpu" else "local"]
    assert seen["first"] == ["local", "local"]
    assert seen["ran"]


def test_the_conformance_command_takes_it(installed: Path) -> None:
    out = run(installed, "-m", "vllm_accel.testing", "--backends", "dense", "--dtypes", "bf16", "--where", "cpu")
    assert re.search(r"dense 1\.0 bf16: \d+ ran, \d+ refused, 0 failed", out)


def test_the_readme_says_what_works(installed: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    use, conformance, register = blocks
    assert "sinks" in run(installed, "-c", use + conformance.replace("import torch\n", ""))
    prepared = "from vllm_accel_dense import DenseBackend\nclass MyBackend(DenseBackend):\n    name = 'mine'\n"
    run(installed, "-c", prepared + register + "from vllm_accel import backends\nassert 'mine' in backends()\n")
