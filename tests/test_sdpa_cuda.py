"""The adapters over PyTorch's CUDA kernels, over their fakes: every case is right or refused, nothing is dropped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_adapters import one_thread
from torch_adapters import ADAPTERS, BF16, EVERY_CASE, FP16, FP32, Adapter, answer, check_dropout, qkv
from vllm_accel.backends import aten, sdpa_cudnn
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.testing import Case, attention_oracle, check_backend, kernel_call
from vllm_accel.testing.oracle import plain_attention
from vllm_accel.testing.tolerance import assert_close, assert_grad_close, assert_lse_close

TORCH = ("flash", "efficient", "cudnn")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(params=TORCH)
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Adapter]:
    chosen = ADAPTERS[request.param]
    with chosen.installed(monkeypatch):
        yield chosen


@pytest.fixture
def efficient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Adapter]:
    with ADAPTERS["efficient"].installed(monkeypatch):
        yield ADAPTERS["efficient"]


@pytest.mark.parametrize("case", EVERY_CASE.values(), ids=lambda case: case.name)
def test_right_or_refused(adapter: Adapter, case: Case) -> None:
    outcome = check_backend(adapter.backend, case, dtype=adapter.dtype, device=adapter.device)
    assert outcome.ran == (case.name not in adapter.refused), outcome.reasons
    assert outcome.ran or all(reason.code and reason.text for reason in outcome.reasons)


@pytest.mark.parametrize("name", ["causal_longer", "gqa", "value_dim", "head_33", "varlen_tail", "varlen_sinks"])
@pytest.mark.parametrize("key", ["flash", "efficient"])
def test_right_in_fp16(key: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[key]
    with adapter.installed(monkeypatch):
        assert check_backend(adapter.backend, EVERY_CASE[name], dtype=FP16, device=adapter.device, seed=1).ran


@pytest.mark.parametrize("name", ["gqa", "head_33", "bias_heads", "mask_keys", "window_square", "varlen_cross_causal"])
@pytest.mark.parametrize("preset", ["v100", "h100"])
def test_efficient_is_right_in_fp32(efficient: Adapter, name: str, preset: str) -> None:
    assert check_backend(efficient.backend, EVERY_CASE[name], dtype=FP32, device=PRESETS[preset]).ran


@pytest.mark.parametrize("shared", ["heads", "batch"])
def test_efficient_copies_keys_that_share_memory(efficient: Adapter, shared: str) -> None:
    """pytorch#191937, reproduced on an H200 (benchmarks.known_bad): expanded keys and a mask are silently wrong."""
    call = kernel_call(efficient.backend, efficient.device)
    q = torch.randn(2, 33, 4, 32, generator=torch.Generator().manual_seed(0)).to(BF16)
    shape = (2, 33, 1, 32) if shared == "heads" else (1, 33, 4, 32)
    k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(BF16).expand(q.shape) for i in (1, 2))
    mask = torch.ones(1, 1, 33, 33, dtype=torch.bool).tril()
    want, _ = attention_oracle(q, k, v, attn_bias=mask)
    plain, _ = plain_attention(q, k, v, attn_bias=mask)
    assert_close(call(q, k, v, attn_bias=mask), want, plain, what="out")


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window_left": {"causal": True, "window_size": (2, -1)},
    "window": {"window_size": (2, 2)},
    "softmax_scale": {"softmax_scale": 0.5},
    "softcap": {"softcap": 0.7},
    "dropout_p": {"dropout_p": 0.5},
    "alibi_slopes": {"alibi_slopes": torch.tensor([0.5, 1.0, 0.2, 0.1])},
    "attn_bias": {"attn_bias": torch.linspace(-2, 2, 24)},
    "mask": {"attn_bias": torch.arange(24)[:, None] >= torch.arange(24)},
    "sinks": {"sinks": torch.ones(4)},
    "q_descale": {"q_descale": torch.tensor(0.5)},
    "k_descale": {"k_descale": torch.tensor(0.5)},
    "v_descale": {"v_descale": torch.tensor(0.5)},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("key", ADAPTERS)
def test_no_option_is_dropped(key: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[key]
    with adapter.installed(monkeypatch):
        call = kernel_call(adapter.backend, adapter.device)
        q, k, v = qkv(adapter.dtype)
        out, reasons = answer(call, q, k, v, **OPTIONS[option])
        if out is None:
            assert reasons[adapter.name]
            return
        without = call(q, k, v, causal=option == "window_left")
        assert (out.float() - without.float()).abs().max() > 0.02


@pytest.mark.parametrize("key", ["flash", "efficient"])
def test_dropout_keeps_what_it_says_and_its_backward_agrees(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ADAPTERS[key].installed(monkeypatch):
        check_dropout(ADAPTERS[key])


def _hidden_masks() -> dict[str, tuple[Tensor, dict[str, Any]]]:
    rows = torch.ones(2, 4, 24, 24, dtype=torch.bool)
    rows[0, 1, 5:9] = False
    first = torch.ones(2, 1, 1, 24, dtype=torch.bool)
    first[1, ..., :10] = False
    return {
        "rows": (rows, {}),
        "all keys of one sequence": (torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 1, 24), {}),
        "padding on the left, causal": (first, {"causal": True}),
        "padding on the left, a window": (first, {"causal": True, "window_size": (3, -1)}),
        "rows, causal": (rows.clone(), {"causal": True}),
        "rows, a window": (rows.clone(), {"causal": True, "window_size": (4, -1)}),
        "additive": (torch.where(rows, 0.5, -math.inf).to(BF16), {}),
    }


@pytest.mark.parametrize("name", _hidden_masks())
def test_rows_that_a_bias_hides(efficient: Adapter, name: str) -> None:
    bias, options = _hidden_masks()[name]
    q, k, v = (t.requires_grad_() for t in qkv())
    want, want_lse = attention_oracle(q, k, v, attn_bias=bias, **options)
    plain, _ = plain_attention(q, k, v, attn_bias=bias, **options)
    out, lse = kernel_call(efficient.backend, efficient.device)(q, k, v, attn_bias=bias, return_lse=True, **options)
    assert_close(out, want, plain, what="out")
    assert_lse_close(lse, want_lse, dtype=BF16)
    assert (lse == -math.inf).any(), "the case has rows without keys"
    grads = [torch.autograd.grad(x.double().square().sum(), (q, k, v)) for x in (out, want, plain)]
    for got, right, near in zip(*grads, strict=True):
        assert_grad_close(got, right, near, what="gradient", scale=float(grads[1][0].abs().max()))


def test_cudnn_hides_rows_of_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, options = _hidden_masks()["rows"]
    with ADAPTERS["cudnn"].installed(monkeypatch):
        q, k, v = qkv()
        out, lse = kernel_call(sdpa_cudnn.BACKEND, PRESETS["h100"])(q, k, v, attn_bias=mask, return_lse=True, **options)
    want, want_lse = attention_oracle(q, k, v, attn_bias=mask)
    assert_close(out, want, plain_attention(q, k, v, attn_bias=mask)[0], what="out")
    assert_lse_close(lse, want_lse, dtype=BF16)


def test_an_fp32_bias_is_not_rounded(efficient: Adapter) -> None:
    q, k, v = qkv()
    bias = (torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(2)) + 40).requires_grad_()
    want, _ = attention_oracle(q, k, v, attn_bias=bias)
    plain, _ = plain_attention(q, k, v, attn_bias=bias)
    out = kernel_call(efficient.backend, efficient.device)(q, k, v, attn_bias=bias)
    assert_close(out, want, plain, what="out")
    got, right, near = (torch.autograd.grad(x.double().square().sum(), bias)[0] for x in (out, want, plain))
    assert got.dtype is torch.float32
    assert_grad_close(got, right, near, what="dbias")


def test_the_gradient_of_a_causal_bias_is_zero_above_the_diagonal(
    efficient: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real kernel skips tiles that the mask hides, and leaves their gradient as it was allocated."""
    real = torch.ops.aten._efficient_attention_backward

    def backward(**kwargs: Any) -> Any:
        *grads, dbias = real(**kwargs)
        return *grads, dbias.masked_fill(torch.ones(dbias.shape[-2:], dtype=torch.bool).triu(1), math.nan)

    backward.default = backward  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward", backward, raising=False)
    for name in ("bias_row", "bias_longer"):
        assert check_backend(efficient.backend, EVERY_CASE[name], dtype=BF16, device=efficient.device).ran


@pytest.mark.parametrize("key", ["flash", "efficient", "cudnn", "xformers_flash", "xformers_cutlass"])
def test_misaligned_rows_are_copied(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[key]
    with adapter.installed(monkeypatch):
        q, k, v = qkv(adapter.dtype)
        odd = torch.zeros(2, 24, 4, 33, dtype=adapter.dtype)[..., 1:].copy_(q)
        call = kernel_call(adapter.backend, adapter.device)
        assert torch.equal(call(odd, k, v), call(q, k, v))


def test_a_gradient_for_everyone_asked(adapter: Adapter) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    sinks = torch.zeros(4, requires_grad=True)
    out, lse = kernel_call(adapter.backend, adapter.device)(q, k, v, sinks=sinks, return_lse=True)
    for loss in (out.float().square().sum(), lse.sum()):
        grads = torch.autograd.grad(loss, (q, k, sinks), retain_graph=True)
        assert all(grad.abs().max() > 1e-3 for grad in grads)


@pytest.mark.parametrize("what", ["deterministic", "batch_invariant", "packed"])
def test_one_pass_over_the_keys(efficient: Adapter, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[Any] = []
    efficient.between(monkeypatch, lambda name, kwargs: splits.append(kwargs.get("num_splits_key")))
    q, k, v = (t.requires_grad_() for t in qkv())
    call = kernel_call(efficient.backend, efficient.device)
    call(q, k, v).sum().backward()
    assert splits[-1] is None
    if what == "packed":
        ends = torch.tensor([0, 10, 48], dtype=torch.int32)
        lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends.clone(), "max_seqlen_q": 38, "max_seqlen_k": 38}
        call(*(t.flatten(0, 1) for t in (q, k, v)), **lengths).sum().backward()
    else:
        call(q, k, v, **{what: True}).sum().backward()
    assert splits[-1] == 1


class _NoMetaKernel(TorchDispatchMode):
    """Stand in for the meta kernel of one operator, which in torch 2.13 has other parameters than the operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._efficient_attention_backward.default:
            query, key, value, bias = args[1:5]
            dbias = query.new_empty(() if bias is None else bias.shape)
            return *(torch.empty_like(t) for t in (query, key, value)), dbias
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", EVERY_CASE.values(), ids=lambda case: case.name)
@pytest.mark.parametrize("key", TORCH)
def test_calls_fit_the_operators_of_this_torch(key: str, case: Case) -> None:
    """Call the real operators on the meta device: names, types and numbers of arguments, forward and backward."""
    adapter = ADAPTERS[key]
    inputs = case.make(adapter.dtype, "meta")
    leaves = [t.detach().requires_grad_(case.grad) for t in (inputs.q, inputs.k, inputs.v)]
    call, with_lse = kernel_call(adapter.backend, adapter.device), case.lse_grad or not case.grad
    with _NoMetaKernel():
        got, reasons = answer(call, *leaves, return_lse=with_lse, **inputs.options)
        if got is None:
            assert case.name in adapter.refused and reasons
            return
        outs = got if with_lse else (got,)
        assert outs[0].shape == (*inputs.q.shape[:-1], inputs.v.shape[-1])
        assert not with_lse or outs[1].shape == (*inputs.q.shape[:-3], inputs.q.shape[-2], inputs.q.shape[-3])
        if case.grad:
            grads = torch.autograd.grad(outs, leaves, [torch.empty_like(t) for t in outs])
            assert [g.shape for g in grads] == [t.shape for t in leaves]


def _refusals(key: str, device: Any, dtype: torch.dtype = BF16, s: int = 24, **options: Any) -> list[str]:
    adapter = ADAPTERS[key]
    _, reasons = answer(kernel_call(adapter.backend, device), *qkv(dtype, s), **options)
    return [reason.code for reason in reasons.get(adapter.name, ())]


@pytest.mark.parametrize(
    ("key", "preset", "dtype", "codes"),
    [
        ("flash", "t4", FP16, ["compute_capability"]),
        ("flash", "h100", FP32, ["dtype"]),
        ("efficient", "t4", BF16, ["bfloat16"]),
        ("efficient", "v100", FP16, []),
        ("efficient", "mi300x", FP16, ["platform"]),
        ("cudnn", "v100", FP16, ["compute_capability"]),
        ("cudnn", "cpu", FP16, ["platform"]),
        ("xformers_flash", "b200", BF16, ["compute_capability"]),
        ("xformers_cutlass", "v100", BF16, ["bfloat16"]),
    ],
)
def test_devices(key: str, preset: str, dtype: torch.dtype, codes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with ADAPTERS[key].installed(monkeypatch):
        assert _refusals(key, PRESETS[preset], dtype) == codes


@pytest.mark.parametrize(
    ("preset", "built", "refused"),
    [
        ("v100", ("sm_75", "sm_80", "sm_90", "compute_90"), True),
        ("v100", ("sm_60", "sm_70"), False),
        ("rtx4090", ("sm_80", "sm_90a"), False),
        ("b200", ("sm_80", "sm_90", "compute_90"), False),
        ("b200", ("sm_80", "sm_90"), True),
        ("t4", ("sm_70",), False),
        ("h100", (), False),
    ],
)
def test_a_gpu_that_this_torch_was_not_built_for(preset: str, built: tuple[str, ...], refused: bool) -> None:
    device = dataclasses.replace(PRESETS[preset], torch_arch_list=built)
    assert bool(aten.CARRIED.check(None, device)) is refused


def test_amd_takes_what_scaled_dot_product_attention_asks_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mi300x = PRESETS["mi300x"]
    with ADAPTERS["flash"].installed(monkeypatch):
        assert _refusals("flash", mi300x, causal=True) == []
        assert _refusals("flash", mi300x, window_size=(3, 3)) == ["rocm"]
        assert _refusals("flash", mi300x, s=1, causal=True) == []
        assert check_backend(ADAPTERS["flash"].backend, EVERY_CASE["gqa"], dtype=BF16, device=mi300x).reasons
        assert _refusals("flash", mi300x, return_lse=True) == ["rocm"]
        assert _refusals("flash", dataclasses.replace(mi300x, arch="gfx1100")) == ["arch"]
        seen: list[dict[str, Any]] = []
        ADAPTERS["flash"].between(monkeypatch, lambda _, kwargs: seen.append(dict(kwargs)))
        q, k, v = (t.requires_grad_() for t in qkv())
        kernel_call(ADAPTERS["flash"].backend, mi300x)(q, k, v, causal=True).sum().backward()
    assert seen[1]["window_size_left"] is None, "any number selects a windowed kernel there"
    assert seen[1]["rng_state"].dtype is torch.int64


@pytest.mark.parametrize(("head_dim", "given"), [(192, 192), (200, 232), (232, 232), (256, 256)])
def test_head_sizes_that_small_chips_cannot_train(head_dim: int, given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, sizes = ADAPTERS["flash"], []
    with adapter.installed(monkeypatch):
        adapter.between(monkeypatch, lambda name, kwargs: sizes.append(kwargs["query"].shape[-1]))
        q, k, v = (torch.randn(1, 9, 2, head_dim).to(BF16).requires_grad_() for _ in range(3))
        kernel_call(adapter.backend, PRESETS["rtx4090"])(q, k, v).sum().backward()
        assert sizes == [head_dim, given]
        _, reasons = answer(kernel_call(adapter.backend, PRESETS["rtx4090"]), q, k, v, dropout_p=0.1)
        assert bool(reasons) is (head_dim > 192)


def test_sizes_beyond_a_grid_and_beyond_32_bits() -> None:
    def codes(adapter: str, q: tuple[int, ...], k: tuple[int, ...], **options: Any) -> list[str]:
        tensors = [torch.empty(shape, dtype=BF16, device="meta") for shape in (q, k, k)]
        backend = ADAPTERS[adapter].backend
        _, reasons = answer(kernel_call(backend, PRESETS["h100"]), *tensors, **options)
        return [reason.code for reason in reasons.get(backend.name, ())]

    many, heads, long = (65536, 2, 1, 8), (1, 2, 65536, 8), (1, 2**18, 64, 128)
    for key in TORCH:
        assert codes(key, many, many) == ["grid_batch"]
        assert codes(key, heads, heads) == ["grid_heads"]
    assert codes("efficient", long, long) == ["strides"]
    bias = torch.empty(1, 1, 1, 1, device="meta", dtype=BF16)
    assert codes("efficient", (1, 4, 2, 8), (1, 6, 2, 8), attn_bias=bias) == ["bias_rows"]


def test_cudnn_knows_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = PRESETS["h100"]
    with ADAPTERS["cudnn"].installed(monkeypatch):
        for version, s, codes in ((91400, 24, ["multiple_of_128"]), (91400, 128, []), (91900, 24, []), (None, 24, [])):
            monkeypatch.setattr(sdpa_cudnn, "cudnn_version", lambda version=version: version)
            assert _refusals("cudnn", h100, s=s) == codes


def test_operators_of_other_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {
        "_flash_attention_forward": frozenset({"query", "window_size_left"}),
        "_flash_attention_backward": frozenset({"philox_seed", "philox_offset"}),
    }
    with ADAPTERS["flash"].installed(monkeypatch):
        monkeypatch.setattr(aten, "parameters", old.__getitem__)
        assert _refusals("flash", PRESETS["h100"], dropout_p=0.5) == ["dropout_schema"]
        assert _refusals("flash", PRESETS["h100"]) == []
        monkeypatch.setattr(sdpa_cudnn.torch, "__version__", "2.8.0+cu128")
        assert sdpa_cudnn.stats_rank() == 3
