"""Random mixtures of experts of transformers: the same logits and gradients through vllm_accel as through eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from vllm_accel import use_backend  # noqa: E402
from vllm_accel.integrations.transformers_experts import NAME  # noqa: E402
from vllm_accel.ops import moe as moe_ops  # noqa: E402

_SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
_MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "GptOss": {
        "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip


def _model(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_SMALL, **_MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", _MODELS)
def test_same_logits_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(name)
    ids = torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    calls = []
    real = moe_ops._run
    monkeypatch.setattr(moe_ops, "_run", lambda *given: calls.append(1) or real(*given))

    def run(implementation: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.set_experts_implementation(implementation)
        logits = model(ids).logits
        weights = [p for n, p in model.named_parameters() if "experts" in n]
        assert len(weights) >= 4
        return logits.detach(), list(torch.autograd.grad(logits.square().mean(), weights))

    want, want_grads = run("eager")
    found, grads = run(NAME)
    assert bool(calls) is (name != "GptOss")  # whose experts have a gate of their own
    assert want.abs().max() > 1 and (found - want).abs().max() < 1e-4
    for got, ref in zip(grads, want_grads, strict=True):
        assert (got - ref).abs().max() <= 1e-5 + 1e-4 * ref.abs().max()
    with torch.no_grad(), use_backend(gemm="torch_grouped"):
        assert (model(ids).logits - want).abs().max() < 1e-4


def test_nobodys_pairs_add_nothing() -> None:
    experts = _model("Mixtral").model.layers[0].mlp.experts
    experts.config._experts_implementation = NAME
    x, ids = torch.randn(5, 32), torch.tensor([[0, 4], [4, 4], [1, 2], [3, 0], [4, 1]])
    weights = torch.rand(5, 2)
    found = experts(x, ids, weights)
    experts.config._experts_implementation = "eager"
    assert (found - experts(x, ids, weights)).abs().max() < 1e-5 and not found[1].any()
