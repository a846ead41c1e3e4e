"""The public calls as a user makes them: wrong arguments, empty tensors, transforms, layouts, threads."""

from __future__ import annotations

import math
import os
import threading
from typing import Any

import pytest
import torch

from host import FIRST_ON_CPU
from vllm_accel import attention, attention_varlen, use_backend
from vllm_accel.ops.run import PLANS
from vllm_accel.testing import attention_oracle


def _qkv(b: int = 2, s: int = 8, h: int = 4, hkv: int = 2, d: int = 16, **kw: Any) -> list[torch.Tensor]:
    return [torch.randn(b, s, heads, d, **kw) for heads in (h, hkv, hkv)]


def _packed(**changes: Any) -> dict[str, Any]:
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    given: dict[str, Any] = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5, "max_seqlen_k": 5}
    return {**given, **changes}


# --- wrong arguments: a clear error, before any launch ---------------------------------------------------------------

Q = torch.randn(2, 8, 4, 16)
K = torch.randn(2, 8, 2, 16)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "rank": ((Q[0], K[0], K[0]), {}, ValueError, r"must be \(batch, tokens, heads, head_dim\)"),
    "batch": ((Q, K[:1], K[:1]), {}, ValueError, "must agree in batch"),
    "key and value lengths": ((Q, K, K[:, :5]), {}, ValueError, "must agree"),
    "head size": ((Q, K[..., :8], K), {}, ValueError, "head size"),
    "heads": ((torch.randn(2, 8, 3, 16), K, K), {}, ValueError, "H=3 must be a positive multiple of Hkv=2"),
    "dtype mix": ((Q, K.half(), K), {}, TypeError, "one dtype; got torch.float32, torch.float16"),
    "integers": ((Q.int(), K.int(), K.int()), {}, TypeError, "floating-point"),
    "two devices": ((Q, K.to("meta"), K), {}, ValueError, "one device"),
    "not a tensor": (([1, 2], K, K), {}, TypeError, "q must be a tensor, not list"),
    "window type": ((Q, K, K), {"window_size": 4}, TypeError, "window_size must be two ints"),
    "window value": ((Q, K, K), {"window_size": (-2, 0)}, ValueError, "-1 \\(unlimited\\)"),
    "scale zero": ((Q, K, K), {"softmax_scale": 0.0}, ValueError, "positive finite"),
    "scale nan": ((Q, K, K), {"softmax_scale": math.nan}, ValueError, "positive finite"),
    "scale tensor": ((Q, K, K), {"softmax_scale": torch.tensor(0.1)}, ValueError, "positive finite"),
    "softcap": ((Q, K, K), {"softcap": -1.0}, ValueError, "softcap must be 0.0"),
    "dropout": ((Q, K, K), {"dropout_p": 1.0}, ValueError, "below 1.0"),
    "causal": ((Q, K, K), {"causal": "yes"}, TypeError, "causal must be True or False"),
    "slopes shape": ((Q, K, K), {"alibi_slopes": torch.ones(3)}, ValueError, r"shape \(4,\) or \(2, 4\)"),
    "slopes dtype": (
        (Q, K, K),
        {"alibi_slopes": torch.ones(4).half()},
        TypeError,
        "alibi_slopes must be torch.float32",
    ),
    "slopes grad": ((Q, K, K), {"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, "detach"),
    "bias shape": ((Q, K, K), {"attn_bias": torch.zeros(2, 3, 8, 8)}, ValueError, "broadcastable to"),
    "bias dtype": ((Q, K, K), {"attn_bias": torch.zeros(8, 8).double()}, TypeError, "attn_bias must be bool"),
    "bias integers": ((Q, K, K), {"attn_bias": torch.zeros(8, 8, dtype=torch.int64)}, TypeError, "attn_bias must be"),
    "sinks shape": ((Q, K, K), {"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(4,\)"),
    "descale shape": ((Q, K, K), {"k_descale": torch.ones(3)}, ValueError, "k_descale must have shape"),
    "extra on another device": ((Q, K, K), {"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks is on meta"),
    "extra not a tensor": ((Q, K, K), {"sinks": [0.0] * 4}, TypeError, "sinks must be a tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    tensors, options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        attention(*tensors, **options)


CU = torch.tensor([0, 3, 8], dtype=torch.int32)
WRONG_PACKED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "int64": ({"cu_seqlens_q": CU.long()}, ValueError, "cu_seqlens_q must be int32"),
    "rank": ({"cu_seqlens_k": CU[None]}, ValueError, "cu_seqlens_k must be int32 of shape"),
    "not a tensor": ({"cu_seqlens_k": [0, 3, 8]}, TypeError, "cu_seqlens_k must be an int32 tensor"),
    "device": ({"cu_seqlens_q": CU.to("meta")}, ValueError, "both must be on one device"),
    "batch": ({"cu_seqlens_k": CU[:2]}, ValueError, "must have one shape"),
    "first not 0": ({"cu_seqlens_q": CU + 1}, ValueError, r"cu_seqlens_q\[0\] must be 0; got 1"),
    "decreasing": (
        {"cu_seqlens_q": torch.tensor([0, 5, 3], dtype=torch.int32)},
        ValueError,
        "must not decrease; entry 2",
    ),
    "past the end": (
        {"cu_seqlens_k": CU + torch.tensor([0, 1, 1], dtype=torch.int32)},
        ValueError,
        "past the 8 tokens",
    ),
    "maximum too small": ({"max_seqlen_q": 4}, ValueError, "sequence 1 has 5 tokens, more than its max_seqlen 4"),
    "maximum not an int": ({"max_seqlen_k": 5.0}, TypeError, "max_seqlen_k must be a Python int"),
}


@pytest.mark.parametrize("name", WRONG_PACKED)
def test_wrong_packed_arguments(name: str) -> None:
    changes, error, message = WRONG_PACKED[name]
    q = torch.randn(8, 4, 16)
    with pytest.raises(error, match=message):
        attention_varlen(q, q, q, **_packed(**changes))


def test_packed_values_are_checked_on_every_call() -> None:
    q = torch.randn(8, 4, 16)
    cu = CU.clone()
    attention_varlen(q, q, q, **_packed(cu_seqlens_q=cu))
    cu[1] = 9
    with pytest.raises(ValueError, match="sequence 0 has 9 tokens"):
        attention_varlen(q, q, q, **_packed(cu_seqlens_q=cu))


def test_options_are_checked_after_a_plan_exists() -> None:
    q, k, v = _qkv()
    attention(q, k, v, softmax_scale=0.5)
    with pytest.raises(ValueError, match="positive finite"):
        attention(q, k, v, softmax_scale=-0.5)


# --- nothing to compute ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "sq", "sk"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_empty(b: int, sq: int, sk: int, with_sinks: bool) -> None:
    q, k = torch.randn(b, sq, 4, 16, requires_grad=True), torch.randn(b, sk, 2, 16, requires_grad=True)
    v = torch.randn(b, sk, 2, 8, requires_grad=True)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True) if with_sinks else None
    out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
    assert out.shape == (b, sq, 4, 8) and not out.any()
    want = torch.full((b, 4, sq), -math.inf) if sinks is None else sinks.detach()[None, :, None].expand(b, 4, sq)
    assert torch.equal(lse, want)
    leaves = [t for t in (q, k, v, sinks) if t is not None]
    grads = torch.autograd.grad(out.sum() + torch.where(lse.isinf(), 0.0, lse).sum(), leaves)
    assert all(not g.any() for g in grads[:3])
    if sinks is not None:
        assert torch.equal(grads[3], torch.full((4,), float(b * sq)))


def test_empty_packed() -> None:
    cu = torch.tensor([0, 0], dtype=torch.int32)
    q, k = torch.randn(0, 4, 16), torch.randn(0, 2, 16)
    out, lse = attention_varlen(
        q, k, k, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=0, max_seqlen_k=0, return_lse=True
    )
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)


# --- transforms ------------------------------------------------------------------------------------------------------


def test_autocast_casts_first_as_torch_does() -> None:
    q, k, v = _qkv(hkv=4)
    bias = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q.requires_grad_(), k, v, causal=True)
        again = attention(q, k, v, causal=True, attn_bias=bias)
    assert out.dtype is torch.bfloat16 and again.dtype is torch.bfloat16
    want = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True)
    assert torch.equal(out, want)
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype is torch.float32
    assert attention(q, k, v, causal=True).dtype is torch.float32, "the plan of another mode is not taken"


def test_reference_is_not_weakened_by_autocast() -> None:
    q, k, v = _qkv(hkv=4)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q.double(), k.double(), v.double(), backend="reference")
    want, _ = attention_oracle(q, k, v)
    assert (out - want).abs().max() < 1e-12


def test_functorch_transforms_are_refused() -> None:
    q, k, v = _qkv()
    attention(q, k, v)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda t: attention(t, k, v))(torch.stack([q, q]))
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda t: attention(t, k, v).sum())(q)


def test_forward_mode_is_refused_even_with_a_plan() -> None:
    q, k, v = _qkv()
    attention(q, k, v)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            attention(dual, k, v)
        assert torch.isfinite(attention(q, k, v)).all(), "a level with no tangent here is no reason to refuse"


def test_double_backward_is_refused() -> None:
    q, k, v = _qkv()
    q.requires_grad_()
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_other_tensor_types_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 4, 16), torch.randn(5, 4, 16)], layout=torch.jagged)
    with pytest.raises(TypeError, match="attention_varlen"):
        attention(nested, nested, nested)

    class Odd(torch.Tensor):
        pass

    q, k, v = _qkv()
    attention(q, k, v)
    with pytest.raises(TypeError, match="q is a Odd"):
        attention(q.as_subclass(Odd), k, v)


def test_parameters_and_inference_mode() -> None:
    q, k, v = _qkv()
    want = attention(q, k, v)
    assert torch.equal(attention(torch.nn.Parameter(q), k, v), want)
    with torch.inference_mode():
        assert torch.equal(attention(q, k, v), want)
        assert torch.equal(attention(q.clone(), k, v), want)


def test_no_grad_and_grad_do_not_share_a_plan() -> None:
    q, k, v = _qkv()
    q.requires_grad_()
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad
    assert attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_only_what_requires_a_gradient_gets_one(which: str) -> None:
    tensors = dict(zip("qkv", _qkv(), strict=True))
    tensors[which].requires_grad_()
    attention(**tensors, causal=True).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [which]


def test_a_lse_nobody_asked_for_has_no_gradient_and_one_asked_for_may_stand_alone() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv())
    _, lse = attention(q, k, v, return_lse=True)
    lse.sum().backward()
    want = torch.autograd.grad(attention_oracle(q, k, v)[1].sum(), q)[0]
    assert torch.allclose(q.grad, want.float(), atol=1e-5) and not v.grad.any()


# --- layouts, values, threads ----------------------------------------------------------------------------------------


def test_lists_work_where_tuples_do() -> None:
    q, k, v = _qkv()
    want = attention(q, k, v, window_size=(3, 0), backend=("sdpa_cpu", "reference"))
    assert torch.equal(attention(q, k, v, window_size=[3, 0], backend=["sdpa_cpu", "reference"]), want)


def test_strides_may_change_between_calls() -> None:
    q, k, v = _qkv()
    want = attention(q, k, v)
    for _ in range(2):
        for mix in (lambda t: t.mT.contiguous().mT, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
            got = attention(mix(q), mix(k), mix(v))
            assert torch.allclose(got, want, atol=1e-6) and got.is_contiguous()
        assert torch.equal(attention(q, k, v), want)


def test_bias_of_fewer_dimensions() -> None:
    q, k, v = _qkv()
    bias = torch.randn(8, 8)
    want, _ = attention_oracle(q, k, v, attn_bias=bias)
    for form in (bias, bias[None], bias[None, None]):
        assert (attention(q, k, v, attn_bias=form) - want).abs().max() < 1e-5
    row = torch.randn(8, requires_grad=True)
    attention(q, k, v, attn_bias=row).square().sum().backward()
    assert row.grad is not None and row.grad.shape == (8,) and row.grad.abs().sum() > 0


def test_a_large_negative_bias_is_finite() -> None:
    q, k, v = _qkv()
    bias = torch.full((8, 8), torch.finfo(torch.float32).min)
    out, lse = attention(q, k, v, attn_bias=bias, return_lse=True)
    assert torch.isfinite(lse).all()
    assert torch.allclose(out[:, 0], v.mean(1).repeat_interleave(2, 1), atol=1e-5), "equal biases: a plain mean"


@pytest.mark.parametrize("backend", dict.fromkeys([FIRST_ON_CPU, "sdpa_cpu", "reference"]))
def test_rows_behind_the_lowest_number_have_finite_gradients(backend: str) -> None:
    """Masks of transformers are filled with it; such a row attends to all keys alike, and nobody reads it."""
    q, k, v = (t.requires_grad_() for t in _qkv())
    bias = torch.zeros(8, 8)
    bias[:3] = torch.finfo(torch.float32).min
    out = attention(q, k, v, attn_bias=bias, backend=backend)
    dout = torch.randn_like(out)
    dout[:, :3] = 0
    found = torch.autograd.grad(out, (q, k, v), dout)
    want, _ = attention_oracle(q[:, 3:], k, v)
    for got, expected in zip(found, torch.autograd.grad(want, (q, k, v), dout[:, 3:].double()), strict=True):
        assert torch.allclose(got, expected.to(got.dtype), atol=1e-5)


def test_fp8_without_a_kernel_runs_on_the_reference() -> None:
    q, k, v = (t.to(torch.float8_e4m3fn) for t in _qkv())
    factor = torch.full((), 0.5)
    out = attention(q, k, v, v_descale=factor)
    want, _ = attention_oracle(q.float(), k.float(), v.float(), v_descale=factor)
    assert out.dtype is torch.bfloat16 and (out - want).abs().max() < 0.02


def test_threads_share_plans() -> None:
    inputs = [_qkv(s=s) for s in (4, 9, 16)]
    want = [attention(*t, causal=True) for t in inputs]
    PLANS.clear()
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(200):
            n = (i + seed) % len(inputs)
            if not torch.equal(attention(*inputs[n], causal=True), want[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 warns of any fork with threads
def test_a_forked_child_can_call() -> None:
    torch.set_num_threads(1)  # torch's own OpenMP pool does not survive a fork
    q, k, v = _qkv()
    want = attention(q, k, v)
    pid = os.fork()
    if pid == 0:
        same = torch.equal(attention(q, k, v), want)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_use_backend_reaches_calls_that_have_a_plan() -> None:
    q, k, v = _qkv()
    plain = attention(q, k, v)
    with use_backend(attention="reference"):
        inside = attention(q, k, v)
    assert torch.equal(inside, attention(q, k, v, backend="reference"))
    assert torch.equal(attention(q, k, v), plain)


def test_the_python_guard_sees_what_torchs_does() -> None:
    from vllm_accel.dispatch.guard import python_guard, tensor_guard

    q, k, v = _qkv()
    other = [
        (q.double(), k, v), (q[:1], k, v), (q, k, v.clone().requires_grad_()), (q.mT.contiguous().mT, k, v),
        (torch.nn.Parameter(q), k, v), (q, k.to("meta"), v),
    ]  # fmt: skip
    for make in (python_guard, tensor_guard):
        check = make(q, k, v)
        assert check(q, k, v) and check(q.clone(), k[:], v)
        assert not any(check(*tensors) for tensors in other)
        with torch.autocast("cpu", torch.bfloat16):
            assert not check(q, k, v)
