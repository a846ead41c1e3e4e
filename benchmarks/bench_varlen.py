"""`make bench`: packed sequences of very different lengths against the same tokens padded to the longest."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from benchmarks import shapes  # noqa: E402
from benchmarks.attention_calls import AUTO, contestants  # noqa: E402
from vllm_accel import attention  # noqa: E402
from vllm_accel.tuning.measure import step  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
(MIX,) = shapes.named(shapes.CPU_SHAPES, "varlen_mix")


def _finished(call: Any) -> Any:
    def run() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    run()
    return run


@pytest.mark.parametrize("name", [name for name in contestants(MIX, MIX.make(DTYPE, DEVICE))[0] if name != AUTO])
def test_packed(benchmark: Any, name: str) -> None:
    benchmark.group = MIX.name
    inputs = MIX.make(DTYPE, DEVICE)
    benchmark(_finished(step(contestants(MIX, inputs)[0][name], MIX, inputs)))


def test_padded_with_a_key_mask(benchmark: Any) -> None:
    benchmark.group = MIX.name
    lengths = torch.tensor([n for n, _ in MIX.lengths], device=DEVICE)
    longest = int(lengths.max())
    q, k, v = (
        torch.randn(len(lengths), longest, heads, MIX.head_dim, device=DEVICE, dtype=DTYPE)
        for heads in (MIX.heads, MIX.kv_heads, MIX.kv_heads)
    )
    mask = (torch.arange(longest, device=DEVICE) < lengths[:, None])[:, None, None, :]
    with torch.no_grad():
        benchmark(_finished(lambda: attention(q, k, v, causal=True, attn_bias=mask)))
