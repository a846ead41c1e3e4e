"""From partial results to launches of `combine.merge_parts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_accel.kernels.triton.combine import join_parts, merge_parts
from vllm_accel.kernels.triton.launch import Bound, Launch

#: What `merge_parts` takes: float64 would lose its last bits.
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
#: Parts of one launch. More are merged in turns, which is exact: merging is associative.
PARTS = 4
#: Numbers of a part in one program: 16 for each of 128 threads.
_ELEMENTS = 2048
#: The same for parts of one tensor: 8 for each thread, so that few rows too fill the device.
_JOINED = 1024
#: Launches kept: one per shape and kind of the parts.
_KEPT = 256
_bound: dict[Any, Bound] = {}


def merge_launch(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None, out: Tensor, lse: Tensor
) -> Launch:
    """Return the launch that merges one to four parts over disjoint key sets.

    Args:
        outs: (B, Sq, H, Dv) or (Tq, H, Dv), contiguous. Dtypes: `DTYPES`. lses: fp32 (B, H, Sq) or (H, Tq), contiguous.
        sinks: (H,), contiguous, or None. out, lse: as the parts, lse fp32.
    """
    *_, seqlen, heads, head_dim_v = out.shape
    width = 1 << (head_dim_v - 1).bit_length()
    rows = out.numel() // head_dim_v
    block = max(1, _ELEMENTS // width)
    return Launch(
        fn=merge_parts,
        grid=(-(-rows // block), 1, 1),
        args=(*merge_tensors(outs, lses, sinks, out, lse), rows, seqlen, heads),
        constexprs={"DV": head_dim_v, "BLOCK_DV": width, "BLOCK_R": block, "SINKS": sinks is not None},
        num_warps=4,
        num_stages=1,
    )


def merge_tensors(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the tensors of the launch, in the kernel's order."""
    missing = (None,) * (PARTS - len(outs))
    return (*outs, *missing, *lses, *missing, sinks, out, lse)


def join_launch(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """Return the launch that joins the parts of one tensor; all contiguous, all lse fp32 natural logarithms.

    Args:
        parts: fp32 (splits, B, S, H, Dv). part_lse: (splits, B, H, S). out: (B, S, H, Dv). lse: (B, H, S).
    """
    splits, _, seqlen, heads, head_dim_v = parts.shape
    width = 1 << (head_dim_v - 1).bit_length()
    rows = out.numel() // head_dim_v
    block = max(1, _JOINED // width)
    return Launch(
        fn=join_parts,
        grid=(-(-rows // block), 1, 1),
        args=(parts, part_lse, out, lse, rows, seqlen, heads, splits),
        constexprs={"DV": head_dim_v, "BLOCK_DV": width, "BLOCK_R": block},
        num_warps=4,
        num_stages=1,
    )


class Join:
    """`join_launch` again and again, with tensors of the same sizes."""

    __slots__ = ("_bound",)

    def __init__(self) -> None:
        self._bound: Bound | None = None

    def __call__(self, parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
        """Join parts on the current stream."""
        if self._bound is None:
            self._bound = Bound(join_launch(parts, part_lse, out, lse))
        self._bound((parts, part_lse, out, lse))


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge any number of parts of equal shapes on the current device: out in the dtype of the first, and lse fp32.

    What `ops.merge.merge_attention` does, without gradients; layouts other than contiguous are copied.
    """
    parts = [t.contiguous() for t in outs]
    logs = [t.contiguous() for t in lses]
    sinks = None if sinks is None else sinks.contiguous()
    while True:
        last = len(parts) <= PARTS
        # Not rounded to the parts' dtype before the last turn.
        out = torch.empty_like(parts[0], dtype=outs[0].dtype if last else torch.float32)
        lse = torch.empty_like(logs[0], dtype=torch.float32)
        tensors = merge_tensors(parts[:PARTS], logs[:PARTS], sinks if last else None, out, lse)
        key = (out.shape, out.device, tuple([None if t is None else t.dtype for t in tensors]))
        bound = _bound.get(key)
        if bound is None:
            if len(_bound) >= _KEPT:
                _bound.clear()
            bound = _bound[key] = Bound(merge_launch(parts[:PARTS], logs[:PARTS], sinks if last else None, out, lse))
        bound(tensors)
        if last:
            return out, lse
        parts, logs = [out, *parts[PARTS:]], [lse, *logs[PARTS:]]
