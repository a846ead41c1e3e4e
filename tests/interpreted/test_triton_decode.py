"""Dense decode through the paged kernel, interpreted: options, layouts, splits, and what takes the forward kernel."""

from __future__ import annotations

import dataclasses
import gc
import mmap
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_accel.backends.triton import BACKEND, TritonAttention
from vllm_accel.backends.triton_decode import shares_keys
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation
from vllm_accel.kernels.triton import forward_launch, paged_launch, splits
from vllm_accel.testing import Case, check_backend
from vllm_accel.testing.oracle import attention_varlen_oracle
from vllm_accel.testing.tolerance import assert_lse_close

H200 = PRESETS["h200"]
#: Few teams, that begin and end in the middle of sequences.
FEW = replace(H200, sm_count=2)
_DECODE: dict[str, Any] = {
    "batch": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "head_dim_v": 16, "grad": False,
}  # fmt: skip
_PACKED: dict[str, Any] = {**_DECODE, "head_dim": 24, "head_dim_v": 24}
_UNEVEN = ((1, 700), (1, 3), (0, 9), (1, 0), (1, 1), (1, 330))
CASES = (
    Case("one", "", seqlen_q=1, seqlen_k=300, options={"causal": True}, **_DECODE),
    Case("split", "", seqlen_q=1, seqlen_k=600, **{**_DECODE, "num_heads": 2, "num_kv_heads": 1}),
    Case("eight", "", seqlen_q=8, seqlen_k=333, options={"causal": True}, **_DECODE),
    Case("eight, in parts", "", seqlen_q=8, seqlen_k=733, options={"causal": True}, sinks=True, **_DECODE),
    Case("gradients", "", seqlen_q=2, seqlen_k=257, lse_grad=True, **{**_DECODE, "grad": True, "batch": 1}),
    Case("three, not causal", "", seqlen_q=3, seqlen_k=260, **_DECODE),
    Case("options", "", seqlen_q=2, seqlen_k=400, alibi="batch", sinks=True,
         options={"causal": True, "softcap": 4.0, "softmax_scale": 0.3}, **{**_DECODE, "head_dim_v": 24}),
    Case("window", "", seqlen_q=2, seqlen_k=400, options={"window_size": (100, 1)}, sinks=True, **_DECODE),
    Case("descale", "", seqlen_q=1, seqlen_k=300, descale=True, **_DECODE),
    Case("heads first", "", seqlen_q=4, seqlen_k=300, layout="heads_first", options={"causal": True}, **_DECODE),
    Case("packed", "", seqlen_q=5, seqlen_k=300, layout="packed_qkv", options={"causal": True}, **_DECODE),
    Case("chunk", "", seqlen_q=21, seqlen_k=4110, options={"causal": True}, sinks=True,
         **{**_DECODE, "batch": 1, "num_heads": 2, "num_kv_heads": 1}),
    Case("chunk, not causal", "", seqlen_q=150, seqlen_k=1500, **{**_DECODE, "batch": 1, "num_heads": 2}),
    Case("packed decode", "", lengths=_UNEVEN, tail=3, **_PACKED),
    Case("packed, several", "", lengths=((3, 400), (8, 2), (0, 0), (1, 0), (2, 290)), tail=1, sinks=True,
         options={"causal": True}, **_PACKED),
    Case("packed, one", "", lengths=((2, 700),), options={"causal": True}, **_PACKED),
    Case("packed, gradients", "", lengths=((2, 300), (1, 0), (0, 9)), tail=2, lse_grad=True,
         **{**_PACKED, "grad": True}),
    Case("packed, options", "", lengths=_UNEVEN, tail=3, alibi="batch", sinks=True,
         options={"causal": True, "softcap": 4.0, "softmax_scale": 0.3}, **{**_PACKED, "head_dim_v": 40}),
    Case("packed, window", "", lengths=_UNEVEN, options={"window_size": (100, 1)}, alibi="heads", **_PACKED),
    Case("packed, descale", "", lengths=_UNEVEN, descale=True, **_PACKED),
    Case("packed, slices of one", "", lengths=((5, 400), (1, 600)), layout="packed_qkv", **_PACKED),
    Case("few teams", "", seqlen_q=2, seqlen_k=700, sinks=True, options={"causal": True}, **{**_DECODE, "batch": 5}),
    Case("a team each", "", seqlen_q=1, seqlen_k=300, alibi="batch", **{**_DECODE, "batch": 5}),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _empty_is_nan() -> Iterator[None]:
    """torch.empty gives NaN here: an output that nobody wrote, or a partial result that was read unwritten, shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
    device = FEW if case.lengths or case.batch > 2 else H200
    assert check_backend(BACKEND, case, dtype=dtype, device=device, where="cpu").ran
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
    spec = _kernel()._spec

    def shares(
        args: AttentionArgs, spec: AttentionSpec = spec, k: torch.Tensor | None = None, sm_count: int = 132
    ) -> bool:
        q = torch.empty(2, args.max_seqlen_q, 4, 16, device="meta")
        dense = torch.empty(2, args.max_seqlen_k, 2, 16, device="meta")
        return shares_keys(spec, q, dense if k is None else k, dense, args, sm_count)

    assert shares(_args(8, 600)) and not shares(_args(1, splits.MIN_SPLIT - 1))
    assert shares(_args(1, 600), _kernel(Feature.VARLEN)._spec)
    assert not shares(_args(9, 6000), _kernel(Feature.VARLEN)._spec)
    for feature in (Feature.BIAS, Feature.MASK, Feature.DROPOUT, Feature.BATCH_INVARIANT):
        assert not shares(_args(1, 600), _kernel(feature)._spec)
        assert not shares(_args(100, 6000), _kernel(feature)._spec)
    far = torch.empty_strided((2, 600, 2, 16), (2**32, 2**22, 16, 1), device="meta")
    assert not shares(_args(1, 600), k=far)
    # A chunk has a tile for each sequence, head and 128 queries: 8, 96 and 104 here, and 132 multiprocessors.
    half = dataclasses.replace(spec, dtype=torch.bfloat16)
    for queries, keys in ((9, 1331), (1536, 4584)):
        assert shares(_args(queries, keys), half) and not shares(_args(queries, keys - 1), half)
        assert not shares(_args(queries, keys), half, sm_count=24) and not shares(_args(queries, keys))
    assert not shares(_args(1537, 90000), half) and not shares(_args(9, 90000), half, sm_count=0)
    assert shares(_args(640, 4096)) and not shares(_args(641, 4096)) and not shares(_args(9, 4095))
    assert not shares(_args(9, 4096)._replace(window_size=(5000, -1)))


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


def _packed(lengths: tuple[tuple[int, int], ...], tail: int = 0, **sizes: Any) -> tuple[Any, ...]:
    """Return q, k, v, arguments of a packed call, without its options."""
    made = Case("", "", lengths=lengths, tail=tail, **{**_PACKED, **sizes}).make(torch.float32)
    ends = made.options["cu_seqlens_q"], made.options["cu_seqlens_k"]
    args = _args(max(n for n, _ in lengths), max(n for _, n in lengths))
    return made.q, made.k, made.v, args._replace(cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])


def _few_teams(features: Feature = Feature.VARLEN) -> TritonAttention:
    dtype = torch.float32
    spec = AttentionSpec(dtype, dtype, 4, 2, 24, 24, 2, 1, 512, Relation.MIXED, features)
    return BACKEND.bind(spec, FEW)


def test_packed_lengths_may_change_under_a_plan(by_forward: list[int]) -> None:
    """What a captured graph replays: the same launch, other cu_seqlens."""
    q, k, v, args = _packed(((1, 700), (1, 1), (1, 300)))
    kernel = _few_teams()
    forward = kernel.prepare(q, k, v, args)
    for ends in ([0, 700, 701, 1001], [0, 0, 400, 1001], [0, 1, 2, 3], [0, 300, 1000, 1000]):
        args.cu_seqlens_k.copy_(torch.tensor(ends))
        out, lse, _ = forward(q, k, v, args)
        want, want_lse = attention_varlen_oracle(
            q, k, v, cu_seqlens_q=args.cu_seqlens_q, cu_seqlens_k=args.cu_seqlens_k, softmax_scale=0.25
        )
        assert (out - want).abs().max() < 1e-5
        assert lse is not None
        assert_lse_close(lse, want_lse, dtype=torch.float32)
    assert not by_forward


def test_wrong_packed_lengths_touch_nothing_outside(by_forward: list[int]) -> None:
    """The interpreter reads through raw addresses: an access outside would crash, or bring in other numbers."""
    q, k, _, args = _packed(((1, 300), (2, 290)))
    kernel, ones = _few_teams(), torch.ones_like(k)
    for wrong in ([-7, 2**30, 2**31 - 1], [0, 590, 5], [2**31 - 1, -(2**31), 600], [0, -5, 590]):
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            broken = args._replace(**{name: torch.tensor(wrong, dtype=torch.int32)})
            out, _, _ = kernel.forward(q, ones, ones, broken)
            assert ((out == 0) | (out - 1).abs().lt(1e-5) | out.isnan()).all()
            assert name == "cu_seqlens_q" or not out.isnan().any()
    assert not by_forward


def test_packed_keys_far_from_each_other() -> None:
    """Offsets beyond 31 bits from the first key of the batch, not of a sequence; and lengths beyond what they reach."""
    q, k, v, args = _packed(((1, 260), (2, 300)), num_kv_heads=1, num_heads=2, head_dim=16, head_dim_v=16)
    apart = 2**31 // 450
    memory = torch.frombuffer(mmap.mmap(-1, 4 * (560 * apart + 16)), dtype=torch.float32)
    far = memory.as_strided((560, 1, 16), (apart, 16, 1))
    far.copy_(k)
    dtype = torch.float32
    spec = AttentionSpec(dtype, dtype, 2, 1, 16, 16, 2, 1, 512, Relation.MIXED, Feature.VARLEN)
    assert shares_keys(spec, q, far, v, args, 132)
    assert not shares_keys(spec, q, far, v, args._replace(max_seqlen_k=330), 132)
    kernel = BACKEND.bind(spec, FEW)
    got, _, _ = kernel.forward(q, far, v, args)
    want, _, _ = kernel.forward(q, k, v, args)
    assert torch.equal(got, want)
    longer = args._replace(cu_seqlens_k=torch.tensor([0, 0, 560], dtype=torch.int32))
    assert kernel.forward(q, far, v, longer)[0].isfinite().all()
