"""Who takes part in `python -m benchmarks.attention`: every backend by name, automatic choice, torch by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_accel import State, explain
from vllm_accel.tuning.attention import attend, call_of
from vllm_accel.tuning.measure import Attend
from vllm_accel.tuning.shape import Inputs, Shape

AUTO, BY_HAND = "attention()", "torch sdpa by hand"
_RUNS = (State.CHOSEN, State.ABLE, State.HELD_BACK, State.QUARANTINED)


def contestants(shape: Shape, inputs: Inputs) -> tuple[dict[str, Attend], dict[str, str], str]:
    """Return the calls that can be timed, the reasons of those that cannot, and what automatic choice takes."""
    selection = explain(call_of(shape), inputs.q, inputs.k, inputs.v, **inputs.options)
    calls: dict[str, Attend] = {AUTO: attend(shape, None)}
    if not shape.block_size:  # torch has no function for a paged cache
        calls[BY_HAND] = _by_hand_varlen if shape.lengths else _by_hand
    refused = {}
    for candidate in selection.candidates:
        if candidate.state in _RUNS:
            calls[candidate.name] = attend(shape, candidate.name)
        else:
            refused[candidate.name] = "; ".join(str(reason) for reason in candidate.reasons)
    return calls, refused, selection.chosen or ""


def _by_hand(inputs: Inputs) -> Tensor:
    """Attend with torch's function as its users do: transposes, enable_gqa, a mask where its causal is another one."""
    q, k, v = (t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v))
    n_q, n_k = q.shape[2], k.shape[2]
    mask, causal = None, bool(inputs.options["causal"]) and n_q > 1
    if causal and n_q != n_k:  # is_causal aligns top-left; generation needs bottom-right
        mask, causal = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q), False
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def _by_hand_varlen(inputs: Inputs) -> Tensor:
    """Attend sequence by sequence; a user who does this has the lengths on the host."""
    n_q, n_k = ([length[i] for length in inputs.lengths] for i in (0, 1))
    split = zip(inputs.q.split(n_q), inputs.k.split(n_k), inputs.v.split(n_k), strict=True)
    return torch.cat([_by_hand(inputs._replace(q=q[None], k=k[None], v=v[None]))[0] for q, k, v in split])
