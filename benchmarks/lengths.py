"""``python -m benchmarks.lengths``: time and memory of every backend as a sequence grows, until it no longer fits.

One causal forward, batch 1, lengths doubling. A backend stops where it raises (out of memory, say) or where one call
takes longer than allowed; every result is checked on a few rows against float64 before it counts. On a GPU the peak is
of torch's allocator; on a CPU, memory is what `benchmarks.memory` measures, and here there is none.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from vllm_accel import State, attention, explain
from vllm_accel.dispatch import registry
from vllm_accel.testing import attention_oracle, kernel_call
from vllm_accel.testing.oracle import plain_attention
from vllm_accel.testing.tolerance import assert_close
from vllm_accel.tuning import timing

MATH = "torch math"
_RUNS = (State.CHOSEN, State.ABLE, State.HELD_BACK)


@dataclass(frozen=True, slots=True)
class Found:
    """One backend at one length; peak: bytes beyond the inputs, None on a CPU; error: why there is no time."""

    backend: str
    seqlen: int
    seconds: float | None = None
    peak: int | None = None
    error: str = ""


def contestants(q: Tensor, k: Tensor, v: Tensor, wanted: str) -> dict[str, Callable[..., Tensor]]:
    """Return a causal call of each backend that can run, and PyTorch's quadratic path."""
    selection = explain(attention, q, k, v, causal=True)

    def named(name: str) -> Callable[..., Tensor]:
        # Not by backend=: "triton" is a family there, and stands for the Gluon kernel first on Hopper.
        call = kernel_call(registry.get("attention", name), selection.device)
        return lambda q, k, v: call(q, k, v, causal=True)

    calls = {c.name: named(c.name) for c in selection.candidates if c.state in _RUNS}
    calls[MATH] = _math
    words = wanted.split(",") if wanted else [""]
    return {name: call for name, call in calls.items() if any(word in name for word in words)}


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Compare the last rows of one head with float64.

    Raises:
        AssertionError: naming the element.
    """
    rows, group = slice(-8, None), q.shape[2] // k.shape[2]
    head = slice(0, group), slice(0, 1)
    parts = q[:, rows, head[0]], k[:, :, head[1]], v[:, :, head[1]]
    want, _ = attention_oracle(*parts, causal=True)
    plain, _ = plain_attention(*parts, causal=True)
    assert_close(out[:, rows, head[0]], want, plain, what="the last rows")


def measure(call: Callable[..., Tensor], name: str, tensors: tuple[Tensor, ...], rounds: int) -> Found:
    """Check and time one backend at one length."""
    seqlen, clock = tensors[0].shape[1], timing.clock(tensors[0].device)
    kept: list[Tensor] = []

    def run() -> None:
        kept.clear()
        with torch.no_grad():
            kept.append(call(*tensors))

    try:
        run()  # what is compiled at the first call does not count
        check(kept[0], *tensors)
        kept.clear()
        peak = clock.peak(run)
        once = clock.seconds(run, 1)
        times = max(1, min(20, int(0.02 / max(once, 1e-7))))
        seconds = sorted(clock.seconds(run, times) for _ in range(1 if once > 0.5 else rounds))
        return Found(name, seqlen, seconds[len(seconds) // 2], peak)
    except (Exception, torch.OutOfMemoryError) as error:
        return Found(name, seqlen, error=timing.text_of(error))
    finally:
        kept.clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if a backend was wrong.

    Raises:
        SystemExit: from argparse, for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lengths", description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything that was measured here, after each length")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", default="", metavar="NAMES", help="only names that contain one of these")
    parser.add_argument("--sizes", default="", metavar="H,HKV,D", help="default 32,8,128 on a GPU, 8,2,64 on a CPU")
    parser.add_argument("--first", type=int, default=512)
    parser.add_argument("--last", type=int, default=1 << 20)
    parser.add_argument("--call-seconds", type=float, default=1.0, help="a backend stops when one call takes longer")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds in all")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(argv)
    device = machine.device(parser, given.device)
    on_gpu = device.type == "cuda"
    sizes = (given.sizes or ("32,8,128" if on_gpu else "8,2,64")).split(",")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
        parser.error(f"--sizes takes H,HKV,D, 3 whole numbers of at least 1, not {given.sizes!r}")
    heads, kv_heads, dim = map(int, sizes)
    dtype = torch.bfloat16
    facts = machine.about("benchmarks.lengths", device)
    print(machine.describe(facts), flush=True)
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 0
    found: list[Found] = []
    out: set[str] = set()
    start = time.monotonic()
    for power in range(int(math.log2(given.first)), int(math.log2(given.last)) + 1):
        try:
            shapes = ((1, 1 << power, n, dim) for n in (heads, kv_heads, kv_heads))
            tensors = tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)
            calls = contestants(*tensors, given.backends)
        except torch.OutOfMemoryError:
            break
        for name, call in calls.items():
            if name in out or time.monotonic() - start > given.budget:
                continue
            one = measure(call, name, tensors, given.rounds)
            found.append(one)
            print(f"{one.seqlen:8} {name:16} {_text(one)}", flush=True)
            if one.seconds is None or one.seconds > given.call_seconds:
                out.add(name)
        if given.json:
            _write(given.json, facts, (heads, kv_heads, dim), memory, found)
        if out >= set(calls) or time.monotonic() - start > given.budget:
            break
        del tensors
    return 1 if any("AssertionError" in one.error for one in found) else 0


def _text(one: Found) -> str:
    if one.seconds is None:
        return one.error
    peak = "" if one.peak is None else f", peak {one.peak / 2**20:.1f} MiB"
    return f"{one.seconds * 1e3:.4g} ms{peak}"


def _write(path: Path, facts: dict[str, Any], sizes: tuple[int, ...], memory: int, found: list[Found]) -> None:
    data = {
        "about": facts,
        "dtype": "bfloat16",
        "sizes": dict(zip(("heads", "kv_heads", "head_dim"), sizes, strict=True)),
        "memory": memory,
        "lengths": [asdict(one) for one in found],
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
