"""Does reading a common prefix once pay? `python -m benchmarks.shared_prefix [--device D] [--json FILE]`.

Decode over a `PagedKVCache` whose sequences were forked from one prompt: every step with the prefix read for each
sequence and read once, in turns, beside what `CacheStep.attend` would choose. On a GPU the L2 cache is cold and
launches are not in the time (`vllm_accel.tuning.timing`). The limits of `ops.shared_prefix` come from here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import machine
from vllm_accel import CacheStep, PagedKVCache
from vllm_accel.ops.shared_prefix import pays
from vllm_accel.tuning import timing

BLOCK, OWN = 16, 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Row:
    """One step: its sizes, the bytes that reading once saves, both times in seconds, and what is chosen."""

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    prefix: int
    saved: int
    each: float
    once: float
    chosen: bool

    @property
    def ratio(self) -> float:
        """Return how many times as fast reading once is."""
        return self.each / self.once

    def __str__(self) -> str:
        """Return a line of the table."""
        what = f"{self.dtype:5} {self.heads:2}/{self.kv_heads:2} {self.head_dim:8} {self.batch:5} {self.prefix:6}"
        times = f"{self.saved / 2**20:10.1f} {self.each * 1e6:9.0f} {self.once * 1e6:9.0f} {self.ratio:6.2f}x"
        return f"{what} {times}  {'once' if self.chosen else 'each'}"


def decode_step(dtype: torch.dtype, sizes: tuple[int, int], batch: int, prefix: int, device: str) -> CacheStep:
    """Return a step of one token for each of some forks of one prompt, with something in the cache."""
    kv_heads, head_dim = sizes
    blocks = prefix // BLOCK + batch * (OWN // BLOCK + 1)
    cache = PagedKVCache(blocks, BLOCK, kv_heads, head_dim, dtype=dtype, device=device)
    prompt = cache.allocate()
    cache.extend([prompt], [prefix])
    forks = [cache.fork(prompt) for _ in range(batch)]
    cache.extend(forks, [OWN - 1] * batch)
    for memory in (cache.k_cache, cache.v_cache):
        memory.normal_()
    return cache.extend(forks, [1] * batch)


def measure(dtype: str, heads: int, sizes: tuple[int, int], batch: int, prefix: int, device: str, rounds: int) -> Row:
    """Time one step both ways, after holding one against the other."""
    step = decode_step(DTYPES[dtype], sizes, batch, prefix, device)
    k_cache, v_cache = step.cache.k_cache, step.cache.v_cache
    q = torch.randn(batch, heads, sizes[1], device=device).to(DTYPES[dtype])
    calls = {way: lambda way=way: step.attend(q, causal=True, shared_prefix=way == "once") for way in ("each", "once")}
    error = (calls["each"]().float() - calls["once"]().float()).abs().max()
    if not error < 0.05:
        raise AssertionError(f"read once and for each, the results differ by {error}")
    taken = timing.in_turns(calls, timing.clock(q.device), rounds)
    each, once = (taken[way].seconds for way in ("each", "once"))
    if each is None or once is None:
        raise RuntimeError(taken["each"].error or taken["once"].error)
    token = sizes[0] * 2 * sizes[1] * q.element_size()
    chosen = pays(q, k_cache, v_cache, prefix_tokens=prefix, batch=batch, options={})
    return Row(dtype, heads, *sizes, batch, prefix, (batch - 1) * prefix * token, each, once, chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print and save what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_prefix", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two small steps, to see that it runs")
    given = parser.parse_args(arguments)
    gpu = machine.device(parser, given.device).type == "cuda"
    batches, prefixes = ((8, 32, 128), (512, 2048, 8192)) if gpu else ((2, 4, 16), (64, 256, 1024, 4096))
    dtypes = ("bf16",) if gpu else ("bf16", "fp32")
    if given.quick:
        batches, prefixes, dtypes = (2,), (32, 64), ("fp32",)
    rows = []
    facts = machine.about("benchmarks.shared_prefix", torch.device(given.device))
    print(machine.describe(facts))
    print("dtype heads head_dim batch prefix  saved MiB   each us   once us  faster  chosen")
    for dtype in dtypes:
        for heads, sizes in ((32, (8, 128)), (8, (8, 64))):
            for batch in batches:
                for prefix in prefixes:
                    row = measure(dtype, heads, sizes, batch, prefix, given.device, 3 if given.quick else 15)
                    rows.append(row)
                    print(row, flush=True)
    chosen = [row for row in rows if row.chosen]
    print(f"{sum(row.ratio > 1 for row in chosen)} of {len(chosen)} steps that read once are faster for it")
    if note := machine.busy(facts["load"], torch.get_num_threads()):
        print(note)
    if given.json:
        found = [{**asdict(row), "ratio": row.ratio} for row in rows]
        given.json.write_text(json.dumps({"about": facts, "rows": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
