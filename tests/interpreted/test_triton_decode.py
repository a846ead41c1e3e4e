"""Dense decode through the paged kernel, interpreted: options, layouts, splits, and what takes the forward kernel."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from vllm_accel.backends.triton import BACKEND, TritonAttention
from vllm_accel.backends.triton_decode import decodes
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation
from vllm_accel.kernels.triton import forward_launch, paged_launch, splits
from vllm_accel.testing import Case, check_backend

H200 = PRESETS["h200"]
_DECODE: dict[str, Any] = {
    "batch": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "head_dim_v": 16, "grad": False,
}  # fmt: skip
CASES = (
    Case("one", "", seqlen_q=1, seqlen_k=300, options={"causal": True}, **_DECODE),
    Case("split", "", seqlen_q=1, seqlen_k=600, **{**_DECODE, "num_heads": 2, "num_kv_heads": 1}),
    Case("eight", "", seqlen_q=8, seqlen_k=333, options={"causal": True}, **_DECODE),
    Case("gradients", "", seqlen_q=2, seqlen_k=257, lse_grad=True, **{**_DECODE, "grad": True, "batch": 1}),
    Case("three, not causal", "", seqlen_q=3, seqlen_k=260, **_DECODE),
    Case("options", "", seqlen_q=2, seqlen_k=400, alibi="batch", sinks=True,
         options={"causal": True, "softcap": 4.0, "softmax_scale": 0.3}, **{**_DECODE, "head_dim_v": 24}),
    Case("window", "", seqlen_q=2, seqlen_k=400, options={"window_size": (100, 1)}, sinks=True, **_DECODE),
    Case("descale", "", seqlen_q=1, seqlen_k=300, descale=True, **_DECODE),
    Case("heads first", "", seqlen_q=4, seqlen_k=300, layout="heads_first", options={"causal": True}, **_DECODE),
    Case("packed", "", seqlen_q=5, seqlen_k=300, layout="packed_qkv", options={"causal": True}, **_DECODE),
)  # fmt: skip


@pytest.fixture
def by_forward(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the forward kernel was described."""
    seen: list[int] = []
    real = forward_launch.forward_launch
    monkeypatch.setattr(forward_launch, "forward_launch", lambda *a, **k: (seen.append(1), real(*a, **k))[1])
    return seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, by_forward: list[int]) -> None:
    dtype = (torch.float16, torch.float32, torch.bfloat16)[CASES.index(case) % 3]
    assert check_backend(BACKEND, case, dtype=dtype, device=H200, where="cpu").ran
    assert not by_forward


def _kernel(features: Feature | None = None) -> TritonAttention:
    dtype = torch.float32
    spec = AttentionSpec(dtype, dtype, 4, 2, 16, 16, 2, 1, 512, Relation.SHORTER, features or Feature(0))
    return BACKEND.bind(spec, H200)


def _args(seqlen_q: int, seqlen_k: int) -> AttentionArgs:
    return AttentionArgs(
        *(None,) * 8, seqlen_q, seqlen_k, 0.25, False, (-1, -1), 0.0, 0.0, True, False, False
    )  # fmt: skip


def test_longer_lengths_are_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode grows by a key a step: nothing of that may be compiled in."""
    seen = []
    real = paged_launch.attention_launch
    monkeypatch.setattr(paged_launch, "attention_launch", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    for length in (301, 302, 350):
        q, k = torch.randn(2, 1, 4, 16), torch.randn(2, length, 2, 16)
        _kernel().forward(q, k, k, _args(1, length))
    assert len({tuple(launch.constexprs.values()) for launch in seen}) == 1


def test_what_takes_the_forward_kernel() -> None:
    k = torch.empty(2, 600, 2, 16, device="meta")
    spec = _kernel()._spec
    assert decodes(spec, k, k, _args(8, 600))
    assert not decodes(spec, k, k, _args(9, 600))
    assert not decodes(spec, k, k, _args(1, splits.MIN_SPLIT - 1))
    for feature in (Feature.VARLEN, Feature.BIAS, Feature.MASK, Feature.DROPOUT, Feature.BATCH_INVARIANT):
        assert not decodes(_kernel(feature)._spec, k, k, _args(1, 600))
    far = torch.empty_strided((2, 600, 2, 16), (2**32, 2**22, 16, 1), device="meta")
    assert not decodes(spec, far, k, _args(1, 600))


def test_a_plan_takes_other_tensors_and_keeps_none() -> None:
    kernel = _kernel()
    q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 300, 2, 16)
    alive = weakref.ref(k)
    forward = kernel.prepare(q, k, k, _args(1, 300))
    forward(q, k, k, _args(1, 300))
    del k
    gc.collect()
    assert alive() is None
    other = torch.randn(2, 300, 2, 16)
    changed = _args(1, 300)._replace(softmax_scale=0.5)
    got, want = forward(q, other, other, changed), _kernel().forward(q, other, other, changed)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert got[0].shape == (2, 1, 4, 16) and got[1].shape == (2, 4, 1) and got[1].is_contiguous()
