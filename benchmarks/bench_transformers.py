"""Padded batches of transformers models on the CPU: packed sequences against a mask of keys.

    make bench ARGS="-k padding"

The numbers behind `MIN_SAVED_KEYS` in vllm_accel/integrations/transformers_masks.py.
"""

from __future__ import annotations

import types
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vllm_accel.integrations import transformers_masks  # noqa: E402
from vllm_accel.integrations.transformers import attention_forward  # noqa: E402

# (batch, longest, heads, key heads, head size, causal); the shortest length is given as a part of the longest
SHAPES = {
    "MiniLM": (32, 128, 12, 12, 32, False),
    "BERT": (16, 256, 12, 12, 64, False),
    "Llama": (8, 512, 8, 2, 64, True),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Two cores that others use as well make many short parallel regions unmeasurable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "mask of keys"])
@pytest.mark.parametrize("shortest", [0.05, 0.6, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_padding(benchmark: Any, monkeypatch: pytest.MonkeyPatch, shape: str, shortest: float, packed: bool) -> None:
    batch, longest, heads, kv_heads, head_dim, causal = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(int(shortest * longest), longest + 1, (batch,), generator=generator)
    lengths[0] = longest
    q = torch.randn(batch, heads, longest, head_dim, generator=generator)
    k = torch.randn(batch, kv_heads, longest, head_dim, generator=generator)
    v = torch.randn(batch, longest, kv_heads, head_dim, generator=generator).transpose(1, 2)
    monkeypatch.setattr(transformers_masks, "MIN_SAVED_KEYS", 0 if packed else longest)
    mask = transformers_masks.build_mask(
        batch_size=batch,
        q_length=longest,
        kv_length=longest,
        attention_mask=torch.arange(longest) >= longest - lengths[:, None],  # padding on the left
        allow_is_causal_skip=causal,
        allow_is_bidirectional_skip=not causal,
        config=types.SimpleNamespace(),
    )
    assert isinstance(mask, transformers_masks.Mask)
    assert (mask.rows is not None) == packed
    benchmark.extra_info["saved keys"] = round(longest - lengths.square().sum().item() / (batch * longest))
    layer = torch.nn.Module().eval()
    with torch.no_grad():
        benchmark(attention_forward, layer, q, k, v, mask)
