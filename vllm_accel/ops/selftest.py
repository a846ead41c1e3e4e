"""Prove batch invariance before relying on it: the same sequence, alone and in company, must give the same bits."""

from __future__ import annotations

import torch

from vllm_accel.dispatch import warm
from vllm_accel.dispatch.backend import AttentionArgs, Backend
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation

_HEADS, _KV_HEADS, _DIM = 4, 2, 64


def batch_invariance(backend: Backend, device: Device) -> bool:
    """Run a backend on one sequence alone and in batches of 3 and 17, and compare bits. Remembered per device."""
    known = warm.self_test_verdict("attention", backend.name, device)
    if known is not None:
        return known
    where = torch.device(device.type, device.index) if device.type == "cuda" else torch.device(device.type)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    fits = [d for d in dtypes if not backend.capability.unsupported_reasons(_spec(d, 17, 33, 190), device)]
    if not fits:
        return warm.record_self_test("attention", backend.name, device, False)
    dtype = fits[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        passed = all(_same_bits(backend, device, where, dtype, generator, q, k) for q, k in ((33, 190), (1, 700)))
    return warm.record_self_test("attention", backend.name, device, passed)


def _same_bits(
    backend: Backend,
    device: Device,
    where: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    seqlen_q: int,
    seqlen_k: int,
) -> bool:
    def make(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(17, tokens, heads, _DIM, generator=generator).to(dtype).to(where)

    q, k, v = make(seqlen_q, _HEADS), make(seqlen_k, _KV_HEADS), make(seqlen_k, _KV_HEADS)
    args = AttentionArgs(
        *(None,) * 8, seqlen_q, seqlen_k, _DIM**-0.5, True, (-1, -1), 0.0, 0.0, False, False, True
    )  # fmt: skip
    outs = []
    for rows in (slice(5, 6), slice(4, 7), slice(0, 17)):
        spec = _spec(dtype, rows.stop - rows.start, seqlen_q, seqlen_k)
        out = backend.bind(spec, device).forward(q[rows], k[rows], v[rows], args)[0]
        outs.append(out[5 - rows.start])
    return torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def _spec(dtype: torch.dtype, batch: int, seqlen_q: int, seqlen_k: int) -> AttentionSpec:
    features = Feature.CAUSAL | Feature.GQA | Feature.BATCH_INVARIANT
    return AttentionSpec(
        dtype, dtype, _HEADS, _KV_HEADS, _DIM, _DIM, batch, seqlen_q, seqlen_k, Relation.SHORTER, features
    )
