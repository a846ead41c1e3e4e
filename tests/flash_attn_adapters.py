"""What the tests of the FlashAttention adapters share: each adapter over its fake, and cases for their conversions."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes import install, kernel
from vllm_accel.backends import library
from vllm_accel.dispatch.device import PRESETS, Device
from vllm_accel.testing import CASES, Case, kernel_call
from vllm_accel.testing.oracle import attention_oracle
from vllm_accel.testing.tolerance import assert_grad_close

_BIAS = {
    "bias_full", "bias_grad", "bias_heads", "bias_row", "bias_keys", "bias_column", "mask_keys", "mask_full",
    "everything",
}  # fmt: skip
_NONE_OF_THEM = {"head_320", "batch_invariant", "varlen_invariant", "descale", *_BIAS}
_ALIBI = {"alibi", "alibi_causal", "alibi_batch", "varlen_alibi"}
_OWN_ALIBI = {"alibi_window_causal", "alibi_wide_window", "alibi_causal_by_window", "alibi_tail"}


@dataclass(frozen=True)
class Adapter:
    """An adapter over a fake.

    Attributes:
        name: of the backend and its module. fake: of the stand-in. preset: the GPU that it is told of.
        refused: names of the cases that it must refuse, and no others.
    """

    name: str
    fake: str
    preset: str
    refused: frozenset[str]

    @property
    def module(self) -> Any:
        return importlib.import_module(f"vllm_accel.backends.{self.name}")

    @property
    def backend(self) -> Any:
        return self.module.BACKEND

    @property
    def device(self) -> Device:
        return PRESETS[self.preset]

    @contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """Put the fake in the library's place, and give the module whose attributes say what it pretends to be."""
        library.forget()
        source = install.install(monkeypatch, self.fake)
        if self.fake == "flash_attn_4":
            major, minor = self.device.compute_capability or (0, 0)
            monkeypatch.setattr(source, "ARCH", 10 * major + minor)
        try:
            yield source
        finally:
            library.forget()


ADAPTERS = {
    "fa2": Adapter("flash_attn_2", "flash_attn_2", "a100", frozenset(_NONE_OF_THEM | {"head_256_lse"})),
    "fa3": Adapter(
        "flash_attn_3", "flash_attn_3", "h100",
        frozenset(_NONE_OF_THEM | _ALIBI | _OWN_ALIBI | {"deterministic", "head_256_lse"}),
    ),
    "fa3_old": Adapter(
        "flash_attn_3", "flash_attn_3_old", "h100",
        frozenset(_NONE_OF_THEM | _ALIBI | _OWN_ALIBI | {"deterministic", "head_256_lse"}),
    ),
    "fa4_sm90": Adapter("flash_attn_4", "flash_attn_4", "h100", frozenset(_NONE_OF_THEM | _ALIBI | _OWN_ALIBI)),
    "fa4_sm100": Adapter(
        "flash_attn_4", "flash_attn_4", "b200",
        frozenset(_NONE_OF_THEM | _ALIBI | _OWN_ALIBI | {"head_256_lse", "head_256_window"}),
    ),
}  # fmt: skip

_MIXED = ((17, 17), (1, 1), (33, 33), (8, 8))
_GAP = ((1, 40), (0, 3), (1, 129))
_CAUSAL: dict[str, Any] = {"causal": True}

#: Beyond the public cases: what only the conversions of these adapters make dangerous.
OWN_CASES: tuple[Case, ...] = (
    Case("window_open_right", "FlashAttention 2 cuts an open right side at Sk keys", seqlen_q=50, seqlen_k=20,
         options={"window_size": (3, -1)}, lse_grad=True),
    Case("window_wide_right", "and any right side of at least Sk", seqlen_q=60, seqlen_k=20, num_kv_heads=2,
         options={"window_size": (-1, 25)}),
    Case("varlen_window_open_right", "in one sequence of several", lengths=((50, 20), (3, 9)), num_kv_heads=2,
         options={"window_size": (3, -1)}, lse_grad=True),
    Case("varlen_window_wide_right", "", lengths=((60, 20), (3, 9)), options={"window_size": (-1, 25)}),
    Case("varlen_decode_gap", "FlashAttention 2 takes row b for sequence b", lengths=_GAP, tail=1, num_heads=8,
         num_kv_heads=2, options=_CAUSAL),
    Case("varlen_tail_sinks", "rows of no sequence have no sink", lengths=_MIXED, tail=5, sinks=True,
         options=_CAUSAL, lse_grad=True),
    Case("varlen_tail_cross", "and keys of no sequence no gradient", lengths=((5, 19), (0, 7), (3, 0)), tail=4,
         num_kv_heads=2, lse_grad=True),
    Case("alibi_window_causal", "a window inside Sk: the other kernel, and no shift", seqlen_q=20, seqlen_k=37,
         alibi="heads", options={"window_size": (9, -1), **_CAUSAL}, lse_grad=True),
    Case("alibi_wide_window", "a left side of at least Sk: purely causal after all", seqlen_q=20, seqlen_k=37,
         alibi="batch", options={"window_size": (40, -1), **_CAUSAL}, lse_grad=True),
    Case("alibi_causal_by_window", "(-1, 0) is causal without the flag", alibi="heads",
         options={"window_size": (-1, 0)}, lse_grad=True),
    Case("alibi_tail", "", lengths=((5, 19), (9, 4), (7, 7)), tail=3, alibi="batch", num_kv_heads=2,
         options=_CAUSAL, lse_grad=True),
    Case("mla_prefill", "head sizes (192, 128)", seqlen_q=20, seqlen_k=28, num_kv_heads=2, head_dim=192,
         head_dim_v=128, options=_CAUSAL),
    Case("mla_prefill_lse", "with a gradient of lse", seqlen_q=20, seqlen_k=28, head_dim=192, head_dim_v=128,
         options=_CAUSAL, lse_grad=True),
    Case("value_dim_160", "between the sizes that kernels have", seqlen_q=20, seqlen_k=28, num_kv_heads=1,
         head_dim=160, head_dim_v=90),
    Case("head_200", "", seqlen_q=20, seqlen_k=28, head_dim=200, head_dim_v=200, options=_CAUSAL),
    Case("head_256_lse", "no spare column for a gradient of lse", seqlen_q=12, seqlen_k=12, head_dim=256,
         head_dim_v=256, lse_grad=True),
    Case("head_256_window", "", seqlen_q=12, seqlen_k=12, head_dim=256, head_dim_v=256,
         options={"window_size": (4, -1), **_CAUSAL}),
)  # fmt: skip

EVERY_CASE = {case.name: case for case in (*CASES, *OWN_CASES)}
BF16, FP16 = torch.bfloat16, torch.float16

#: Where a library's functions are, and which one a dense call runs forward and backward.
OPERATORS = {
    "flash_attn_2": ("flash_attn.flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
    "flash_attn_3": ("flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
    "flash_attn_4": ("flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd"),
}


def qkv(dtype: torch.dtype = BF16, s: int = 24) -> list[Tensor]:
    g = torch.Generator().manual_seed(s)
    return [torch.randn(2, s, 4, 32, generator=g).to(dtype) for _ in range(3)]


def between(adapter: Adapter, monkeypatch: pytest.MonkeyPatch, look: Callable[[str, dict[str, Any]], object]) -> None:
    """Stand between adapter and library: ``look`` sees the name and the keywords of every call, and may change them."""
    module = sys.modules[OPERATORS[adapter.name][0]]
    for name, real in list(vars(module).items()):
        if name.startswith("_flash_attn") and callable(real):

            @functools.wraps(real)
            def call(*args: Any, _name: str = name, _real: Callable[..., Any] = real, **kwargs: Any) -> Any:
                assert not args, f"{_name} is called by position"
                look(_name, kwargs)
                return _real(**kwargs)

            monkeypatch.setattr(module, name, call)


def check_dropout(adapter: Adapter, sinks: Tensor | None = None) -> None:
    """Compare the gradients with those of an oracle that has the dropout mask of the forward."""
    tensors = [t.requires_grad_() for t in qkv(s=40)]
    keep = 0.7
    torch.manual_seed(11)
    rng = kernel.draw_rng_state()  # what the fake will draw
    torch.manual_seed(11)
    out = kernel_call(adapter.backend, adapter.device)(*tensors, dropout_p=1 - keep, sinks=sinks)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    got = torch.autograd.grad(out, tensors, dout)
    kept = kernel.dropout_mask(rng, (2, 4, 40, 40), keep).transpose(1, 2)

    def dropped(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in tensors)
        # The probabilities are what attention makes of the unit vectors.
        units = torch.eye(40, dtype=dtype)[None, :, None].expand(2, -1, 4, -1)
        p = torch.where(kept, attention_oracle(q, k, units, sinks=sinks)[0].to(dtype) / keep, 0.0)
        loss = (torch.einsum("bihj,bjhd->bihd", p, v) * dout.to(dtype)).sum()
        return list(torch.autograd.grad(loss, (q, k, v)))

    for name, actual, want, plain in zip("qkv", got, dropped(torch.float64), dropped(BF16), strict=True):
        assert_grad_close(actual, want, plain, what=f"d{name}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run tiny tensors on one thread: with a pool of them the tests take ten times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
