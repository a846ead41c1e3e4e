"""`make bench`: dense attention on this machine's CPU or GPU, and what a call costs on tiny tensors.

For differences below a microsecond use ``python -m benchmarks.dispatch``, for a GPU's list ``benchmarks.attention``.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from benchmarks import dispatch_contests, shapes, trivial  # noqa: E402
from benchmarks.attention_calls import AUTO, contestants  # noqa: E402
from vllm_accel import attention  # noqa: E402
from vllm_accel.tuning.measure import step  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PREFILL, TRAIN = shapes.named(shapes.CPU_SHAPES, "prefill_512_causal,train_1k")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def _able(shape: shapes.Shape) -> list[str]:
    return [name for name in contestants(shape, shape.make(DTYPE, DEVICE))[0] if name != AUTO]


def _timed(benchmark: Any, shape: shapes.Shape, name: str) -> None:
    inputs = shape.make(DTYPE, DEVICE)
    call = step(contestants(shape, inputs)[0][name], shape, inputs)

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    finished()
    benchmark(finished)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["tflops"] = shape.flops() / benchmark.stats["median"] * 1e-12


@pytest.mark.parametrize("name", _able(PREFILL))
def test_prefill(benchmark: Any, name: str) -> None:
    """A prefill of 512 tokens with 8 heads over 2 key heads, by backend."""
    benchmark.group = PREFILL.name
    _timed(benchmark, PREFILL, name)


@pytest.mark.parametrize("name", _able(TRAIN))
def test_train(benchmark: Any, name: str) -> None:
    """Forward with backward of 1024 tokens with 4 heads, by backend."""
    benchmark.group = TRAIN.name
    _timed(benchmark, TRAIN, name)


def test_hit(benchmark: Any) -> None:
    """An exact hit on tiny tensors, with the real kernel."""
    benchmark.group = "one call on tiny tensors"
    q, k, v = dispatch_contests.qkv(DEVICE, 1)[0]
    with torch.no_grad():
        attention(q, k, v, causal=True)
        benchmark(attention, q, k, v, causal=True)


def test_hit_of_nothing(benchmark: Any) -> None:
    """An exact hit with a kernel that does nothing: the dispatch alone."""
    benchmark.group = "one call on tiny tensors"
    q, k, v = dispatch_contests.qkv(DEVICE, 1)[0]
    with torch.no_grad(), trivial.installed(DEVICE):
        attention(q, k, v, causal=True)
        benchmark(attention, q, k, v, causal=True)


def test_sdpa_by_hand(benchmark: Any) -> None:
    """torch's function with the transposes that (B, S, H, D) tensors need."""
    benchmark.group = "one call on tiny tensors"
    q, k, v = dispatch_contests.qkv(DEVICE, 1)[0]
    with torch.no_grad():
        benchmark(dispatch_contests.by_hand, q, k, v)
