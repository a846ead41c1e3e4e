"""The arithmetic which the fake libraries share: dense attention in float64, forward and a flash-style backward.

It knows nothing of any library's conventions: masks, biases and window limits come in as tensors, already decided by
the fake that calls it. ``backward`` starts from the log-sum-exp and the delta it is given, as the CUDA kernels do, so
an adapter that hands over a wrongly converted one gets wrong gradients here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

INF = float("inf")


def check(condition: bool, message: str) -> None:
    """Raise what TORCH_CHECK raises in Python."""
    if not condition:
        raise RuntimeError(message)


def round_up(x: int, multiple: int) -> int:
    return (x + multiple - 1) // multiple * multiple


def distance(seqlen_q: int, seqlen_k: int, *, top_left: bool = False) -> Tensor:
    """Return j - (i + offset), (Sq, Sk): how far key j is to the right of the diagonal."""
    offset = 0 if top_left else seqlen_k - seqlen_q
    return torch.arange(seqlen_k)[None, :] - (torch.arange(seqlen_q)[:, None] + offset)


def band(seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, *, top_left: bool = False) -> Tensor:
    """Return which keys lie from ``left`` before to ``right`` after the diagonal; None is no limit, negatives are."""
    d = distance(seqlen_q, seqlen_k, top_left=top_left)
    seen = torch.ones_like(d, dtype=torch.bool)
    if left is not None:
        seen &= d >= -left
    if right is not None:
        seen &= d <= right
    return seen


def _heads_first(x: Tensor, heads: int) -> Tensor:
    x = x.double().transpose(1, 2)
    return x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    scores = q @ k.transpose(-1, -2) * scale
    slope = None
    if softcap > 0.0:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1.0 - tanh * tanh
    return (scores if bias is None else scores + bias), slope


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, visible: Tensor, softcap: float = 0.0,
    bias: Tensor | None = None, sink: Tensor | None = None, kept: Tensor | None = None, keep: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out (B, Sq, H, Dv) and lse (B, H, Sq) in float64; 0 and -inf for a row that sees nothing.

    ``visible`` and ``bias`` broadcast to (B, H, Sq, Sk); ``sink`` is one logit per head; ``kept`` is the dropout mask
    and ``keep`` the probability it was drawn with.
    """
    heads = q.shape[2]
    q, k, v = _heads_first(q, heads), _heads_first(k, heads), _heads_first(v, heads)
    scores, _ = _scores(q, k, scale, softcap, bias)
    visible = visible.expand(scores.shape)
    scores = torch.where(visible, scores, -INF)
    column = scores.new_full((*scores.shape[:-1], 1), -INF)
    if sink is not None:
        column = column.new_zeros(column.shape) + sink.double()[:, None, None]
    lse = torch.logsumexp(torch.cat([scores, column], dim=-1), dim=-1)
    p = torch.where(visible, torch.exp(scores - torch.where(lse == -INF, 0.0, lse)[..., None]), 0.0)
    if kept is not None:
        p = torch.where(kept, p / keep, 0.0)
    return (p @ v).transpose(1, 2).contiguous(), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, *, scale: float, visible: Tensor,
    softcap: float = 0.0, bias: Tensor | None = None, kept: Tensor | None = None, keep: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv (k's and v's heads, float64) and the gradient of the scores before the scale (B, H, Sq, Sk).

    P is ``exp(scores - lse)`` with the lse given ((B, H, Sq); +inf means an empty row, and -inf counts as 0, as in
    FlashAttention's ``scale_apply_exp2``), dS is ``P * (dP - delta)`` with the delta given.
    """
    kv_heads, heads = k.shape[2], q.shape[2]
    q, k, v, dout = (_heads_first(x, heads) for x in (q, k, v, dout))
    scores, slope = _scores(q, k, scale, softcap, bias)
    shift = torch.where(lse == -INF, 0.0, lse.double())[..., None]
    p = torch.where(visible.expand(scores.shape), torch.exp(scores - shift), 0.0)
    dp = dout @ v.transpose(-1, -2)
    dropped = p
    if kept is not None:
        dropped, dp = torch.where(kept, p / keep, 0.0), torch.where(kept, dp / keep, 0.0)
    ds = p * (dp - delta.double()[..., None])
    dbias = ds
    if slope is not None:
        ds = ds * slope
    dv = dropped.transpose(-1, -2) @ dout
    dq, dk = ds @ k * scale, ds.transpose(-1, -2) @ q * scale

    def group(x: Tensor) -> Tensor:
        return x.unflatten(1, (kv_heads, -1)).sum(2).transpose(1, 2)

    return dq.transpose(1, 2), group(dk), group(dv), dbias


def delta_of(dout: Tensor, out: Tensor) -> Tensor:
    """Return rowsum(dout * out) as (B, H, Sq)."""
    return (dout.double() * out.double()).sum(-1).transpose(1, 2)


def dropout_mask(rng_state: Tensor, shape: Sequence[int], keep: float, sequence: int = 0) -> Tensor:
    """Return which probabilities are kept: a function of the two numbers of rng_state, as with Philox."""
    seed, offset = (int(x) for x in rng_state.flatten().tolist())
    generator = torch.Generator().manual_seed((seed * 1_000_003 + offset * 97 + sequence) % 2**63)
    return torch.rand(*shape, generator=generator) < keep


def draw_rng_state() -> Tensor:
    """Take a seed and an offset from torch's default generator, which so advances from call to call."""
    return torch.randint(0, 2**31, (2,), dtype=torch.int64)


def garbage(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return what torch.empty may return at its worst."""
    return torch.full(shape, math.nan, dtype=dtype)


def sequences(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int
) -> Iterator[tuple[int, slice, slice]]:
    """Yield the number, the rows of q and the rows of k of every sequence; refuse what would leave the tensors."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    check(starts_q[-1] <= total_q and starts_k[-1] <= total_k, "CUDA error: an illegal memory access was encountered")
    for b in range(len(starts_q) - 1):
        yield b, slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])


def check_aligned(**tensors: Tensor | None) -> None:
    """Refuse tensors whose rows do not start at multiples of 16 bytes.

    The CUDA kernels load and store 16 bytes at a time and most entry points do not check: the launch then fails with
    this error, which poisons the CUDA context.
    """
    for name, x in tensors.items():
        if x is None or x.numel() == 0:
            continue
        strides = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
        aligned = x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in strides)
        check(aligned, f"CUDA error: misaligned address ({name}, strides {x.stride()})")
