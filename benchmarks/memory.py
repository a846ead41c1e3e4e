"""``python -m benchmarks.memory``: how much resident memory a call takes on a CPU as sequences grow.

Each measurement is a process of its own, forked after `import torch` and before any tensor exists, so that nothing
that an allocator kept from another measurement counts. What is reported is the highest resident memory during the
call minus that just before it, inputs in place.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from vllm_accel import attention, explain


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of call, in the dtype and with the heads that keep it short.

    Attributes:
        name: unique. grad: also run the backward. mask: boolean mask of keys (B, 1, 1, Sk).
    """

    name: str
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    causal: bool = True
    mask: bool = False
    softcap: float = 0.0
    grad: bool = False


_KINDS = (
    Case("causal", heads=1, kv_heads=1),
    Case("causal_bf16", heads=1, kv_heads=1, dtype="bfloat16"),
    Case("key_mask", heads=1, kv_heads=1, causal=False, mask=True),
    Case("causal_key_mask", heads=1, kv_heads=1, mask=True),
    Case("gqa", heads=2, kv_heads=1),
    Case("softcap", heads=1, kv_heads=1, softcap=5.0),
)
CASES = (*_KINDS, *(replace(case, name=f"{case.name}_backward", grad=True) for case in _KINDS))
LENGTHS = (4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes that one call took at one length, by which backend, in how many seconds; error if it failed."""

    case: str
    seqlen: int
    extra: int = 0
    backend: str = ""
    seconds: float = 0.0
    error: str = ""


def call(case: Case, seqlen: int) -> Measured:
    """Run one call in this process and measure it."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    q, k, v = (
        torch.randn(1, seqlen, heads, case.head_dim).to(dtype).requires_grad_(case.grad)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    options: dict[str, Any] = {"causal": case.causal, "softcap": case.softcap}
    if case.mask:
        options["attn_bias"] = torch.arange(seqlen).view(1, 1, 1, -1) < seqlen - 100
    _run(q[:, :64], k[:, :64], v[:, :64], {**options, "attn_bias": _short(options, 64)})  # threads, lazy imports
    backend = explain(attention, q, k, v, **options).chosen or ""
    before, start = _resident("VmRSS"), time.perf_counter()
    _run(q, k, v, options)
    return Measured(case.name, seqlen, _resident("VmHWM") - before, backend, time.perf_counter() - start)


def _short(options: dict[str, Any], n: int) -> Any:
    return options["attn_bias"][..., :n] if "attn_bias" in options else None


def _run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> None:
    out = attention(q, k, v, **options)
    assert isinstance(out, torch.Tensor)
    if out.requires_grad:
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def _resident(field: str) -> int:
    """Return a size in bytes from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _map_large_blocks() -> None:
    """Have glibc map every large block and unmap it when freed: what was freed then never hides a later block."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        m_mmap_threshold = -3
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 16)


def measure(jobs: Sequence[tuple[Case, int]], at_once: int = 1) -> list[Measured]:
    """Measure calls (a case and a length each) in forked processes, in order of `jobs`.

    Call it before this process has started any thread of torch.
    """
    found: list[Measured] = []
    running: list[tuple[tuple[Case, int], int, int]] = []
    for job in jobs:
        if len(running) == at_once:
            found.append(_finish(*running.pop(0)))
        running.append((job, *_start(*job)))
    return found + [_finish(*started) for started in running]


def _start(case: Case, seqlen: int) -> tuple[int, int]:
    """Fork a process that measures one call; return its id and where it writes what it found."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    try:
        _map_large_blocks()
        torch.set_num_threads(1)  # two threads that wait for each other on a busy machine take minutes
        found = call(case, seqlen)
    except BaseException:
        found = Measured(case.name, seqlen, error=traceback.format_exc(limit=-1).strip().splitlines()[-1])
    os.write(writer, json.dumps(asdict(found)).encode())
    os._exit(0)


def _finish(job: tuple[Case, int], child: int, reader: int) -> Measured:
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return Measured(**json.loads(text)) if text else Measured(job[0].name, job[1], error=f"ended with {status}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if a call failed.

    Raises:
        SystemExit: from argparse, for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--cases", default="", help=f"comma separated, of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, comma separated")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; each uses one thread")
    given = parser.parse_args(argv)
    wanted = given.cases.split(",") if given.cases else [case.name for case in CASES]
    if unknown := set(wanted) - {case.name for case in CASES}:
        parser.error(f"--cases {given.cases}: no such case: {', '.join(sorted(unknown))}")
    facts = machine.about("benchmarks.memory", torch.device("cpu"))
    print(machine.describe(facts), flush=True)
    lengths = sorted((int(n) for n in given.lengths.split(",")), reverse=True)  # the long ones first: none ends alone
    found = measure([(case, n) for n in lengths for case in CASES if case.name in wanted], given.jobs)
    found.sort(key=lambda m: (wanted.index(m.case), m.seqlen))
    for _, group in itertools.groupby(found, key=lambda m: m.case):
        row = list(group)
        sizes = "  ".join(f"{m.seqlen}: {m.error or f'{m.extra / 2**20:.1f} MiB {m.seconds:.1f} s'}" for m in row)
        growth = [b.extra / a.extra for a, b in itertools.pairwise(row) if a.extra and b.extra]
        print(f"{row[0].case:24} {row[0].backend:10} {sizes}  growth {', '.join(f'{g:.2f}' for g in growth)}")
    if given.json:
        data = {"about": facts, "measured": [asdict(m) for m in found]}
        given.json.write_text(json.dumps(data, indent=1) + "\n")
    return 1 if any(m.error for m in found) else 0


if __name__ == "__main__":
    sys.exit(main())
