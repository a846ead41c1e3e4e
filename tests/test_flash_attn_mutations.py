"""Break each conversion of each FlashAttention adapter, one at a time: some case must notice every one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from flash_attn_adapters import ADAPTERS, BF16, EVERY_CASE, Adapter, between, check_dropout, one_thread, qkv
from vllm_accel.testing import check_backend, kernel_call

Mutation = Callable[[Adapter, pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def attribute(name: str, value: Any) -> Mutation:
    """Put something else in the place of a function that the adapter's module uses."""
    return lambda adapter, monkeypatch: monkeypatch.setattr(adapter.module, name, value)


def passes(_only: str = "", **changes: Any) -> Mutation:
    """Change what the library is given, where it is given that; a callable gets the value and returns another."""

    def look(name: str, kwargs: dict[str, Any]) -> None:
        for key, value in changes.items():
            if key in kwargs and _only in name:
                kwargs[key] = value(kwargs[key]) if callable(value) else value

    return lambda adapter, monkeypatch: between(adapter, monkeypatch, look)


def swap_window(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(name: str, kwargs: dict[str, Any]) -> None:
        if "window_size" in kwargs:
            kwargs["window_size"] = kwargs["window_size"][::-1]
        else:
            sides = kwargs["window_size_left"], kwargs["window_size_right"]
            kwargs["window_size_right"], kwargs["window_size_left"] = sides

    between(adapter, monkeypatch, look)


class _Nan:
    """The module torch, but new zeros are NaN, as uninitialised memory may be."""

    def __getattr__(self, name: str) -> Any:
        if name == "zeros":
            return lambda shape, **kwargs: torch.full(shape, math.nan, **kwargs)
        return getattr(torch, name)


def same(x: Any, *_: Any, **__: Any) -> Any:
    return x


def never(*_: Any) -> bool:
    return False


def minus_one(side: int | None) -> int:
    return -1 if side is None else side


def no_dlse(v: Any, out: Any, dout: Any, dlse: Any, head_dim: int) -> Any:
    from vllm_accel.backends.convert import with_dlse_column

    return with_dlse_column(v, out, dout, None, head_dim)


ALL = tuple(ADAPTERS)
FA3, FA4, TWO_AND_THREE = ("fa3", "fa3_old"), ("fa4_sm90", "fa4_sm100"), ("fa2", "fa3", "fa3_old")

#: (adapters, what is broken, how, the case that must notice)
TABLE: tuple[tuple[tuple[str, ...], str, Mutation, str], ...] = (
    (ALL, "causal is dropped", passes(causal=False, is_causal=False), "causal_shorter"),
    (ALL, "causal is dropped in the backward", passes("b", causal=False, is_causal=False), "causal_shorter"),
    (ALL, "the scale is that of the padded head", passes(softmax_scale=lambda scale: 40**-0.5), "head_33"),
    (ALL, "the caller's scale is dropped", passes(softmax_scale=64**-0.5), "scale"),
    (ALL, "softcap is dropped", passes(softcap=0.0), "softcap"),
    (ALL, "the window's sides are swapped", swap_window, "window"),
    (ALL, "the window's sides are swapped, packed", swap_window, "varlen_window"),
    (ALL, "heads are not padded", attribute("pad_heads", same), "head_33"),
    (ALL, "the sinks get no gradient", attribute("sinks_grad", lambda s, *_: torch.zeros_like(s)), "sinks"),
    (ALL, "rows of no sequence are left as they are", attribute("clear_past_end", same), "varlen_tail_sinks"),
    (TWO_AND_THREE, "the sinks are not folded in", attribute("fold_sinks", lambda out, lse, _: (out, lse)), "sinks"),
    (TWO_AND_THREE, "the gradient of lse is dropped", attribute("with_dlse_column", no_dlse), "plain"),
    ((*FA3, *FA4), "rows of no sequence are left, dense out", attribute("clear_past_end", same), "varlen_tail"),
    ((*FA3, *FA4), "their gradients are left as they are", attribute("torch", _Nan()), "varlen_tail"),
    (FA3, "sizes are only rounded", attribute("_kernel_dims", lambda d, dv, _: (d, dv + -dv % 8)), "value_dim_160"),
    (FA4, "the sink is not passed", passes(learnable_sink=None), "sinks"),
    (FA4, "the gradient of lse is dropped", passes(dlse=None), "plain"),
    (FA4, "-1 is passed for an open left side", passes(window_size_left=minus_one), "window_right"),
    (FA4, "-1 is passed for an open right side", passes(window_size_right=minus_one), "window_left"),
    (("fa4_sm100",), "head sizes are only rounded", attribute("_kernel_dims", lambda d, dv, **_: (d, dv)), "head_200"),
    (("fa2",), "+inf is kept", attribute("empty_rows_to_minus_inf", same), "causal_longer"),
    (("fa2",), "+inf is kept, packed", attribute("empty_rows_to_minus_inf", same), "varlen_cross_causal"),
    (("fa2",), "slopes are dropped", passes(alibi_slopes=None), "alibi"),
    (("fa2",), "lse keeps its shift", attribute("alibi_lse_shift", lambda *_: torch.zeros(())), "alibi_causal"),
    (("fa2",), "lse keeps its shift, packed", attribute("alibi_lse_shift", lambda *_: torch.zeros(())), "alibi_tail"),
    (("fa2",), "lse is shifted for every window", attribute("longest_k", lambda args: 0), "alibi_window_causal"),
    (("fa2",), "no wide window is causal", attribute("longest_k", lambda args: 1000), "alibi_wide_window"),
    (("fa2",), "the open right side is cut", attribute("open_right_is_cut", never), "window_open_right"),
    (("fa2",), "the wide right side is opened", attribute("open_right_is_cut", never), "window_wide_right"),
    (("fa2",), "the open right side is cut, packed", attribute("open_right_is_cut", never), "varlen_window_open_right"),
    (("fa2",), "rows of no sequence are left as they are", passes(zero_tensors=False), "varlen_tail"),
    (("fa2",), "their gradients are left as they are", passes("backward", zero_tensors=False), "varlen_tail"),
    (("fa2",), "one query is one query", passes(max_seqlen_q=lambda n: 1 if n == 2 else n), "varlen_decode_gap"),
)  # fmt: skip

PARAMETERS = [
    pytest.param(name, mutation, case, id=f"{name}-{what}") for names, what, mutation, case in TABLE for name in names
]


@pytest.mark.parametrize(("name", "mutation", "case"), PARAMETERS)
def test_a_case_notices(name: str, mutation: Mutation, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[name]
    with adapter.installed(monkeypatch):
        assert check_backend(adapter.backend, EVERY_CASE[case], dtype=BF16, device=adapter.device).ran
    with adapter.installed(monkeypatch):
        mutation(adapter, monkeypatch)
        assert adapter.backend.unavailable_reason() is None
        with pytest.raises((AssertionError, RuntimeError)):
            check_backend(adapter.backend, EVERY_CASE[case], dtype=BF16, device=adapter.device)


@pytest.mark.parametrize("name", TWO_AND_THREE)  # FlashAttention 4 copies misaligned inputs itself
def test_misaligned_rows_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[name]
    odd = torch.zeros(2, 24, 4, 33, dtype=BF16)[..., 1:]
    with adapter.installed(monkeypatch):
        attribute("aligned", same)(adapter, monkeypatch)
        with pytest.raises(RuntimeError, match="misaligned address"):
            kernel_call(adapter.backend, adapter.device)(odd, *qkv()[1:])


def _another_state(name: str, kwargs: dict[str, Any]) -> None:
    if "backward" in name:
        kwargs["rng_state"] = None


def test_another_dropout_mask_in_the_backward_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with ADAPTERS["fa2"].installed(monkeypatch):
        check_dropout(ADAPTERS["fa2"])
        between(ADAPTERS["fa2"], monkeypatch, _another_state)
        from vllm_accel.backends import library

        library.forget()
        with pytest.raises(AssertionError, match="dq"):
            check_dropout(ADAPTERS["fa2"])
