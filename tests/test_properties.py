"""Random shapes, lengths (0 and 1 included), strides, dtypes and options against the oracle, by hypothesis."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_accel import attention, attention_varlen, explain, merge_attention
from vllm_accel.testing import Case, check_call
from vllm_accel.testing.oracle import attention_oracle

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["contiguous", "packed_qkv", "heads_first", "inner_stride"])
WINDOWS = st.tuples(st.integers(-1, 12), st.integers(-1, 6))


@st.composite
def options(draw: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if draw(st.booleans()):
        chosen["causal"] = True
    if draw(st.booleans()):
        chosen["window_size"] = draw(WINDOWS)
    if draw(st.booleans()):
        chosen["softmax_scale"] = draw(st.floats(0.05, 0.5))
    if draw(st.integers(0, 3)) == 0:
        chosen["softcap"] = draw(st.floats(0.5, 20.0))
    return chosen


@st.composite
def cases(draw: Any, packed: bool) -> Case:
    groups, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    common: dict[str, Any] = {
        "num_heads": groups * kv_heads,
        "num_kv_heads": kv_heads,
        "head_dim": draw(st.integers(1, 40)),
        "head_dim_v": draw(st.integers(1, 40)),
        "options": draw(options()),
        "alibi": draw(st.sampled_from([None, "heads", "batch"])),
        "sinks": draw(st.booleans()),
        "layout": draw(LAYOUTS),
        "lse_grad": draw(st.booleans()),
    }
    if packed:
        lengths = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 14)), min_size=1, max_size=4))
        if not sum(q for q, _ in lengths) or not sum(k for _, k in lengths):
            lengths = [*lengths, (2, 3)]
        return Case("random packed", "property", lengths=tuple(lengths), tail=draw(st.integers(0, 3)), **common)
    common["bias"] = draw(st.sampled_from([None, None, "full", "row", "keys", "heads", "column"]))
    common["bool_bias"] = bool(common["bias"]) and draw(st.booleans())
    return Case(
        "random dense", "property", batch=draw(st.integers(1, 3)), seqlen_q=draw(st.integers(1, 20)),
        seqlen_k=draw(st.integers(1, 24)), **common,
    )  # fmt: skip


def _call(q, k, v, **kwargs):
    return (attention_varlen if "cu_seqlens_q" in kwargs else attention)(q, k, v, **kwargs)


@pytest.mark.parametrize("packed", [False, True])
@settings(max_examples=60)
@given(data=st.data(), dtype=DTYPES, seed=st.integers(0, 10))
def test_any_call_matches_the_oracle(packed: bool, data: Any, dtype: torch.dtype, seed: int) -> None:
    case = data.draw(cases(packed))
    # A single visible key makes dq and dk exact zeros by cancellation; sizes of a few elements make the yardstick
    # (the error of plain PyTorch) vanish by luck: forward numbers only, gradients in float32 with absolute bounds.
    forward = Case(**{name: getattr(case, name) for name in case.__dataclass_fields__ if name != "grad"}, grad=False)
    try:
        check_call(_call, forward, dtype=dtype, seed=seed)
    except AssertionError:
        _within_absolute_bound(forward, dtype, seed)
    if dtype is torch.float32:
        _gradients_agree(case, seed)


def _within_absolute_bound(case: Case, dtype: torch.dtype, seed: int) -> None:
    """For tiny tensors, where plain PyTorch happens to be exact: a few roundings of the largest value."""
    inputs = case.make(dtype, seed=seed)
    out = _call(inputs.q, inputs.k, inputs.v, **inputs.options)
    want = _call(inputs.q.double(), inputs.k.double(), inputs.v.double(), backend="reference", **_wide(inputs.options))
    assert torch.isfinite(out).all()
    largest = max(1.0, float(inputs.v.nan_to_num().abs().max()))
    assert (out - want).abs().max() <= 6 * torch.finfo(dtype).eps * largest


def _wide(given_options: dict[str, Any]) -> dict[str, Any]:
    bias = given_options.get("attn_bias")
    if bias is None or bias.dtype is torch.bool:
        return given_options
    return {**given_options, "attn_bias": bias.double()}


def _gradients_agree(case: Case, seed: int) -> None:
    """Against float64 through the other path: same gradients within float32's roundings of the largest one."""
    inputs = case.make(torch.float32, seed=seed)
    results = []
    for dtype, backend in ((torch.float32, None), (torch.float64, "reference")):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        opts = _wide(inputs.options) if dtype is torch.float64 else inputs.options
        out, lse = _call(*leaves, return_lse=True, backend=backend, **opts)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        loss = (out * weights).sum() + torch.where(torch.isfinite(lse), lse, 0.0).sum() * case.lse_grad
        results.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        assert (got - want).abs().max() <= 2e-4 * max(1.0, float(want.abs().max()))


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 20), min_size=1, max_size=4), seed=st.integers(0, 5))
def test_any_cut_of_the_keys_merges_back(cuts: list[int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, 2, 8, generator=g) for n in (5, 20, 20))
    edges = sorted({0, *cuts, 20})
    parts = [attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in itertools.pairwise(edges)]
    out, lse = merge_attention([p[0] for p in parts], [p[1] for p in parts])
    want, want_lse = attention_oracle(q, k, v)
    assert (out - want).abs().max() < 1e-5 and (lse - want_lse).abs().max() < 1e-5


@settings(max_examples=40)
@given(data=st.data())
def test_explain_names_what_runs(data: Any) -> None:
    """Whatever automatic choice names, asking for it by name gives the same bits."""
    case = data.draw(cases(False))
    inputs = case.make(torch.float32)
    chosen = explain(attention, inputs.q, inputs.k, inputs.v, **inputs.options).chosen
    auto = attention(inputs.q, inputs.k, inputs.v, **inputs.options)
    assert torch.equal(auto, attention(inputs.q, inputs.k, inputs.v, backend=chosen, **inputs.options))


@settings(max_examples=60)
@given(n=st.integers(1, 1 << 20))
def test_buckets(n: int) -> None:
    from vllm_accel.dispatch.spec import bucket

    low = bucket(n)
    assert low <= n < low * 1.25 + 1 and bucket(low) == low
    assert (bucket(n) == n) or n > 8
