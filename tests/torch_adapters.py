"""What the tests of the adapters over PyTorch's CUDA kernels share: each adapter over its fake, and more cases."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes import aten as fake_aten
from fakes import install
from vllm_accel.backends import library
from vllm_accel.dispatch.device import PRESETS, Device
from vllm_accel.errors import UnsupportedCallError
from vllm_accel.testing import CASES, Case, kernel_call
from vllm_accel.testing.tolerance import assert_close, assert_grad_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_CAUSAL: dict[str, Any] = {"causal": True}
_MIXED = ((17, 17), (1, 1), (33, 33), (8, 8))
_CROSS = ((5, 19), (1, 33), (0, 7), (12, 12), (3, 0), (9, 4))

#: Beyond the public cases: what only the conversions of these adapters make dangerous.
OWN_CASES: tuple[Case, ...] = (
    Case("window_open_right", "FlashAttention 2 cuts an open right side at Sk keys", seqlen_q=50, seqlen_k=20,
         options={"window_size": (3, -1)}, lse_grad=True),
    Case("window_wide_right", "and any right side of at least Sk", seqlen_q=60, seqlen_k=20, num_kv_heads=2,
         options={"window_size": (-1, 25)}),
    Case("window_square", "a sliding window, trained", num_kv_heads=2, options={"window_size": (6, -1), **_CAUSAL},
         lse_grad=True),
    Case("window_longer", "a window where the first queries see no key", seqlen_q=45, seqlen_k=30,
         options={"window_size": (6, -1), **_CAUSAL}, lse_grad=True),
    Case("window_shorter", "a window at the end of more keys", seqlen_q=20, seqlen_k=70, grad=False,
         options={"window_size": (15, -1), **_CAUSAL}),
    Case("varlen_window_square", "", lengths=_MIXED, shared_cu=True, num_kv_heads=2, lse_grad=True,
         options={"window_size": (6, -1), **_CAUSAL}),
    Case("varlen_window_cross", "", lengths=_CROSS, options={"window_size": (3, -1), **_CAUSAL}, grad=False),
    Case("varlen_decode_gap", "FlashAttention 2 takes row b for sequence b", lengths=((1, 40), (0, 3), (1, 129)),
         tail=1, num_heads=8, num_kv_heads=2, options=_CAUSAL),
    Case("varlen_tail_sinks", "rows of no sequence have no sink", lengths=_MIXED, tail=5, sinks=True,
         options=_CAUSAL, lse_grad=True),
    Case("varlen_tail_cross", "and keys of no sequence no gradient", lengths=((5, 19), (0, 7), (3, 0)), tail=4,
         num_kv_heads=2, lse_grad=True),
    Case("varlen_tail_causal", "", lengths=((5, 19), (0, 7), (9, 4)), tail=4, num_kv_heads=2, lse_grad=True,
         options=_CAUSAL),
    Case("bias_longer", "a bias over queries that see no key", seqlen_q=45, seqlen_k=13, bias="full", bias_grad=True,
         options=_CAUSAL),
    Case("bias_shorter", "a bias and a diagonal that is not its own", seqlen_q=13, seqlen_k=45, bias="full",
         bias_grad=True, options=_CAUSAL),
    Case("bias_odd", "rows of a bias start at 16 bytes", seqlen_q=11, seqlen_k=37, bias="full", bias_grad=True),
    Case("bias_forward", "causal and a bias, without gradients", bias="full", options=_CAUSAL, grad=False),
    Case("decode_forward", "one query, without gradients", seqlen_q=1, seqlen_k=77, num_heads=8, num_kv_heads=2,
         options=_CAUSAL, grad=False),
    Case("mask_forward", "", bias="full", bool_bias=True, num_kv_heads=2, grad=False),
    Case("head_200", "between kernel sizes", seqlen_q=20, seqlen_k=28, head_dim=200, head_dim_v=200, options=_CAUSAL),
    Case("head_256_lse", "no spare column for a gradient of lse", seqlen_q=12, seqlen_k=12, head_dim=256,
         head_dim_v=256, lse_grad=True),
)  # fmt: skip

EVERY_CASE = {case.name: case for case in (*CASES, *OWN_CASES)}

_SOFTCAP = {"softcap", "softcap_large", "varlen_softcap", "everything"}
_ALIBI = {"alibi", "alibi_causal", "alibi_batch", "varlen_alibi"}
_BIAS = {
    "bias_full", "bias_grad", "bias_heads", "bias_row", "bias_keys", "bias_column", "mask_keys", "mask_full",
    "bias_longer", "bias_shorter", "bias_odd", "bias_forward", "mask_forward",
}  # fmt: skip
_TWO_SIDED = {"window", "window_left", "window_right", "window_zero", "window_empty_rows", "window_open_right",
              "window_wide_right", "varlen_window", "alibi_batch"}  # fmt: skip
_WINDOW_UNEQUAL = {"window_causal", "varlen_window_causal"}
_INVARIANT = {"batch_invariant", "varlen_invariant"}
_BIAS_GRAD = {"bias_grad", "bias_heads", "bias_row", "bias_longer", "bias_shorter", "bias_odd", "everything"}

_FLASH = {*_SOFTCAP, *_ALIBI, *_BIAS, *_INVARIANT, "descale", "deterministic", "head_320", "head_256_lse"}
_EFFICIENT = {*_SOFTCAP, *_ALIBI, *_TWO_SIDED, *_WINDOW_UNEQUAL, "bias_column", "descale"}
_CUDNN = {
    *_SOFTCAP, *_ALIBI, *_TWO_SIDED, *_WINDOW_UNEQUAL, *_INVARIANT, *_BIAS, "descale", "decode",
    "causal_shorter", "causal_longer", "sinks_window", "sinks_empty", "window_causal_right", "window_square",
    "window_longer", "window_shorter", "head_256", "head_320", "head_200", "head_256_lse", "tiny", "long",
    "deterministic", *(name for name in EVERY_CASE if name.startswith("varlen")),
}  # fmt: skip
_FMHA = {*_SOFTCAP, *_ALIBI, *_INVARIANT, *_BIAS_GRAD, "bias_column", "mask_full", "descale",
         "deterministic"}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter over a fake.

    Attributes:
        name: of the backend and its module. fake: of the stand-in. preset: the GPU that it is told of.
        dtype: of every case. refused: names of the cases that it must refuse, and no others.
    """

    name: str
    fake: str
    preset: str
    dtype: torch.dtype
    refused: frozenset[str]

    @property
    def backend(self) -> Any:
        return importlib.import_module(f"vllm_accel.backends.{self.name}").BACKEND

    @property
    def device(self) -> Device:
        return PRESETS[self.preset]

    @contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """Put the fake in the library's place, and give the module whose attributes say what it pretends to be."""
        library.forget()
        source = install.install(monkeypatch, self.fake)
        if self.fake != "aten":
            monkeypatch.setattr(source, "COMPUTE_CAPABILITY", self.device.compute_capability)
        try:
            yield source
        finally:
            library.forget()

    def between(self, monkeypatch: pytest.MonkeyPatch, look: Callable[[str, dict[str, Any]], object]) -> None:
        """Stand between adapter and library: ``look`` sees name and keywords of every call, and may change them."""
        if self.fake == "aten":
            for name in fake_aten.OPERATORS:
                wrapped = _watched(name, fake_aten.OPERATORS[name], look)
                monkeypatch.setattr(torch.ops.aten, name, fake_aten.Op(name, wrapped), raising=False)
            return
        module = sys.modules[{"xformers": "xformers.ops.fmha", "mslk": "mslk.attention.fmha"}[self.fake]]
        for name, real in list(vars(module).items()):
            if name.startswith("memory_efficient_attention"):
                monkeypatch.setattr(module, name, _watched(name, real, look))
        library.forget()


def _watched(name: str, real: Callable[..., Any], look: Callable[[str, dict[str, Any]], object]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        assert not args, f"{name} is called by position"
        look(name, kwargs)
        return real(**kwargs)

    # What library.py asks a function for.
    call.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    return call


ADAPTERS = {
    "flash": Adapter("sdpa_flash", "aten", "h100", BF16, frozenset(_FLASH)),
    "efficient": Adapter("sdpa_efficient", "aten", "h100", BF16, frozenset(_EFFICIENT)),
    "cudnn": Adapter("sdpa_cudnn", "aten", "h100", BF16, frozenset(_CUDNN - {"mask_forward"})),
    "xformers_flash": Adapter(
        "xformers", "xformers", "a100", BF16,
        frozenset(_FMHA | {"window_empty_rows", "window_open_right", "window_wide_right", "varlen_window"}),
    ),
    "xformers_cutlass": Adapter(
        "xformers", "xformers", "t4", FP16,
        frozenset(
            _FMHA | _TWO_SIDED | _WINDOW_UNEQUAL
            | {"window_causal_right", "window_square", "window_longer", "sinks_window", "varlen_cross",
               "varlen_tail_cross"}
        ),
    ),
}  # fmt: skip

#: The same code as xformers over another module: a few cases are enough.
MSLK = Adapter("mslk", "mslk", "h100", BF16, frozenset())


def qkv(dtype: torch.dtype = BF16, s: int = 24, heads: int = 4, kv_heads: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(s)
    return [torch.randn(2, s, n, 32, generator=g).to(dtype) for n in (heads, kv_heads, kv_heads)]


def answer(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Return a call's result, or None and the reasons of its refusal."""
    try:
        return call(*args, **kwargs), {}
    except UnsupportedCallError as refusal:
        return None, refusal.reasons


def check_dropout(adapter: Adapter) -> None:
    """Check the share of what is dropped, that torch's generator decides it, and that the backward agrees."""
    n, keep = 64, 0.75
    call = kernel_call(adapter.backend, adapter.device)
    q, k = (t.repeat(1, 1, 1, 2) for t in qkv(s=n)[:2])
    # With unit vectors for values the output is the matrix of kept probabilities itself.
    v = torch.eye(n, dtype=BF16)[None, :, None].expand(2, -1, 4, -1).contiguous().requires_grad_()
    torch.manual_seed(7)
    out = call(q, k, v, dropout_p=1 - keep)
    dropped = out == 0
    assert abs(float(dropped.float().mean()) - (1 - keep)) < 0.01
    assert not torch.equal(call(q, k, v, dropout_p=1 - keep), out), "the next mask is another one"
    torch.manual_seed(7)
    assert torch.equal(call(q, k, v, dropout_p=1 - keep), out), "the mask comes from torch's generator"
    kept = torch.where(dropped, 0.0, call(q, k, v).float() / keep)
    assert_close(out, kept.double(), kept.to(BF16), what="kept probabilities over 1 - p")
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    (dv,) = torch.autograd.grad(out, v, dout)
    want, plain = (torch.einsum("bihj,bihd->bjhd", out.to(t), dout.to(t)).detach() for t in (torch.float64, BF16))
    assert_grad_close(dv, want, plain, what="dv of the same mask")
