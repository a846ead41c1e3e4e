"""The convention fakes: signatures of the real libraries, and conventions against the oracle."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import operator
import os
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes import aten, flash_attn_2, flash_attn_3, flash_attn_4, flashinfer, install, kernel, xformers_fmha
from fakes import flash_attn_2_ops as fa2
from fakes import xformers_attn_bias as masks
from vllm_accel.testing.oracle import (
    attention_oracle,
    attention_paged_oracle,
    attention_varlen_oracle,
    plain_attention,
    plain_attention_varlen,
)
from vllm_accel.testing.tolerance import assert_close, assert_grad_close, assert_lse_close

INF = float("inf")
BF16 = torch.bfloat16


def rand(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def qkv(
    seqlen_q: int = 5, seqlen_k: int = 7, heads: int = 4, heads_k: int = 2, dim: int = 8, dim_v: int = 0
) -> list[Tensor]:
    dim_v = dim_v or dim
    return [
        rand(2, seqlen_q, heads, dim),
        rand(2, seqlen_k, heads_k, dim, seed=1),
        rand(2, seqlen_k, heads_k, dim_v, seed=2),
    ]


def bhsd(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def check(
    got: tuple[Tensor, Tensor | None], inputs: list[Tensor], *, varlen: bool = False, grads: Any = None, **options: Any
) -> None:
    """Hold out, lse and gradients (of a fixed random dout) against the oracle with the same options."""
    oracle, plain = (attention_varlen_oracle, plain_attention_varlen) if varlen else (attention_oracle, plain_attention)
    (out, lse), (want_out, want_lse), (plain_out, _) = got, oracle(*inputs, **options), plain(*inputs, **options)
    assert_close(out, want_out, plain_out, what="out")
    if lse is not None:
        assert_lse_close(lse, want_lse, dtype=inputs[0].dtype)
    if grads is None and not out.requires_grad:
        return
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    mine = torch.autograd.grad(out, inputs, dout) if grads is None else grads(dout)
    wanted = torch.autograd.grad(want_out, inputs, dout.double())
    plainly = torch.autograd.grad(plain_out, inputs, dout)
    for name, a, b, c in zip(("dq", "dk", "dv"), mine, wanted, plainly, strict=False):
        assert_grad_close(a, b, c, what=name, scale=1.0)


CU_Q = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
CU_K = torch.tensor([0, 4, 6, 13], dtype=torch.int32)


def packed(heads: int = 4, heads_k: int = 2, dim: int = 8, rows: int = 10, keys: int = 15) -> list[Tensor]:
    return [rand(rows, heads, dim), rand(keys, heads_k, dim, seed=1), rand(keys, heads_k, dim, seed=2)]


# --- signatures ---------------------------------------------------------------------------------------------------


def real(name: str) -> ModuleType | str:
    """Import a library, or say why not."""
    try:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            return f"{name} is not installed"
        if name.startswith("mslk") and not torch.cuda.is_available():
            os.environ.setdefault("MSLK_PYTHON_ONLY", "1")  # its extension needs a GPU's libraries
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:  # whatever a half-installed library raises
        return f"{name} cannot be imported: {type(error).__name__}: {error}"


FLASHINFER = ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.mla")
LIBRARIES = ("flash_attn.cute.interface", "xformers.ops.fmha", "mslk.attention.fmha", *FLASHINFER)
REAL = {name: real(name) for name in LIBRARIES}
XFORMERS_FUNCTIONS = [name for name in vars(xformers_fmha) if name.startswith("memory_efficient_attention")]
SIGNATURES = [
    *(("flash_attn.cute.interface", name, getattr(flash_attn_4, name))
      for name in ("_flash_attn_fwd", "_flash_attn_bwd", "flash_attn_func", "flash_attn_varlen_func")),
    *(("xformers.ops.fmha", name, getattr(xformers_fmha, name)) for name in XFORMERS_FUNCTIONS),
    *(("mslk.attention.fmha", name, getattr(xformers_fmha, name))
      for name in XFORMERS_FUNCTIONS if not name.endswith("partial")),
    ("mslk.attention.fmha", "memory_efficient_attention_partial",
     xformers_fmha.mslk_memory_efficient_attention_partial),
    *(("flashinfer", f"BatchPrefillWithPagedKVCacheWrapper.{name}",
       getattr(flashinfer.BatchPrefillWithPagedKVCacheWrapper, name)) for name in ("__init__", "plan", "run")),
    ("flashinfer.decode", "xqa_batch_decode_with_kv_cache", flashinfer.xqa_batch_decode_with_kv_cache),
    ("flashinfer.decode", "trtllm_batch_decode_with_kv_cache", flashinfer.trtllm_batch_decode_with_kv_cache),
    ("flashinfer.prefill", "trtllm_batch_context_with_kv_cache", flashinfer.trtllm_batch_context_with_kv_cache),
    ("flashinfer.mla", "trtllm_batch_decode_with_kv_cache_mla", flashinfer.trtllm_batch_decode_with_kv_cache_mla),
]  # fmt: skip
MASKS = [name for name, kind in vars(masks).items() if inspect.isclass(kind) and issubclass(kind, masks.AttentionBias)]
MASKS = [name for name in MASKS if name not in ("_Blocks", "AttentionBias")]


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


def installed(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(isinstance(REAL[library], str), reason=str(REAL[library]))


@pytest.mark.parametrize(
    ("library", "name", "fake"),
    [pytest.param(*row, marks=installed(row[0]), id=f"{row[0]}.{row[1]}") for row in SIGNATURES],
)
def test_signatures_are_those_of_the_library(library: str, name: str, fake: Callable[..., Any]) -> None:
    assert parameters(fake) == parameters(operator.attrgetter(name)(REAL[library]))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "library", [pytest.param(x, marks=installed(x)) for x in ("xformers.ops.fmha", "mslk.attention.fmha")]
)
def test_masks_are_those_of_the_library(library: str, name: str) -> None:
    bias = REAL[library].attn_bias  # type: ignore[union-attr]
    theirs, ours = getattr(bias, name), getattr(masks, name)
    assert parameters(ours.__init__) == parameters(theirs.__init__)
    for method in ("from_seqlens", "from_seqlens_local"):
        if hasattr(ours, method):
            assert parameters(getattr(ours, method)) == parameters(getattr(theirs, method))
    ours_made, theirs_made = make_mask(name, masks), make_mask(name, bias)
    shape = mask_shape(ours_made)
    torch.testing.assert_close(ours_made.materialize(shape), theirs_made.materialize(shape))


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason=f"schemas of torch 2.13, not {torch.__version__}")
@pytest.mark.parametrize("name", aten.OPERATORS)
def test_aten_signatures_are_the_schemas(name: str) -> None:
    schema = getattr(torch.ops.aten, name).default._schema
    theirs = [
        (a.name, "KEYWORD_ONLY" if a.kwarg_only else "POSITIONAL_OR_KEYWORD",
         a.default_value if a.has_default_value() else inspect.Parameter.empty)
        for a in schema.arguments
    ]  # fmt: skip
    ours = [(n, kind.name, default) for n, kind, default in parameters(aten.OPERATORS[name])]
    assert ours == theirs


# --- flash-attn 2 -------------------------------------------------------------------------------------------------

COMMON = {
    "plain": {},
    "causal": {"causal": True},
    "left": {"window_size": (2, -1)},
    "both": {"window_size": (2, 1)},
    "right": {"window_size": (-1, 1)},
    "causal left": {"causal": True, "window_size": (2, -1)},
    "softcap": {"softcap": 1.5, "causal": True},
    "scale": {"softmax_scale": 0.3},
}


@pytest.mark.parametrize("heads_k", [1, 2, 4])
@pytest.mark.parametrize("name", COMMON)
def test_fa2_dense(name: str, heads_k: int) -> None:
    inputs = qkv(heads_k=heads_k, dim=12)
    out, lse, _ = flash_attn_2.flash_attn_func(*inputs, return_attn_probs=True, **COMMON[name])
    check((out, lse), inputs, **COMMON[name])
    assert not out.is_contiguous()  # 12 is padded to 16


@pytest.mark.parametrize("name", COMMON)
def test_fa2_packed(name: str) -> None:
    inputs = packed()
    out, lse, _ = flash_attn_2.flash_attn_varlen_func(*inputs, CU_Q, CU_K, 5, 7, return_attn_probs=True, **COMMON[name])
    assert out[8:].isnan().all() and lse[:, 8:].isnan().all()  # torch.empty, never written
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert grads[0][8:].isnan().all() and grads[1][13:].isnan().all()
    rows, keys = slice(0, 8), slice(0, 13)
    short = [inputs[0][rows], inputs[1][keys], inputs[2][keys]]
    again = flash_attn_2.flash_attn_varlen_func(*short, CU_Q, CU_K, 5, 7, return_attn_probs=True, **COMMON[name])
    check(again[:2], short, varlen=True, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, **COMMON[name])


def test_fa2_empty_rows_have_plus_infinity() -> None:
    inputs = qkv(5, 3)
    out, lse, _ = flash_attn_2.flash_attn_func(*inputs, causal=True, return_attn_probs=True)
    assert (out[:, :2] == 0).all() and (lse[..., :2] == INF).all()
    check((out, torch.where(lse == INF, -INF, lse)), inputs, causal=True)


@pytest.mark.parametrize("slopes", [torch.tensor([0.5, 0.25, 0.1, 1.0]), torch.rand(2, 4)])
def test_fa2_alibi_shifts_the_lse_of_pure_causal_calls_only(slopes: Tensor) -> None:
    inputs = qkv(5, 7)
    for options, shifted in (
        ({"causal": True}, True),
        ({"window_size": (-1, 0)}, True),
        ({"causal": True, "window_size": (7, -1)}, True),  # a left side of Sk or more is dropped first
        ({"causal": True, "window_size": (4, -1)}, False),
        ({}, False),
    ):
        out, lse, _ = flash_attn_2.flash_attn_func(*inputs, alibi_slopes=slopes, return_attn_probs=True, **options)
        excess = slopes[..., None] * (torch.arange(5) + 2) if shifted else 0.0
        check((out, lse - excess), inputs, alibi_slopes=slopes, **options)


def fa2_backward(inputs: list[Tensor], out: Tensor, lse: Tensor, dout: Tensor, **options: Any) -> list[Tensor]:
    grads = [torch.full_like(x, math.nan) for x in inputs]
    arguments = {"softmax_scale": inputs[0].shape[-1] ** -0.5, "causal": True, **options}
    fa2._flash_attn_backward(
        dout, *(x.detach() for x in inputs), out, lse, *grads, 0.0, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, deterministic=False, **arguments,
    )  # fmt: skip
    return grads


def test_fa2_backward_starts_from_the_lse_it_is_given() -> None:
    inputs = qkv()
    out, lse, _ = (x.detach() for x in flash_attn_2.flash_attn_func(*inputs, causal=True, return_attn_probs=True))
    check((out, lse), inputs, causal=True, grads=lambda dout: fa2_backward(inputs, out, lse, dout))
    with pytest.raises(AssertionError, match="dq: element"):
        check((out, lse), inputs, causal=True, grads=lambda dout: fa2_backward(inputs, out, lse + 0.5, dout))
    with pytest.raises(RuntimeError, match="dense float32"):
        fa2_backward(inputs, out, lse.transpose(1, 2).contiguous().transpose(1, 2), out)


def test_fa2_backward_takes_sinks_folded_into_out_and_lse() -> None:
    inputs, sinks = qkv(), torch.tensor([0.5, -1.0, 2.0, 0.0])
    out, lse, _ = (x.detach() for x in flash_attn_2.flash_attn_func(*inputs, causal=True, return_attn_probs=True))
    with_sink = torch.logaddexp(lse, sinks[:, None])
    scaled = (out * torch.exp(lse - with_sink).transpose(1, 2)[..., None]).to(BF16)
    check(
        (scaled, with_sink), inputs, causal=True, sinks=sinks,
        grads=lambda dout: fa2_backward(inputs, scaled, with_sink, dout),
    )  # fmt: skip


def test_fa2_backward_takes_the_gradient_of_the_lse_in_an_extra_column() -> None:
    inputs = qkv()
    out, lse, _ = (x.detach() for x in flash_attn_2.flash_attn_func(*inputs, causal=True, return_attn_probs=True))
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(1))
    wide = [torch.nn.functional.pad(x.detach(), [0, 8]) for x in inputs]
    wide_out, dout = torch.nn.functional.pad(out, [0, 8]), torch.zeros(2, 5, 4, 16, dtype=BF16)
    wide_out[..., 8], dout[..., 8] = 1.0, -dlse.transpose(1, 2).to(BF16)
    grads = fa2_backward(wide, wide_out, lse, dout, softmax_scale=8**-0.5)
    rounded = dlse.to(BF16)
    wanted = torch.autograd.grad(attention_oracle(*inputs, causal=True)[1], inputs[:2], rounded.double())
    plainly = torch.autograd.grad(plain_attention(*inputs, causal=True)[1], inputs[:2], rounded.float())
    for got, want, other in zip(grads, wanted, plainly, strict=False):
        assert_grad_close(got[..., :8], want, other, what="gradient of the lse")


def test_fa2_dropout_is_the_same_mask_in_both_directions() -> None:
    inputs = qkv()
    out, lse, s_dmask = flash_attn_2.flash_attn_func(*inputs, dropout_p=0.4, return_attn_probs=True)
    again, _, _ = flash_attn_2.flash_attn_func(*inputs, dropout_p=0.4, return_attn_probs=True)
    assert s_dmask.shape == (2, 4, 128, 128) and not torch.equal(out, again)
    assert_lse_close(lse.detach(), attention_oracle(*inputs)[1].detach(), dtype=BF16)
    kept = s_dmask[..., :5, :7] >= 0
    assert 0.4 < kept.float().mean() < 0.8
    q, k, v = (x.double() for x in inputs)
    scores = q.transpose(1, 2) @ k.repeat_interleave(2, 2).permute(0, 2, 3, 1) * 8**-0.5
    p = torch.where(kept, scores.softmax(-1) / 0.6, 0.0)
    want = (p @ v.repeat_interleave(2, 2).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=0.02)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(BF16)
    for got, wanted in zip(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(want, inputs, dout.double()), strict=True
    ):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("window", [(1, -1), (-1, 3)])
def test_fa2_windows_go_wrong_with_more_queries_than_keys(window: tuple[int, int]) -> None:
    inputs = [x.detach() for x in qkv(10, 3)]
    with pytest.raises(AssertionError, match="out: element"):
        check((flash_attn_2.flash_attn_func(*inputs, window_size=window), None), inputs, window_size=window)


def test_fa2_packed_decode_ignores_where_sequences_start() -> None:
    q, k, v = (x.detach() for x in packed(rows=2, keys=6))
    cu_k = torch.tensor([0, 2, 6], dtype=torch.int32)
    moved = torch.tensor([0, 0, 1], dtype=torch.int32)  # sequence 0 has no query, row 1 belongs to none
    out = flash_attn_2.flash_attn_varlen_func(q, k, v, moved, cu_k, 1, 4)
    even = torch.arange(3, dtype=torch.int32)
    torch.testing.assert_close(out, flash_attn_2.flash_attn_varlen_func(q, k, v, even, cu_k, 1, 4))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        flash_attn_2.flash_attn_varlen_func(torch.cat([q, q]), k, v, moved, cu_k, 1, 4)


def test_fa2_grouped_backward_leaves_garbage_where_there_was_zero() -> None:
    q, k, v = (x.detach() for x in packed())
    out, lse, _, _ = fa2._flash_attn_varlen_forward(q, k, v, CU_Q, CU_K, 5, 7, 0.0, 0.3, False)
    for zero_tensors in (False, True):
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        fa2._flash_attn_varlen_backward(
            torch.ones_like(q), q, k, v, out, lse, *grads, CU_Q, CU_K, 5, 7, 0.0, 0.3, False, -1, -1, 0.0, None, False,
            zero_tensors=zero_tensors,
        )  # fmt: skip
        assert (grads[0][8:] == 0).all() and grads[1][13:].isnan().all() == (not zero_tensors)


def test_fa2_paged() -> None:
    inputs = [x.detach() for x in packed(keys=600, dim=16)]
    q, cache = inputs[0][:8], torch.full((2, 4, 256, 2, 16), math.nan, dtype=BF16)
    cache[0, 2], cache[1, 2] = inputs[1][:256], inputs[2][:256]
    cache[0, 1, :9], cache[1, 1, :9] = inputs[1][256:265], inputs[2][256:265]
    cache[0, 3, :4], cache[1, 3, :4] = inputs[1][265:269], inputs[2][265:269]
    table = torch.tensor([[3, -5], [99, 99], [2, 1]], dtype=torch.int32)
    cu_k = torch.tensor([0, 4, 4, 269], dtype=torch.int32)
    want = attention_paged_oracle(
        q, *cache, cu_seqlens_q=CU_Q, block_table=table, seqused_k=torch.diff(cu_k), causal=True
    )
    out, lse, _ = flash_attn_2.flash_attn_varlen_func(
        q, *cache, CU_Q, cu_k, 5, 265, causal=True, return_attn_probs=True, block_table=table
    )
    torch.testing.assert_close(out.double(), want[0], rtol=0, atol=0.01)
    assert_lse_close(lse, want[1], dtype=BF16)
    used = torch.tensor([265], dtype=torch.int32)
    one = flash_attn_2.flash_attn_with_kvcache(
        q[3:8][None], *cache, cache_seqlens=used, block_table=table[2:], causal=True
    )
    torch.testing.assert_close(one[0], out[3:8])
    with pytest.raises(RuntimeError, match="divisible by 256"):
        flash_attn_2.flash_attn_varlen_func(q, *cache[:, :, :16], CU_Q, cu_k, 5, 7, block_table=table)


def test_fa2_refuses_what_the_library_refuses() -> None:
    q, k, v = (x.detach() for x in qkv(dim=16))
    call = flash_attn_2.flash_attn_func
    for change, message in (
        (lambda: call(q.float(), k.float(), v.float()), "only support fp16 and bf16"),
        (lambda: call(q, k.half(), v), "query and key must have the same dtype"),
        (lambda: call(q, k, v, dropout_p=0.1, softcap=1.0), "Softcapping does not support dropout"),
        (lambda: call(*qkv(dim=264)), "at most 256"),
        (lambda: call(q, k, v[..., :8]), "v must have shape"),
        (lambda: call(q[:, :, :3], k, v), "must divide"),
        (lambda: call(q[:0], k[:0], v[:0]), "batch size must be positive"),
        (lambda: call(q, k, v, alibi_slopes=torch.rand(4).double()), "must have dtype fp32"),
        (lambda: call(q, k, v, alibi_slopes=torch.rand(3)), r"\(H,\) or \(B, H\)"),
        (lambda: call(rand(2, 5, 4, 17)[..., 1:], k, v), "misaligned address"),
        (lambda: fa2._flash_attn_forward(*qkv(dim=12), 0.0, 1.0, False, -1, -1, 0.0, None, False), "multiple of 8"),
        (lambda: flash_attn_2.flash_attn_varlen_func(*packed(), CU_Q.long(), CU_K, 5, 7), "must have dtype int32"),
        (lambda: flash_attn_2.flash_attn_varlen_func(*packed(keys=9), CU_Q, CU_K, 5, 7), "illegal memory access"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            change()


# --- ATen ---------------------------------------------------------------------------------------------------------

FLASH = ("_flash_attention_forward", "_flash_attention_backward")


@pytest.mark.parametrize("name", [name for name in COMMON if name != "softcap"])
def test_aten_flash(name: str) -> None:
    options = COMMON[name]
    left, right = options.get("window_size", (None, None))
    arguments = {"scale": options.get("softmax_scale"), "window_size_left": left, "window_size_right": right}
    for inputs, lengths, varlen in (
        (qkv(), (None, None, 5, 7), {}),
        (packed(rows=8, keys=13), (CU_Q, CU_K, 5, 7), {"varlen": True, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}),
    ):
        q, k, v = (x.detach() for x in inputs)
        causal = options.get("causal", False)
        out, lse, rng, unused, mask = aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, **arguments)
        assert rng.dtype == unused.dtype == torch.uint64 and mask.numel() == 0

        def backward(
            dout: Tensor, saved: Any = (q, k, v, out, lse, *lengths), causal: bool = causal, rng: Any = rng
        ) -> Any:
            return aten._flash_attention_backward(dout, *saved, 0.0, causal, rng, rng, **arguments)

        check((out, lse), inputs, grads=backward, **varlen, **options)


def test_aten_flash_refuses_strides_and_takes_no_batch() -> None:
    q, k, v = (x.detach() for x in qkv())
    with pytest.raises(RuntimeError, match="contiguous last dimension"):
        aten._flash_attention_forward(q[..., ::2], k[..., ::2], v[..., ::2], None, None, 5, 7, 0.0, False, False)
    out = aten._flash_attention_forward(q[:0], k[:0], v[:0], None, None, 5, 7, 0.0, False, False)[0]
    assert out.shape == (0, 5, 4, 8)


def efficient(inputs: list[Tensor], **options: Any) -> tuple[Tensor, Tensor, Callable[[Tensor], Any]]:
    """Run the forward on equal heads; return out, lse without its padding, and the backward."""
    q, k, v = (x.detach() for x in inputs)
    lengths = options.pop("lengths", (None, None, None, None))
    bias, kind, window = options.pop("bias", None), options.pop("kind", 0), options.pop("window", None)
    out, lse, seed, offset, max_q, max_k = aten._efficient_attention_forward(
        q, k, v, bias, *lengths, 0.0, kind, True, window_size=window
    )
    assert lse.shape[-1] == (32 if lengths[0] is None else kernel.round_up(lengths[2], 32))

    def backward(dout: Tensor, padded: Tensor = lse) -> Any:
        return aten._efficient_attention_backward(
            dout, q, k, v, bias, out, *lengths[:2], max_q, max_k, padded, 0.0, seed, offset, kind, bias is not None,
            window_size=window,
        )  # fmt: skip

    return out, lse, backward


EFFICIENT = {
    "plain": ({}, {}),
    "bottom right": ({"kind": 2}, {"causal": True}),
    "bias": ({"bias": torch.randn(2, 4, 5, 8).to(BF16)[..., :7]}, None),
    "expanded bias": ({"bias": torch.randn(1, 1, 5, 8).to(BF16)[..., :7].expand(2, 4, 5, 7)}, None),
}


@pytest.mark.parametrize("name", EFFICIENT)
def test_aten_efficient(name: str) -> None:
    inputs = qkv(heads_k=4, dim_v=16)
    arguments, options = EFFICIENT[name]
    out, lse, backward = efficient(inputs, **arguments)
    options = {"attn_bias": arguments["bias"]} if options is None else options
    assert (lse[..., 5:] == INF).all()
    check((out, lse[..., :5]), inputs, grads=backward, **options)
    with pytest.raises(RuntimeError, match=r"must be \+inf"):
        backward(torch.ones_like(out), torch.nn.functional.pad(lse[..., :5], [0, 27]))


def test_aten_efficient_bias_gradient_and_empty_rows() -> None:
    inputs = qkv(heads_k=4)
    bias = torch.zeros(2, 4, 5, 8).to(BF16)
    bias[:, :, :, 2], bias[:, :, 1] = 0.5, -INF
    bias = bias[..., :7].requires_grad_()
    out, lse, backward = efficient(inputs, bias=bias.detach())
    assert (lse[..., 1] == 0).all() and (out[:, 1] == 0).all()  # an empty row: 0.0, not -inf
    dout = torch.ones_like(out)
    grad = backward(dout)[3]
    want = torch.autograd.grad(attention_oracle(*inputs, attn_bias=bias)[0], bias, dout.double())[0]
    torch.testing.assert_close(grad.double(), want.double(), rtol=0.02, atol=0.02)
    assert grad.shape == bias.shape and grad.stride(-2) == 16


def test_aten_efficient_masks() -> None:
    q, k, v = (x.detach() for x in qkv(heads_k=4))
    top_left = kernel.band(5, 7, None, 0, top_left=True)
    check((efficient([q, k, v], kind=1)[0], None), [q, k, v], attn_bias=top_left)
    check((efficient([q, k, v], kind=2, window=3)[0], None), [q, k, v], causal=True, window_size=(2, 0))
    with pytest.raises(RuntimeError, match="custom_mask_type not supported"):
        efficient([q, k, v], window=3)
    q, k, v = (x.detach() for x in qkv(5, 3, heads_k=4))
    assert efficient([q, k, v], kind=2)[0].isnan().all()  # not defined with more queries than keys


def test_aten_efficient_backward_of_a_bottom_right_window_is_wrong() -> None:
    for seqlen_k, right in ((5, True), (9, False)):
        inputs = qkv(5, seqlen_k, heads_k=4)
        out, lse, backward = efficient(inputs, kind=2, window=2)
        if right:
            check((out, lse[..., :5]), inputs, grads=backward, causal=True, window_size=(1, 0))
        else:
            with pytest.raises(AssertionError, match=r"d[qkv]: element"):
                check((out, lse[..., :5]), inputs, grads=backward, causal=True, window_size=(1, 0))


def test_aten_efficient_packed() -> None:
    inputs = packed(heads_k=4, rows=8, keys=13)
    four = [x[None] for x in inputs]
    out, lse, backward = efficient(four, lengths=(CU_Q, CU_K, 5, 7), kind=2)
    assert lse.shape == (3, 4, 32) and (lse[0, :, 3:] == INF).all() and lse[1].isnan().all()
    flat = torch.cat([lse[b, :, : int(n)] for b, n in enumerate(torch.diff(CU_Q))], dim=1)
    check(
        (out[0], flat), inputs, varlen=True, causal=True, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K,
        grads=lambda dout: [x[0] for x in backward(dout[None])[:3]],
    )  # fmt: skip


def test_aten_efficient_refuses_what_the_kernel_refuses() -> None:
    q, k, v = (x.detach() for x in qkv(heads_k=4))
    bias = torch.zeros(2, 4, 5, 7, dtype=BF16)
    for change, message in (
        (lambda: efficient([q, k[:, :, :2], v[:, :, :2]]), "head counts must agree"),
        (lambda: efficient([q.double(), k.double(), v.double()]), "Only fp32, half & bf16"),
        (lambda: efficient([q[..., :6].contiguous(), k[..., :6].contiguous(), v]), "no kernel found"),
        (lambda: efficient([q, k, v], bias=bias), "not correctly aligned"),
        (lambda: efficient([q, k, v], bias=bias.float()), "match query's dtype"),
        (lambda: efficient([q, k, v], bias=bias[:1]), "wrong shape"),
        (lambda: efficient([q, k, v], bias=bias[0]), "BMHK"),
    ):
        with pytest.raises(RuntimeError, match=message):
            change()


@pytest.mark.parametrize("causal", [False, True])
def test_aten_cudnn(causal: bool) -> None:
    inputs = qkv(6, 6)
    q, k, v = bhsd(*(x.detach() for x in inputs))
    result = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    out, lse, seed, offset = result[0], result[1], result[6], result[7]
    assert lse.shape == (2, 4, 6, 1) and out.shape == (2, 4, 6, 8) and out.transpose(1, 2).is_contiguous()

    def backward(dout: Tensor) -> list[Tensor]:
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            dout.transpose(1, 2), q, k, v, out, lse, seed, offset, None, None, None, 6, 6, 0.0, causal
        )
        return bhsd(*grads)

    check((out.transpose(1, 2), lse[..., 0]), inputs, grads=backward, causal=causal)


def test_aten_cudnn_is_causal_from_the_top_left_and_returns_nothing_for_nothing() -> None:
    q, k, v = bhsd(*(x.detach() for x in qkv(5, 7)))
    out = aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True)[0]
    check((out.transpose(1, 2), None), bhsd(q, k, v), attn_bias=kernel.band(5, 7, None, 0, top_left=True))
    assert aten._scaled_dot_product_cudnn_attention(q, k[:, :, :0], v[:, :, :0], None, True)[:2] == (None, None)
    bias = torch.zeros(5, 7, dtype=BF16)
    bias[2] = -INF
    assert aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True)[0][:, :, 2].isnan().all()


# --- xFormers and MSLK --------------------------------------------------------------------------------------------

Q_LENGTHS, K_LENGTHS = [3, 1, 4], [4, 2, 6]


def make_mask(name: str, module: Any) -> Any:
    kind = getattr(module, name)
    if name.startswith("BlockDiagonal"):
        if "Padded" in name:
            windows = {
                "BlockDiagonalLocalAttentionPaddedKeysMask": (2, 1),
                "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (2,),
            }
            if name in windows:
                return kind.from_seqlens_local(Q_LENGTHS, 6, K_LENGTHS, *windows[name])
            return kind.from_seqlens(Q_LENGTHS, 6, K_LENGTHS)
        base = module.BlockDiagonalMask.from_seqlens(Q_LENGTHS, K_LENGTHS)
        return {
            "BlockDiagonalMask": lambda: base,
            "BlockDiagonalCausalMask": base.make_causal,
            "BlockDiagonalCausalFromBottomRightMask": base.make_causal_from_bottomright,
            "BlockDiagonalCausalLocalAttentionMask": lambda: base.make_local_attention(2),
            "BlockDiagonalCausalLocalAttentionFromBottomRightMask": lambda: base.make_local_attention_from_bottomright(
                2
            ),
        }[name]()
    if name == "LowerTriangularMaskWithTensorBias":
        return kind(torch.arange(2 * 4 * 5 * 8.0).reshape(2, 4, 5, 8)[..., :7].to(BF16))
    arguments = {"LocalAttentionFromBottomRightMask": (2, 1), "LowerTriangularFromBottomRightLocalAttentionMask": (3,)}
    return kind(*arguments.get(name, ()))


def mask_shape(mask: Any) -> tuple[int, ...]:
    if hasattr(mask, "q_seqinfo"):
        return (1, 4, mask.q_seqinfo.seqstart_py[-1], mask.k_seqinfo.seqstart_py[-1])
    return (2, 4, 5, 7)


@pytest.fixture(params=[(9, 0), (7, 5)], ids=["flash", "cutlass"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    monkeypatch.setattr(xformers_fmha, "COMPUTE_CAPABILITY", request.param)
    return request.param


def mask_inputs(mask: Any, dtype: torch.dtype, heads_k: int = 4) -> list[Tensor]:
    batch, _, rows, keys = mask_shape(mask)
    return [
        rand(batch, n, h, 8, dtype=dtype, seed=s)
        for s, (n, h) in enumerate(((rows, 4), (keys, heads_k), (keys, heads_k)))
    ]


@pytest.mark.parametrize("name", MASKS)
def test_xformers_masks_mean_what_they_materialize(name: str, capability: tuple[int, int]) -> None:
    dtype = BF16 if capability >= (8, 0) else torch.float16
    mask = make_mask(name, masks)
    if name == "LowerTriangularMaskWithTensorBias":
        mask._bias = mask._bias.to(dtype)
    inputs = mask_inputs(mask, dtype)
    q, k, v = (x.detach() for x in inputs)
    described = xformers_fmha.Inputs(q, k, v, mask)
    ops = (xformers_fmha.flash, xformers_fmha.cutlass)
    if not any(op.FwOp.supports(described) for op in ops):
        with pytest.raises(NotImplementedError, match="No operator found"):
            xformers_fmha.memory_efficient_attention_forward(q, k, v, mask)
        return
    out = xformers_fmha.memory_efficient_attention_forward(q, k, v, mask)
    check((out, None), [q, k, v], attn_bias=mask.materialize(mask_shape(mask)).double())
    if not any(op.BwOp.supports(described) for op in ops):
        return
    out, lse = xformers_fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask)
    chosen = next(op for op in ops if op.FwOp.supports(described))

    def backward(dout: Tensor) -> Any:
        return xformers_fmha.memory_efficient_attention_backward(dout, out, lse, q, k, v, mask)

    if not chosen.BwOp.supports(described):
        with pytest.raises((NotImplementedError, ValueError)):
            backward(torch.ones_like(out))
        return
    check((out, None), inputs, attn_bias=mask.materialize(mask_shape(mask)).double(), grads=backward)


def test_xformers_lse_depends_on_the_operator(capability: tuple[int, int]) -> None:
    flash = capability >= (8, 0)
    q, k, v = (x.detach().half() for x in qkv(heads_k=4))
    _, lse = xformers_fmha.memory_efficient_attention_forward_requires_grad(q, k, v)
    assert lse.shape == ((2, 4, 5) if flash else (2, 4, 32))
    assert_lse_close(lse[..., :5], attention_oracle(q, k, v)[1], dtype=torch.float16)
    mask = make_mask("BlockDiagonalMask", masks)
    q, k, v = (x.detach() for x in mask_inputs(mask, torch.float16))
    _, lse = xformers_fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask)
    assert lse.shape == ((1, 4, 8) if flash else (3, 4, 32))
    q, k, v = (x.detach().half() for x in qkv(2, 1, heads_k=4))
    wide = torch.full((2, 4, 2, 8), -INF, dtype=torch.float16)[..., :1]
    _, lse = xformers_fmha.memory_efficient_attention_forward_requires_grad(q, k, v, wide)
    assert (lse[..., :2] == 0.0).all()  # a tensor bias is always cutlass; an empty row there is 0.0
    if flash:
        bottom_right = masks.LowerTriangularFromBottomRightMask()
        _, lse = xformers_fmha.memory_efficient_attention_forward_requires_grad(q, k, v, bottom_right)
        assert (lse[..., 0] == INF).all()


@pytest.mark.parametrize("expanded", [True, False])
def test_xformers_grouped_heads_are_five_dimensional_or_repeated(expanded: bool, capability: tuple[int, int]) -> None:
    inputs = [x.half() for x in qkv()]
    q, k, v = inputs
    if expanded:
        five = (q.unflatten(2, (2, 2)), *(x.unsqueeze(3).expand(-1, -1, -1, 2, -1) for x in (k, v)))
        if capability < (8, 0):  # PyTorch's CUTLASS kernel serves, and reads a shared key wrongly
            with pytest.raises(RuntimeError, match="stride of 0"):
                xformers_fmha.memory_efficient_attention_forward_requires_grad(*(x.detach() for x in five))
            five = tuple(x.contiguous() for x in five)
        out, lse = xformers_fmha.memory_efficient_attention_forward_requires_grad(*(x.detach() for x in five))
        check((out.flatten(2, 3).detach(), lse.flatten(1, 2)[..., :5]), [x.detach() for x in inputs])
        with pytest.raises(NotImplementedError, match="BMGHK"):
            xformers_fmha.memory_efficient_attention_backward(out, out, lse, *(x.detach() for x in five))
        return
    with pytest.raises(ValueError, match="Incompatible shapes"):
        xformers_fmha.memory_efficient_attention(q, k, v)
    repeated = (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))
    check((xformers_fmha.memory_efficient_attention(*repeated), None), inputs)


def test_xformers_bias_gradients_and_dropout_need_autograd() -> None:
    q, k, v = qkv(heads_k=4)
    bias = torch.randn(2, 4, 5, 8).to(BF16)[..., :7].requires_grad_()
    out = xformers_fmha.memory_efficient_attention(q, k, v, bias)
    want = attention_oracle(q, k, v, attn_bias=bias)[0]
    got, wanted = (torch.autograd.grad(x.float().sum(), bias)[0] for x in (out, want))
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.02)
    for call in (
        xformers_fmha.memory_efficient_attention_forward_requires_grad,
        xformers_fmha.memory_efficient_attention_partial,
    ):
        with pytest.raises(NotImplementedError, match="dropout"):
            call(q, k, v, p=0.1)
    out = xformers_fmha.memory_efficient_attention(q, k, v, p=0.5)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


def test_xformers_partial(capability: tuple[int, int]) -> None:
    q, k, v = (x.detach().half() for x in qkv(heads_k=4))
    if capability < (8, 0):
        with pytest.raises(NotImplementedError, match="Partial attention not supported"):
            xformers_fmha.memory_efficient_attention_partial(q, k, v)
        return
    out, lse = xformers_fmha.memory_efficient_attention_partial(q, k, v)
    assert out.dtype == torch.float16  # not float32, whatever the documentation says of other operators
    check((out, lse), [q, k, v])
    grad = [x.requires_grad_() for x in (q, k, v)]
    out, lse = xformers_fmha.mslk_memory_efficient_attention_partial(*grad, _allow_backward=True)
    check((out, lse.detach()), grad)


def test_xformers_refuses_what_it_refuses() -> None:
    q, k, v = (x.detach() for x in qkv(heads_k=4))
    call = xformers_fmha.memory_efficient_attention
    with pytest.raises(ValueError, match="Invalid shape for attention bias"):
        call(q, k, v, torch.zeros(1, 1, 5, 7, dtype=BF16))
    with pytest.raises(NotImplementedError, match=r"attn_bias.stride\(-2\) % 8 != 0"):
        call(q, k, v, torch.zeros(2, 4, 5, 7, dtype=BF16))
    with pytest.raises(ValueError, match="batch_size=1"):
        call(q, k, v, masks.BlockDiagonalMask.from_seqlens([5], [7]))
    with pytest.raises(ValueError, match="num_keys >= num_queries"):
        masks.BlockDiagonalMask.from_seqlens([5], [3]).make_causal_from_bottomright()
    with pytest.raises(NotImplementedError, match=r"torch\.float64"):
        call(q.double(), k.double(), v.double())
    with pytest.raises(AssertionError):
        masks.BlockDiagonalMask.from_seqlens(torch.tensor([5]))


# --- FlashAttention 3 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMON)
def test_fa3(name: str) -> None:
    inputs = qkv()
    check(flash_attn_3.flash_attn_func(*inputs, return_attn_probs=True, **COMMON[name]), inputs, **COMMON[name])
    inputs = packed(rows=8, keys=13)
    got = flash_attn_3.flash_attn_varlen_func(*inputs, CU_Q, CU_K, 5, 7, return_attn_probs=True, **COMMON[name])
    check(got, inputs, varlen=True, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, **COMMON[name])


@pytest.mark.parametrize("window", [(1, -1), (-1, 3), (4, 2)])
def test_fa3_windows_are_right_with_more_queries_than_keys(window: tuple[int, int]) -> None:
    inputs = qkv(10, 3)
    got = flash_attn_3.flash_attn_func(*inputs, window_size=window, return_attn_probs=True)
    check(got, inputs, window_size=window)


def test_fa3_empty_rows() -> None:
    q, k, v = (x.detach() for x in qkv(5, 3))
    _, lse = flash_attn_3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (lse[..., :2] == -INF).all()
    out, lse = flash_attn_3.flash_attn_func(q, k[:, :0], v[:, :0], return_attn_probs=True)
    assert (out == 0).all() and (lse == INF).all()  # no key in the whole call


def test_fa3_old_operators_take_a_tuple_and_return_the_gradients() -> None:
    inputs = qkv()
    q, k, v = (x.detach() for x in inputs)
    scale, none = 8**-0.5, [None] * 17
    out, lse, *_ = flash_attn_3.old_flash_attn_forward(q, k, v, *none, None, None, None, scale, True, (3, -1))
    new = flash_attn_3._flash_attn_forward(q, k, v, softmax_scale=scale, causal=True, window_size_left=3)
    assert len(new) == 4 and torch.equal(new[0], out)

    def backward(dout: Tensor) -> Any:
        grads = [torch.empty_like(x) for x in (q, k, v)]
        return flash_attn_3.old_flash_attn_backward(dout, q, k, v, out, lse, *[None] * 6, *grads, scale, True, (3, -1))[
            :3
        ]

    check((out, lse), inputs, grads=backward, causal=True, window_size=(3, -1))


def test_fa3_fp8_and_pages() -> None:
    q, k, v = (x.detach().to(torch.float8_e4m3fn) for x in qkv(dim=16))
    descales = {f"{x}_descale": torch.rand(2, 2) + 0.5 for x in "qkv"}
    out, lse = flash_attn_3.flash_attn_func(q, k, v, return_attn_probs=True, **descales)
    check((out, lse), [q, k, v], **descales)
    q, k, v = (x.detach() for x in packed(rows=8, keys=24))
    table, used = torch.tensor([[4, 0], [9, 9], [2, 1]], dtype=torch.int32), torch.tensor([4, 0, 7], dtype=torch.int32)
    cache = [torch.full((5, 4, 2, 8), math.nan, dtype=BF16) for _ in "kv"]
    for x, source in zip(cache, (k, v), strict=True):
        x[4], x[2], x[1, :3] = source[:4], source[4:8], source[8:11]
    out, lse = flash_attn_3.flash_attn_with_kvcache(
        q, *cache, cache_seqlens=used, page_table=table, cu_seqlens_q=CU_Q, max_seqlen_q=5, causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    want = attention_paged_oracle(q, *cache, cu_seqlens_q=CU_Q, block_table=table, seqused_k=used, causal=True)
    torch.testing.assert_close(out.double(), want[0], rtol=0, atol=0.01)
    assert_lse_close(lse, want[1], dtype=BF16)


def test_fa3_refuses_what_the_library_refuses() -> None:
    for inputs, message in (
        ([x.float() for x in qkv()], "fp16, bf16, and fp8"),
        (qkv(dim=12), "multiple of 8"),
        (qkv(dim=264), "at most 256"),
        (qkv(dim=96, dim_v=64), "V headdim"),
    ):
        with pytest.raises(RuntimeError, match=message):
            flash_attn_3.flash_attn_func(*inputs)


# --- FlashAttention 4 ---------------------------------------------------------------------------------------------


def none_for_minus_one(options: dict[str, Any]) -> dict[str, Any]:
    window = tuple(None if x < 0 else x for x in options.get("window_size", (-1, -1)))
    return {**options, "window_size": window}


@pytest.mark.parametrize("name", COMMON)
def test_fa4(name: str) -> None:
    options = none_for_minus_one(COMMON[name])
    inputs = qkv(dim_v=16)
    check(flash_attn_4.flash_attn_func(*inputs, return_lse=True, **options), inputs, **COMMON[name])
    inputs = packed(rows=8, keys=13)
    lengths = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    got = flash_attn_4.flash_attn_varlen_func(*inputs, **lengths, return_lse=True, **options)
    check(got, inputs, varlen=True, **lengths, **COMMON[name])


def test_fa4_a_negative_side_is_a_limit() -> None:
    q, k, v = (x.detach() for x in qkv())
    both, _ = flash_attn_4.flash_attn_func(q, k, v, window_size=(-1, -1))
    check((both, None), [q, k, v])
    nothing, lse = flash_attn_4.flash_attn_func(q, k, v, window_size=(-1, 0), return_lse=True)
    assert (nothing == 0).all() and (lse == -INF).all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_fa4_sinks_and_the_gradient_of_the_lse(dtype: torch.dtype) -> None:
    inputs, sinks = qkv(5, 3), torch.tensor([0.5, -1.0, 2.0, 0.0]).to(dtype).requires_grad_()
    out, lse = flash_attn_4.flash_attn_func(*inputs, causal=True, learnable_sink=sinks, return_lse=True)
    want, want_lse = attention_oracle(*inputs, causal=True, sinks=sinks)
    check((out.detach(), lse.detach()), [x.detach() for x in inputs], causal=True, sinks=sinks.detach())
    weights = torch.randn(lse.shape, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad(out.float().sum() + (lse * weights).sum(), (*inputs, sinks))
    wanted = torch.autograd.grad(want.sum() + (want_lse * weights).sum(), (*inputs, sinks))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.02, atol=0.03)


def test_fa4_returns() -> None:
    q, k, v = qkv()
    assert flash_attn_4.flash_attn_func(q.detach(), k.detach(), v.detach())[1] is None
    assert flash_attn_4.flash_attn_func(q, k, v)[1] is not None  # needed for the backward, so it comes back
    empty = flash_attn_4._flash_attn_fwd(
        q, k[:, :0], v[:, :0], return_lse=True, learnable_sink=torch.tensor([1.0, 2, 3, 4])
    )
    assert len(empty) == 5 and (empty[0] == 0).all() and (empty[1][0, :, 0] == torch.tensor([1.0, 2, 3, 4])).all()


def test_fa4_last_pages_must_be_finite() -> None:
    q, k, v = (x.detach() for x in packed(rows=8, keys=24))
    table, used = torch.tensor([[4, 0], [0, 0], [2, 1]], dtype=torch.int32), torch.tensor([4, 0, 7], dtype=torch.int32)
    for tail in (0.0, math.nan):
        cache = [torch.full((5, 4, 2, 8), math.nan, dtype=BF16) for _ in "kv"]
        for x, source in zip(cache, (k, v), strict=True):
            x[4], x[2], x[1, :3], x[1, 3:] = source[:4], source[4:8], source[8:11], tail
        out, lse = flash_attn_4.flash_attn_varlen_func(
            q, *cache, cu_seqlens_q=CU_Q, seqused_k=used, page_table=table, causal=True, return_lse=True
        )
        want = attention_paged_oracle(q, *cache, cu_seqlens_q=CU_Q, block_table=table, seqused_k=used, causal=True)
        assert_lse_close(lse, want[1], dtype=BF16)
        if tail == 0.0:
            torch.testing.assert_close(out.double(), want[0], rtol=0, atol=0.01)
        else:
            assert out[3:].isnan().any()


def test_fa4_refuses_what_the_library_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        flash_attn_4.flash_attn_func(*[x.float() for x in qkv()])
    with pytest.raises(AssertionError, match="not supported on SM90"):
        flash_attn_4.flash_attn_func(*qkv(dim=12))
    with pytest.raises(AssertionError, match="only supported on SM100"):
        flash_attn_4.flash_attn_func(*[x.detach().to(torch.float8_e4m3fn) for x in qkv(dim=16)])
    monkeypatch.setattr(flash_attn_4, "ARCH", 100)
    with pytest.raises(AssertionError, match="SM100"):
        flash_attn_4.flash_attn_func(*qkv(dim=160))
    monkeypatch.setattr(flash_attn_4, "ARCH", 80)
    with pytest.raises(AssertionError, match="Unsupported compute capability"):
        torch.autograd.grad(flash_attn_4.flash_attn_func(*(inputs := qkv()))[0].sum(), inputs)


# --- installing ---------------------------------------------------------------------------------------------------

PLACES = {
    "flash_attn_2": [("flash_attn", "flash_attn_func"), ("flash_attn.flash_attn_interface", "_flash_attn_backward")],
    "flash_attn_3": [
        ("flash_attn_interface", "flash_attn_func"),
        ("flash_attn_3.flash_attn_interface", "_flash_attn_forward"),
    ],
    "flash_attn_3_old": [("flash_attn_interface", "_flash_attn_backward")],
    "flash_attn_4": [("flash_attn.cute", "flash_attn_func"), ("flash_attn.cute.interface", "_flash_attn_fwd")],
    "xformers": [("xformers.ops", "memory_efficient_attention"), ("xformers.ops.fmha.attn_bias", "BlockDiagonalMask")],
    "mslk": [("mslk.attention.fmha", "memory_efficient_attention_partial")],
    "flashinfer": [
        ("flashinfer", "BatchPrefillWithPagedKVCacheWrapper"),
        ("flashinfer.decode", "xqa_batch_decode_with_kv_cache"),
        ("flashinfer.prefill", "trtllm_batch_context_with_kv_cache"),
        ("flashinfer.mla", "trtllm_batch_decode_with_kv_cache_mla"),
    ],
    "aten": [],
}


@pytest.mark.parametrize("name", install.NAMES)
def test_install_puts_the_fake_where_the_library_would_be(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        before = {path: sys.modules.get(path) for path, _ in PLACES[name]}
        install.install(patch, name)
        for path, attribute in PLACES[name]:
            assert callable(getattr(importlib.import_module(path), attribute))
            assert importlib.util.find_spec(path) is not None
        for distribution, version in install._DISTRIBUTIONS.get(name, {}).items():
            assert importlib.metadata.version(distribution) == version
        if name == "flash_attn_4":
            assert not hasattr(importlib.import_module("flash_attn"), "flash_attn_func")
        if name == "aten":
            q = torch.randn(1, 2, 1, 8, dtype=BF16)
            out = torch.ops.aten._flash_attention_forward.default(q, q, q, None, None, 2, 2, 0.0, True, False)[0]
            assert out.shape == q.shape and torch.ops.aten._flash_attention_forward._schema.arguments
    assert {path: sys.modules.get(path) for path, _ in PLACES[name]} == before


def test_install_knows_its_names() -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="no fake is called"):
        install.install(patch, "flash")


def test_both_flash_attn_packages_can_be_installed_at_once() -> None:
    with pytest.MonkeyPatch.context() as patch:
        install.install(patch, "flash_attn_2")
        install.install(patch, "flash_attn_4")
        package = importlib.import_module("flash_attn")
        assert callable(package.flash_attn_func) and callable(package.cute.flash_attn_func)
