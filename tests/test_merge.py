"""Partial results put together: exact, differentiable, and quiet about rows that saw nothing."""

from __future__ import annotations

import importlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from vllm_accel import attention, attention_varlen, merge_attention
from vllm_accel.ops.fused import Fused
from vllm_accel.testing.oracle import attention_oracle, merge_oracle

merge = importlib.import_module("vllm_accel.ops.merge")


def _parts(cuts: tuple[int, ...], dtype: torch.dtype = torch.float32, grad: bool = False):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 4, 16, generator=g).to(dtype).requires_grad_(grad)
    k, v = (torch.randn(2, cuts[-1], 2, 16, generator=g).to(dtype).requires_grad_(grad) for _ in range(2))
    edges = list(itertools.pairwise(cuts))
    parts = [attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in edges]
    return (q, k, v), [p[0] for p in parts], [p[1] for p in parts]


@pytest.mark.parametrize("cuts", [(0, 9), (0, 4, 9), (0, 1, 2, 9), (0, 0, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_parts_are_the_whole(cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    (q, k, v), outs, lses = _parts(cuts, dtype)
    out, lse = merge_attention(outs, lses)
    want, want_lse = attention_oracle(q, k, v)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert out.dtype is dtype and (out - want).abs().max() < tolerance
    assert (lse - want_lse).abs().max() < 1e-4


def test_sinks_join_at_the_merge() -> None:
    (q, k, v), outs, lses = _parts((0, 4, 9))
    sinks = torch.tensor([0.5, 2.0, -1.0, 0.0])
    out, lse = merge_attention(outs, lses, sinks=sinks)
    want, want_lse = attention_oracle(q, k, v, sinks=sinks)
    assert (out - want).abs().max() < 1e-5 and (lse - want_lse).abs().max() < 1e-5


def test_a_causal_last_part() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, 2, 8, generator=g) for n in (4, 10, 10))
    head = attention(q, k[:, :6], v[:, :6], return_lse=True)
    tail = attention(q, k[:, 6:], v[:, 6:], causal=True, return_lse=True)
    out, lse = merge_attention([head[0], tail[0]], [head[1], tail[1]])
    want, want_lse = attention_oracle(q, k, v, causal=True)
    assert (out - want).abs().max() < 1e-5 and (lse - want_lse).abs().max() < 1e-5


def test_gradients_through_outs_and_lses() -> None:
    leaves, outs, lses = _parts((0, 3, 9), grad=True)
    out, lse = merge_attention(outs, lses)
    g = torch.Generator().manual_seed(2)
    wo, wl = torch.randn(out.shape, generator=g), torch.randn(lse.shape, generator=g)
    got = torch.autograd.grad((out * wo).sum() + (lse * wl).sum(), leaves)
    ref, ref_lse = attention_oracle(*leaves)
    want = torch.autograd.grad((ref * wo).sum() + (ref_lse * wl).sum(), leaves)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(got, want, strict=True))


def test_rows_that_no_part_saw() -> None:
    outs = [torch.zeros(1, 2, 1, 4, requires_grad=True), torch.ones(1, 2, 1, 4, requires_grad=True)]
    lses = [
        torch.full((1, 1, 2), -math.inf, requires_grad=True),
        torch.tensor([[[-math.inf, 1.0]]], requires_grad=True),
    ]
    out, lse = merge_attention(outs, lses)
    assert torch.equal(lse, torch.tensor([[[-math.inf, 1.0]]]))
    assert not out[0, 0].any() and torch.equal(out[0, 1], torch.ones(1, 4))
    grads = torch.autograd.grad(out.sum() + lse[..., 1].sum(), [*outs, *lses])
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0].any() and torch.equal(grads[1][0, :, 0, 0], torch.tensor([0.0, 1.0]))


def test_a_sink_alone() -> None:
    out, lse = merge_attention([torch.zeros(3, 1, 4)], [torch.full((1, 3), -math.inf)], sinks=torch.tensor([0.7]))
    assert not out.any() and torch.allclose(lse, torch.full((1, 3), 0.7))


def test_huge_lses_do_not_overflow() -> None:
    outs, lses = (
        [torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)],
        [torch.full((1, 1, 1), 500.0), torch.full((1, 1, 1), 500.0)],
    )
    out, lse = merge_attention(outs, lses)
    assert torch.allclose(out, torch.full_like(out, 0.5)) and torch.allclose(lse, torch.tensor(500.0 + math.log(2)))


def test_packed_parts_and_the_oracle() -> None:
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    g = torch.Generator().manual_seed(3)
    q, k1, k2 = (torch.randn(5, 2, 8, generator=g) for _ in range(3))
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 3, "max_seqlen_k": 3, "return_lse": True}
    parts = [attention_varlen(q, k, k, **lengths) for k in (k1, k2)]
    got = merge_attention([p[0] for p in parts], [p[1] for p in parts])
    want = merge_oracle([p[0] for p in parts], [p[1] for p in parts])
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(got, want, strict=True))


def test_one_launch_where_our_kernel_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As if the CPU were a GPU: which calls the fused kernel gets, and what happens when it fails."""
    kernel, seen = Fused("merge_attention", "merge_launch"), []

    def merged(outs: list[torch.Tensor], lses: list[torch.Tensor], sinks: torch.Tensor | None) -> tuple:
        seen.append((len(outs), sinks))
        if len(seen) == 3:
            raise RuntimeError("no image")
        return merge_oracle(outs, lses, sinks=sinks)

    launcher = SimpleNamespace(merge=merged, DTYPES={torch.float32, torch.bfloat16})
    monkeypatch.setattr(kernel, "launcher", lambda tensors, kind: None if kernel.failed else launcher)
    monkeypatch.setattr(merge, "_kernel", kernel)
    (q, k, v), outs, lses = _parts((0, 4, 9))
    want, want_lse = attention_oracle(q, k, v)
    for sinks in (None, torch.zeros(4)):
        merge_attention(outs, lses, sinks=sinks)
    assert [(n, sinks is None) for n, sinks in seen] == [(2, True), (2, False)]
    for _ in range(2):  # the third launch fails, and there is no fourth
        out, lse = merge_attention(outs, lses)
        assert (out - want).abs().max() < 1e-5 and (lse - want_lse).abs().max() < 1e-5
    assert len(seen) == 3 and caplog.text.count("no image") == 1
    kernel.failed = None
    merge_attention([t.double() for t in outs], [t.double() for t in lses])
    merge_attention([t.clone().requires_grad_() for t in outs], lses)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "at least one part"),
        ([torch.zeros(1, 2, 1, 4)], [torch.zeros(1, 2, 1)], "do not belong together"),
        ([torch.zeros(1, 2, 1, 4), torch.zeros(1, 3, 1, 4)], [torch.zeros(1, 1, 2), torch.zeros(1, 1, 3)], "part 1"),
    ],
)
def test_parts_that_do_not_fit(outs: list[torch.Tensor], lses: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_attention(outs, lses)
    with pytest.raises(ValueError, match="sinks must have shape"):
        merge_attention([torch.zeros(1, 2, 1, 4)], [torch.zeros(1, 1, 2)], sinks=torch.zeros(3))
