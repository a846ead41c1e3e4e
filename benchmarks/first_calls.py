"""``python -m benchmarks.first_calls``: what the first call of a kind costs, with nothing compiled and from the disk.

Each backend and shape runs in two processes of their own over one compile cache that starts empty: the first one
compiles, the second one finds the kernels on disk. The time is that of the first call (its imports and its compilation;
CUDA has started before) less that of the second one, for gradients forward and backward together. SPEC 4.8 asks for it:
what compiles for more than two seconds is not taken before `warmup`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.shapes import GPU_SHAPES, Shape, named
from vllm_accel.tuning.attention import attend

SHAPES = (
    "prefill_1k_causal,prefill_d64_4k_full,prefill_d256,prefill_mla,varlen_mix,chunk_512,decode_b32_4k,decode_b1_4k,"
    "paged16_b32_4k,paged64_b1_16k,train_4k_causal"
)


def first_call(backend: str, shape: Shape) -> float:
    """Return the seconds of the first call beyond those of the second one, in this process."""
    device = torch.device("cuda")
    inputs = shape.make(torch.bfloat16, device)
    call = attend(shape, backend)

    def once() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = call(inputs)
        if shape.kind == "train":
            torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    torch.ones(8, device=device).add_(1)
    first = once()
    return first - once()


def _in_processes(backend: str, shape: Shape, limit: float) -> dict[str, Any]:
    """Return the seconds of a process that compiles and of one that finds the kernels, or the error."""
    found: dict[str, Any] = {"backend": backend, "shape": shape.name}
    with tempfile.TemporaryDirectory() as cache:
        for when in ("compiled", "on_disk"):
            command = [sys.executable, "-m", "benchmarks.first_calls", "--one", backend, shape.name]
            environment = {**os.environ, "TRITON_CACHE_DIR": cache}
            try:
                run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
            except subprocess.TimeoutExpired:
                return {**found, "error": f"killed after {limit:.0f} s"}
            if run.returncode:
                return {**found, "error": " ".join(run.stderr.split())[-300:]}
            found[when] = json.loads(run.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 where nothing could be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_calls", description=__doc__)
    parser.add_argument("--backends", default="triton,gluon_hopper", help="names, separated by commas")
    parser.add_argument("--shapes", default=SHAPES, help="words of names of `benchmarks.shapes`")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; more than one disturb each other")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of one process")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "SHAPE"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.one:
        backend, name = given.one
        print(first_call(backend, next(shape for shape in GPU_SHAPES if shape.name == name)))
        return 0
    try:
        cases = [(b, shape) for shape in named(GPU_SHAPES, given.shapes) for b in given.backends.split(",")]
    except ValueError as error:
        parser.error(str(error))
    about = machine.about("benchmarks.first_calls", machine.device(parser, "cuda"))
    rows = []
    with ThreadPoolExecutor(given.jobs) as pool:
        for row in pool.map(lambda case: _in_processes(case[0], case[1], given.limit), cases):
            rows.append(row)
            text = row.get("error") or f"{row['compiled']:6.2f} s, {row['on_disk']:6.2f} s from disk"
            print(f"{row['backend']:14} {row['shape']:24} {text}", flush=True)
            if given.json:
                data = {"about": about, "jobs": given.jobs, "results": rows}
                given.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0 if any("compiled" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
