"""Each correction of the interpreter: right with it, wrong or impossible without it. The measure is torch."""

from __future__ import annotations

from collections.abc import Callable

import patches
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

N = 32
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


@triton.jit
def add_kernel(X, Y, Out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Out + i, tl.load(X + i) + tl.load(Y + i))


@triton.jit
def less_kernel(X, Y, Out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Out + i, (tl.load(X + i) < tl.load(Y + i)).to(tl.int32))


@triton.jit
def maximum_kernel(X, Y, Out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Out + i, tl.maximum(tl.load(X + i), -tl.load(Y + i)))


@triton.jit
def clamp_kernel(X, Out, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(Out + i, tl.clamp(x, (x * 0 - 0.5).to(x.dtype), (x * 0 + 0.25).to(x.dtype)))


@triton.jit
def fma_kernel(X, Y, Out, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(Out + i, tl.fma(x, tl.load(Y + i), x))


@triton.jit
def cast_kernel(X, Out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Out + i, tl.load(X + i).to(Out.dtype.element_ty))


@triton.jit
def truncate_kernel(X, Out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Out + i, tl.load(X + i).to(Out.dtype.element_ty, fp_downcast_rounding="rtz"))


@triton.jit
def full_kernel(Out, N: tl.constexpr):
    tl.store(Out + tl.arange(0, N), tl.full([N], -1.5, tl.bfloat16))


@triton.jit
def reduce_kernel(X, Out, N: tl.constexpr):
    x = tl.load(X + tl.arange(0, N))
    tl.store(Out, tl.sum(x, 0))
    tl.store(Out + 1, tl.min(x, 0))


@triton.jit
def cumsum_kernel(X, Out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Out + i, tl.cumsum(tl.load(X + i), 0, reverse=True))


@triton.jit
def dot_kernel(X, Y, Out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(Out + at, tl.dot(tl.load(X + at), tl.load(Y + at)))


@triton.jit
def host_descriptor_kernel(X, Out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(Out + at, X.load([0, 0]) * 0.5)


@triton.jit
def loop_kernel(Bound, n, Out):
    steps = 0
    for _ in range(tl.load(Bound)):
        steps += 1
    for _ in tl.range(n // 2, tl.cdiv(n, 1)):
        steps += 10
    tl.store(Out, steps)


def ramp(dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.linspace(-1.3, 1.7, N) * scale).to(dtype)


def square(dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(N, N, generator=torch.Generator().manual_seed(seed)).to(dtype)


X, Y = ramp(BF16, 0.7), ramp(BF16).flip(0)
WIDE = X.float() * 3.14159
SPREAD = torch.linspace(-300, 300, 64)  # some round up to the next power of two: the carry gets lost
BIG = torch.tensor([0.0, 1e-3, -1e-3, 447.0, 449.0, -1e4, 1.9999, 0.124])
INTEGERS = torch.arange(-16, 16, dtype=torch.int32) * 77
# Whole numbers: their sums are exact, in whatever order a machine's BLAS adds.
A, B = (square(torch.float32, seed).mul(8).round().to(BF16) for seed in (1, 2))
BOUND = torch.tensor([7], dtype=torch.int32)

#: patch without which it goes wrong, kernel, arguments before the output and the constexpr, what has to come out.
CASES: list[tuple[str, Callable[..., None], tuple[object, ...], Tensor]] = [
    ("dot", dot_kernel, (A, B), A.float() @ B.float()),
    ("binary", add_kernel, (X, Y), X + Y),
    ("binary", less_kernel, (X, Y), (X < Y).int()),
    ("binary", maximum_kernel, (X, Y), torch.maximum(X, -Y)),
    ("none", clamp_kernel, (X,), X.clamp(-0.5, 0.25)),
    ("fma", fma_kernel, (X, Y), (X.float() * Y.float() + X.float()).to(BF16)),
    ("cast", cast_kernel, (WIDE,), WIDE.to(BF16)),
    ("cast", cast_kernel, (INTEGERS,), INTEGERS.to(BF16)),
    ("cast", cast_kernel, (WIDE.half(),), WIDE.half().to(BF16)),
    ("fp_to_fp", cast_kernel, (SPREAD,), SPREAD.to(E4M3)),
    ("fp_to_fp", cast_kernel, (BIG,), BIG.clamp(-448, 448).to(E4M3)),
    ("fp_to_fp", cast_kernel, (WIDE,), WIDE.to(E5M2)),
    ("fp_to_fp", cast_kernel, (BIG * 100,), (BIG * 100).clamp(-57344, 57344).to(E5M2)),
    ("fp_to_fp", cast_kernel, (torch.tensor([float("nan"), 2.0]).to(E4M3),), torch.tensor([float("nan"), 2.0])),
    ("reduce", reduce_kernel, (X,), torch.stack([X.float().sum(), X.float().min()]).to(BF16)),
    ("none", cumsum_kernel, (X,), X.float().flip(0).cumsum(0).flip(0).to(BF16)),
    ("constant", full_kernel, (), torch.full((N,), -1.5, dtype=BF16)),
    ("constant", host_descriptor_kernel, (A,), A * 0.5),
    ("index", loop_kernel, (BOUND, 9), torch.tensor([57], dtype=torch.int32)),
]
NEEDED = [case for case in CASES if case[0] in patches.PATCHES]


def launch(kernel: Callable[..., None], given: tuple[object, ...], like: Tensor) -> Tensor:
    out = torch.zeros_like(like)
    if kernel is host_descriptor_kernel:
        given = (TensorDescriptor(given[0], [N, N], [N, 1], [N, N]),)
    size = () if kernel is loop_kernel else (max(t.shape[0] for t in (*given, like) if isinstance(t, Tensor)),)
    kernel[(1,)](*given, out, *size)  # type: ignore[index]
    return out


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.double().nan_to_num(nan=12345.0), b.double().nan_to_num(nan=12345.0))


@pytest.mark.parametrize(("name", "kernel", "given", "want"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_the_interpreter_is_right(
    name: str, kernel: Callable[..., None], given: tuple[object, ...], want: Tensor
) -> None:
    assert equal(launch(kernel, given, want), want)


@pytest.mark.parametrize(("name", "kernel", "given", "want"), NEEDED, ids=lambda v: getattr(v, "__name__", ""))
def test_each_patch_is_needed(name: str, kernel: Callable[..., None], given: tuple[object, ...], want: Tensor) -> None:
    with patches.lifted(name):
        try:
            got = launch(kernel, given, want)
        except InterpreterError:
            return
    assert not equal(got, want), f"this Triton is right without {name!r}: drop the patch"


def test_every_patch_has_a_case() -> None:
    assert {case[0] for case in CASES} == patches.PATCHES.keys() | {"index", "none"}


def test_rounding_towards_zero_stays() -> None:
    want = (WIDE.view(torch.int32) & ~0xFFFF).view(torch.float32).to(BF16)
    assert equal(launch(truncate_kernel, (WIDE,), want), want)
    assert not equal(want, WIDE.to(BF16))


def test_descriptor_loads_of_bits_are_padded_with_zeros() -> None:
    for dtype in (BF16, E4M3):
        x = square(dtype, 3)
        out = torch.ones(N, N, dtype=torch.float32)
        padded_kernel[(1,)](x, out, N)
        want = x.float()
        want[N - 5 :] = 0
        assert torch.equal(out, want)


@triton.jit
def padded_kernel(X, Out, N: tl.constexpr):
    descriptor = tl.make_tensor_descriptor(X, [N - 5, N], [N, 1], [N, N])
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(Out + at, descriptor.load([0, 0]).to(tl.float32))
