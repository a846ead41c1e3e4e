"""Check our grouped products on a GPU and time their tiles: ``python -m benchmarks.gpu_gemm --out DIR``.

First every option on small products against float64, in several processes that compile side by side; then the shapes
of Mixtral and DeepSeek-V3 with a few tiles each, beside PyTorch's own. Whatever fails is written down and the rest goes
on; DIR/gemm.json is rewritten after each step.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_gemm_cases as cases
from benchmarks import machine
from benchmarks.gpu_gemm_cases import CASES, TIMED, Case, Inputs

WORKERS, ROUNDS = 10, 11
Engine = Callable[..., Callable[[], Tensor]]  # (case, inputs[, tile]) -> a call that returns the product


def triton_call(
    case: Case, given: Inputs, tile: tuple[int, ...] | None = None, tma: bool = True
) -> Callable[[], Tensor]:
    """Return our Triton kernel on these inputs, as a backend would call it."""
    from vllm_accel.kernels.triton.grouped_gemm_bound import BoundGemm

    plain, described, tensors = launches(case, given, tile, tma)
    bound = BoundGemm(plain, described)

    def call() -> Tensor:
        out = torch.empty(given.out_shape, dtype=case.out, device=given.a.device)
        bound((*tensors[:2], out, *tensors[3:]))
        return out

    return call


def launches(case: Case, given: Inputs, tile: tuple[int, ...] | None, tma: bool) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return the launch with pointers, the one with descriptors (or None), and their tensors."""
    from vllm_accel.kernels.triton import grouped_gemm_launch as gemm
    from vllm_accel.kernels.triton.tiles import Tile

    arch, sms = _gpu()
    native = case.native and gemm.natively_fp8(arch)
    rows = max(1, given.a.shape[-2] // (len(case.sizes) if case.form == "rows" else 1))
    out = torch.empty(given.out_shape, dtype=case.out, device=given.a.device)
    plain, described = gemm.gemm_launches(
        given.a, given.b, out, arch=arch, sm_count=sms, rows=rows, tile=Tile(*tile) if tile else None,
        allow_tma=tma, offs=given.offs, bias=given.bias, gather=given.gather, native_fp8=native,
        a_scale=None if given.a_factors is None else gemm.Scale(given.a_factors),
        b_scale=None
        if given.b_factors is None
        else gemm.Scale(given.b_factors, 128 if case.scaling == "blocks" else 1),
    )  # fmt: skip
    a, b = gemm.as_read(given.a, given.b, native)
    return plain, described, (a, b, out, given.offs, given.bias, given.gather, given.a_factors, given.b_factors)


@functools.cache
def _gpu() -> tuple[str, int]:
    if not torch.cuda.is_available():
        return "sm_90", 132
    found = torch.cuda.get_device_properties(0)
    return f"sm_{found.major}{found.minor}", found.multi_processor_count


def engines() -> dict[str, Engine]:
    """Return what is checked and timed, by name."""
    return {"triton": triton_call, "triton without TMA": functools.partial(triton_call, tma=False)}


def check(engine: str, case: Case) -> dict[str, Any]:
    """Compare one product with float64, in a process of its own pool."""
    started = time.perf_counter()
    found: dict[str, Any] = {"engine": engine, "case": str(case)}
    try:
        given = cases.draw(case, torch.device("cuda"))
        made = engines()[engine](case, given)()
        torch.cuda.synchronize()
        found["error"], found["limit"] = cases.error(made, cases.exact(case, given)), cases.NEAR[case.out]
        zeros = case.form != "rows" or not bool(made[sum(case.sizes) :].any())
        found["ok"] = found["error"] <= found["limit"] and zeros
    except Exception as failure:
        found.update(ok=False, failure=_short(failure))
    return {**found, "seconds": round(time.perf_counter() - started, 2)}


def warm(case: Case, tile: tuple[int, ...]) -> str:
    """Compile what a timed call will launch, without memory for it; return what failed."""
    from vllm_accel.kernels.triton.launch import compile_options

    try:
        plain, described, _ = launches(case, meta(case), tile, True)
        launch = described or plain
        launch.fn.warmup(
            *launch.args,
            grid=launch.grid,
            **launch.constexprs,
            **compile_options(launch),
        )
    except Exception as failure:
        return _short(failure)
    return ""


def meta(case: Case) -> Inputs:
    """Return the tensors of a case without their numbers."""
    groups, tokens = len(case.sizes), sum(case.sizes) + case.past
    empty = functools.partial(torch.empty, device="meta")
    offs = None if case.form == "batch" else empty(groups, dtype=torch.int32)
    if case.form == "depth":
        a, b = empty(tokens, case.k, dtype=case.dtype).t(), empty(tokens, case.n, dtype=case.dtype)
        return Inputs(a, b, offs, None, None, None, None, (groups, case.k, case.n))
    shape = (groups, case.k, case.n) if case.along == "n" else (groups, case.n, case.k)
    b = empty(shape, dtype=case.dtype)
    b = b if case.along == "n" else b.transpose(1, 2)
    rows = tokens if case.form == "rows" else case.sizes[0]
    a = empty((rows, case.k) if case.form == "rows" else (groups, rows, case.k), dtype=case.dtype)
    blocks, columns = (-(-case.k // 128), -(-case.n // 128)) if case.scaling == "blocks" else (1, case.n)
    factors = (empty(1, rows, blocks), empty(groups, blocks, columns)) if case.scaling else (None, None)
    return Inputs(a, b, offs, None, None, factors[0], factors[1], (*a.shape[:-1], case.n))


def sample_error(case: Case, given: Inputs, made: Tensor) -> float:
    """Compare some rows of a large product with float64."""
    if case.form == "depth":
        end = case.sizes[0]
        return cases.error(made[0, :64], given.a[:64, :end].double() @ given.b[:end].double())
    worst = 0.0
    for e in {0, len(case.sizes) // 2, len(case.sizes) - 1}:
        first = sum(case.sizes[:e]) if case.form == "rows" else 0
        count = min(case.sizes[e], 24)
        rows = slice(first, first + count)
        a = given.a[rows] if case.form == "rows" else given.a[e, rows]
        of_a, of_b = given.a_factors, given.b_factors
        if of_a is not None and of_b is not None and case.scaling != "tensor":
            of_a, of_b = of_a[:, rows], of_b[e : e + 1]
        part = Case("batch", (count,), case.k, case.n, case.dtype, case.scaling)
        small = Inputs(a[None], given.b[e : e + 1], None, None, None, of_a, of_b, (1, count, case.n))
        got = made[rows] if case.form == "rows" else made[e, rows]
        worst = max(worst, cases.error(got, cases.exact(part, small)[0])) if count else worst
    return worst


def time_calls(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Return the median time of each in microseconds; they take turns, so that a hot chip slows all of them."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in "be"]
            call()  # the chip is busy when the clock starts
            events[0].record()
            call()
            events[1].record()
            torch.cuda.synchronize()
            taken[name].append(events[0].elapsed_time(events[1]) * 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def contest(timed: cases.Timed) -> dict[str, Any]:
    """Check and time every contestant of one shape."""
    case = timed.case
    given = cases.draw(case, torch.device("cuda"))
    made: dict[str, Any] = {"name": timed.name, "case": str(case), "refused": {}, "error": {}}
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, build in _contestants(timed, given):
        try:
            call = build()
            made["error"][name] = sample_error(case, given, call())
            torch.cuda.synchronize()
            if made["error"][name] > cases.NEAR[case.out]:
                made["refused"][name] = f"wrong by {made['error'][name]:.3g}"
            else:
                calls[name] = call
        except Exception as failure:
            made["refused"][name] = _short(failure)
    for name, call in cases.torch_rivals(case, given).items():
        try:
            call()
            calls[name] = call
        except Exception as failure:
            made["refused"][name] = _short(failure)
    times = time_calls(calls)
    made["us"] = {name: round(us, 1) for name, us in times.items()}
    made["tflops"] = {name: round(cases.flops(case) / us / 1e6, 1) for name, us in times.items()}
    return made


def _contestants(timed: cases.Timed, given: Inputs) -> Iterator[tuple[str, Callable[[], Callable[[], Tensor]]]]:
    for tile in timed.tiles:
        yield f"triton {list(tile)}", functools.partial(triton_call, timed.case, given, tile)
    for name, engine in engines().items():
        if not name.startswith("triton"):
            yield name, functools.partial(engine, timed.case, given)


def _short(failure: BaseException) -> str:
    last = traceback.extract_tb(failure.__traceback__)[-1:]
    where = f" at {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
    return f"{type(failure).__name__}: {str(failure)[-400:]}{where}"


class Run:
    """What was found so far, and where it is written."""

    def __init__(self, out: Path, budget: float) -> None:
        self.path, self.end = out / "gemm.json", time.monotonic() + budget
        out.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = {
            "about": machine.about("benchmarks.gpu_gemm", torch.device("cuda")), "checks": [], "timed": []
        }  # fmt: skip

    def left(self) -> float:
        """Return the seconds that remain."""
        return self.end - time.monotonic()

    def write(self) -> None:
        """Write everything found so far."""
        self.path.write_text(json.dumps(self.found, indent=1, default=str), encoding="utf-8")


def check_and_compile(run: Run) -> None:
    """Run every check and compile what will be timed, side by side."""
    jobs = [(name, case) for name in engines() for case in CASES if "TMA" not in name or case.native]
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(WORKERS, mp_context=context)
    checks = [pool.submit(check, *job) for job in jobs]
    compiles = [pool.submit(warm, timed.case, tile) for timed in TIMED for tile in timed.tiles]
    try:
        for done in as_completed(checks, timeout=max(10.0, run.left() * 0.6)):
            found = done.result()
            run.found["checks"].append(found)
            if not found["ok"]:
                print("WRONG", found, flush=True)
        for compiled in as_completed(compiles, timeout=max(10.0, run.left() * 0.5)):
            if compiled.result():
                print("does not compile:", compiled.result(), flush=True)
    finally:
        good = sum(found["ok"] for found in run.found["checks"])
        print(f"{good} of {len(jobs)} checks are right; {run.left():.0f} s left", flush=True)
        run.write()
        pool.shutdown(wait=False, cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then time, within the budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_gemm", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for gemm.json")
    parser.add_argument("--budget", type=float, default=180.0, help="seconds in all (180)")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and run nothing")
    asked = parser.parse_args(argv)
    if asked.dry_run:
        for name in engines():
            print(f"check {name}: {len(CASES)} products")
        for timed in TIMED:
            print(f"time {timed.name}: {timed.case}, tiles {[list(tile) for tile in timed.tiles]}")
        return 0
    if not torch.cuda.is_available():
        parser.error("this needs a GPU; --dry-run lists what it would do")
    run = Run(asked.out, asked.budget)
    try:
        check_and_compile(run)
    except Exception as failure:
        print("checks stopped:", _short(failure), flush=True)
    for timed in TIMED:
        if run.left() < 8:
            print(f"no time for {timed.name}", flush=True)
            continue
        try:
            found = contest(timed)
            print(timed.name, json.dumps(found["us"]), json.dumps(found["refused"]), flush=True)
            run.found["timed"].append(found)
        except Exception as failure:
            print(timed.name, "failed:", _short(failure), flush=True)
            run.found["timed"].append({"name": timed.name, "failure": _short(failure)})
        torch.cuda.empty_cache()
        run.write()
    return 0 if all(found["ok"] for found in run.found["checks"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
