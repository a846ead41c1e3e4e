"""A mixture of experts around two grouped products: route, permute, activate, combine. Nothing is read on the host.

    route(topk_ids) -> order, ends -> x[order] -> product -> activation -> product -> combine

T tokens, k experts a token, E experts, D hidden size, I inner size. Ids outside of 0..E-1 sort behind all groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: What lies between the two products, of the gate.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
}


class Route(NamedTuple):
    """Where token and expert pairs go.

    order: int64 (T * k,), pairs in the order of their experts. place: int64 (T * k,), its inverse.
    ends: int32 (E,), where each expert's rows end. valid: bool (T, k), pairs that belong to an expert.
    """

    order: Tensor
    place: Tensor
    ends: Tensor
    valid: Tensor


def route(topk_ids: Tensor, num_experts: int) -> Route:
    """Sort the pairs of (T, k) ids by expert, those of one expert in the order of their tokens."""
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    ids = torch.where(valid, topk_ids, num_experts).flatten()
    ids, order = torch.sort(ids, stable=True)
    experts = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    return Route(order, place, ends, valid)


def gated(activation: str) -> Callable[[Tensor], Tensor]:
    """Return what makes (rows, 2I) of gate and up into (rows, I)."""
    act = ACTIVATIONS[activation]

    def apply(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return act(gate) * up

    return apply


def combine(rows: Tensor, routed: Route, topk_weights: Tensor) -> Tensor:
    """Return (T, D) in the dtype of the rows: experts weighted and summed in fp32, in the order of the ids."""
    tokens, k = topk_weights.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    weights = topk_weights.to(wide).unsqueeze(-1)
    pairs = rows[routed.place].view(tokens, k, rows.shape[-1])
    # Not a product with 0: what lies in the rows of nobody's pairs may be NaN.
    weighted = torch.where(routed.valid.unsqueeze(-1), pairs * weights, 0)
    return weighted.sum(1).to(rows.dtype)


def mixture(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    num_experts: int,
    first: Callable[[Tensor, Tensor, Tensor], Tensor],
    between: Callable[[Tensor], Tensor],
    second: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Run a layer: `first` and `second` take rows by expert, the ends of the groups, and the order of the pairs."""
    routed = route(topk_ids, num_experts)
    rows = x[routed.order // topk_ids.shape[1]]
    rows = between(first(rows, routed.ends, routed.order))
    return combine(second(rows, routed.ends, routed.order), routed, topk_weights)
