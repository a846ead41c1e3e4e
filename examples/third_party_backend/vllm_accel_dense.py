"""An attention backend for vllm_accel: dense PyTorch, every score in memory. Slow, short, and honest about both.

A backend is three things: a `Capability` (what it can do, as data), a `bind` that returns a kernel, and the kernel's
`forward` and `backward` in vllm_accel's conventions. Nothing here imports a heavy package, so `capability` can be read
on a machine that lacks one; a real adapter imports its library in `unavailable_reason` and `bind`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads
from vllm_accel.dispatch.capability import Capability, Guard
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.errors import Reason

__version__ = "1.0"

MAX_SCORES = 1 << 28


def _fits(spec: AttentionSpec, sizes: object) -> str | None:
    """Refuse by exact sizes, which are not part of the spec. The sentence says what was found, to be acted on."""
    scores = spec.num_heads * sizes.batch * sizes.seqlen_q * sizes.seqlen_k  # type: ignore[attr-defined]
    return f"keeps {scores} scores in memory, at most {MAX_SCORES}" if scores > MAX_SCORES else None


class DenseBackend:
    """The backend `dense`."""

    name = "dense"
    capability = Capability(
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
        platforms=frozenset({"cpu", "cuda", "rocm"}),
        # What is not named here is refused, with a sentence: packed sequences, biases, dropout and the rest.
        features=(
            Feature.SCALE | Feature.CAUSAL | Feature.WINDOW_LEFT | Feature.WINDOW_RIGHT | Feature.SOFTCAP
            | Feature.GQA | Feature.VALUE_DIM | Feature.MASK | Feature.GRAD | Feature.LSE | Feature.LSE_GRAD
            | Feature.DETERMINISTIC
        ),
        # The honest line: it holds (B, H, Sq, Sk), so automatic choice never takes it. By name it runs.
        linear_memory=False,
        guards=(Guard("scores", _fits),),
    )  # fmt: skip

    def version(self) -> str | None:
        """Return the version of the library behind it; shown by explain and doctor."""
        return __version__

    def unavailable_reason(self) -> Reason | None:
        """Return None: it needs torch alone. Others try their import here and return what it said."""
        return None

    def bind(self, spec: AttentionSpec, device: Device) -> DenseKernel:
        """Return the kernel for this kind of call; compile or configure here, not in `forward`."""
        return DenseKernel()


class DenseKernel:
    """Attention with all scores at once; stateless, so one may serve several threads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor, None]:
        """Return out (B, Sq, H, Dv), contiguous, in q's dtype, and lse (B, H, Sq), -inf for a row without keys."""
        scores, _ = _scores(q, k, args)
        lse = torch.logsumexp(scores, -1)
        out = _probabilities(scores, lse) @ _heads_first(v, q)
        return out.to(q.dtype).transpose(1, 2).contiguous(), lse, None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        args: AttentionArgs,
        out: Tensor,
        lse: Tensor,
        rng: Tensor | None,
        dout: Tensor,
        dlse: Tensor | None,
    ) -> AttentionGrads:
        """Return dq, dk, dv. `dlse` is None unless somebody differentiates the log-sum-exp."""
        scores, slope = _scores(q, k, args)
        p = _probabilities(scores, lse)
        do, wide_out = (t.to(p.dtype).transpose(1, 2) for t in (dout, out))
        delta = (do * wide_out).sum(-1)
        if dlse is not None:
            delta = delta - dlse.to(p.dtype)
        ds = p * (do @ _heads_first(v, q).mT - delta.unsqueeze(-1)) * slope * args.softmax_scale
        dq = ds @ _heads_first(k, q)
        dk, dv = ds.mT @ q.to(p.dtype).transpose(1, 2), p.mT @ do
        groups = (k.shape[2], q.shape[2] // k.shape[2])
        dk, dv = (t.unflatten(1, groups).sum(2) for t in (dk, dv))
        return AttentionGrads(*(t.transpose(1, 2).to(q.dtype) for t in (dq, dk, dv)))


def _scores(q: Tensor, k: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor | float]:
    """Return the masked logits (B, H, Sq, Sk) and the derivative of the softcap."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    scores = (q.to(wide).transpose(1, 2) @ _heads_first(k, q).mT) * args.softmax_scale
    slope: Tensor | float = 1.0
    if args.softcap:
        squashed = torch.tanh(scores / args.softcap)
        scores, slope = squashed * args.softcap, 1 - squashed * squashed
    n_q, n_k = q.shape[1], k.shape[1]
    # Positions count from the bottom right: query i stands at key i + Sk - Sq.
    behind = torch.arange(n_q, device=q.device)[:, None] + (n_k - n_q) - torch.arange(n_k, device=q.device)
    left, right = args.window_size
    right = 0 if args.causal else right
    if right >= 0:
        scores = scores.masked_fill(behind < -right, -math.inf)
    if left >= 0:
        scores = scores.masked_fill(behind > left, -math.inf)
    if args.attn_bias is not None:  # boolean, since Feature.BIAS is not declared: True may attend
        scores = scores.masked_fill(~args.attn_bias, -math.inf)
    return scores, slope


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Return exp(scores - lse), and 0 where a row sees no key."""
    row = lse.to(scores.dtype).unsqueeze(-1)
    return torch.exp(scores - torch.where(row == -math.inf, 0.0, row))


def _heads_first(t: Tensor, q: Tensor) -> Tensor:
    """(B, S, Hkv, D) -> (B, H, S, D), each key head repeated for the query heads that read it."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    return t.to(wide).transpose(1, 2).repeat_interleave(q.shape[2] // t.shape[2], dim=1)


BACKEND = DenseBackend()
