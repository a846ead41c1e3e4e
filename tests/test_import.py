"""Importing the library is cheap: torch and nothing heavier, no CUDA context."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: Both imports in one process, so that neither a busy machine nor a cold disk favours one of them.
IMPORTS = """
import json, sys, time
start = time.process_time()
import torch
torch_done, before = time.process_time(), set(sys.modules)
import vllm_accel
done = time.process_time()
print(json.dumps({
    "torch": torch_done - start,
    "ours": done - torch_done,
    "added": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
    "file": vllm_accel.__file__,
}))
"""
HEAVY = {
    "triton", "flash_attn", "flash_attn_interface", "flash_attn_3", "xformers", "mslk", "flashinfer", "transformers",
    "diffusers", "matplotlib", "rich", "numpy", "scipy", "pandas",
}  # fmt: skip


def _import() -> dict[str, Any]:
    # As installed: with compiled modules, which the first import writes.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@functools.cache
def _first() -> dict[str, Any]:
    return _import()


def test_imports_nothing_heavy() -> None:
    added = _first()["added"]
    assert not {name for name in added if name.partition(".")[0] in HEAVY}
    # torch's compiler takes seconds to import; only a compiled call needs it.
    assert not {
        name for name in added if name.startswith(("torch._dynamo", "torch._inductor", "torch.fx.experimental"))
    }


def test_imports_no_adapter_and_no_tool() -> None:
    own = {name for name in _first()["added"] if name.startswith("vllm_accel")}
    lazy = (
        "vllm_accel.backends.",
        "vllm_accel.cli",
        "vllm_accel.integrations.",
        "vllm_accel.testing",
        "vllm_accel.kernels",
        "vllm_accel.dispatch.table_file",  # and with it all that reads measured times
    )
    assert not {name for name in own if name.startswith(lazy)}
    assert Path(_first()["file"]).is_relative_to(ROOT)


def test_starts_no_cuda_context() -> None:
    assert _first()["cuda"] is False


def test_adds_at_most_five_percent_to_the_import_of_torch() -> None:
    _first()
    shares: list[float] = []
    # Two of at most five: processor time only ever grows by what else the machine does.
    while len(shares) < 5 and sum(share <= 0.05 for share in shares) < 2:
        found = _import()
        shares.append(found["ours"] / found["torch"])
    assert sum(share <= 0.05 for share in shares) == 2, shares
