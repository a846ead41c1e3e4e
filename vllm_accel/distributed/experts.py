"""Expert parallelism: each rank holds some of the experts, tokens travel to them and back (all-to-all, uneven counts).

The experts of rank r are a contiguous range (`expert_range`). Every rank calls `expert_parallel_moe` with its own
tokens; one exchange of counts, one of rows there and one back. The counts are read on the host, since torch's
all-to-all wants them there: one synchronisation a call, so a CUDA graph cannot hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vllm_accel.kernels.torch.moe import Route, combine, route
from vllm_accel.ops.moe import fused_moe

Group = Any


def expert_range(num_experts: int, group: Group = None) -> range:
    """Return the experts that this rank of a process group holds: as even as possible, the first ranks one more."""
    return _range(num_experts, dist.get_rank(group), dist.get_world_size(group))


def expert_parallel_moe(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    num_experts: int,
    group: Group = None,
    activation: str = "silu",
    bias_gate_up: Tensor | None = None,
    bias_down: Tensor | None = None,
    backend: str | Sequence[str] | None = None,
) -> Tensor:
    """Run `fused_moe` over experts that are spread over the ranks of a process group; differentiable.

    Args:
        x: (T, D), this rank's tokens; T may differ between ranks and be 0.
        w_gate_up, w_down, bias_gate_up, bias_down: of this rank's experts, `expert_range`, as `fused_moe` takes them.
        topk_weights, topk_ids: (T, k), ids among all experts.
        num_experts: of all ranks. group: process group, the default one if None; all its ranks have to call.
        activation, backend: as `fused_moe`.

    Returns:
        (T, D): what `fused_moe` over all experts gives for this rank's tokens.

    Raises:
        ValueError: weights of another number of experts than this rank's range. RuntimeError: no process group.
    """
    own = expert_range(num_experts, group)
    if w_gate_up.shape[0] != len(own) or w_down.shape[0] != len(own):
        raise ValueError(
            f"this rank holds experts {own.start}..{own.stop - 1} of {num_experts}: w_gate_up and w_down must have "
            f"{len(own)}; got {w_gate_up.shape[0]} and {w_down.shape[0]}"
        )
    routed = route(topk_ids, num_experts)
    sent, received = _counts(routed, num_experts, group)
    ids = topk_ids.flatten()[routed.order][: sum(sent)]
    rows = x[routed.order // topk_ids.shape[1]][: sum(sent)]
    ids = _exchange(ids.to(torch.int64), received, sent, group) - own.start
    rows = AllToAll.apply(rows, received, sent, group)  # type: ignore[no-untyped-call]
    ones = torch.ones(rows.shape[0], 1, device=x.device)
    found = fused_moe(
        rows, w_gate_up, w_down, ones, ids.unsqueeze(1), activation=activation, bias_gate_up=bias_gate_up,
        bias_down=bias_down, backend=backend,
    )  # fmt: skip
    back = AllToAll.apply(found, sent, received, group)  # type: ignore[no-untyped-call]
    nobodys = back.new_zeros(routed.order.shape[0] - sum(sent), back.shape[1])
    return combine(torch.cat([back, nobodys]), routed, topk_weights)


def _counts(routed: Route, num_experts: int, group: Group) -> tuple[list[int], list[int]]:
    """Return how many rows go to each rank, and how many come from each."""
    world = dist.get_world_size(group)
    last = torch.tensor([_range(num_experts, r, world).stop for r in range(world)], device=routed.ends.device)
    ends = torch.cat([routed.ends.new_zeros(1), routed.ends])[last].to(torch.int64)
    sent = torch.diff(ends, prepend=ends.new_zeros(1))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    both = torch.stack([sent, received]).tolist()
    return both[0], both[1]


def _range(num_experts: int, rank: int, world: int) -> range:
    each, more = divmod(num_experts, world)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class AllToAll(torch.autograd.Function):
    """Exchange rows between ranks; the gradient travels the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
        """Send `sent[r]` rows to each rank r and return what came, `received[r]` rows of each."""
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _exchange(rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Send gradients back to where the rows came from."""
        return _exchange(grads[0], ctx.sent, ctx.received, ctx.group), None, None, None
