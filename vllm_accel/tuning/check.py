"""A result has to be right before its time counts: heads of a call against the float64 oracle, at any length.

Heads do not depend on each other, nor do sequences, nor the rows of a forward pass. So two groups of heads of the
longest and the outermost sequences are computed by the oracle, in blocks of rows that fit in memory; gradients of the
blocks add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_accel.testing.oracle import attention_oracle, plain_attention
from vllm_accel.testing.tolerance import assert_close, assert_grad_close
from vllm_accel.tuning.shape import Inputs, Shape

#: Scores of a block: 2^26 in float64 is half a GiB a temporary, 2^21 is 16 MiB.
_MAX_SCORES = {"cuda": 1 << 26, "cpu": 1 << 21}


@dataclass(frozen=True, slots=True)
class Part:
    """One key head of one sequence: where it is, and what the oracle and plain PyTorch say (out, dq, dk, dv)."""

    name: str
    rows: tuple[Any, ...]
    keys: tuple[Any, ...]
    want: list[Tensor]
    plain: list[Tensor]


def parts(shape: Shape, inputs: Inputs) -> list[Part]:
    """Compute the truth of a few heads of a call."""
    grad = shape.kind == "train"
    made = []
    for b, name, rows, keys in _places(shape, inputs):
        q, k, v, dout = (t.detach()[at] for t, at in zip(inputs[:4], (rows, keys, keys, rows), strict=True))
        if shape.block_size:  # the blocks of one sequence
            k, v = (t.flatten(0, 1)[: shape.sequences[b][1]] for t in (k, v))
        options = {name: value for name, value in inputs.options.items() if name in ("causal", "window_size")}
        if shape.padded:
            options["attn_bias"] = inputs.options["attn_bias"][b : b + 1]
        want = _blocks(attention_oracle, torch.float64, (q, k, v, dout), options, grad)
        plain = _blocks(plain_attention, q.dtype, (q, k, v, dout), options, grad)
        made.append(Part(name, rows, keys, want, plain))
    return made


def verify(found: list[Tensor], truth: list[Part]) -> None:
    """Compare out (and dq, dk, dv) of a whole call with the parts.

    Raises:
        AssertionError: naming the part, the element and the bound.
    """
    for part in truth:
        largest = max(float(t.abs().max()) for t in part.want[1:]) if len(part.want) > 1 else 0.0
        places = (part.rows, part.rows, part.keys, part.keys)
        for i, (tensor, at, want, plain) in enumerate(zip(found, places, part.want, part.plain, strict=False)):
            what = f"{part.name}: {('out', 'dq', 'dk', 'dv')[i]}"
            if i == 0:
                assert_close(tensor[at], want, plain, what=what)
            else:
                assert_grad_close(tensor[at], want, plain, what=what, scale=largest)


def _places(shape: Shape, inputs: Inputs) -> Iterator[tuple[int, str, tuple[Any, ...], tuple[Any, ...]]]:
    """Yield index expressions that cut (rows, heads, D) of one sequence and one key head out of q and k."""
    group = shape.heads // shape.kv_heads
    last = len(shape.sequences) - 1
    longest = max(range(last + 1), key=lambda b: shape.sequences[b])
    ends_q, ends_k = ([0, *itertools.accumulate(column)] for column in zip(*shape.sequences, strict=True))
    for b, head in dict.fromkeys([(0, 0), (last, shape.kv_heads - 1), (longest, shape.kv_heads // 2)]):
        heads, kv_heads = slice(head * group, (head + 1) * group), slice(head, head + 1)
        rows: tuple[Any, ...] = (b, slice(None), heads)
        keys: tuple[Any, ...] = (b, slice(None), kv_heads)
        if shape.packed:
            rows, keys = (slice(ends_q[b], ends_q[b + 1]), heads), (slice(ends_k[b], ends_k[b + 1]), kv_heads)
        if shape.block_size:
            count = -(-shape.sequences[b][1] // shape.block_size)
            keys = (inputs.options["block_table"][b, :count].long(), slice(None), kv_heads)
        yield b, f"sequence {b}, key head {head}", rows, keys


def _blocks(
    fn: Callable[..., Any], dtype: torch.dtype, tensors: tuple[Tensor, ...], options: dict[str, Any], grad: bool
) -> list[Tensor]:
    """Run an oracle on (rows, heads, D) tensors in blocks of rows; gradients gather in the widest dtype."""
    q, k, v, dout = (t.unsqueeze(0) for t in tensors)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    leaves = [t.to(wide).requires_grad_(grad) for t in (q, k, v)]
    n_q, n_k = q.shape[1], k.shape[1]
    step = max(1, _MAX_SCORES[q.device.type] // (n_k * q.shape[2]))
    outs, sums = [], [torch.zeros_like(t) for t in leaves]
    for start in range(0, n_q, step):
        stop = min(start + step, n_q)
        # Bottom-right stays bottom-right for a block that ends at `stop`.
        seen = n_k - n_q + stop if options["causal"] else n_k
        with torch.set_grad_enabled(grad):
            block = [leaves[0][:, start:stop], leaves[1][:, :seen], leaves[2][:, :seen]]
            out, _ = fn(*(t.to(dtype) for t in block), **options)
        outs.append(out.detach()[0])
        if grad:
            gradients = torch.autograd.grad(out, leaves, dout[:, start:stop].to(out.dtype))
            sums = [a + b for a, b in zip(sums, gradients, strict=True)]
    return [torch.cat(outs), *(t[0] for t in sums if grad)]
