"""The public reports of wrong attention kernels, each as a function that tries it (see `benchmarks.known_bad`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_accel import attention, explain

#: An error above this share of the largest value is no rounding in 16 bits; the reports are off by whole values.
WRONG = 0.05


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen: whether the kernel in question is wrong here, in words, and what the library's own call gave."""

    wrong: bool | None
    detail: str
    ours: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One report. device: type of torch device that it is about. run: tries it there."""

    name: str
    backend: str
    link: str
    device: str
    run: Callable[[torch.device], Finding]


def _very_negative(n_q: int, n_k: int, heads: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return q, k, v (B, H, S, D) whose every scaled score is near -120, so every log-sum-exp is below -88.7."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, n, 64, generator=generator, device=device) * scale
        for n, scale in ((n_q, 0.1), (n_k, 0.1), (n_k, 1.0))
    )
    q[..., 0] = 1.0
    k[..., 0] = -120.0 * math.sqrt(64)
    return tuple(t.to(torch.bfloat16).requires_grad_() for t in (q, k, v))


def _cudnn(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **options)


def _efficient(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **options)


def _bad_gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> str:
    """Return how many elements of dq, dk, dv are not finite, empty if none is."""
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    counts = {name: int((~torch.isfinite(g)).sum()) for name, g in zip(("dq", "dk", "dv"), grads, strict=True)}
    return ", ".join(f"{count} of {name} not finite" for name, count in counts.items() if count)


def _ours_backward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    ours = tuple(t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v))
    options = {} if mask is None else {"attn_bias": mask}
    chosen = explain(attention, *ours, **options).chosen
    bad = _bad_gradients(attention(*ours, **options), ours)
    return f"WRONG with {chosen}: {bad}" if bad else f"{chosen}: finite"


def cudnn_mask_backward(device: torch.device) -> Finding:
    """pytorch#196678: with a mask tensor, lengths of 64 mod 128 and a log-sum-exp below -88.7, dQ is NaN."""
    seen, control = [], []
    for n in (192, 704, 640, 768):
        inputs = _very_negative(n, n, 1, device)
        mask = torch.ones(1, 1, n, n, dtype=torch.bool, device=device)
        bad = _bad_gradients(_cudnn(*inputs, attn_mask=mask), inputs)
        (seen if n % 128 == 64 else control).append(f"length {n}: {bad or 'finite'}")
    wrong = any("not finite" in text for text in seen)
    inputs = _very_negative(704, 704, 1, device)
    mask = torch.ones(1, 1, 704, 704, dtype=torch.bool, device=device)
    return Finding(wrong, "; ".join(seen + control), _ours_backward(*inputs, mask))


def cudnn_one_query_backward(device: torch.device) -> Finding:
    """cudnn-frontend#1072: one query over 128 keys, very negative log-sum-exp: dK and dV are NaN."""
    seen = []
    for n in (128, 97, 256):
        inputs = _very_negative(1, n, 2, device)
        seen.append(f"{n} keys: {_bad_gradients(_cudnn(*inputs), inputs) or 'finite'}")
    inputs = _very_negative(1, 128, 2, device)
    return Finding(any("not finite" in text for text in seen), "; ".join(seen), _ours_backward(*inputs, None))


def _rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend (B, H, few, D) queries in float64."""
    scores = (q.double() @ k.double().transpose(-1, -2)) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v.double()


def _error(out: Tensor, want: Tensor) -> float:
    """Return the largest error as a share of the largest value; infinite for what is not finite."""
    if not bool(torch.isfinite(out).all()):
        return math.inf
    return float((out.double() - want).abs().max() / want.abs().max())


def _normal(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)


def efficient_expanded_keys(device: torch.device) -> Finding:
    """pytorch#191937: keys and values expanded over heads (stride 0), a boolean mask, 32n + 1 keys, head size 512."""
    seen, wrong = [], False
    for n in (33, 577, 1025):
        q = _normal(device, 1, 8, n, 512)
        k, v = (_normal(device, 1, 1, n, 512, seed=i).expand(1, 8, n, 512) for i in (1, 2))
        mask = torch.ones(1, 1, n, n, dtype=torch.bool, device=device).tril()
        error = _error(_efficient(q, k, v, attn_mask=mask), _rows(q, k, v, mask))
        copied = _error(_efficient(q, k.contiguous(), v.contiguous(), attn_mask=mask), _rows(q, k, v, mask))
        seen.append(f"{n} keys: error {error:.2g}, with copies {copied:.2g}")
        wrong |= error > WRONG
    ours = attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_bias=mask)
    chosen = explain(attention, *(t.transpose(1, 2) for t in (q, k, v)), attn_bias=mask).chosen
    return Finding(wrong, "; ".join(seen), _ours(chosen, _error(ours.transpose(1, 2), _rows(q, k, v, mask))))


def _ours(chosen: str | None, error: float) -> str:
    return f"{'WRONG with ' if error > WRONG else ''}{chosen}: error {error:.2g}"


def _long(device: torch.device, masked: bool) -> Finding:
    """Compare rows on both sides of 65,536 with float64."""
    n = 65536 + 128
    q, k, v = (_normal(device, 1, 1, n, 64, seed=i) for i in range(3))
    mask = None
    if masked:  # hides the second half of the keys from everybody: a row that misreads it is off by a whole value
        mask = torch.zeros(1, 1, n, n, dtype=torch.bool, device=device)
        mask[..., : n // 2] = True
    seen, errors = [], []
    out = _efficient(q, k, v, attn_mask=mask) if masked else _efficient(q, k, v, is_causal=True)
    picked = (0, n // 2, 65535, 65536, n - 1)
    ours = attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_bias=mask, causal=not masked).transpose(1, 2)
    chosen = explain(attention, *(t.transpose(1, 2) for t in (q, k, v)), attn_bias=mask, causal=not masked).chosen
    worst = 0.0
    for row in picked:
        own = slice(row, row + 1)
        seen_keys = n if masked else row + 1
        part = None if mask is None else mask[:, :, own]
        want = _rows(q[:, :, own], k[:, :, :seen_keys], v[:, :, :seen_keys], part)
        errors.append(_error(out[:, :, own], want))
        worst = max(worst, _error(ours[:, :, own], want))
        seen.append(f"row {row}: {errors[-1]:.2g}")
    return Finding(max(errors) > WRONG, "; ".join(seen), _ours(chosen, worst))


def efficient_long_mask(device: torch.device) -> Finding:
    """pytorch#162588: more than 65,536 tokens with a mask give wrong values without an error."""
    return _long(device, masked=True)


def efficient_long_causal(device: torch.device) -> Finding:
    """pytorch#162588, a comment there: the same with is_causal and no mask."""
    return _long(device, masked=False)


def efficient_long_mask_backward(device: torch.device) -> Finding:
    """pytorch#147585: beyond 46,344 tokens the backward with a mask raises."""
    n = 46400
    q, k, v = (_normal(device, 1, 1, n, 64, seed=i).requires_grad_() for i in range(3))
    mask = torch.ones(1, 1, n, n, dtype=torch.bool, device=device)
    try:
        bad = _bad_gradients(_efficient(q, k, v, attn_mask=mask), (q, k, v))
    except RuntimeError as error:
        seen, wrong = str(error).splitlines()[0][:200], True
    else:
        seen, wrong = bad or "finite", bool(bad)
    return Finding(wrong, seen, _ours_backward(q, k, v, mask))


def efficient_many_rows(device: torch.device) -> Finding:
    """pytorch#142228, #146704: a batch of 65,536 or more is more blocks than a grid has."""
    batch = 65536
    q, k, v = (_normal(device, batch, 1, 8, 16, seed=i) for i in range(3))
    want = _rows(q[-64:], k[-64:], v[-64:], None)
    try:
        error = _error(_efficient(q, k, v)[-64:], want)
    except RuntimeError as raised:
        seen, wrong = str(raised).splitlines()[0][:200], True
    else:
        seen, wrong = f"error {error:.2g}", error > WRONG
    ours = attention(*(t.transpose(1, 2) for t in (q, k, v)))
    chosen = explain(attention, *(t.transpose(1, 2) for t in (q, k, v))).chosen
    return Finding(wrong, seen, _ours(chosen, _error(ours.transpose(1, 2)[-64:], want)))


def cpu_inner_stride(device: torch.device) -> Finding:
    """aten's CPU flash operator, called directly, is wrong for an innermost stride other than 1."""
    q, k, v = (_normal(device, 1, 2, 40, 32, seed=i).float() for i in range(3))
    strided = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(strided, k, v)[0]
    want = _rows(q, k, v, None)
    ours = attention(strided.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    chosen = explain(attention, strided.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).chosen
    error = _error(out, want)
    return Finding(error > WRONG, f"error {error:.2g}", _ours(chosen, _error(ours.transpose(1, 2), want)))


def cpu_empty_row(device: torch.device) -> Finding:
    """aten's CPU flash operator gives a row that sees no key a log-sum-exp of 0, which no merge can use."""
    q, k, v = (_normal(device, 1, 2, 8, 32, seed=i).float() for i in range(3))
    mask = torch.zeros(1, 1, 8, 8).masked_fill_(torch.arange(8)[:, None] == 3, -math.inf)
    lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)[1]
    got = float(lse[0, 0, 3])  # (B, H, Sq)
    _, ours = attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_bias=mask, return_lse=True)
    right = bool((ours[..., 3] == -math.inf).all())
    return Finding(got != -math.inf, f"log-sum-exp {got:g}", "-inf" if right else "WRONG: not -inf")


_PYTORCH = "https://github.com/pytorch/pytorch/issues"
CASES: tuple[Case, ...] = (
    Case("cudnn-mask-backward", "sdpa_cudnn", f"{_PYTORCH}/196678", "cuda", cudnn_mask_backward),
    Case("cudnn-one-query-backward", "sdpa_cudnn", "https://github.com/NVIDIA/cudnn-frontend/issues/1072", "cuda", cudnn_one_query_backward),
    Case("efficient-expanded-keys", "sdpa_efficient", f"{_PYTORCH}/191937", "cuda", efficient_expanded_keys),
    Case("efficient-long-mask", "sdpa_efficient", f"{_PYTORCH}/162588", "cuda", efficient_long_mask),
    Case("efficient-long-causal", "sdpa_efficient", f"{_PYTORCH}/162588", "cuda", efficient_long_causal),
    Case("efficient-mask-backward-46344", "sdpa_efficient", f"{_PYTORCH}/147585", "cuda", efficient_long_mask_backward),
    Case("efficient-many-rows", "sdpa_efficient", f"{_PYTORCH}/142228", "cuda", efficient_many_rows),
    Case("cpu-inner-stride", "sdpa_cpu", "", "cpu", cpu_inner_stride),
    Case("cpu-empty-row", "sdpa_cpu", f"{_PYTORCH}/103963", "cpu", cpu_empty_row),
)  # fmt: skip
