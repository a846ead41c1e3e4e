"""Groups and factors as the adapters need them: spans on the host, masks on the device, factors spread over values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.gemm_spec import Form, Scaling
from vllm_accel.dispatch.offsets import group_of_rows

Multiply = Callable[[Tensor, Tensor], Tensor]


def spans(offs: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield (group, start, end) of groups that have rows; reads offs on the host and stays within 0..rows."""
    start = 0
    for group, end in enumerate(offs.tolist()):
        end = min(max(end, start), rows)
        if end > start:
            yield group, start, end
        start = end


def spread(scale: Tensor, scaling: Scaling, matrix: torch.Size, of_a: bool) -> Tensor:
    """Return the factors of one matrix, (M, K) of a or (K, N) of b, in a shape that broadcasts over it."""
    rows, columns = matrix
    if scaling is Scaling.TENSOR:
        return scale.reshape(1, 1)
    if scaling is Scaling.ROW:
        return scale.unsqueeze(1) if of_a else scale.unsqueeze(0)
    if scaling is Scaling.BLOCK_128x128:
        return scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return scale.repeat_interleave(128, 1)[:, :columns] if of_a else scale.repeat_interleave(128, 0)[:rows]


def zero_past_end(out: Tensor, args: GemmArgs) -> Tensor:
    """Overwrite rows past the last group with zeros, in place, on the device; nothing where there are none."""
    if args.full or args.offs is None:
        return out
    past = torch.arange(out.shape[0], device=out.device) >= args.offs[-1]
    return out.masked_fill_(past.unsqueeze(1), 0)


def add_group_bias(out: Tensor, args: GemmArgs) -> Tensor:
    """Add the bias (E, N) of each row's group to (T, N), in place, on the device; rows past the end take none."""
    if args.bias is None or args.offs is None:
        return out
    groups = args.bias.shape[0]
    group = group_of_rows(args.offs, out.shape[0])
    rows = args.bias.to(out.dtype)[group.clamp(max=groups - 1)]
    return out.add_(rows if args.full else rows.masked_fill_((group >= groups).unsqueeze(1), 0))


def by_group(form: Form, a: Tensor, b: Tensor, args: GemmArgs, multiply: Callable[..., Tensor], out: Tensor) -> Tensor:
    """Run a grouped product group by group with spans read on the host.

    `multiply(a, b, group, target)` computes one group's product into `target`, a view of `out`, which holds zeros.
    """
    if form is Form.BATCHED:
        for group in range(b.shape[0]):
            multiply(a[group], b[group], group, out[group])
        return out
    assert args.offs is not None
    for group, start, end in spans(args.offs, a.shape[0] if form is Form.GROUPED_M else a.shape[1]):
        if form is Form.GROUPED_M:
            multiply(a[start:end], b[group], group, out[start:end])
        else:
            multiply(a[:, start:end], b[start:end], group, out[group])
    return out
