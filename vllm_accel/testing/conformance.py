"""Hold any attention implementation against the oracle: it says yes and is right, or says no and gives the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_accel.dispatch import device as devices
from vllm_accel.dispatch.backend import Backend
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.guard import tensor_guard
from vllm_accel.dispatch.plan import Plan
from vllm_accel.ops import run
from vllm_accel.ops.arguments import Options, describe
from vllm_accel.ops.extras import Extras, needs_grad, with_four_dims
from vllm_accel.testing.cases import Case, Inputs
from vllm_accel.testing.oracle import (
    attention_oracle,
    attention_varlen_oracle,
    plain_attention,
    plain_attention_varlen,
)
from vllm_accel.testing.outcome import Outcome, bound, outcome_of
from vllm_accel.testing.tolerance import assert_close, assert_grad_close, assert_lse_close

_NOT_MATHS = ("deterministic", "batch_invariant", "max_seqlen_q", "max_seqlen_k")


def check_backend(
    backend: Backend,
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device | None = None,
    where: torch.device | str = "cpu",
    seed: int = 0,
) -> Outcome:
    """Check one backend on one case, forward and backward, without going through automatic choice.

    Args:
        backend: the backend object. case: from `CASES`, or your own.
        dtype: of q, k, v. device: what the backend is told that it runs on; default: what `where` really is.
        where: where the tensors are. A backend over a fake library runs on the CPU while it is told of a GPU.
        seed: of the drawn numbers.

    Raises:
        AssertionError: a wrong number, shape, dtype, a NaN, or a missing gradient.
    """
    target = device or devices.detect(torch.device(where))
    call = kernel_call(backend, target)
    return outcome_of(backend, case.name, lambda: check_call(call, case, dtype=dtype, where=where, seed=seed))


def kernel_call(backend: Backend, device: Device) -> Callable[..., Any]:
    """Return a callable with the signature of `attention` (and, given cu_seqlens, `attention_varlen`) for one backend.

    It asks the backend's capability, binds and runs, as the library does, but for this backend and device alone.

    Raises (when called):
        UnsupportedCallError: the backend refuses; carries its reasons.
    """

    def call(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        defaults: dict[str, Any] = dict.fromkeys(Options._fields, False)
        defaults |= {"window_size": (-1, -1), "softmax_scale": None, "softcap": 0.0, "dropout_p": 0.0}
        options = Options(**{name: kwargs.get(name, default) for name, default in defaults.items()})
        extras = Extras(**{name: kwargs.get(name) for name in Extras._fields if name != "attn_bias"})
        extras = extras._replace(attn_bias=with_four_dims(kwargs.get("attn_bias")))
        grad = needs_grad(q, k, v, extras)
        described = describe(q, k, v, extras, options, kwargs.get("max_seqlen_q"), kwargs.get("max_seqlen_k"), grad)
        spec = run.FAMILY.make_spec(described.kind)
        kernel = bound(backend, spec, described.sizes, device)
        plan = Plan(
            check=tensor_guard(q, k, v), forward=kernel.forward, args=described.args, direct=False, grad=bool(grad),
            copies=True, kernel=kernel, backend=backend.name, spec=spec, device=device, explicit=True,
        )  # fmt: skip
        return run.execute(plan, q, k, v, described.args, options.return_lse)

    return call


def check_call(
    call: Callable[..., Any],
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    where: torch.device | str = "cpu",
    seed: int = 0,
) -> None:
    """Compare a callable with the signature of `attention` / `attention_varlen` with the oracle on one case.

    Checks the output alone, then with its log-sum-exp, then gradients of everything that the case asks for, against
    float64; and that what comes back is new, contiguous, finite and of the right dtype.

    Raises:
        AssertionError: naming what is wrong, by how much, and the bound.
    """
    inputs = case.make(dtype, where, seed)
    want_out, want_lse, _ = _run(_oracle(case), inputs, grads=False)
    plain_out, _, _ = _run(_plain(case), inputs, grads=False)
    with torch.no_grad():
        out = call(inputs.q, inputs.k, inputs.v, **inputs.options)
        pair = call(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.options)
    _check_fresh(out, inputs, dtype)
    assert_close(out, want_out, plain_out, what=f"{case.name}: out")
    assert isinstance(pair, tuple) and len(pair) == 2, "return_lse must give (out, lse)"
    assert_close(pair[0], want_out, plain_out, what=f"{case.name}: out with lse")
    assert_lse_close(pair[1], want_lse, dtype=dtype, what=f"{case.name}: lse")
    if case.grad:
        check_gradients(call, case, dtype=dtype, where=where, seed=seed)


def check_gradients(
    call: Callable[..., Any],
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    where: torch.device | str = "cpu",
    seed: int = 0,
) -> None:
    """Compare the gradients of a callable with the oracle's.

    Raises:
        AssertionError: naming the gradient.
    """
    inputs = case.make(dtype, where, seed)
    _, _, want = _run(_oracle(case), inputs, grads=True)
    _, _, plain = _run(_plain(case), inputs, grads=True)
    _, _, got = _run(lambda q, k, v, **o: call(q, k, v, return_lse=case.lse_grad, **o), inputs, grads=True)
    names = ["dq", "dk", "dv", *(["dbias"] if case.bias_grad else []), *(["dsinks"] if case.sinks else [])]
    largest = max(float(g.abs().max()) for g in want if g.numel())
    for name, actual, expected, yardstick in zip(names, got, want, plain, strict=True):
        assert_grad_close(actual, expected, yardstick, what=f"{case.name}: {name}", scale=largest)


def _oracle(case: Case) -> Callable[..., Any]:
    return attention_varlen_oracle if case.varlen else attention_oracle


def _plain(case: Case) -> Callable[..., Any]:
    return plain_attention_varlen if case.varlen else plain_attention


def _run(fn: Callable[..., Any], inputs: Inputs, *, grads: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run a call or an oracle on the inputs; gradients are those of fixed random weights on out (and lse)."""
    ours = fn is not attention_oracle and fn is not attention_varlen_oracle
    ours = ours and fn is not plain_attention and fn is not plain_attention_varlen
    options = dict(inputs.options)
    leaves: list[Tensor] = []
    if grads:
        # Views of detached leaves keep the layout of the case: strides must not matter to gradients either.
        leaves = [t.detach().requires_grad_() for t in inputs.leaves()]
        q, k, v = leaves[:3]
        names = [*(["attn_bias"] if inputs.case.bias_grad else []), *(["sinks"] if inputs.case.sinks else [])]
        options |= dict(zip(names, leaves[3:], strict=True))
    else:
        q, k, v = inputs.q, inputs.k, inputs.v
    if not ours:
        for name in _NOT_MATHS:
            options.pop(name, None)
    result = fn(q, k, v, **options)
    out, lse = result if isinstance(result, tuple) else (result, None)
    if not grads:
        return out, lse, []
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g).to(out.device)
    loss = (out.float() * dout).sum() if out.dtype is not torch.float64 else (out * dout.double()).sum()
    if inputs.case.lse_grad and lse is not None:
        dlse = torch.randn(lse.shape, generator=g).to(lse.device)
        finite = torch.isfinite(lse)
        loss = loss + torch.where(finite, lse, 0.0).mul(dlse.to(lse.dtype)).sum()
    return out, lse, list(torch.autograd.grad(loss, leaves))


def _check_fresh(out: Tensor, inputs: Inputs, dtype: torch.dtype) -> None:
    expected = (*inputs.q.shape[:-1], inputs.v.shape[-1])
    assert tuple(out.shape) == expected, f"out has shape {tuple(out.shape)}, not {expected}"
    assert out.dtype is dtype, f"out has dtype {out.dtype}, not {dtype}"
    assert out.is_contiguous(), "out must be contiguous"
    own = {t.untyped_storage().data_ptr() for t in (inputs.q, inputs.k, inputs.v)}
    assert out.untyped_storage().data_ptr() not in own, "out must be new memory"
