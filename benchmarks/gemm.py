"""``python -m benchmarks.gemm [--gpu] [--json FILE]``: grouped products and layers, every backend that can run here.

A time counts only if sampled rows agree with float64. Beside our backends run PyTorch's own grouped product, called
directly, a dense product of equally many operations, and for layers the loop over experts. Targets are printed last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.gemm_shapes import CPU_SHAPES, GPU_SHAPES, QUICK_SHAPES, GemmShape
from vllm_accel import State, explain, fused_moe, grouped_gemm, quantize_fp8, scaled_gemm, warmup
from vllm_accel.dispatch import registry
from vllm_accel.dispatch.selection import Candidate
from vllm_accel.testing import GEMM_CASES, check_gemm_backend
from vllm_accel.testing.tolerance import tolerance
from vllm_accel.tuning import timing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AUTO, TORCH, DENSE, LOOP = "automatic", "torch._grouped_mm", "a dense product", "loop over experts"
#: Rows of a group that are compared with float64.
SAMPLED = 24


@dataclass(slots=True)
class Report:
    """What was measured on one shape: seconds of each contestant, what was chosen, what refused, what went wrong."""

    shape: GemmShape
    chosen: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass(slots=True)
class Contest:
    """A call in the forms that are timed, and a few rows of its result in float64 and in plain PyTorch."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    others: dict[str, Callable[[], Any]]
    rows: Tensor
    want: Tensor
    plain: Tensor


def _draw(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def _weights(device: torch.device, dtype: torch.dtype, experts: int, n: int, k: int, seed: int) -> Tensor:
    """Return (E, K, N), stored as models store weights, (E, N, K); drawn expert by expert, to fit in memory."""
    stored = torch.empty(experts, n, k, device=device, dtype=dtype)
    for e in range(experts):
        stored[e] = _draw(device, dtype, n, k, seed=seed + e) * k**-0.5
    return stored.mT


def grouped(shape: GemmShape, device: torch.device, dtype: torch.dtype) -> Contest:
    """Make a grouped product, quantised by blocks for "fp8"."""
    a = _draw(device, dtype, shape.rows, shape.k)
    b = _weights(device, dtype, shape.experts, shape.n, shape.k, 1)
    ends = shape.ends(device)
    counts = shape.counts()
    sampled = [e for e in (0, len(counts) // 2, len(counts) - 1) if counts[e]]
    starts = [0, *ends.tolist()]
    fp8 = shape.kind == "fp8"
    fn: Callable[..., Any] = grouped_gemm
    args: tuple[Any, ...] = (a, b, ends)
    kwargs: dict[str, Any] = {}
    if fp8:
        (a_q, a_s), (b_q, b_s) = quantize_fp8(a, scaling="1x128"), quantize_fp8(b.mT, scaling="128x128")
        fn, args = scaled_gemm, (a_q, b_q.mT, a_s, "1x128", b_s.mT, "128x128")
        kwargs = {"offs": ends, "output_dtype": dtype}

    def rows_of(e: int) -> slice:
        return slice(starts[e], min(starts[e + 1], starts[e] + SAMPLED))

    def wide(e: int, to: torch.dtype) -> Tensor:
        if not fp8:
            return a[rows_of(e)].to(to) @ b[e].to(to)
        x = a_q[rows_of(e)].to(to) * a_s[rows_of(e)].to(to).repeat_interleave(128, 1)[:, : shape.k]
        y = b_q[e].to(to) * b_s[e].to(to).repeat_interleave(128, 0)[: shape.n].repeat_interleave(128, 1)[:, : shape.k]
        return x @ y.t()

    want = torch.cat([wide(e, torch.float64) for e in sampled])
    plain = torch.cat([wide(e, torch.float32 if fp8 else dtype) for e in sampled]).to(dtype)
    rows = torch.cat([torch.arange(rows_of(e).start, rows_of(e).stop, device=device) for e in sampled])
    others: dict[str, Callable[[], Any]] = {}
    if not fp8:
        if hasattr(torch, "_grouped_mm"):
            others[TORCH] = lambda: torch._grouped_mm(a, b, offs=ends)
        others[DENSE] = lambda: a @ b[0]
        if device.type == "cpu":
            others[LOOP] = lambda: torch.cat([a[s:t] @ b[e] for e, (s, t) in enumerate(zip(starts, starts[1:]))])  # noqa: B905, RUF007
    return Contest(fn, args, kwargs, others, rows, want, plain)


def layer(shape: GemmShape, device: torch.device, dtype: torch.dtype) -> Contest:
    """Make a mixture-of-experts layer with random routing."""
    x = _draw(device, dtype, shape.rows, shape.k)
    up = _weights(device, dtype, shape.experts, 2 * shape.n, shape.k, 1)
    down = _weights(device, dtype, shape.experts, shape.k, shape.n, 1000)
    logits = _draw(device, torch.float32, shape.rows, shape.experts, seed=5)
    weights, ids = torch.softmax(logits, -1).topk(shape.top_k)

    def loop() -> Tensor:
        out = torch.zeros_like(x)
        for e in range(shape.experts):
            token, place = torch.where(ids == e)
            gate, linear = (x[token] @ up[e]).chunk(2, dim=-1)
            rows = (torch.nn.functional.silu(gate) * linear) @ down[e]
            out.index_add_(0, token, (rows * weights[token, place, None]).to(dtype))
        return out

    rows = torch.arange(0, shape.rows, max(1, shape.rows // 6), device=device)[:6]

    def some(to: torch.dtype) -> Tensor:
        found = []
        for t in rows.tolist():
            total = torch.zeros(shape.k, device=device, dtype=to)
            for e, weight in zip(ids[t].tolist(), weights[t], strict=True):
                gate, linear = (x[t].to(to) @ up[e].to(to)).chunk(2)
                total += weight.to(to) * ((torch.nn.functional.silu(gate) * linear) @ down[e].to(to))
            found.append(total)
        return torch.stack(found)

    args = (x, up, down, weights, ids)
    return Contest(fused_moe, args, {}, {LOOP: loop}, rows, some(torch.float64), some(dtype))


def measure(
    shape: GemmShape, device: torch.device, dtype: torch.dtype, rounds: int, only: str, targets: bool = False
) -> Report:
    """Check and time every contestant on one shape; whatever fails becomes text in the report."""
    report = Report(shape)
    try:
        with torch.no_grad():
            contest = (layer if shape.kind == "moe" else grouped)(shape, device, dtype)
            _measure(report, contest, device, rounds, only, targets)
    except Exception as error:  # out of memory, say: the next shape may be smaller
        report.error = timing.text_of(error)
    return report


def _measure(report: Report, contest: Contest, device: torch.device, rounds: int, only: str, targets: bool) -> None:
    fn, args, kwargs = contest.fn, contest.args, contest.kwargs
    if not targets:
        try:
            warmup(fn, *args, **kwargs)
        except Exception as error:  # the backend that does not build is named by its own check below
            report.failed["warmup"] = timing.text_of(error)
    selection = explain(fn, *args, **kwargs)
    report.chosen = selection.chosen or ""
    names = [c.name for c in selection.candidates if _takes_part(c, report, targets)]
    if device.type == "cpu":
        names.append("reference")
    calls: dict[str, timing.Call] = {AUTO: lambda: fn(*args, **kwargs)}
    for name in names:
        if not only or name in only.split(","):
            calls[name] = lambda name=name: fn(*args, **kwargs, backend=name)  # type: ignore[misc]
    bound = tolerance(contest.want, contest.plain, contest.plain.dtype)
    for name, call in list(calls.items()):
        try:
            worst = float((call()[contest.rows].double() - contest.want).abs().max())
        except Exception as error:  # it raised: no time for it, and the others go on
            report.failed[name] = timing.text_of(error)
            del calls[name]
            continue
        if not worst <= bound:
            report.failed[name] = f"wrong: an error of {worst:.3g} where {bound:.3g} is allowed"
            del calls[name]
    for name, timed in timing.in_turns({**calls, **contest.others}, timing.clock(device), rounds).items():
        if timed.seconds is None:
            report.failed[name] = timed.error
        else:
            report.seconds[name] = timed.seconds


def _takes_part(candidate: Candidate, report: Report, targets: bool) -> bool:
    """Tell whether a backend is timed by name: all that can run; for targets, what competes for FP8 without a build."""
    if candidate.name == "reference" or candidate.state not in (State.ABLE, State.CHOSEN, State.HELD_BACK):
        return False
    waits = any(reason.code == "first_call" for reason in candidate.reasons)
    return not targets or (report.shape.kind == "fp8" and candidate.state is not State.CHOSEN and not waits)


def conformance(device: torch.device, dtype: torch.dtype, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Hold backends against the oracle in every case of the kit: "right", or what is wrong, or why it refuses."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        backend = registry.get("gemm", name)
        if missing := backend.unavailable_reason():
            found[name] = {"": f"not available: {missing.text}"}
            continue
        found[name] = {}
        for case in GEMM_CASES:
            try:
                outcome = check_gemm_backend(backend, case, dtype=dtype, where=device)
            except Exception as error:  # every case is said, whatever happens to one
                found[name][case.name] = f"FAILED {timing.text_of(error)}"
            else:
                found[name][case.name] = "right" if outcome.ran else f"refused: {outcome.reasons[0].text}"
        lines = [f"  {case}: {text}" for case, text in found[name].items() if text.startswith("FAILED")]
        right = sum(text == "right" for text in found[name].values())
        print(f"{name}: {right} cases right, {len(lines)} failed", *lines, sep="\n", flush=True)
    return found


def show(report: Report) -> None:
    """Print one shape's results, fastest first."""
    shape = report.shape
    print(f"{shape.name}: {shape.rows} rows, K {shape.k}, N {shape.n}, {shape.experts} experts; chosen {report.chosen}")
    for name, seconds in sorted(report.seconds.items(), key=lambda item: item[1]):
        over = f"  {seconds / report.seconds[AUTO]:6.3f} of automatic's time" if AUTO in report.seconds else ""
        print(f"  {name:<20} {seconds * 1e3:9.4f} ms  {shape.flops() / seconds * 1e-12:8.4g} TFLOP/s{over}")
    for name, text in report.failed.items():
        print(f"  {name:<20} {text}")
    print(f"  {report.error}\n" if report.error else "", flush=True)


def targets(reports: Sequence[Report]) -> dict[str, Any]:
    """Compare with the targets: ratios of times, above 1 where automatic choice is faster."""

    def ratios(kind: str, other: str) -> list[float]:
        found = [r.seconds for r in reports if r.shape.kind == kind]
        return [s[other] / s[AUTO] for s in found if other in s and AUTO in s]

    bests = [
        min(t for n, t in r.seconds.items() if n != AUTO) / r.seconds[AUTO]
        for r in reports
        if r.shape.kind == "fp8" and AUTO in r.seconds and len(r.seconds) > 1
    ]
    rows = {
        "grouped over torch._grouped_mm": ratios("grouped", TORCH),
        "grouped over a dense product": ratios("grouped", DENSE),
        "grouped over the loop": ratios("grouped", LOOP),
        "FP8 by blocks over the best": bests,
        "layer over the loop": ratios("moe", LOOP),
    }
    return {n: {"median": statistics.median(v), "least": min(v), "shapes": len(v)} for n, v in rows.items() if v}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if a contestant was wrong or raised.

    Raises:
        SystemExit: from argparse, for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm", description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--gpu", action="store_true", help="the list for data-centre GPUs, on the current CUDA device")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--shapes", default="", help="only shapes whose name contains one of these words")
    parser.add_argument("--backends", default="", help="only these backends, beside automatic choice")
    parser.add_argument(
        "--targets", action=argparse.BooleanOptionalAction, help="time what the targets compare alone (on a GPU)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=0.0, help="start no further shape after so many seconds")
    parser.add_argument("--check", action="store_true", help="no times: the conformance kit on this device instead")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for the tests: numbers mean nothing")
    given = parser.parse_args(argv)
    device, start = machine.device(parser, "cuda" if given.gpu else "cpu"), time.perf_counter()
    dtype = DTYPES[given.dtype or ("bf16" if given.gpu else "fp32")]
    listed = QUICK_SHAPES if given.quick else GPU_SHAPES if given.gpu else CPU_SHAPES
    words = given.shapes.split(",")
    wanted = [shape for shape in listed if any(word in shape.name for word in words)]
    if not wanted:
        parser.error(f"--shapes {given.shapes}: none of {', '.join(shape.name for shape in listed)}")
    before, facts = machine.load(), machine.about("benchmarks.gemm", device)
    print(machine.describe(facts), f"{dtype}", "", sep="\n", flush=True)
    if given.check:
        names = given.backends.split(",") if given.backends else registry.names("gemm")
        outcomes = conformance(device, dtype, names)
        if given.json:
            given.json.write_text(json.dumps({"about": facts, "cases": outcomes}, indent=1) + "\n")
        return 1 if any(text.startswith("FAILED") for cases in outcomes.values() for text in cases.values()) else 0
    reports: list[Report] = []
    only_targets = given.gpu if given.targets is None else given.targets

    def save() -> None:
        left = [shape.name for shape in wanted[len(reports) :]]
        data = {"about": facts, "dtype": str(dtype).removeprefix("torch."), "targets": targets(reports), "left": left,
                "shapes": [asdict(report) for report in reports]}  # fmt: skip
        if given.json:
            part = given.json.with_suffix(".part")
            part.write_text(json.dumps(data, indent=1) + "\n")
            part.replace(given.json)  # at once: whoever reads it never sees half of it

    save()
    for shape in wanted:
        if given.budget and time.perf_counter() - start > given.budget:
            print(f"the budget of {given.budget:g} s is spent before {shape.name}")
            break
        reports.append(measure(shape, device, dtype, given.rounds, given.backends, only_targets))
        save()
        show(reports[-1])
    for name, found in targets(reports).items():
        print(f"{name}: {found['median']:.3g} at the median, {found['least']:.3g} at least, {found['shapes']} shapes")
    if warning := machine.busy(before, torch.get_num_threads()):
        print(f"warning: {warning}")
    return 1 if any(report.error or report.failed for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
