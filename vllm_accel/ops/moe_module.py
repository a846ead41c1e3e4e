"""`MoE`: a mixture-of-experts layer with its router, to drop into model code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_accel.ops.moe import fused_moe
from vllm_accel.ops.moe_arguments import ACTIVATIONS


class MoE(nn.Module):
    """Route each token to the experts with the largest router logits and sum what they say.

    Args:
        hidden_size: D. intermediate_size: I of each expert. num_experts: E. top_k: experts of a token.
        activation: of the gate, as `fused_moe`. normalize: the weights of a token's experts sum to 1 (Mixtral,
            Qwen3-MoE with norm_topk_prob); else they are its softmax over all experts.
        bias: the experts have biases. backend: as `fused_moe`. device, dtype: of the parameters.

    Parameters: ``router`` (E, D), ``w_gate_up`` (E, D, 2I) with the gate first, ``w_down`` (E, I, D), and with `bias`
    ``bias_gate_up`` (E, 2I), ``bias_down`` (E, D).

    Raises:
        ValueError: sizes below 1, top_k above num_experts, or an unknown activation.
    """

    bias_gate_up: nn.Parameter | None
    bias_down: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "silu",
        normalize: bool = True,
        bias: bool = False,
        backend: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(hidden_size, intermediate_size, num_experts, top_k) < 1 or top_k > num_experts:
            raise ValueError(
                f"hidden_size={hidden_size}, intermediate_size={intermediate_size}, num_experts={num_experts}, "
                f"top_k={top_k}: all at least 1, top_k at most num_experts"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.top_k, self.activation, self.normalize, self.backend = top_k, activation, normalize, backend
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = 2 * intermediate_size
        self.router = nn.Parameter(torch.empty(num_experts, hidden_size, **made))
        self.w_gate_up = nn.Parameter(torch.empty(num_experts, hidden_size, inner, **made))
        self.w_down = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size, **made))
        biases = {"bias_gate_up": inner, "bias_down": hidden_size}
        for name, size in biases.items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_experts, size, **made)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as `nn.Linear` does: uniform within one over the square root of the inputs; biases 0."""
        for weights, inputs in ((self.router, self.router.shape[1]), (self.w_gate_up, self.w_gate_up.shape[1]),
                                (self.w_down, self.w_down.shape[1])):  # fmt: skip
            nn.init.uniform_(weights, -(inputs**-0.5), inputs**-0.5)
        for bias in (self.bias_gate_up, self.bias_down):
            if bias is not None:
                nn.init.zeros_(bias)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return topk_weights fp32 and topk_ids (T, k) of tokens (T, D)."""
        logits = nn.functional.linear(x, self.router)
        weights, ids = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return (weights / weights.sum(-1, keepdim=True) if self.normalize else weights), ids

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x (..., D), in x's shape."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(tokens)
        out = fused_moe(
            tokens, self.w_gate_up, self.w_down, weights, ids, activation=self.activation,
            bias_gate_up=self.bias_gate_up, bias_down=self.bias_down, backend=self.backend,
        )  # fmt: skip
        return out.view(x.shape)

    def extra_repr(self) -> str:
        """Describe the layer in its repr."""
        experts, hidden, inner = self.w_gate_up.shape
        return f"{hidden} -> {inner // 2}, top {self.top_k} of {experts}, {self.activation}"
