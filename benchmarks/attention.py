"""``python -m benchmarks.attention``: every backend that can run here, over one list of shapes.

A time counts only if the result is right (`benchmarks.check`). Contestants take turns; a matrix product and a copy run
in the same turns, so that each number can be read as a share of what this machine gives at that moment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, shapes
from benchmarks.attention_calls import AUTO, contestants
from vllm_accel import warmup
from vllm_accel.tuning import check, timing
from vllm_accel.tuning.attention import call_of
from vllm_accel.tuning.measure import step
from vllm_accel.tuning.shape import Shape
from vllm_accel.tuning.timing import Call, Timed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MATMUL, COPY = "a matrix product", "a copy"


@dataclass(slots=True)
class Result:
    """One contestant on one shape.

    Attributes:
        seconds: median over rounds; None if it raised or was wrong. rounds: each round's seconds.
        tflops, gbs: achieved. of_matmul, of_copy: as a share of the yardsticks of the same turns.
        peak: bytes taken beyond the inputs, on a GPU. error: what it raised, or how it was wrong.
    """

    name: str
    seconds: float | None
    rounds: list[float]
    tflops: float | None = None
    gbs: float | None = None
    of_matmul: float | None = None
    of_copy: float | None = None
    peak: int | None = None
    error: str = ""


@dataclass(slots=True)
class Report:
    """What was measured on one shape."""

    shape: Shape
    chosen: str = ""
    results: list[Result] = field(default_factory=list)
    matmul_tflops: float | None = None
    copy_gbs: float | None = None
    refused: dict[str, str] = field(default_factory=dict)
    error: str = ""


def measure(
    shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int, only: str = "", without: str = "",
    warm: bool = False,
) -> Report:  # fmt: skip
    """Check and time every contestant on one shape; whatever fails becomes text in the report.

    Args:
        only, without: words, by comma; contestants with one of them in their name take part, or do not.
        warm: `vllm_accel.warmup` first, as a server does, so that automatic choice may take what compiles for long.
    """
    report = Report(shape)
    try:
        _measure(report, device, dtype, rounds, only, without, warm)
    except Exception as error:  # out of memory, say: the next shape may be smaller
        report.error = timing.text_of(error)
    return report


def _measure(
    report: Report, device: torch.device, dtype: torch.dtype, rounds: int, only: str, without: str, warm: bool
) -> None:
    shape = report.shape
    inputs = shape.make(dtype, device)
    if warm:
        warmup(call_of(shape), inputs.q, inputs.k, inputs.v, **inputs.options)
    attends, report.refused, report.chosen = contestants(shape, inputs)
    truth = check.parts(shape, inputs)
    calls: dict[str, Call] = {}
    for name, attend in attends.items():
        if (only and not _has(name, only)) or (without and _has(name, without)):
            continue
        call = step(attend, shape, inputs)
        try:
            check.verify(call(), truth)
        except Exception as error:  # wrong, or it raised: no time for it, and the others go on
            report.results.append(Result(name, None, [], error=timing.text_of(error)))
        else:
            calls[name] = call
    del truth
    measures, work = yardsticks(device, dtype, small=max(map(max, shape.sequences)) <= 64)
    found = timing.in_turns({**measures, **calls}, timing.clock(device), rounds)
    matmul, copy = (found.pop(name).seconds for name in (MATMUL, COPY))
    report.matmul_tflops = work[MATMUL] / matmul * 1e-12 if matmul else None
    report.copy_gbs = work[COPY] / copy * 1e-9 if copy else None
    report.results += [_result(name, timed, report, dtype) for name, timed in found.items()]


def _has(name: str, words: str) -> bool:
    return any(word in name for word in words.split(","))


def yardsticks(device: torch.device, dtype: torch.dtype, small: bool) -> tuple[dict[str, Call], dict[str, float]]:
    """Return a square matrix product and a copy too large for any cache, with their operations and bytes."""
    n, size = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 27)
    if small:
        n, size = 64, 1 << 16
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {MATMUL: lambda: a @ b, COPY: lambda: target.copy_(source)}, {MATMUL: 2.0 * n**3, COPY: 2.0 * size}


def _result(name: str, timed: Timed, report: Report, dtype: torch.dtype) -> Result:
    result = Result(name, timed.seconds, timed.rounds, peak=timed.peak, error=timed.error)
    if result.seconds is None:
        return result
    result.tflops = report.shape.flops() / result.seconds * 1e-12
    if report.matmul_tflops:
        result.of_matmul = result.tflops / report.matmul_tflops
    if report.shape.kind == "decode":
        result.gbs = report.shape.bytes(dtype) / result.seconds * 1e-9
        result.of_copy = result.gbs / report.copy_gbs if report.copy_gbs else None
    return result


def show(report: Report) -> None:
    """Print one shape's results, fastest first."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    shape = report.shape
    yardsticks = [f"matmul {report.matmul_tflops:.4g} TFLOP/s"] if report.matmul_tflops else []
    yardsticks += [f"copy {report.copy_gbs:.4g} GB/s"] if report.copy_gbs else []
    sizes = f"{shape.heads}/{shape.kv_heads} heads of {shape.head_dim}, {', '.join(yardsticks)}"
    table = Table(box=None, pad_edge=False, title=f"[bold]{shape.name}[/] {sizes}", title_justify="left")
    table.add_column("backend")
    for name in ("ms", "± %", "TFLOP/s", "of matmul", "GB/s", "of copy", "peak MiB"):
        table.add_column(name, justify="right")
    table.add_column("")
    for r in sorted(report.results, key=lambda r: r.seconds or float("inf")):
        name = f"{r.name} = {report.chosen}" if r.name == AUTO else r.name
        if r.seconds is None:
            table.add_row(name, *[""] * 7, f"[yellow]{r.error}")
            continue
        wobble = (max(r.rounds) - min(r.rounds)) / 2 / r.seconds
        peak = "" if r.peak is None else f"{r.peak / 2**20:.1f}"
        table.add_row(name, f"{r.seconds * 1e3:.4g}", f"{wobble:.0%}", _number(r.tflops), _share(r.of_matmul),
                      _number(r.gbs), _share(r.of_copy), peak)  # fmt: skip
    console.print(table)
    if report.error:
        console.print(f"  [yellow]{report.error}", highlight=False)
    console.print()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if a contestant was wrong or raised.

    Raises:
        SystemExit: from argparse, for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--gpu", action="store_true", help="the list for data-centre GPUs, on the current CUDA device")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--shapes", default="", metavar="NAME", help="only shapes whose name contains one of these words"
    )
    parser.add_argument(
        "--backends", default="", metavar="NAME", help="only contestants whose name contains one of these"
    )
    parser.add_argument("--without", default="", metavar="NAME", help="no contestants whose name contains one of these")
    parser.add_argument("--warm", action="store_true", help="warm up first: automatic choice may take what compiles")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for the tests: numbers mean nothing")
    given = parser.parse_args(argv)
    device = machine.device(parser, "cuda" if given.gpu else "cpu")
    dtype = DTYPES[given.dtype or ("bf16" if given.gpu else "fp32")]
    listed = shapes.QUICK_SHAPES if given.quick else shapes.GPU_SHAPES if given.gpu else shapes.CPU_SHAPES
    try:
        wanted = shapes.named(listed, given.shapes)
    except ValueError as error:
        parser.error(str(error))
    before, facts = machine.load(), machine.about("benchmarks.attention", device)
    print(machine.describe(facts), f"{dtype}", "", sep="\n", flush=True)
    reports = []
    for shape in wanted:
        reports.append(measure(shape, device, dtype, given.rounds, given.backends, given.without, given.warm))
        show(reports[-1])
        if given.json:  # after every shape: a run that is cut short still leaves what it found
            _write(given.json, facts, dtype, reports)
    if warning := machine.busy(before, torch.get_num_threads()):
        print(f"warning: {warning}")
    failed = any(report.error or any(r.error for r in report.results) for report in reports)
    return 1 if failed else 0


def _write(path: Path, facts: dict[str, Any], dtype: torch.dtype, reports: list[Report]) -> None:
    data = {
        "about": facts,
        "dtype": str(dtype).removeprefix("torch."),
        "shapes": [asdict(report) for report in reports],
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
