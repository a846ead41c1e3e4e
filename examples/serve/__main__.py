"""Serve random requests with a small random Llama: `python -m examples.serve --help`, from the repository's root.

Prompts and answers have very different lengths and arrive over time. Every step is one packed batch: one token of each
answer that is being written and, beside them, chunks of prompts that are being read. Sequences start as forks of one
system prompt and share its blocks. A request gets in when the free blocks hold its prompt; when the cache is full the
newest one is evicted, and computed again later. None of this may change a token: `--compare-one-by-one` checks it.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from examples.serve.decoder import Decoder, Sizes
from examples.serve.engine import Engine, Request, one_by_one, serve
from vllm_accel import CacheStep, VllmAccelError, attention_paged, explain, warmup

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def random_requests(count: int, vocabulary: int, seed: int, longest: int = 160) -> list[Request]:
    """Return requests whose lengths are spread evenly on a logarithmic scale, a few of them arriving at every step."""
    source = random.Random(seed)

    def length() -> int:
        return round(math.exp(source.uniform(math.log(4), math.log(longest))))

    arrives = [source.randrange(1 + 2 * count) for _ in range(count)]
    return [
        Request(i, at, [source.randrange(vocabulary) for _ in range(length())], length())
        for i, at in enumerate(arrives)
    ]


def paged_call(step: CacheStep, model: Decoder) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Return the arguments of the `attention_paged` call of a step's first layer, to explain or to warm up."""
    cache, sizes = step.cache, model.sizes
    q = torch.zeros(step.slot_mapping.shape[0], sizes.heads, sizes.head_dim, dtype=cache.dtype, device=cache.device)
    names = ("cu_seqlens_q", "max_seqlen_q", "block_table", "seqused_k", "max_seqlen_k")
    given = {name: getattr(step, name) for name in names}
    return (q, cache.k_cache, cache.v_cache), {**given, "finite_tail": True, "causal": True, **model.options}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, and print what it took; return 1 where fp32 tokens differ from those of one request at a time."""
    given = parser().parse_args(arguments)
    console = Console(highlight=False)
    sizes = Sizes(layers=given.layers, heads=given.heads, kv_heads=given.kv_heads, head_dim=given.head_dim)
    options = {"backend": given.backend, "batch_invariant": given.batch_invariant}
    model = Decoder(sizes, given.seed, **options).to(given.device, DTYPES[given.dtype])
    requests = random_requests(given.requests, sizes.vocabulary, given.seed)
    source = random.Random(given.seed + 1)
    system = [source.randrange(sizes.vocabulary) for _ in range(given.system)]
    try:
        if given.backend is None:
            build(model, console)
        engine = Engine(model, model.cache(given.blocks, given.block_size), system, given.tokens_per_step)
        seconds = run(engine, requests, console)
    except (VllmAccelError, ValueError) as error:
        console.print(str(error), style="red", markup=False)
        return 2
    report(engine, requests, seconds, console)
    return compare(model, system, requests, given.block_size, console) if given.compare_one_by_one else 0


def parser() -> argparse.ArgumentParser:
    """Return the program's arguments."""
    made = argparse.ArgumentParser(prog="python -m examples.serve", description=__doc__.splitlines()[0])
    made.add_argument("--requests", type=int, default=32)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=DTYPES, default="fp32")
    made.add_argument("--backend", help="of attention_paged; automatic choice without it")
    made.add_argument("--blocks", type=int, default=36, help="of the cache: few of them force evictions")
    made.add_argument("--block-size", type=int, default=16, help="tokens of a block")
    made.add_argument("--seed", type=int, default=0, help="of weights, prompts, lengths and arrivals")
    made.add_argument("--compare-one-by-one", action="store_true", help="answer each alone too: the tokens are equal")
    made.add_argument("--batch-invariant", action="store_true", help="attention with the same bits in any batch")
    made.add_argument("--tokens-per-step", type=int, default=128)
    made.add_argument("--system", type=int, default=40, help="tokens of the system prompt that all share")
    for name in ("layers", "heads", "kv_heads", "head_dim"):
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Sizes, name), help="of the model")
    return made


def build(model: Decoder, console: Console) -> None:
    """Build kernels that compile at their first call, for steps with prompts in them and for steps of answers only."""
    cache = model.cache(4, 16)
    sequence = cache.allocate()
    for count in (17, 1):
        args, keywords = paged_call(cache.extend([sequence], [count]), model)
        if built := warmup(attention_paged, *args, **keywords):
            console.print(f"built for {count} tokens a sequence: {', '.join(built)}")


def run(engine: Engine, requests: Sequence[Request], console: Console) -> float:
    """Serve all requests, with a bar, and return the seconds it took."""
    columns = (BarColumn(10), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(request.wanted for request in requests))
        for _ in serve(engine, requests):
            used = engine.cache.num_blocks - engine.cache.free_blocks
            answered = sum(len(request.answer) for request in requests)
            rate = answered / (time.perf_counter() - start)
            told = (
                f"tokens, {rate:.0f}/s, {len(engine.running)} running, {len(engine.waiting)} waiting, "
                f"{used}/{engine.cache.num_blocks} blocks"
            )
            progress.update(task, completed=answered, description=told)
    engine.close()
    return time.perf_counter() - start


def report(engine: Engine, requests: Sequence[Request], seconds: float, console: Console) -> None:
    """Print what was served, what it took, and what attended."""
    cache, answered = engine.cache, sum(len(request.answer) for request in requests)
    rows = {
        "requests": str(len(requests)),
        "tokens answered": f"{answered}, {answered / seconds:.0f}/s",
        "steps": f"{engine.steps}, {engine.computed / engine.steps:.1f} tokens each",
        "evictions": f"{engine.evictions}",
        "blocks": f"{engine.peak_blocks} of {cache.num_blocks} at most, {cache.num_blocks - cache.free_blocks} now",
    }
    for kind, step in engine.seen.items():
        args, keywords = paged_call(step, engine.model)
        selection = explain(attention_paged, *args, **keywords)
        rows[f"steps with {kind}" if kind == "prompts" else f"steps of {kind} only"] = (
            f"{selection.chosen} on {selection.device.name} ({selection.decided_by})"
        )
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def compare(
    model: Decoder, system: Sequence[int], requests: Sequence[Request], block_size: int, console: Console
) -> int:
    """Answer every request alone, and say whether the tokens are the same."""
    start = time.perf_counter()
    differing = [r.number for r in requests if one_by_one(model, system, r, block_size) != r.answer]
    rate = sum(r.wanted for r in requests) / (time.perf_counter() - start)
    console.print(f"one by one: {rate:.0f} tokens/s; {len(requests) - len(differing)} of {len(requests)} answers equal")
    if not differing:
        return 0
    console.print(f"different: requests {differing}")
    if model.head.weight.dtype is torch.float32:
        return 1
    console.print(
        "In 16 bits two logits are often equal but for rounding, which depends on the batch; try --dtype fp32."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
