"""What a mixture-of-experts layer is, in float64 and one token after another; shares no code with the library."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_ACTIVATIONS: dict[str, Any] = {
    "silu": lambda t: t / (1 + torch.exp(-t)),
    "gelu": lambda t: t * 0.5 * (1 + torch.erf(t / math.sqrt(2))),
    "gelu_tanh": lambda t: t * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))),
    "relu": lambda t: t * (t > 0),
}


def moe_oracle(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    bias_gate_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return (T, D): loops over tokens and their experts, computed and left in `dtype`; differentiable."""
    act, experts = _ACTIVATIONS[activation], w_down.shape[0]
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros(x.shape[1], dtype=dtype)
        for j, e in enumerate(topk_ids[t].tolist()):
            if not 0 <= e < experts:
                continue
            hidden = x[t].to(dtype) @ w_gate_up[e].to(dtype)
            if bias_gate_up is not None:
                hidden = hidden + bias_gate_up[e].to(dtype)
            inner = hidden.shape[0] // 2
            out = (act(hidden[:inner]) * hidden[inner:]) @ w_down[e].to(dtype)
            if bias_down is not None:
                out = out + bias_down[e].to(dtype)
            total = total + topk_weights[t, j].to(dtype) * out
        rows.append(total)
    return torch.stack(rows)
