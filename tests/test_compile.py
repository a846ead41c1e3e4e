"""`torch.compile` and `torch.export` over every public call: one graph, eager numbers, no recompilation by length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import vllm_accel
from vllm_accel import attention, attention_varlen, merge_attention, use_backend
from vllm_accel.dispatch.spec import Feature


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def _qkv(s: int = 12, *, grad: bool = False, h: int = 4, hkv: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(s)
    return [torch.randn(2, s, heads, 16, generator=g).requires_grad_(grad) for heads in (h, hkv, hkv)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1), "softmax_scale": 0.2},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
    "bias": {"attn_bias": torch.linspace(-1, 1, 12)},
    "mask": {"attn_bias": torch.arange(12) < 9},
    "sinks": {"sinks": torch.tensor([0.1, 1.0, -1.0, 0.5])},
    "named": {"backend": ("sdpa_cpu", "reference")},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_one_graph_and_the_eager_numbers(name: str) -> None:
    options = OPTIONS[name]
    counter = CompileCounter()

    def model(q, k, v):
        out, lse = attention(q * 1.0, k, v, return_lse=True, **options)
        return out + 0, lse

    tensors = _qkv(grad=True)
    out, lse = torch.compile(model, backend=counter, fullgraph=True)(*tensors)
    want, want_lse = model(*tensors)
    assert counter.frame_count == 1
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    got = torch.autograd.grad(out.square().sum() + lse.sum(), tensors)
    expected = torch.autograd.grad(want.square().sum() + want_lse.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("grad", [False, True])
def test_through_the_compiler_itself(grad: bool) -> None:
    bias = torch.randn(4, 12, 12, requires_grad=grad)
    sinks = torch.randn(4, requires_grad=grad)

    def model(q, k, v, bias, sinks):
        return attention(torch.tanh(q), k, v, causal=True, attn_bias=bias, sinks=sinks) * 2

    tensors = [*_qkv(grad=grad), bias, sinks]
    out = torch.compile(model, fullgraph=True)(*tensors)
    want = model(*tensors)
    assert torch.allclose(out, want, atol=1e-5)
    if grad:
        got = torch.autograd.grad(out.sum(), tensors)
        expected = torch.autograd.grad(want.sum(), tensors)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, expected, strict=True))


def test_lengths_change_with_one_recompilation_at_most() -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True) + 1, backend=counter, fullgraph=True)
    for s in (8, 9, 10, 64, 333):
        q, k, v = _qkv(s)
        assert torch.equal(compiled(q, k, v), attention(q, k, v, causal=True) + 1)
    assert counter.frame_count <= 2


def test_a_compiled_decode_does_not_recompile() -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda q, k: attention(q, k, k), backend=counter, fullgraph=True)
    q = torch.randn(2, 1, 4, 16)
    for s in range(20, 40):
        k = torch.randn(2, s, 2, 16)
        assert torch.equal(compiled(q, k), attention(q, k, k))
    assert counter.frame_count <= 2


def _varlen(q, cu, longest):
    return attention_varlen(
        q, q[:, :2], q[:, :2], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
    )


def test_packed_lengths_change_without_recompilation() -> None:
    counter = CompileCounter()
    compiled = torch.compile(_varlen, backend=counter, fullgraph=True)
    for lengths in ((3, 5), (7, 2), (30, 11), (4, 60)):
        cu = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        q = torch.randn(sum(lengths), 4, 16)
        assert torch.equal(compiled(q, cu, max(lengths)), _varlen(q, cu, max(lengths)))
    assert counter.frame_count <= 2


def test_packed_gradients() -> None:
    cu = torch.tensor([0, 3, 10], dtype=torch.int32)
    q = torch.randn(10, 4, 16, requires_grad=True)
    out = torch.compile(_varlen, backend="aot_eager", fullgraph=True)(q, cu, 7)
    got = torch.autograd.grad(out.square().sum(), q)[0]
    want = torch.autograd.grad(_varlen(q, cu, 7).square().sum(), q)[0]
    assert torch.allclose(got, want, atol=1e-5)


def test_wrong_packed_values_are_errors_when_compiled_too() -> None:
    q = torch.randn(10, 4, 16)
    cu = torch.tensor([0, 8, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="must not decrease"):
        torch.compile(_varlen, backend="eager", fullgraph=True)(q, cu, 8)


def test_merge_and_the_module() -> None:
    module = vllm_accel.Attention(4, 16, 0.25, num_kv_heads=2, sliding_window=5, sinks=torch.randn(4))

    def model(q, k, v):
        parts = [attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 5), slice(5, 12))]
        out, lse = merge_attention([p[0] for p in parts], [p[1] for p in parts])
        return out + module(q, k, v), lse

    tensors = _qkv()
    got = torch.compile(model, backend="eager", fullgraph=True)(*tensors)
    for a, b in zip(got, model(*tensors), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_use_backend_outside_reaches_inside() -> None:
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), backend="eager", fullgraph=True)
    q, k, v = _qkv()
    plain = compiled(q, k, v)
    with use_backend(attention="reference"):
        inside = compiled(q, k, v)
    assert torch.equal(inside, attention(q, k, v, backend="reference"))
    assert torch.equal(compiled(q, k, v), plain)


def test_autocast_when_compiled() -> None:
    q, k, v = _qkv()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(q, k, v)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_export_gives_a_program_with_one_operator() -> None:
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True) * 2

    q, k, v = _qkv()
    program = torch.export.export(Model(), (q, k, v))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("vllm_accel.attention" in name for name in names) == 1
    assert torch.equal(program.module()(q, k, v), attention(q, k, v, causal=True) * 2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("varlen", [False, True])
def test_the_operator_passes_torchs_own_check(grad: bool, varlen: bool) -> None:
    if varlen:
        q = torch.randn(10, 4, 16, requires_grad=grad)
        cu = torch.tensor([0, 3, 10], dtype=torch.int32)
        extras, lengths = (cu, cu.clone(), None, None, torch.randn(4), None, None, None), (7, 7)
    else:
        q = torch.randn(2, 6, 4, 16, requires_grad=grad)
        extras, lengths = (None, None, None, torch.randn(1, 4, 6, 6), torch.randn(4), None, None, None), (-1, -1)
    args = (
        q,
        q.detach().clone(),
        q.detach().clone(),
        *extras,
        *lengths,
        None,
        True,
        -1,
        -1,
        0.0,
        0.0,
        True,
        False,
        False,
        Feature.GRAD.value if grad else 0,
        "",
    )
    result = torch.library.opcheck(torch.ops.vllm_accel.attention.default, args)
    assert set(result.values()) == {"SUCCESS"}


def test_fake_tensors_take_the_operator() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 5, 4, 16)
        out, lse = attention(q, q, q, return_lse=True)
        assert out.shape == (2, 5, 4, 16) and lse.shape == (2, 4, 5) and lse.dtype is torch.float32
