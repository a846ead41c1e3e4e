"""Prove batch invariance before relying on it: the same sequence, alone and in company, must give the same bits."""

from __future__ import annotations

import torch

from vllm_accel.dispatch import warm
from vllm_accel.dispatch.backend import AttentionArgs, Backend, PagedArgs
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


#: Head sizes of the paged test: keys, values, key heads; MLA's own sizes, since its kernels are made for them.
_PAGED_SIZES, _MLA_SIZES = (_DIM, _DIM, _KV_HEADS), (576, 512, 1)
_BLOCK = 16


def paged_batch_invariance(backend: Backend, device: Device) -> bool:
    """The same over a paged cache: other companions, other blocks, other maxima. Remembered per device."""
    return _paged_verdict("attention_paged", backend, device, _PAGED_SIZES)


def mla_batch_invariance(backend: Backend, device: Device) -> bool:
    """The same for multi-head latent attention."""
    return _paged_verdict("attention_mla", backend, device, _MLA_SIZES)


def _paged_verdict(name: str, backend: Backend, device: Device, sizes: tuple[int, int, int]) -> bool:
    known = warm.self_test_verdict(name, backend.name, device)
    if known is not None:
        return known
    where = torch.device(device.type, device.index) if device.type == "cuda" else torch.device(device.type)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    fits = [d for d in dtypes if not backend.capability.unsupported_reasons(_paged_spec(d, 3, 40, 700, sizes), device)]
    passed = bool(fits)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for seqlen_q, seqlen_k in ((1, 700), (33, 190)) if fits else ():
            alone = _paged_rows(backend, device, where, fits[0], sizes, [(seqlen_q, seqlen_k)], 0, generator)
            for others in ([(7, 50)], [(40, 90), (1, 1300), (0, 20)] * 5):
                packed = [*others, (seqlen_q, seqlen_k)]
                together = _paged_rows(backend, device, where, fits[0], sizes, packed, len(others), generator)
                passed = passed and torch.equal(alone, together)
    return warm.record_self_test(name, backend.name, device, passed)


def _paged_rows(
    backend: Backend,
    device: Device,
    where: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    lengths: list[tuple[int, int]],
    index: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the rows of sequence `index`, whose numbers depend on its own lengths alone."""
    head_dim, head_dim_v, kv_heads = sizes
    width = -(-max(k for _, k in lengths) // _BLOCK)
    blocks = torch.randperm(len(lengths) * width, generator=generator).to(torch.int32).view(len(lengths), width)
    cache = torch.randn(blocks.numel(), _BLOCK, kv_heads, head_dim, generator=generator)
    seqlen_q, seqlen_k = lengths[index]
    own = torch.Generator().manual_seed(seqlen_k)
    cache[blocks[index].long()] = torch.randn(4096 // _BLOCK, _BLOCK, kv_heads, head_dim, generator=own)[:width]
    queries = [torch.randn(n, _HEADS, head_dim, generator=generator) for n, _ in lengths]
    queries[index] = torch.randn(seqlen_q, _HEADS, head_dim, generator=own)
    ends = torch.tensor([0, *(n for n, _ in lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    k_cache = cache.to(dtype).to(where)
    # Values follow from the keys of the same block, wherever that lies.
    v_cache = k_cache[..., :head_dim_v] if sizes is _MLA_SIZES else k_cache.roll(1, dims=-1)
    longest_q, longest_k = max(n for n, _ in lengths), max(n for _, n in lengths)
    args = PagedArgs(
        ends.to(where), blocks.to(where), torch.tensor([n for _, n in lengths], dtype=torch.int32).to(where),
        *(None,) * 5, longest_q, longest_k, head_dim**-0.5, True, (-1, -1), 0.0, False, False, True,
    )  # fmt: skip
    spec = _paged_spec(dtype, len(lengths), longest_q, longest_k, sizes)
    out, _ = backend.bind(spec, device).forward(torch.cat(queries).to(dtype).to(where), k_cache, v_cache, args)
    rows: torch.Tensor = out[int(ends[index]) : int(ends[index + 1])]
    return rows


def _paged_spec(
    dtype: torch.dtype, batch: int, seqlen_q: int, seqlen_k: int, sizes: tuple[int, int, int]
) -> AttentionSpec:
    head_dim, head_dim_v, kv_heads = sizes
    features = Feature.PAGED | Feature.CAUSAL | Feature.GQA | Feature.BATCH_INVARIANT | Feature.FINITE_TAIL
    if sizes is _MLA_SIZES:
        features |= Feature.MLA | Feature.VALUE_DIM
    return AttentionSpec(
        dtype, dtype, _HEADS, kv_heads, head_dim, head_dim_v, batch, seqlen_q, seqlen_k, Relation.MIXED, features,
        _BLOCK,
    )  # fmt: skip
