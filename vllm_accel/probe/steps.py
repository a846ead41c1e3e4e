"""What is run of a backend: a few conformance cases, forward and backward, and one call that is timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_accel import gemm, grouped_gemm
from vllm_accel.dispatch.backend import Backend
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.selector import MAX_FIRST_CALL_SECONDS
from vllm_accel.errors import UnsupportedCallError
from vllm_accel.testing import CASES, PAGED_CASES, attention_oracle, check_paged_backend, kernel_call
from vllm_accel.testing.conformance import check_call, check_gradients
from vllm_accel.tuning import timing

#: Conformance cases by the part of a backend that they are about: masks, grouped heads, one query, packed sequences.
DENSE = ("causal", "window_causal", "mask_keys", "decode", "head_128")
VARLEN = ("varlen_causal", "varlen_tail")
PAGED = ("decode", "prefill")
#: Batch, tokens, heads, key heads, head size of the call that is timed.
TIMED = {"cpu": (1, 512, 8, 2, 64), "cuda": (1, 2048, 16, 4, 128)}
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to run. part: of the backend, as `probed.parts_of` names it. run: raises where the result is wrong.

    ``run()`` raises UnsupportedCallError where the backend refuses the call, AssertionError where it is wrong.
    """

    part: str
    name: str
    run: Callable[[], None]


def half(device: Device) -> torch.dtype:
    """Return the 16-bit dtype that a device computes in: bf16 has no tensor cores before Ampere."""
    capability = device.compute_capability
    return torch.float16 if (capability and capability < (8, 0)) or device.type == "mps" else torch.bfloat16


def steps(op: str, backend: Backend, device: Device, where: torch.device) -> Iterator[Step]:
    """List what to run of a backend; nothing for an operation that the probe does not know."""
    dtypes = [half(device), torch.float32]
    seconds = backend.capability.first_call_seconds
    if callable(seconds) or seconds > MAX_FIRST_CALL_SECONDS:
        dtypes = dtypes[:1]  # every dtype is a compilation
    for dtype in dtypes:
        if dtype in backend.capability.dtypes:
            if op == "attention":
                yield from _attention(backend, device, where, dtype)
            elif op == "gemm":
                yield from _gemm(backend, where, dtype)


def _attention(backend: Backend, device: Device, where: torch.device, dtype: torch.dtype) -> Iterator[Step]:
    call = kernel_call(backend, device)
    kind = str(dtype).removeprefix("torch.")
    for case in CASES:
        part = "dense" if case.name in DENSE else "varlen" if case.name in VARLEN else None
        if part is None:
            continue
        forward = replace(case, grad=False)
        yield Step(part, f"{case.name}, {kind}", lambda c=forward: check_call(call, c, dtype=dtype, where=where))  # type: ignore[misc]
        if case.grad:
            name = f"backward of {case.name}, {kind}"
            yield Step("gradients", name, lambda c=case: check_gradients(call, c, dtype=dtype, where=where))  # type: ignore[misc]
    first_mla = next((case.name for case in PAGED_CASES if case.mla), None)
    for paged in PAGED_CASES:
        if paged.name in PAGED or paged.name == first_mla:

            def check(case: Any = paged) -> None:
                found = check_paged_backend(backend, case, dtype=dtype, device=device, where=where)
                if not found.ran:
                    raise UnsupportedCallError(f"{backend.name} refuses {case.name}", {backend.name: found.reasons})

            yield Step("mla" if paged.mla else "paged", f"paged {paged.name}, {kind}", check)


def _gemm(backend: Backend, where: torch.device, dtype: torch.dtype) -> Iterator[Step]:
    """Use the public calls, dense and by groups of rows (one of them empty, one short of the end)."""
    kind = str(dtype).removeprefix("torch.")
    for m, n, k, with_bias in ((33, 48, 64, False), (1, 64, 128, True)):

        def check(m: int = m, n: int = n, k: int = k, with_bias: bool = with_bias, grad: bool = False) -> None:
            def truth(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
                return a @ b if bias is None else a @ b + bias

            shapes = ((m, k), (k, n), *([(n,)] if with_bias else []))
            _check_product(lambda *t: gemm(*t, backend=backend.name), truth, shapes, where, dtype, grad)

        name = f"{m} x {k} x {n}{' + bias' if with_bias else ''}, {kind}"
        yield Step("gemm", name, check)
        yield Step("gradients", f"backward of {name}", lambda check=check: check(grad=True))  # type: ignore[misc]

    def grouped(grad: bool = False) -> None:
        ends = (16, 16, 40)
        offs = torch.tensor(ends, dtype=torch.int32, device=where)

        def truth(a: Tensor, b: Tensor) -> Tensor:
            rows = [a[start:end] @ b[e] for e, (start, end) in enumerate(zip((0, *ends), ends, strict=False))]
            return torch.cat([*rows, a.new_zeros(48 - ends[-1], b.shape[-1])])

        shapes = ((48, 64), (3, 64, 32))
        _check_product(lambda a, b: grouped_gemm(a, b, offs, backend=backend.name), truth, shapes, where, dtype, grad)

    yield Step("grouped", f"three groups, {kind}", grouped)
    yield Step("gradients", f"backward of three groups, {kind}", lambda: grouped(grad=True))


def _check_product(
    call: Callable[..., Tensor], truth: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], where: torch.device,
    dtype: torch.dtype, grad: bool,
) -> None:  # fmt: skip
    """Compare a product, and its gradients where they are asked for, with float64 on the host."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    ours = [t.to(where).requires_grad_(grad) for t in drawn]
    exact = [t.double().requires_grad_(grad) for t in drawn]
    got, want = call(*ours), truth(*exact)
    _compare("the product", got, want.detach(), dtype)
    if grad:
        dout = torch.randn(want.shape, generator=generator).to(dtype)
        found = torch.autograd.grad(got, ours, dout.to(where))
        for name, g, w in zip(
            ("da", "db", "dbias"), found, torch.autograd.grad(want, exact, dout.double()), strict=False
        ):
            _compare(name, g, w, dtype)


def _compare(name: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that a product is as near to float64 as its dtype allows: two roundings of the largest value."""
    assert got.shape == want.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    error = (got.detach().double().cpu() - want).abs().max()
    bound = 4 * torch.finfo(dtype).eps * float(want.abs().max()) + 1e-6
    assert float(error) <= bound, f"{name} is off by {float(error):.3g}, above {bound:.3g}"  # a NaN is not below


def timed(op: str, backend: Backend, device: Device, where: torch.device) -> tuple[float, float] | None:
    """Return the seconds of one prefill and its largest error against float64, None where it is refused."""
    if op != "attention" or where.type not in TIMED:
        return None
    batch, tokens, heads, kv_heads, dim = TIMED[where.type]
    generator = torch.Generator(where).manual_seed(0)
    q, k, v = (
        torch.randn(batch, tokens, n, dim, generator=generator, device=where).to(half(device))
        for n in (heads, kv_heads, kv_heads)
    )
    call = kernel_call(backend, device)
    try:
        with torch.no_grad():
            out = call(q, k, v, causal=True)
    except UnsupportedCallError:
        return None
    want, _ = attention_oracle(q, k, v, causal=True)
    error = float((out.double() - want.to(out.device)).abs().max())
    clock = timing.clock(where)
    with torch.no_grad():
        run = lambda: call(q, k, v, causal=True)  # noqa: E731
        times = max(1, min(20, int(0.02 / max(clock.seconds(run, 1), 1e-6))))
        return statistics.median(clock.seconds(run, times) for _ in range(ROUNDS)), error
