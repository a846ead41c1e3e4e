"""``python -m benchmarks.cpu [--json FILE]``: the C++ CPU kernels beside PyTorch's and beside what the machine gives.

Every row is a ratio of one run: contestants take turns (`benchmarks.timing`), and the yardstick (a matrix product, a
loop of multiply-adds, a read of the same bytes in the same order) is one of them. A row whose yardstick varies between
rounds says so: a neighbour was at work, and the row is worth nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.shapes import Shape
from vllm_accel import attention, attention_paged, attention_varlen
from vllm_accel.kernels.cpu import load
from vllm_accel.tuning import timing

#: The slowest quarter of a yardstick's rounds may be this much above the fastest before the row counts as disturbed.
BUSY = 1.15
CPU = torch.device("cpu")


@dataclass(slots=True)
class Row:
    """One piece of work with its contestants.

    Attributes:
        name: what is measured. calls: contestants, "ours" among them; others are PyTorch's or yardsticks.
        amount: operations or bytes of "ours". yardstick, yardstick_amount: the contestant that stands for the machine.
        over: least ratio wanted over a contestant. share: least share of the yardstick's rate wanted.
        seconds: medians. disturbed: the yardstick varied.
    """

    name: str
    calls: dict[str, Callable[[], Any]]
    amount: float
    yardstick: str = ""
    yardstick_amount: float = 0.0
    over: dict[str, float] = field(default_factory=dict)
    share: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    disturbed: bool = False
    errors: dict[str, str] = field(default_factory=dict)

    def ratio(self, other: str) -> float:
        """Return how many times faster ours is."""
        return self.seconds[other] / self.seconds["ours"]

    def of_machine(self) -> float:
        """Return the share of the yardstick's rate."""
        return (self.amount / self.seconds["ours"]) / (self.yardstick_amount / self.seconds[self.yardstick])


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Callable[[], Tensor]:
    """Return PyTorch's call on the same (B, S, H, D) tensors."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def bottom_right(n_q: int, n_k: int) -> dict[str, Any]:
    """Return the options that make PyTorch's call causal, aligned bottom-right."""
    if n_q == n_k:
        return {"is_causal": True}
    return {"attn_mask": torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)}


def matmul(dtype: torch.dtype) -> tuple[Callable[[], Tensor], float]:
    """Return a matrix product and its operations."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return (lambda: a @ b), 2.0 * 2048**3


def multiply_adds() -> tuple[Callable[[], Any], float]:
    """Return a loop of fused multiply-adds on all threads, and its operations."""
    module, threads = load().module, torch.get_num_threads()
    return (lambda: module.probe_fma(400_000, threads, 0)), 2.0 * module.probe_fma(1, threads, 0) * 400_000


def prefill_rows(quick: bool) -> Iterator[Row]:
    """Causal prefill: one dense shape per dtype, then the others in bf16."""
    main = {"bf16": (5.0, 0.88), "fp32": (2.4, 0.70), "fp16": (3.8, 0.70)}
    for name, (over, share) in main.items():
        shape = Shape(f"{name} prefill H16 D128 S2048", "prefill", 1, 2048, 2048, 16, 16, 128)
        yield _dense(shape, {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[name], over, share)
    if quick:
        return
    others = [
        ("S512", 512, 512, 16, 128), ("S8192", 8192, 8192, 16, 128), ("D64 S2048", 2048, 2048, 16, 64),
        ("GQA 16/4 S2048", 2048, 2048, 4, 128), ("Sq512 Sk2048", 512, 2048, 16, 128),
    ]  # fmt: skip
    for name, n_q, n_k, kv_heads, dim in others:
        yield _dense(
            Shape(f"bf16 prefill {name}", "prefill", 1, n_q, n_k, 16, kv_heads, dim), torch.bfloat16, 4.0, 0.75
        )
    yield _varlen()


def _dense(shape: Shape, dtype: torch.dtype, over: float, share: float) -> Row:
    q, k, v, _, _, _ = shape.make(dtype, CPU)
    theirs = sdpa(q, k, v, **bottom_right(shape.seqlen_q, shape.seqlen_k))
    yardstick, work = matmul(dtype) if dtype is torch.bfloat16 else multiply_adds()
    calls = {"ours": lambda: attention(q, k, v, causal=True, backend="cpu"), "PyTorch": theirs, "machine": yardstick}
    return Row(shape.name, calls, shape.flops(), "machine", work, {"PyTorch": over}, share)


def _varlen() -> Row:
    lengths = tuple((n, n) for n in (2048, 1100, 700, 512, 300, 128))
    shape = Shape("bf16 prefill varlen, 6 lengths to 2048", "prefill", heads=16, kv_heads=16, lengths=lengths)
    q, k, v, _, options, _ = shape.make(torch.bfloat16, CPU)
    ends = options["cu_seqlens_q"].tolist()
    one_by_one = [sdpa(*(t[None, a:b] for t in (q, k, v)), is_causal=True) for a, b in itertools.pairwise(ends)]
    yardstick, work = matmul(torch.bfloat16)
    calls = {
        "ours": lambda: attention_varlen(q, k, v, backend="cpu", **options),
        "PyTorch": lambda: [call() for call in one_by_one],
        "machine": yardstick,
    }
    return Row(shape.name, calls, shape.flops(), "machine", work, {"PyTorch": 4.0}, 0.75)


def decode_rows(quick: bool) -> Iterator[Row]:
    """GQA decode, 32 query heads over 8, head size 128: contiguous, then paged."""
    shapes = [(8, 4096)] if quick else [(8, 4096), (1, 4096), (1, 32768)]
    for dtype, over in ((torch.bfloat16, 4.0), (torch.float16, 8.0)):
        for batch, keys in shapes:
            yield _contiguous(dtype, batch, keys, over)
    for block, over in ((64, 3.5), (16, 3.0)):
        for batch, keys in shapes:
            yield _paged(torch.bfloat16, batch, keys, block, over)


HEADS, KV_HEADS, DIM = 32, 8, 128


def _decode_tensors(dtype: torch.dtype, batch: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, 1, HEADS, DIM).to(dtype)
    k, v = (torch.randn(batch, keys, KV_HEADS, DIM).to(dtype) for _ in range(2))
    return q, k, v


def _theirs(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    """PyTorch's two ways: heads of a group folded into queries, and its own grouping."""
    folded = q.reshape(q.shape[0], KV_HEADS, HEADS // KV_HEADS, DIM)
    k_t, v_t = k.transpose(1, 2), v.transpose(1, 2)
    return {
        "folded": lambda: F.scaled_dot_product_attention(folded, k_t, v_t),
        "enable_gqa": sdpa(q, k, v),
    }


def _contiguous(dtype: torch.dtype, batch: int, keys: int, over: float) -> Row:
    q, k, v = _decode_tensors(dtype, batch, keys)
    module, threads = load().module, torch.get_num_threads()
    size = k.numel() * k.element_size()
    calls = {
        "ours": lambda: attention(q, k, v, backend="cpu"),
        **_theirs(q, k, v),
        "machine": lambda: module.probe_read(k, v, None, size // threads, threads, 0),
    }
    name = f"{str(dtype).removeprefix('torch.')} decode 32/8 B{batch} {keys} keys, contiguous"
    return Row(name, calls, 2.0 * size, "machine", 2.0 * size, {"folded": over, "enable_gqa": 20.0}, 0.80)


def _paged(dtype: torch.dtype, batch: int, keys: int, block: int, over: float) -> Row:
    q, k, v = _decode_tensors(dtype, batch, keys)
    k_cache, v_cache = (t.reshape(-1, block, KV_HEADS, DIM) for t in (k, v))
    table = torch.randperm(k_cache.shape[0], generator=torch.Generator().manual_seed(0)).int()
    options = {
        "cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32),
        "max_seqlen_q": 1,
        "block_table": table.view(batch, -1),
        "seqused_k": torch.full((batch,), keys, dtype=torch.int32),
        "max_seqlen_k": keys,
    }
    module, threads = load().module, torch.get_num_threads()
    size, packed = k.numel() * k.element_size(), q.flatten(0, 1)
    of_block = block * KV_HEADS * DIM * k.element_size()
    calls = {
        "ours": lambda: attention_paged(packed, k_cache, v_cache, backend="cpu", **options),
        **_theirs(q, k, v),
        "machine": lambda: module.probe_read(k_cache, v_cache, table, of_block, threads, 0),
    }
    name = f"bf16 decode 32/8 B{batch} {keys} keys, blocks of {block}, random table"
    return Row(name, calls, 2.0 * size, "machine", 2.0 * size, {"folded": over}, 0.75)


def overhead_row() -> Row:
    """One token, one head, 16 keys: nothing but the call."""
    q, k, v = torch.randn(1, 1, 1, 64), torch.randn(1, 16, 1, 64), torch.randn(1, 16, 1, 64)
    calls = {"ours": lambda: attention(q, k, v, backend="cpu"), "PyTorch": sdpa(q, k, v)}
    return Row("call overhead: 1 token, 1 head, 16 keys", calls, 1.0, over={"PyTorch": 1.0})


def backward_rows(quick: bool) -> Iterator[Row]:
    """Forward and backward together."""
    for dtype in (torch.bfloat16, torch.float32):
        shape = Shape(f"{str(dtype).removeprefix('torch.')} training H16 D64 S1024", "train", 1, 1024, 1024, 16, 16, 64)
        q, k, v, dout, _, _ = shape.make(dtype, CPU)

        def step(call: Callable[[], Tensor], q: Tensor = q, k: Tensor = k, v: Tensor = v, dout: Tensor = dout) -> Any:
            out = call()
            return torch.autograd.grad(out, (q, k, v), dout if out.shape == dout.shape else dout.transpose(1, 2))

        ours = lambda q=q, k=k, v=v: attention(q, k, v, causal=True, backend="cpu")  # noqa: E731
        theirs = sdpa(q, k, v, is_causal=True)
        calls = {
            "ours": lambda ours=ours, step=step: step(ours),
            "PyTorch": lambda theirs=theirs, step=step: step(theirs),
        }
        yield Row(shape.name, calls, shape.flops(), over={"PyTorch": 1.0})
        if quick:
            return


class OneThread(timing.CpuClock):
    """Processor time of this thread, to which neighbours add little; for one thread only."""

    def seconds(self, call: timing.Call, times: int) -> float:
        """Return the mean over `times` calls."""
        start = time.thread_time()
        for _ in range(times):
            call()
        return (time.thread_time() - start) / times


def measure(row: Row, rounds: int) -> None:
    """Time the contestants of a row in turns."""
    clock = OneThread() if torch.get_num_threads() == 1 else timing.clock(CPU)
    with torch.set_grad_enabled("training" in row.name):
        found = timing.in_turns(row.calls, clock, rounds)
    for name, timed in found.items():
        if timed.seconds is None:
            row.errors[name] = timed.error
        else:
            row.seconds[name] = timed.seconds
    watched = found[row.yardstick or "ours"].rounds
    if len(watched) > 2:
        row.disturbed = statistics.quantiles(watched, n=4)[2] > BUSY * min(watched)


def line(row: Row) -> str:
    """Return a row as text: ratios with what is wanted of them."""
    if "ours" in row.errors:
        return f"{row.name}: {row.errors['ours']}"
    parts = [f"{row.seconds['ours'] * 1e3:9.3f} ms"]
    for other, wanted in row.over.items():
        if other in row.seconds:
            parts.append(f"{row.ratio(other):5.2f} x {other} (want {wanted:g})")
    if row.yardstick:
        parts.append(f"{row.of_machine():4.0%} of the machine (want {row.share:.0%})")
    return f"{row.name:48s} " + "   ".join(parts) + ("   DISTURBED" if row.disturbed else "")


def rows(quick: bool) -> Iterator[Row]:
    """Return everything that is measured, one row at a time: tensors of one do not outlive it."""
    yield overhead_row()
    yield from prefill_rows(quick)
    yield from decode_rows(quick)
    yield from backward_rows(quick)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; exit status 1 where the kernels are not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--json", metavar="FILE", type=Path, help="save every figure")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the main shapes only")
    parser.add_argument("--threads", type=int, default=0, help="1 also takes processor time instead of wall-clock time")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args(argv)
    if (reason := load().reason) is not None:
        print(f"no CPU kernels: {reason}")
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = machine.about("benchmarks.cpu", CPU)
    print(machine.describe(facts), f"instruction sets: {', '.join(load().module.instruction_sets())}", sep="\n")
    results = []
    for row in rows(options.quick):
        if options.only in row.name:
            measure(row, options.rounds)
            print(line(row), flush=True)
            result = {k: v for k, v in asdict(_plain(row)).items() if k != "calls"}
            results.append(result | {"of_machine": row.of_machine() if row.yardstick and not row.errors else None})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"about": facts, "rows": results}, indent=1) + "\n")
    return 0


def _plain(row: Row) -> Row:
    row.calls = {}
    return row


if __name__ == "__main__":
    sys.exit(main())
