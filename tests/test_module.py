"""The drop-in module: layouts in and out, and vLLM's constructor arguments with vLLM's meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_accel import Attention
from vllm_accel.testing import attention_oracle, attention_varlen_oracle

H, HKV, D = 4, 2, 16


def _qkv(*lead: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*lead, heads, D, generator=g) for heads in (H, HKV, HKV)]


SLOPES, SINKS = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 1.0, 0.0, -1.0])
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "decoder": ({}, {"causal": True}),
    "encoder": ({"causal": False}, {}),
    "sliding": ({"sliding_window": 3}, {"causal": True, "window_size": (2, 0)}),
    "sliding encoder": ({"sliding_window": 3, "causal": False}, {"window_size": (2, 2)}),
    "softcap": ({"logits_soft_cap": 2.0}, {"causal": True, "softcap": 2.0}),
    "no softcap": ({"logits_soft_cap": 0.0}, {"causal": True}),
    "alibi": ({"alibi_slopes": [0.1, 0.2, 0.3, 0.4]}, {"causal": True, "alibi_slopes": SLOPES}),
    "sinks": ({"sinks": SINKS}, {"causal": True, "sinks": SINKS}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_constructor_arguments_mean_what_vllm_means(name: str) -> None:
    given, meant = OPTIONS[name]
    q, k, v = _qkv(2, 9)
    out = Attention(H, D, 0.3, num_kv_heads=HKV, **given)(q, k, v)
    want, _ = attention_oracle(q, k, v, softmax_scale=0.3, **meant)
    assert (out - want).abs().max() < 1e-5


def test_the_result_has_the_layout_of_the_query() -> None:
    q, k, v = _qkv(2, 9)
    module = Attention(H, D, D**-0.5, num_kv_heads=HKV)
    want = module(q, k, v)
    flat = module(*(t.flatten(2) for t in (q, k, v)))
    assert flat.shape == (2, 9, H * D) and torch.equal(flat, want.flatten(2))
    mixed = module(q.flatten(2), k, v)
    assert torch.equal(mixed, flat)


@pytest.mark.parametrize("flat", [False, True])
def test_packed_sequences(flat: bool) -> None:
    q, k, v = _qkv(9)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    given = [t.flatten(1) if flat else t for t in (q, k, v)]
    out = Attention(H, D, 0.25, num_kv_heads=HKV)(*given, cu_seqlens=cu, max_seqlen=5)
    want, _ = attention_varlen_oracle(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, softmax_scale=0.25)
    assert (out - (want.flatten(1) if flat else want)).abs().max() < 1e-5


def test_parameters_move_and_train() -> None:
    module = Attention(H, D, 0.25, num_kv_heads=HKV, sinks=torch.nn.Parameter(torch.zeros(H)), alibi_slopes=[1.0] * H)
    assert [name for name, _ in module.named_parameters()] == ["sinks"] and not list(module.state_dict())[1:]
    q, k, v = _qkv(1, 5)
    module(q, k, v).square().sum().backward()
    assert module.sinks is not None and module.sinks.grad is not None and module.sinks.grad.abs().sum() > 0
    assert module.double().alibi_slopes is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_kv_heads": 3}, "multiple of num_kv_heads=3"),
        ({"head_size": 0}, "head_size=0"),
        ({"sliding_window": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(**{"num_heads": 4, "head_size": 16, "scale": 0.25, **arguments})


def test_tensors_that_do_not_fit() -> None:
    module = Attention(H, D, 0.25, num_kv_heads=HKV)
    q, k, v = _qkv(2, 9)
    with pytest.raises(ValueError, match="key must be"):
        module(q, k[:, :, :1], v)
    with pytest.raises(ValueError, match="need max_seqlen"):
        module(q[0], k[0], v[0], cu_seqlens=torch.tensor([0, 9], dtype=torch.int32))
