"""What compute-sanitizer has to say about our Triton and Gluon kernels: memcheck on all, racecheck on the Gluon ones.

Cases are tiny. Kernels that are made for long calls are told of few multiprocessors (``gluon_hopper@3``), so that a
block of threads takes several tiles, and a team of a decode several sequences, all the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks import gpu_triton_tasks as work

_TURNS = tuple(case.name for case in (*work.TURN_CASES, *work.PART_CASES))
#: Tool, and what it watches: ``backend[@multiprocessors]:cases``, those of a paged cache as ``paged_name``; each entry
#: is a process. Most telling first. Gradients are included where a case has them.
CHECKS: tuple[tuple[str, str], ...] = (
    *[("racecheck", f"gluon_hopper@3:{case}") for case in _TURNS],
    *[("memcheck", f"gluon_hopper@3:{case}") for case in _TURNS],
    ("memcheck", "triton:paged_stream_few,paged_stream_few_d128"),
    ("memcheck", "triton@4:paged_stream_many,paged_stream_many_fp8,packed_stream"),
    ("memcheck", "triton:shared_chunk,paged_shared_chunk,long_decode_d128"),
    ("memcheck", "triton:gqa,window_causal,varlen_tail,bias_grad,sinks"),
    ("memcheck", "triton:paged_mixed,paged_fp8_scalar,paged_mla_small"),
    ("memcheck", "gluon_hopper:gqa,head_128,varlen_cross_causal,varlen_tail,head_256"),
    *[("racecheck", f"gluon_hopper:{case}") for case in ("gqa", "head_128", "varlen_cross_causal", "varlen_tail")],
)
LIMIT = 75.0  # seconds of one process
_LEAST = 15.0  # with fewer left none is started


def not_run() -> list[dict[str, Any]]:
    """Return a row for each of `CHECKS`."""
    return [{"name": f"{check} {which}", "outcome": "not run"} for check, which in CHECKS]


def watch(rows: list[dict[str, Any]], jobs: int, end: float, report: Callable[[dict[str, Any]], None]) -> None:
    """Run `CHECKS`, so many at a time, and fill in their rows.

    Args:
        end: of `time.monotonic`: nothing runs beyond. report: called with each row that is filled in.
    """
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    with ThreadPoolExecutor(min(jobs, len(CHECKS))) as pool:
        row_of = {pool.submit(_sanitize, tool, *given, end): row for row, given in zip(rows, CHECKS, strict=True)}
        for done in as_completed(row_of):
            row = row_of[done]
            row |= done.result()
            report(row)


def _sanitize(tool: str, check: str, which: str, end: float) -> dict[str, Any]:
    """Run cases under the sanitizer for `LIMIT` seconds at most, and not beyond `end` of `time.monotonic`."""
    start = time.monotonic()
    limit = min(LIMIT, end - start)
    if not Path(tool).exists():
        return {"outcome": "compute-sanitizer is not installed"}
    if limit < _LEAST:
        return {"outcome": "no time left"}
    mine = [sys.executable, "-m", "benchmarks.gpu_triton", "--tiny", which]
    command = [tool, "--tool", check, "--error-exitcode", "9", *mine]
    # Without torch's pool an access past a tensor's end leaves its allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=environment)
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else str(error.stdout or "")
        return {"outcome": f"stopped after {limit:.0f} s", "races": races(text), "detail": text[-3000:]}
    text = done.stdout + done.stderr
    outcome = {0: "clean", 9: "errors"}.get(done.returncode, f"exit status {done.returncode}")
    # A case that is refused or wrong is no error of the tool's, but nothing that it has watched either.
    if done.returncode == 0 and text.count("'outcome': 'ran'") != len(which.partition(":")[2].split(",")):
        outcome = "clean, but not every case ran and was right"
    seconds = round(time.monotonic() - start, 1)
    return {"outcome": outcome, "seconds": seconds, "races": races(text), "detail": text[:3000] + text[3000:][-3000:]}


def races(text: str) -> list[str]:
    """Return what racecheck reports, each pair of places once: ``Read kernel file.py:3 / Write kernel file.py:5``."""
    found: dict[str, None] = {}
    first = ""
    pattern = r"=\s+(Error: Race reported between|and) (Read|Write) access at (\w+)\S* in (\S+)"
    for begins, kind, kernel, place in re.findall(pattern, text):
        if begins != "and":
            first = f"{kind} {kernel} {place}"
        else:
            found[f"{first} / {kind} {kernel} {place}"] = None
    return list(found)


def tiny(which: str, where: str = "cuda") -> None:
    """Run a few small cases in this process and print what came of each (what the sanitizer watches).

    Args:
        which: a backend, perhaps ``@`` and how many multiprocessors it is told of, a colon, and names of cases, comma
            separated; those of a paged cache as ``paged_name``.
    """
    target, _, names = which.partition(":")
    backend, _, count = target.partition("@")
    for name in names.split(","):
        paged = name.startswith("paged_")
        found = work.conformance(backend, paged, name.removeprefix("paged_"), "bf16", where, int(count or 0))
        print(name, found, flush=True)
