"""Prove reproducible products before relying on them: the same rows must give the same bits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vllm_accel.dispatch import warm
from vllm_accel.dispatch.backend import Backend, GemmArgs, MoeArgs
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_spec import Form, GemmSpec, Scaling
from vllm_accel.dispatch.spec import Feature, bucket

#: Rows of the tested group, and rows of the groups before and after it.
_ROWS, _COMPANIONS = 37, ((0, 0), (5, 0), (70, 220), (3, 1))
_N, _K = 192, 320


def same_bits(spec: GemmSpec, backend: Backend, device: Device) -> bool:
    """Run products of a kind again (deterministic) or in other company (batch_invariant), and compare bits.

    Remembered per device and kind of call. False where the backend does not take the test's own sizes.
    """
    name = warm.tested_as("gemm", spec)
    known = warm.self_test_verdict(name, backend.name, device)
    if known is not None:
        return known
    where = torch.device(device.type, device.index) if device.type == "cuda" else torch.device(device.type)
    invariant = Feature.BATCH_INVARIANT in spec.features
    company = _COMPANIONS if invariant else ((5, 40),) * 3
    run = _tokens_of_interest if spec.form is Form.MOE else _rows_of_interest
    with torch.no_grad():
        outs = [run(spec, backend, device, where, before, after) for before, after in company]
    passed = all(torch.equal(outs[0], out) for out in outs[1:])
    return warm.record_self_test(name, backend.name, device, passed)


def _rows_of_interest(
    spec: GemmSpec, backend: Backend, device: Device, where: torch.device, before: int, after: int
) -> Tensor:
    """Return the result of the tested group, among `before` and `after` rows (or groups of one row) of others."""
    generator = torch.Generator().manual_seed(before * 1000 + after)
    own = torch.Generator().manual_seed(7)
    total = before + _ROWS + after
    a = torch.randn(total, _K, generator=generator)
    a[before : before + _ROWS] = torch.randn(_ROWS, _K, generator=own)
    weights = torch.randn(_K, _N, generator=own)
    ends = torch.tensor([before, before + _ROWS, total], dtype=torch.int32, device=where)
    form = spec.form
    if form is Form.GROUPED_K:
        b = torch.randn(total, _N, generator=generator)
        b[before : before + _ROWS] = torch.randn(_ROWS, _N, generator=own)
        a = a.t().contiguous().t()[:, :_K].t()
    elif form is Form.DENSE:
        b = weights
    else:
        b = torch.randn(3, _K, _N, generator=generator)
        b[1] = weights
    if form is Form.BATCHED:
        a = torch.stack([torch.zeros_like(a), a, torch.ones_like(a)])
    a, b = _as(a, spec.dtype).to(where), _as(b, spec.b_dtype).to(where)
    args = GemmArgs(
        ends if form in (Form.GROUPED_M, Form.GROUPED_K) else None,
        None,
        _ones(spec.scaling_a, a, form is Form.BATCHED, True),
        _ones(spec.scaling_b, b, form is not Form.DENSE, False),
    )
    groups = 0 if form is Form.DENSE else 3
    sizes = (_K, _N, total) if form is Form.GROUPED_K else (total, _N, _K)
    m, n, k = map(bucket, sizes)
    tested = replace(spec, m=m, n=n, k=k, groups=groups, features=spec.features & ~(Feature.BIAS | Feature.GRAD))
    out: Tensor = backend.bind(tested, device).forward(a, b, args)
    if form is Form.GROUPED_K:
        return out[1]
    return (out[1] if form is Form.BATCHED else out)[before : before + _ROWS]


def _tokens_of_interest(
    spec: GemmSpec, backend: Backend, device: Device, where: torch.device, before: int, after: int
) -> Tensor:
    """Return a layer's output for the tested tokens, among `before` and `after` others."""
    generator = torch.Generator().manual_seed(before * 1000 + after)
    own = torch.Generator().manual_seed(7)
    total, experts, top_k, hidden, inner = before + _ROWS + after, 4, 2, 128, 192
    x = torch.randn(total, hidden, generator=generator)
    ids = torch.randint(0, experts, (total, top_k), generator=generator)
    mine = slice(before, before + _ROWS)
    x[mine] = torch.randn(_ROWS, hidden, generator=own)
    ids[mine] = torch.randint(0, experts, (_ROWS, top_k), generator=own)
    w_gate_up = torch.randn(experts, hidden, 2 * inner, generator=own)
    w_down = torch.randn(experts, inner, hidden, generator=own)
    weights = [_as(w, spec.b_dtype).to(where) for w in (w_gate_up, w_down)]
    scales = [_ones(spec.scaling_b, w, True, False) for w in weights]
    args = MoeArgs(torch.full((total, top_k), 0.5, device=where), ids.to(where), None, None, *scales)
    tested = replace(
        spec, m=bucket(total), n=hidden, k=inner, groups=experts, top_k=top_k,
        features=spec.features & ~(Feature.BIAS | Feature.GRAD),
    )  # fmt: skip
    out: Tensor = backend.bind(tested, device).forward(x.to(spec.dtype).to(where), *weights, args)
    return out[mine]


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return (t * 30).round().clamp(-127, 127).to(dtype) if dtype is torch.int8 else t.to(dtype)


def _ones(scaling: Scaling, t: Tensor, grouped: bool, of_a: bool) -> Tensor | None:
    from vllm_accel.ops.gemm_arguments import factor_shape

    if scaling is Scaling.NONE:
        return None
    lead = (t.shape[0],) if grouped else ()
    return torch.ones(factor_shape(t.shape[-2:], scaling, lead, of_a), device=t.device)
