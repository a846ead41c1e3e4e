"""The oracle against explicit loops in numpy, its gradients against finite differences, and the tolerance rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_accel.testing.oracle import (
    attention_oracle,
    attention_paged_oracle,
    attention_varlen_oracle,
    merge_oracle,
    plain_attention,
    plain_attention_varlen,
)
from vllm_accel.testing.tolerance import assert_close, assert_grad_close, assert_lse_close, tolerance

INF = float("inf")


def loops(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: np.ndarray | None = None,
    attn_bias: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    q_descale: np.ndarray | None = None,
    k_descale: np.ndarray | None = None,
    v_descale: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention one number at a time: the meaning of every option, spelt out."""
    (batch, seqlen_q, heads, dim), (_, seqlen_k, kv_heads, dim_v) = q.shape, v.shape
    scale = 1 / math.sqrt(dim) if softmax_scale is None else softmax_scale
    out, lse = np.zeros((batch, seqlen_q, heads, dim_v)), np.full((batch, heads, seqlen_q), -INF)

    def descale(value: np.ndarray | None, b: int, kv_head: int) -> float:
        if value is None or value.ndim == 0:
            return 1.0 if value is None else float(value)
        return float(value[kv_head] if value.ndim == 1 else value[b, kv_head])

    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            factors = [descale(x, b, g) for x in (q_descale, k_descale, v_descale)]
            for i in range(seqlen_q):
                scores = {}
                for j in range(seqlen_k):
                    diagonal = i + seqlen_k - seqlen_q
                    score = sum(q[b, i, h, d] * k[b, j, g, d] for d in range(dim)) * factors[0] * factors[1] * scale
                    if softcap > 0:
                        score = softcap * math.tanh(score / softcap)
                    if alibi_slopes is not None:
                        slope = alibi_slopes[h] if alibi_slopes.ndim == 1 else alibi_slopes[b, h]
                        score -= float(slope) * abs(diagonal - j)
                    hidden = (
                        (causal and j > diagonal)
                        or (window_size[0] >= 0 and j < diagonal - window_size[0])
                        or (window_size[1] >= 0 and j > diagonal + window_size[1])
                    )
                    if attn_bias is not None:
                        value = np.broadcast_to(attn_bias, (batch, heads, seqlen_q, seqlen_k))[b, h, i, j]
                        if attn_bias.dtype == bool:
                            hidden = hidden or not value
                        else:
                            score += value
                    if not hidden and score != -INF:
                        scores[j] = score
                logits = [*scores.values(), *([] if sinks is None or sinks[h] == -INF else [float(sinks[h])])]
                if not logits:
                    continue
                largest = max(logits)
                total = sum(math.exp(x - largest) for x in logits)
                lse[b, h, i] = math.log(total) + largest
                for j, score in scores.items():
                    out[b, i, h] += math.exp(score - largest) / total * v[b, j, g] * factors[2]
    return out, lse


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def bias_with_gaps(*shape: int) -> Tensor:
    bias = rand(*shape, seed=9)
    return torch.where(rand(*shape, seed=10) < -0.8, -INF, bias)


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "window left": {"window_size": (1, -1)},
    "window right": {"window_size": (-1, 1)},
    "window zero": {"window_size": (0, 0)},
    "window two sides": {"window_size": (2, 1)},
    "causal window": {"causal": True, "window_size": (2, 5)},
    "scale": {"softmax_scale": 0.7},
    "softcap": {"softcap": 0.8, "softmax_scale": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 1.0, 0.25])},
    "alibi per sequence": {"alibi_slopes": rand(2, 4).abs().float(), "causal": True},
    "bias": {"attn_bias": bias_with_gaps(2, 4, 5, 3)},
    "bias broadcast": {"attn_bias": bias_with_gaps(4, 1, 3), "causal": True},
    "bias one row": {"attn_bias": bias_with_gaps(3)},
    "mask": {"attn_bias": rand(2, 1, 5, 3) > 0},
    "mask everything": {"attn_bias": torch.zeros(5, 3, dtype=torch.bool)},
    "large negative bias": {"attn_bias": torch.full((5, 3), torch.finfo(torch.float32).min, dtype=torch.float64)},
    "sinks": {"sinks": rand(4)},
    "sinks, nothing seen": {"sinks": rand(4), "attn_bias": torch.zeros(5, 3, dtype=torch.bool)},
    "sink of -inf": {"sinks": torch.full((4,), -INF), "causal": True},
    "descale scalar": {"q_descale": torch.tensor(0.5), "k_descale": 2.0, "v_descale": torch.tensor(3.0)},
    "descale per head": {"q_descale": torch.tensor([0.5, 2.0]), "v_descale": torch.tensor([1.5, 0.1])},
    "descale per sequence": {"k_descale": torch.tensor([[0.5, 2.0], [1.0, 3.0]])},
    "all": {
        "causal": True, "window_size": (2, 3), "softmax_scale": 1.3, "softcap": 2.0, "sinks": rand(4),
        "alibi_slopes": torch.tensor([0.5, 0.1, 1.0, 0.25]), "attn_bias": bias_with_gaps(2, 1, 5, 3),
        "q_descale": torch.tensor([0.5, 2.0]), "k_descale": torch.tensor([[0.5, 2.0], [1.0, 3.0]]),
        "v_descale": torch.tensor(3.0),
    },
}  # fmt: skip


def to_numpy(options: dict[str, Any]) -> dict[str, Any]:
    named = {
        key: np.asarray(value) if key.endswith("descale") or isinstance(value, Tensor) else value
        for key, value in options.items()
    }
    return {key: value.numpy() if isinstance(value, Tensor) else value for key, value in named.items()}


def fit(options: dict[str, Any], seqlen_k: int) -> dict[str, Any]:
    """Make a bias for 3 keys one for ``seqlen_k`` keys."""
    bias = options.get("attn_bias")
    if bias is None:
        return options
    return {**options, "attn_bias": bias[..., [j % 3 for j in range(seqlen_k)]]}


@pytest.mark.parametrize("seqlen_k", [3, 7])
@pytest.mark.parametrize("name", OPTIONS)
def test_oracle_is_what_the_loops_say(name: str, seqlen_k: int) -> None:
    options = fit(OPTIONS[name], seqlen_k)
    q, k, v = rand(2, 5, 4, 3), rand(2, seqlen_k, 2, 3), rand(2, seqlen_k, 2, 6)
    out, lse = attention_oracle(q, k, v, **options)
    expected_out, expected_lse = loops(q.numpy(), k.numpy(), v.numpy(), **to_numpy(options))
    assert out.dtype == lse.dtype == torch.float64 and out.is_contiguous()
    np.testing.assert_allclose(out.numpy(), expected_out, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OPTIONS)
def test_plain_attention_in_float64_is_the_oracle(name: str) -> None:
    q, k, v = rand(2, 5, 4, 3), rand(2, 3, 2, 3), rand(2, 3, 2, 6)
    for got, want in zip(
        plain_attention(q, k, v, **OPTIONS[name]), attention_oracle(q, k, v, **OPTIONS[name]), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_plain_attention_keeps_the_dtype(dtype: torch.dtype) -> None:
    q, k, v = (rand(1, 6, 2, 8, seed=s).to(dtype) for s in range(3))
    out, lse = plain_attention(q, k, v, causal=True, q_descale=torch.tensor([2.0, 0.5]))
    wanted_out, wanted_lse = attention_oracle(q, k, v, causal=True, q_descale=torch.tensor([2.0, 0.5]))
    half = torch.bfloat16 if dtype.itemsize == 1 else dtype
    assert out.dtype == half and lse.dtype == torch.float32
    error = (out - wanted_out).abs().max()
    assert 0 < error < 8 * torch.finfo(half).eps
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=8 * torch.finfo(half).eps)


# Beside a bias of -3e38 a finite difference of the scores is lost in rounding.
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "large negative bias"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    options = {key: value for key, value in OPTIONS[name].items() if key not in ("sinks", "attn_bias")}
    bias, sinks = OPTIONS[name].get("attn_bias"), OPTIONS[name].get("sinks")
    inputs = [rand(2, 5, 4, 3), rand(2, 3, 2, 3), rand(2, 3, 2, 2)]
    finite_sinks = sinks is not None and bool(torch.isfinite(sinks).all())
    inputs += [sinks.clone()] if finite_sinks else []
    smooth = bias is not None and bias.dtype != torch.bool and bool((bias.abs() < 1e6).any())
    holes = bias == -INF if smooth else None
    inputs += [torch.where(holes, 0.0, bias)] if smooth else []
    for x in inputs:
        x.requires_grad_()

    def run(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        rest = list(more)
        sink = rest.pop(0) if finite_sinks else sinks
        # The holes of a bias stay holes: only its finite values are differentiated.
        own_bias = torch.where(holes, -INF, rest.pop(0)) if smooth else bias
        out, lse = attention_oracle(q, k, v, sinks=sink, attn_bias=own_bias, **options)
        return out, torch.where(lse == -INF, 0.0, lse)

    assert torch.autograd.gradcheck(run, tuple(inputs))


def test_rows_without_keys_give_zero_and_minus_infinity_and_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in (rand(1, 4, 2, 3), rand(1, 2, 2, 3), rand(1, 2, 2, 3)))
    out, lse = attention_oracle(q, k, v, causal=True)
    assert (out[:, :2] == 0).all() and (lse[..., :2] == -INF).all() and torch.isfinite(lse[..., 2:]).all()
    grads = torch.autograd.grad(out.sum() + lse[..., 2:].sum(), (q, k, v))
    assert (grads[0][:, :2] == 0).all() and all(torch.isfinite(g).all() for g in grads)
    # Even a gradient that arrives for a row without keys goes nowhere.
    zeros = torch.autograd.grad(attention_oracle(q, k, v, causal=True)[1], (q, k), torch.ones(1, 2, 4))
    assert all(torch.isfinite(g).all() for g in zeros) and (zeros[0][:, :2] == 0).all()


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 0), (2, 0, 4), (0, 3, 4), (1, 0, 0)])
def test_empty_inputs(shape: tuple[int, int, int], with_sinks: bool) -> None:
    batch, seqlen_q, seqlen_k = shape
    q, k, v = rand(batch, seqlen_q, 4, 3), rand(batch, seqlen_k, 2, 3), rand(batch, seqlen_k, 2, 5)
    sinks = rand(4) if with_sinks else None
    out, lse = attention_oracle(q, k, v, sinks=sinks)
    assert out.shape == (batch, seqlen_q, 4, 5) and lse.shape == (batch, 4, seqlen_q)
    if seqlen_k == 0:
        assert (out == 0).all()
        assert (lse == (torch.full((4,), -INF) if sinks is None else sinks)[:, None]).all()


def test_what_no_one_sees_may_be_nan() -> None:
    q, k, v = rand(1, 4, 2, 3), rand(1, 6, 2, 3), rand(1, 6, 2, 3)
    seen = torch.ones(4, 6, dtype=torch.bool)
    seen[:, 2], seen[1] = False, False
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    q[:, 1], k[:, 2], v[:, 2] = math.nan, math.nan, INF
    dirty = [x.requires_grad_() for x in (q, k, v)]
    results = [attention_oracle(*inputs, attn_bias=seen) for inputs in (clean, dirty)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    grads = [
        torch.autograd.grad(r[0].sum() + r[1][..., [0, 2, 3]].sum(), x)
        for r, x in zip(results, (clean, dirty), strict=True)
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_softcap_saturates() -> None:
    q, k, v = rand(1, 3, 1, 2) * 1e150, rand(1, 3, 1, 2) * 1e150, rand(1, 3, 1, 2)
    out, lse = attention_oracle(q.requires_grad_(), k, v, softcap=5.0)
    assert torch.isfinite(out).all() and (lse.abs() <= 5.0 + math.log(3)).all()
    assert torch.isfinite(torch.autograd.grad(out.sum(), q)[0]).all()


def test_a_window_below_minus_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="window_size"):
        attention_oracle(rand(1, 2, 1, 2), rand(1, 2, 1, 2), rand(1, 2, 1, 2), window_size=(-2, 0))


CU_Q, CU_K = torch.tensor([0, 3, 3, 4, 6]), torch.tensor([0, 2, 5, 5, 9])


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if "attn_bias" not in options])
def test_varlen_is_dense_sequence_by_sequence(name: str) -> None:
    options = dict(OPTIONS[name])
    for key, value in options.items():
        if isinstance(value, Tensor) and value.ndim == 2:
            options[key] = value.repeat(2, 1)  # one row for each of four sequences
    q, k, v = rand(8, 4, 3), rand(11, 2, 3), rand(11, 2, 5)
    q[6:], k[9:], v[9:] = math.nan, math.nan, math.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention_varlen_oracle(*inputs, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, **options)
    assert out.shape == (8, 4, 5) and lse.shape == (4, 8)
    assert (out[6:] == 0).all() and (lse[:, 6:] == -INF).all()
    for b in range(4):
        rows, keys = slice(int(CU_Q[b]), int(CU_Q[b + 1])), slice(int(CU_K[b]), int(CU_K[b + 1]))
        own = {
            key: value[b] if isinstance(value, Tensor) and value.ndim == 2 else value for key, value in options.items()
        }
        expected = attention_oracle(q[None, rows], k[None, keys], v[None, keys], **own)
        torch.testing.assert_close((out[rows], lse[:, rows]), (expected[0][0], expected[1][0]), rtol=0, atol=0)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.isfinite(g).all() for g in grads) and (grads[0][6:] == 0).all() and (grads[1][9:] == 0).all()
    plain = plain_attention_varlen(q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, **options)
    torch.testing.assert_close(plain, (out, lse), rtol=1e-12, atol=1e-13)


def test_paged_is_varlen_over_gathered_blocks() -> None:
    k, v, q = rand(9, 2, 3), rand(9, 2, 5), rand(6, 4, 3)
    k_cache, v_cache = torch.full((5, 4, 2, 3), math.nan), torch.full((5, 4, 2, 5), math.nan)
    k_cache, v_cache = k_cache.double(), v_cache.double()
    table = torch.tensor([[3, 99], [1, -1], [77, 77], [4, 77]], dtype=torch.int32)  # past a sequence: never read
    used = torch.diff(CU_K).int()
    for b, block in enumerate((3, 1, 0, 4)):
        n = int(used[b])
        k_cache[block, :n], v_cache[block, :n] = k[CU_K[b] : CU_K[b + 1]], v[CU_K[b] : CU_K[b + 1]]
    got = attention_paged_oracle(q, k_cache, v_cache, cu_seqlens_q=CU_Q, block_table=table, seqused_k=used, causal=True)
    want = attention_varlen_oracle(q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, causal=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_paged_spans_several_blocks() -> None:
    k, v, q = rand(1, 7, 2, 3), rand(1, 7, 2, 3), rand(2, 4, 3)
    cache = {name: torch.full((4, 3, 2, 3), math.nan, dtype=torch.float64) for name in "kv"}
    for name, x in (("k", k), ("v", v)):
        cache[name][2], cache[name][0], cache[name][3, :1] = x[0, :3], x[0, 3:6], x[0, 6:]
    out, lse = attention_paged_oracle(
        q, cache["k"], cache["v"], cu_seqlens_q=torch.tensor([0, 2]), block_table=torch.tensor([[2, 0, 3, 9]]),
        seqused_k=torch.tensor([7]), causal=True,
    )  # fmt: skip
    want = attention_oracle(q[None], k, v, causal=True)
    torch.testing.assert_close((out, lse), (want[0][0], want[1][0]), rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_merging_parts_gives_the_whole(packed: bool) -> None:
    q, k, v, sinks = rand(1, 4, 4, 3), rand(1, 7, 2, 3), rand(1, 7, 2, 5), rand(4)
    whole = attention_oracle(q, k, v, sinks=sinks)
    parts = [attention_oracle(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 3), (3, 3), (3, 7))]
    parts[1] = (torch.full_like(parts[1][0], math.nan), parts[1][1])
    outs, lses = [[x[0] for x in pair] if packed else list(pair) for pair in zip(*parts, strict=True)]
    merged = merge_oracle(outs, lses, sinks)
    want = tuple(x[0] for x in whole) if packed else whole
    torch.testing.assert_close(merged, want, rtol=1e-12, atol=1e-13)


def test_merging_nothing_and_its_gradients() -> None:
    outs, lses = [rand(1, 2, 1, 3), rand(1, 2, 1, 3, seed=1)], [torch.full((1, 1, 2), -INF).double() for _ in "ab"]
    out, lse = merge_oracle(outs, lses)
    assert (out == 0).all() and (lse == -INF).all()
    inputs = (*outs, rand(1, 1, 2), rand(1, 1, 2, seed=1), rand(1))
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, c, d, s: merge_oracle([a, b], [c, d], s), inputs)
    lses[0].requires_grad_()
    assert (torch.autograd.grad(merge_oracle(outs, lses)[0].sum(), lses[0])[0] == 0).all()


class TestTolerance:
    reference = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    plain = reference.float() + torch.tensor([0.0, 0.01, 0.0])

    def test_the_bound(self) -> None:
        bound = tolerance(self.reference, self.plain, torch.bfloat16, factor=3.0)
        assert bound == pytest.approx(3 * (0.01 + torch.finfo(torch.bfloat16).eps * 2.0), rel=1e-5)
        scaled = tolerance(self.reference, self.plain, torch.bfloat16, factor=2.0, scale=10.0)
        assert scaled == pytest.approx(2 * (0.01 + torch.finfo(torch.bfloat16).eps * 10.0), rel=1e-5)
        assert tolerance(torch.empty(0), torch.empty(0), torch.float32) == 0.0

    def test_within_and_beyond(self) -> None:
        near = self.reference.float()
        near[2] += 0.0199
        assert_close(near, self.reference, self.plain, what="out")
        near[2] += 0.001
        with pytest.raises(AssertionError, match=r"out: element \(2,\).*0\.5209.*0\.5.*above 0\.02"):
            assert_close(near, self.reference, self.plain, what="out")
        assert_grad_close(near, self.reference, self.plain, what="dq")

    @pytest.mark.parametrize("bad", [math.nan, INF, -INF])
    def test_not_finite_is_never_close(self, bad: float) -> None:
        actual = self.reference.float()
        actual[1] = bad
        with pytest.raises(AssertionError, match=r"element \(1,\)"):
            assert_close(actual, self.reference, self.plain, what="out")
        with pytest.raises(AssertionError, match="sets no tolerance"):
            assert_close(self.reference.float(), self.reference, actual, what="out")

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(AssertionError, match="shape"):
            assert_close(self.plain[:2], self.reference, self.plain, what="out")

    def test_lse(self) -> None:
        reference = torch.tensor([[3.0, -INF, -0.5]], dtype=torch.float64)
        assert_lse_close(reference.float() + 0.0009, reference, dtype=torch.bfloat16)
        assert_lse_close(reference.float() + 2e-5, reference, dtype=torch.float32)
        for wrong in (reference.float() + 0.002, reference.float().nan_to_num(neginf=-1e30), -reference.float()):
            with pytest.raises(AssertionError, match="lse: element"):
                assert_lse_close(wrong, reference, dtype=torch.float16)
        with pytest.raises(AssertionError, match="lse: element"):
            assert_lse_close(reference.float() + 5e-5, reference, dtype=torch.float32)
        with pytest.raises(AssertionError, match="float64 inputs give float64"):
            assert_lse_close(reference.float(), reference, dtype=torch.float64)
        hidden = torch.tensor([[3.0, -INF, -INF]])
        with pytest.raises(AssertionError, match=r"element \(0, 2\)"):
            assert_lse_close(hidden, reference, dtype=torch.bfloat16)
