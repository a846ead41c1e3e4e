"""Every backend that runs on this machine's CPU, through the public call, against the float64 oracle."""

from __future__ import annotations

import functools

import pytest
import torch

from host import FIRST_ON_CPU, FIRST_WITH_SOFTCAP
from vllm_accel import UnsupportedCallError, attention, attention_varlen, explain
from vllm_accel.testing import CASES, Case
from vllm_accel.testing.conformance import check_call

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

#: What PyTorch's CPU kernel cannot do; anything else that it refuses is a regression.
REFUSED_BY_SDPA_CPU = {
    "softcap", "softcap_large", "bias_grad", "bias_heads", "bias_row", "bias_column", "batch_invariant", "descale",
    "everything", "varlen_softcap", "varlen_invariant",
}  # fmt: skip


def _call(backend: str | None):
    def call(q, k, v, **kwargs):
        fn = attention_varlen if "cu_seqlens_q" in kwargs else attention
        return fn(q, k, v, backend=backend, **kwargs)

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_runs_everything(case: Case, dtype: str) -> None:
    check_call(_call("reference"), case, dtype=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sdpa_cpu_is_right_or_says_why_not(case: Case, dtype: str) -> None:
    if case.name not in REFUSED_BY_SDPA_CPU:
        check_call(_call("sdpa_cpu"), case, dtype=DTYPES[dtype])
        return
    inputs = case.make(DTYPES[dtype])
    for leaf in inputs.leaves():
        leaf.requires_grad_()
    fn = attention_varlen if case.varlen else attention
    shown = explain(fn, inputs.q, inputs.k, inputs.v, **inputs.options)["sdpa_cpu"]
    with pytest.raises(UnsupportedCallError) as refusal:
        _call("sdpa_cpu")(inputs.q, inputs.k, inputs.v, **inputs.options)
    assert refusal.value.reasons["sdpa_cpu"] == shown.reasons
    assert shown.reasons and all(reason.text in str(refusal.value) for reason in shown.reasons)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_automatic_choice(case: Case) -> None:
    check_call(_call(None), case, dtype=torch.bfloat16, seed=3)


DECODE = {"seqlen_q": 1, "num_heads": 6, "num_kv_heads": 2, "lse_grad": True}
DECODE_CASES = (
    Case("decode_keys", "a padding mask, one query, grouped heads", bias="keys", bool_bias=True, **DECODE),
    Case("decode_full", "a bias that differs by head", bias="full", **DECODE),
    Case("decode_none", "", options={"causal": True}, layout="heads_first", **DECODE),
    Case("decode_value_dim", "", head_dim_v=32, **DECODE),
)
KEY_MASK = {"bias": "keys", "bool_bias": True, "options": {"causal": True}, "num_kv_heads": 2, "lse_grad": True}
KEY_MASK_CASES = (
    Case("keys_causal", "one mask over keys and the causal one", **KEY_MASK),
    Case("keys_causal_shorter", "", seqlen_q=17, **KEY_MASK),
    Case("keys_causal_longer", "", seqlen_k=17, **KEY_MASK),
    Case("keys_value_dim", "", bias="keys", head_dim_v=32, lse_grad=True),
    Case("keys_window", "", bias="keys", options={"causal": True, "window_size": (9, -1)}),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DECODE_CASES + KEY_MASK_CASES, ids=lambda case: case.name)
def test_sdpa_cpu_short_ways(case: Case, dtype: str) -> None:
    check_call(_call("sdpa_cpu"), case, dtype=DTYPES[dtype])


def test_automatic_choice_takes_the_fastest_kernel_that_can() -> None:
    q = torch.randn(1, 8, 2, 16)
    assert explain(attention, q, q, q).chosen == FIRST_ON_CPU
    assert explain(attention, q, q, q, softcap=2.0).chosen == FIRST_WITH_SOFTCAP
    assert explain(attention, *(q.double(),) * 3).chosen == "sdpa_cpu"
    assert explain(attention, q, q, q, dropout_p=0.1).chosen == "reference"


@pytest.mark.parametrize("name", dict.fromkeys(["reference", "sdpa_cpu", FIRST_ON_CPU]))
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("gqa", "varlen_causal", "deterministic")], ids=str)
def test_same_bits_on_every_run(name: str, case: Case) -> None:
    inputs = case.make(torch.float32)
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    options = {**inputs.options, "deterministic": True}

    def once() -> list[torch.Tensor]:
        out = _call(name)(*leaves, **options)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_batch_invariant_bits(packed: bool) -> None:
    g = torch.Generator().manual_seed(0)
    lengths = [7, 33, 1, 20]
    sequences = [torch.randn(n, 4, 32, generator=g).bfloat16() for n in lengths]
    run = functools.partial(attention, causal=True, batch_invariant=True)
    alone = [run(s[None], s[None, :, :2], s[None, :, :2])[0] for s in sequences]
    if packed:
        cu = torch.tensor([0, 7, 40, 41, 61], dtype=torch.int32)
        q = torch.cat(sequences)
        out = attention_varlen(
            q, q[:, :2], q[:, :2], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=60, max_seqlen_k=50,
            causal=True, batch_invariant=True,
        )  # fmt: skip
        together = list(out.split(lengths))
    else:
        q = torch.stack([sequences[1]] * 3)
        alone, together = alone[1:2] * 3, list(run(q, q[:, :, :2], q[:, :, :2]))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def _dropout_inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 64, 4, 32, generator=g).requires_grad_() for _ in range(3))


def test_dropout_keeps_the_mean_and_leaves_the_lse() -> None:
    q, k, v = (t.detach() for t in _dropout_inputs())
    ones = torch.ones_like(v)
    torch.manual_seed(5)
    out, lse = attention(q, k, ones, dropout_p=0.3, return_lse=True)
    _, plain = attention(q, k, ones, return_lse=True)
    assert torch.allclose(lse, plain, atol=1e-5)
    # Each row is a sum of kept probabilities / 0.7: mean 1; 512 rows of at most 64 terms.
    assert abs(out.mean().item() - 1.0) < 0.02 and out.std().item() > 0.05
    torch.manual_seed(5)
    assert torch.equal(out, attention(q, k, ones, dropout_p=0.3, return_lse=True)[0])
    assert not torch.equal(out, attention(q, k, ones, dropout_p=0.3, return_lse=True)[0])


@pytest.mark.parametrize("varlen", [False, True])
def test_dropout_drops_the_same_weights_in_backward(varlen: bool) -> None:
    q, k, v = _dropout_inputs()
    torch.manual_seed(1)
    if varlen:
        cu = torch.tensor([0, 40, 128], dtype=torch.int32)
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        out = attention_varlen(*flat, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=88, max_seqlen_k=88, dropout_p=0.4)
    else:
        out = attention(q, k, v, dropout_p=0.4)
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad((out * dout).sum(), v)
    # out is linear in v with the dropped weights A: <dout, A v> = <A^T dout, v> only if both use one mask.
    assert torch.allclose((out * dout).sum(), (dv * v).sum(), rtol=1e-4)
