"""Hugging Face transformers: importing this module makes ``experts_implementation="vllm_accel"`` work.

>>> import vllm_accel.integrations.transformers_experts
>>> model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="vllm_accel")
>>> model.set_experts_implementation("vllm_accel")        # or later

For every model whose experts go through transformers' `ExpertsInterface` (transformers 5): gated or not, with biases,
weights stored either way round, gates of their own (gpt-oss). `vllm_accel.use_backend(gemm=...)` and
`VLLM_ACCEL_GEMM_BACKEND` choose the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe as transformers_moe

from vllm_accel.kernels.torch.moe import mixture
from vllm_accel.ops.gemm import grouped_gemm
from vllm_accel.ops.moe import fused_moe

#: What to write for `experts_implementation`.
NAME = "vllm_accel"

#: transformers' activation modules by class, as `fused_moe` names them.
_ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "ReLU": "relu",
}  # fmt: skip


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts of a transformers model: hidden_states (T, D), the rest (T, k); returns (T, D).

    Raises:
        AttributeError: experts that lack what transformers' decorator promises.
    """
    experts: Any = module
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    weights = top_k_weights if top_k_weights.dtype in (torch.float32, tokens.dtype) else top_k_weights.float()
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    first, second = (_oriented(experts, name) for name in names)
    biases = [_bias(experts, name) if experts.has_bias else None for name in names]
    activation = _plain_activation(experts)
    if activation is not None:
        out = fused_moe(
            tokens, first, second, weights, top_k_index, activation=activation, bias_gate_up=biases[0],
            bias_down=biases[1],
        )  # fmt: skip
        return out.view(hidden_states.shape)

    def by(matrix: Tensor, bias: Tensor | None, after: Callable[[Tensor], Tensor] | None = None) -> Any:
        def product(rows: Tensor, ends: Tensor, order: Tensor) -> Tensor:
            found = grouped_gemm(rows, matrix, ends, bias)
            return found if after is None else after(found)

        return product

    between = experts._apply_gate if experts.has_gate else experts.act_fn
    after = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
    out = mixture(
        tokens, weights, top_k_index, second.shape[0], by(first, biases[0]), between, by(second, biases[1], after)
    )
    return out.view(hidden_states.shape)


def _oriented(experts: Any, name: str) -> Tensor:
    """Return weights as (E, in, out), a view."""
    weights: Tensor = getattr(experts, name)
    return weights if experts.is_transposed else weights.transpose(-1, -2)


def _bias(experts: Any, name: str) -> Tensor:
    bias: Tensor = getattr(experts, f"{name}_bias")
    return bias


def _plain_activation(experts: Any) -> str | None:
    """Return the activation that `fused_moe` knows, None where the experts do something else between their products."""
    own_gate = type(experts)._apply_gate is not transformers_moe._default_apply_gate
    other = not experts.has_gate or not getattr(experts, "is_concatenated", True)
    if own_gate or other or getattr(experts, "has_post_expert_norm", False):
        return None
    name = type(experts.act_fn).__name__
    if name == "GELU" and isinstance(experts.act_fn, nn.GELU):
        return "gelu_tanh" if experts.act_fn.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(name)


transformers_moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
