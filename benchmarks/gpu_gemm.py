"""Check our grouped products on a GPU and time their tiles: ``python -m benchmarks.gpu_gemm --out DIR``.

First every option on small products against float64, in several processes that compile side by side; then the shapes
of Mixtral and DeepSeek-V3 with a few tiles each, beside PyTorch's own. Whatever fails is written down and the rest goes
on; DIR/gemm.json is rewritten after each step.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_gemm_engines as engines
from benchmarks import machine
from benchmarks.gpu_gemm_cases import CASES, TIMED
from benchmarks.workers import Done, Task, run_all

WORKERS = 12
#: Of the budget, for checks and for compiling what will be timed.
CHECKS = 0.6


class Run:
    """What was found so far, and where it is written."""

    def __init__(self, out: Path, budget: float) -> None:
        self.path, self.begin, self.budget = out / "gemm.json", time.monotonic(), budget
        out.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = {
            "about": machine.about("benchmarks.gpu_gemm", torch.device("cuda")), "checks": [], "timed": []
        }  # fmt: skip

    def until(self, share: float) -> float:
        """Return when a share of the budget will be spent, by `time.monotonic`."""
        return self.begin + share * self.budget

    def write(self) -> None:
        """Write everything found so far."""
        self.path.write_text(json.dumps(self.found, indent=1, default=str), encoding="utf-8")


def prepare_cutlass(carried: Path | None) -> bool:
    """Make the CUTLASS kernels ready: those of a directory, or built by nvcc; tell whether there are any."""
    from vllm_accel.kernels.cutlass import build

    if carried is not None:
        os.environ[engines.LIBRARIES] = str(carried.resolve())
        return any(carried.glob("*.so"))
    if missing := build.problems():
        print("no CUTLASS:", "; ".join(missing), flush=True)
        return False
    failed = build.build(build.variants(engines.gpu()[0]))
    for variant, text in failed.items():
        print(f"CUTLASS: {variant} failed: {text[-400:]}", flush=True)
    return True


def check_and_compile(run: Run, cutlass: bool) -> None:
    """Run every check, and compile what will be timed without a product's memory, side by side."""
    checks = {
        name: [Task(f"{name}: {case}", engines.check, (name, case)) for case in CASES]
        for name in engines.engines()
        if cutlass or name != "cutlass"
    }
    compiles = [
        Task(f"{timed.name} {tile}", engines.warm, (timed.case, tile)) for timed in TIMED for tile in timed.tiles
    ]
    tasks = [
        *checks.pop("triton"),
        *checks.pop("cutlass", ()),
        *compiles,
        *(task for rest in checks.values() for task in rest),
    ]

    def report(done: Done) -> None:
        if done.task.call is engines.warm:
            if text := done.error or done.value:
                print(f"not compiled: {done.task.name}: {text}", flush=True)
            return
        found = done.value or {"case": done.task.name, "ok": False, "failure": done.error}
        run.found["checks"].append(found)
        if not found["ok"]:
            print("WRONG", found, flush=True)

    run_all(tasks, WORKERS, run.until(CHECKS), report)
    ran = [found for found in run.found["checks"] if "refused" not in found]
    print(f"{sum(found['ok'] for found in ran)} of {len(ran)} checks are right", flush=True)
    run.write()


def time_all(run: Run) -> None:
    """Time the shapes one after another, the most important first, in a process that may be lost.

    CUTLASS takes part if its checks were all right: a fault would end the process, and every time of the shape with it.
    """
    found = [check for check in run.found["checks"] if "cutlass" in str(check.get("engine", check["case"]))]
    cutlass = bool(found) and all(check["ok"] for check in found)

    def report(done: Done) -> None:
        found = done.value or {"name": done.task.name, "failure": done.error}
        run.found["timed"].append(found)
        print(done.task.name, json.dumps(found.get("us", found)), json.dumps(found.get("refused", {})), flush=True)
        run.write()

    run_all([Task(timed.name, engines.contest, (timed, cutlass)) for timed in TIMED], 1, run.until(1), report)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then time, within the budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_gemm", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for gemm.json")
    parser.add_argument("--budget", type=float, default=180.0, help="seconds in all (180)")
    parser.add_argument("--cutlass", type=Path, help="directory of prebuilt libraries; else nvcc builds them first")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and run nothing")
    asked = parser.parse_args(argv)
    if asked.dry_run:
        for name in engines.engines():
            print(f"check {name}: {len(CASES)} products")
        for timed in TIMED:
            print(f"time {timed.name}: {timed.case}, tiles {[list(tile) for tile in timed.tiles]}")
        return 0
    if not torch.cuda.is_available():
        parser.error("this needs a GPU; --dry-run lists what it would do")
    run = Run(asked.out, asked.budget)
    check_and_compile(run, prepare_cutlass(asked.cutlass))
    time_all(run)
    return 0 if all(found["ok"] for found in run.found["checks"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
