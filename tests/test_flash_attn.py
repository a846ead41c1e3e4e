"""The FlashAttention adapters over their fakes: every case is right or refused, and nothing is silently dropped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn_adapters import (
    ADAPTERS,
    BF16,
    EVERY_CASE,
    FP16,
    OPERATORS,
    Adapter,
    between,
    check_dropout,
    one_thread,
    qkv,
)
from vllm_accel.errors import BackendUnavailableError, UnsupportedCallError
from vllm_accel.testing import Case, check_backend, kernel_call

Calls = list[tuple[str, dict[str, Any]]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Adapter]:
    chosen = ADAPTERS[request.param]
    with chosen.installed(monkeypatch):
        yield chosen


@pytest.fixture
def calls(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record what reaches the library, by the name of its function."""
    seen: Calls = []
    between(adapter, monkeypatch, lambda name, kwargs: seen.append((name, dict(kwargs))))
    return seen


def answer(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Return a call's result, or None and the reasons of its refusal."""
    try:
        return call(*args, **kwargs), {}
    except UnsupportedCallError as refusal:
        return None, refusal.reasons


@pytest.mark.parametrize("case", EVERY_CASE.values(), ids=lambda case: case.name)
def test_right_or_refused(adapter: Adapter, case: Case) -> None:
    outcome = check_backend(adapter.backend, case, dtype=BF16, device=adapter.device)
    assert outcome.ran == (case.name not in adapter.refused), outcome.reasons
    assert outcome.ran or all(reason.code and reason.text for reason in outcome.reasons)


@pytest.mark.parametrize("name", ["causal_longer", "gqa", "value_dim", "head_33", "varlen_tail", "varlen_sinks"])
def test_right_in_fp16(adapter: Adapter, name: str) -> None:
    assert check_backend(adapter.backend, EVERY_CASE[name], dtype=FP16, device=adapter.device, seed=1).ran


def test_other_dtypes_are_refused(adapter: Adapter) -> None:
    outcome = check_backend(adapter.backend, EVERY_CASE["plain"], dtype=torch.float32, device=adapter.device)
    assert [reason.code for reason in outcome.reasons] == ["dtype"]


OPTIONS: dict[str, Any] = {
    "causal": True, "window_size": (2, -1), "softmax_scale": 0.5, "softcap": 0.7, "dropout_p": 0.5,
    "alibi_slopes": torch.tensor([0.5, 1.0, 0.2, 0.1]), "attn_bias": torch.linspace(-2, 2, 24), "sinks": torch.ones(4),
    "q_descale": torch.tensor(0.5), "k_descale": torch.tensor(0.5), "v_descale": torch.tensor(0.5),
}  # fmt: skip


@pytest.mark.parametrize("option", [*OPTIONS, "window_right", "mask"])
def test_no_option_is_dropped(adapter: Adapter, option: str) -> None:
    call = kernel_call(adapter.backend, adapter.device)
    q, k, v = qkv()
    changed = {
        "window_right": {"window_size": (-1, 2)},
        "mask": {"attn_bias": torch.arange(24) < 20},
    }.get(option) or {option: OPTIONS[option]}
    out, reasons = answer(call, q, k, v, **changed)
    assert reasons.get(adapter.name) if out is None else (out.float() - call(q, k, v).float()).abs().max() > 0.02


def test_a_gradient_reaches_every_input(adapter: Adapter, calls: Calls) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    sinks = torch.zeros(4, requires_grad=True)
    out, lse = kernel_call(adapter.backend, adapter.device)(q, k, v, sinks=sinks, return_lse=True)
    for loss in (out.float().square().sum(), lse.sum()):
        grads = torch.autograd.grad(loss, (q, k, sinks), retain_graph=True)
        assert all(grad.abs().max() > 1e-3 for grad in grads)
    assert [name for name, _ in calls] == [OPERATORS[adapter.name][1], *[OPERATORS[adapter.name][2]] * 2]


def test_deterministic_reaches_the_backward(adapter: Adapter, calls: Calls) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    call = kernel_call(adapter.backend, adapter.device)
    for asked in (False, True):
        calls.clear()
        out, reasons = answer(call, q, k, v, deterministic=asked)
        if out is None:
            assert adapter.name == "flash_attn_3" and "2244" in reasons[adapter.name][0].text
            continue
        out.sum().backward()
        assert calls[-1][1]["deterministic"] is asked
    with torch.no_grad():
        call(q, k, v, deterministic=True)  # the forward always is


def test_misaligned_rows_are_copied(adapter: Adapter) -> None:
    call = kernel_call(adapter.backend, adapter.device)
    inputs = qkv()
    want = call(*inputs)
    wide = [torch.zeros(*t.shape[:-1], t.shape[-1] + 1, dtype=t.dtype) for t in inputs]
    for odd, t in zip(wide, inputs, strict=True):
        odd[..., 1:] = t
    assert torch.equal(call(*(odd[..., 1:] for odd in wide)), want)
    flat = [torch.cat([torch.zeros(1, dtype=t.dtype), t.flatten()])[1:].view(t.shape) for t in inputs]
    assert all(t.data_ptr() % 16 for t in flat)
    assert torch.equal(call(*flat), want)


def test_without_the_library_the_kernel_cannot_be_bound(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_accel.backends import library

    for name in ("flash_attn", "flash_attn_3", "flash_attn_interface"):
        for path in [path for path in sys.modules if path.split(".")[0] == name]:
            monkeypatch.setitem(sys.modules, path, None)
        monkeypatch.setitem(sys.modules, name, None)
    library.forget()
    reason = adapter.backend.unavailable_reason()
    assert reason is not None and reason.code == "not_installed"
    with pytest.raises(BackendUnavailableError, match="not installed"):
        kernel_call(adapter.backend, adapter.device)(*qkv())


@pytest.mark.parametrize("adapter", ["fa2"], indirect=True)
class TestFlashAttn2:
    def test_empty_rows_are_minus_infinity_outside_and_plus_infinity_inside(
        self, adapter: Adapter, calls: Calls
    ) -> None:
        q, k, v = qkv()
        q.requires_grad_()
        out, lse = kernel_call(adapter.backend, adapter.device)(q, k[:, :8], v[:, :8], causal=True, return_lse=True)
        assert (lse[..., :16] == -torch.inf).all() and torch.isfinite(lse[..., 16:]).all()
        out.sum().backward()
        given = calls[-1][1]["softmax_lse"]
        assert (given[..., :16] == torch.inf).all() and torch.isfinite(given[..., 16:]).all()

    def test_dropout_is_new_every_time_unless_seeded(self, adapter: Adapter) -> None:
        call = kernel_call(adapter.backend, adapter.device)
        q, k, _ = qkv(s=96)
        ones = torch.ones_like(k)
        torch.manual_seed(7)
        first, second = (call(q, k, ones, dropout_p=0.3).float() for _ in range(2))
        torch.manual_seed(7)
        assert torch.equal(first, call(q, k, ones, dropout_p=0.3).float())
        assert not torch.equal(first, second)
        assert abs(float(first.mean()) - 1.0) < 0.02, "kept probabilities are scaled by 1 / (1 - p)"
        _, plain = call(q, k, ones, return_lse=True)
        _, lse = call(q, k, ones, dropout_p=0.3, return_lse=True)
        assert torch.equal(lse, plain), "lse is not affected by dropout"

    @pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 0.0, 2.0])])
    def test_backward_uses_the_mask_of_the_forward(self, adapter: Adapter, calls: Calls, sinks: Tensor | None) -> None:
        check_dropout(adapter, sinks)
        rng = calls[-1][1]["rng_state"]
        assert rng.dtype is torch.int64 and tuple(rng.shape) == (2,)

    def test_no_random_state_without_dropout(self, adapter: Adapter, calls: Calls) -> None:
        q, k, v = (t.requires_grad_() for t in qkv())
        kernel_call(adapter.backend, adapter.device)(q, k, v).sum().backward()
        assert calls[-1][1]["rng_state"] is None and calls[0][1]["return_softmax"] is False


@pytest.mark.parametrize("adapter", ["fa3", "fa3_old"], indirect=True)
def test_fa3_splits_keys_for_few_queries_only(adapter: Adapter, calls: Calls) -> None:
    q, k, v = qkv()
    call = kernel_call(adapter.backend, adapter.device)
    call(q[:, :1], k, v), call(q, k, v)
    assert [kwargs["num_splits"] for _, kwargs in calls] == [0, 1]


@pytest.mark.parametrize("adapter", ["fa4_sm90"], indirect=True)
def test_fa4_gets_none_for_an_unlimited_side(adapter: Adapter, calls: Calls) -> None:
    q, k, v = qkv()
    kernel_call(adapter.backend, adapter.device)(q, k, v, window_size=(-1, 3))
    assert calls[0][1]["window_size_left"] is None and calls[0][1]["window_size_right"] == 3


@pytest.mark.parametrize("adapter", ["fa4_sm90", "fa4_sm100"], indirect=True)
@pytest.mark.parametrize(("case", "sm90", "sm100"), [
    ("mla_prefill", ((192, 128), (192, 192)), ((192, 128), (192, 128))),  # grouped heads want equal sizes on sm_90
    ("value_dim_160", ((192, 128), (160, 160)), ((192, 128), (192, 128))),
    ("head_200", ((200, 200), (200, 200)), ((256, 256), (256, 256))),
    ("head_40", ((40, 40), (40, 40)), ((40, 40), (40, 40))),
])  # fmt: skip
def test_fa4_head_sizes(adapter: Adapter, calls: Calls, case: str, sm90: Any, sm100: Any) -> None:
    check_backend(adapter.backend, EVERY_CASE[case], dtype=BF16, device=adapter.device)
    sizes = {name: (kwargs["q"].shape[-1], kwargs["v"].shape[-1]) for name, kwargs in calls}
    assert tuple(sizes.values()) == (sm90 if adapter.preset == "h100" else sm100)
