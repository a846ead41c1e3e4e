"""One product of `gpu_gemm_cases` on our kernels and on PyTorch's: checked with float64, compiled ahead, timed."""

from __future__ import annotations

import functools
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_gemm_cases as cases
from benchmarks.gpu_gemm_cases import Case, Inputs, Timed

ROUNDS = 9
DEVICE = torch.device("cuda")
#: Names a directory of prebuilt CUTLASS libraries to processes of the run.
LIBRARIES = "GPU_GEMM_LIBRARIES"
Engine = Callable[..., Callable[[], Tensor]]  # (case, inputs[, tile]) -> a call that returns the product


class Refused(Exception):
    """An engine does not take a case; the reason."""


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

    arch, sms = gpu()
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
def gpu() -> tuple[str, int]:
    if not torch.cuda.is_available():
        return "sm_90", 132
    found = torch.cuda.get_device_properties(0)
    return f"sm_{found.major}{found.minor}", found.multi_processor_count


def cutlass_call(case: Case, given: Inputs) -> Callable[[], Tensor]:
    """Return our CUTLASS kernel on these inputs.

    Raises:
        Refused: a case that it does not take, or a kernel that is not built.
    """
    from vllm_accel.kernels.cutlass import build, library

    arch, sms = gpu()
    element = {(torch.bfloat16, ""): "bf16", (torch.float16, ""): "fp16", (cases.E4M3, "blocks"): "e4m3"}
    kind = element.get((case.dtype, case.scaling))
    step = 128 if kind == "e4m3" else 8
    if kind is None or case.form != "rows" or case.gather or case.bias or not case.native:
        raise Refused("takes 16-bit rows, and e4m3 rows by blocks, without bias and gather")
    if case.k % step or case.n % step or (kind == "e4m3" and (arch != "sm_90" or case.along == "n")):
        raise Refused("needs copies for these sizes and strides, or sm_90 for e4m3")
    wanted = build.variant(arch, kind, case.along == "k", given.a.shape[0] <= 64 * len(case.sizes))
    carried = Path(os.environ.get(LIBRARIES, ""), f"{wanted}.so")
    path = carried if carried.is_file() else build.path_of(wanted)
    if not path.is_file():
        raise Refused(f"{wanted} is not built")
    launch = library.load(path)
    of_a = None if given.a_factors is None else given.a_factors[0].contiguous()
    of_b = None if given.b_factors is None else given.b_factors.transpose(1, 2).contiguous()
    assert given.offs is not None
    offs = given.offs

    def call() -> Tensor:
        out = torch.empty(given.out_shape, dtype=case.out, device=given.a.device)
        launch(given.a, given.b, out, offs, of_a, of_b, sms)
        return out

    return call


def engines() -> dict[str, Engine]:
    """Return what is checked and timed, by name."""
    without = functools.partial(triton_call, tma=False)
    return {"triton": triton_call, "cutlass": cutlass_call, "triton without TMA": without}


def check(engine: str, case: Case) -> dict[str, Any]:
    """Compare one product with float64, in a process of its own pool."""
    started = time.perf_counter()
    found: dict[str, Any] = {"engine": engine, "case": str(case)}
    try:  # what else is raised, benchmarks.workers reports, and replaces a process whose context is lost
        given = cases.draw(case, DEVICE)
        made = engines()[engine](case, given)()
        found["error"], found["limit"] = cases.error(made, cases.exact(case, given)), cases.NEAR[case.out]
        zeros = case.form != "rows" or not bool(made[sum(case.sizes) :].any())
        found["ok"] = found["error"] <= found["limit"] and zeros
    except Refused as refusal:
        found.update(ok=True, refused=str(refusal))
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


def contest(timed: Timed, cutlass: bool) -> dict[str, Any]:
    """Check and time every contestant of one shape; what does not take it, fails or is wrong is in "refused"."""
    case = timed.case
    given = cases.draw(case, DEVICE)
    made: dict[str, Any] = {"name": timed.name, "case": str(case), "refused": {}, "error": {}}
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, build in _contestants(timed, given, cutlass):
        try:
            call = build()
            made["error"][name] = sample_error(case, given, call())
            if made["error"][name] > cases.NEAR[case.out]:
                made["refused"][name] = f"wrong by {made['error'][name]:.3g}"
            else:
                calls[name] = call
        except Refused as refusal:
            made["refused"][name] = str(refusal)
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


def _contestants(
    timed: Timed, given: Inputs, cutlass: bool
) -> Iterator[tuple[str, Callable[[], Callable[[], Tensor]]]]:
    for tile in timed.tiles:
        yield f"triton {list(tile)}", functools.partial(triton_call, timed.case, given, tile)
    if cutlass:
        yield "cutlass", functools.partial(cutlass_call, timed.case, given)


def _short(failure: BaseException) -> str:
    last = traceback.extract_tb(failure.__traceback__)[-1:]
    where = f" at {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
    return f"{type(failure).__name__}: {str(failure)[-400:]}{where}"
