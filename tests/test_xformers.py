"""xFormers and MSLK over their fake: cases, mutations, and the ways in which an installed library is not usable."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from flash_attn_adapters import one_thread
from test_sdpa_cuda_mutations import Mutation, attribute, first_of_group, interleaved, no_dlse, no_sinks, passes, same
from torch_adapters import ADAPTERS, BF16, EVERY_CASE, FP16, FP32, MSLK, Adapter, qkv
from vllm_accel.backends import library
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.testing import Case, check_backend, kernel_call

KEYS = ("xformers_flash", "xformers_cutlass")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(params=KEYS)
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Adapter]:
    chosen = ADAPTERS[request.param]
    with chosen.installed(monkeypatch):
        yield chosen


@pytest.mark.parametrize("case", EVERY_CASE.values(), ids=lambda case: case.name)
def test_right_or_refused(adapter: Adapter, case: Case) -> None:
    outcome = check_backend(adapter.backend, case, dtype=adapter.dtype, device=adapter.device)
    assert outcome.ran == (case.name not in adapter.refused), outcome.reasons
    assert outcome.ran or all(reason.code and reason.text for reason in outcome.reasons)


@pytest.mark.parametrize("name", ["gqa", "head_33", "mask_keys", "bias_forward", "varlen_cross_causal", "head_320"])
@pytest.mark.parametrize("preset", ["v100", "h100"])
def test_right_in_fp32(name: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS["xformers_cutlass"]
    with adapter.installed(monkeypatch) as source:
        monkeypatch.setattr(source, "COMPUTE_CAPABILITY", PRESETS[preset].compute_capability)
        assert check_backend(adapter.backend, EVERY_CASE[name], dtype=FP32, device=PRESETS[preset]).ran


@pytest.mark.parametrize("name", ["causal_shorter", "gqa", "window", "head_320", "bias_full", "varlen_cross_causal"])
def test_mslk_is_the_same_under_another_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with MSLK.installed(monkeypatch):
        assert check_backend(MSLK.backend, EVERY_CASE[name], dtype=BF16, device=MSLK.device).ran
        assert (MSLK.backend.name, MSLK.backend.version()) == ("mslk", "1.1.0")


def test_an_operator_is_chosen_and_no_length_read(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    adapter.between(monkeypatch, lambda name, kwargs: seen.append(kwargs))
    q, k, v = (t.flatten(0, 1).requires_grad_() for t in qkv(adapter.dtype))
    ends = torch.tensor([0, 10, 48], dtype=torch.int32)
    lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends.clone(), "max_seqlen_q": 38, "max_seqlen_k": 38}
    call = kernel_call(adapter.backend, adapter.device)
    out = call(q, k, v, causal=True, return_lse=True, **lengths)[0]
    out.sum().backward()
    with torch.no_grad():
        call(q, k, v, causal=True, **lengths)
    operators = [kwargs["op"].NAME for kwargs in seen]
    flash = adapter.device.compute_capability >= (8, 0)
    assert [name[:4] for name in operators] == (["fa2F", "fa2B", "fa2F"] if flash else ["cutl", "cutl", "cutl"])
    assert all(kwargs["attn_bias"].k_seqinfo.seqstart_py == [0] for kwargs in seen), (
        "a list would cost a synchronisation"
    )
    assert all(kwargs["p"] == 0.0 for kwargs in seen)


def mask(**changes: Any) -> Mutation:
    """Change fields of the mask object that the library is given."""

    def look(name: str, kwargs: dict[str, Any]) -> None:
        for field, value in changes.items():
            if hasattr(kwargs["attn_bias"], field):
                setattr(kwargs["attn_bias"], field, value(getattr(kwargs["attn_bias"], field)))

    return lambda adapter, monkeypatch: adapter.between(monkeypatch, look)


def masks_named(word: str, other: str) -> Mutation:
    """Build another mask than the adapter asks for."""
    real = importlib.import_module("vllm_accel.backends.fmha_launch")._Fmha.mask

    def build(self: Any, name: str, **fields: Any) -> Any:
        return real(self, name.replace(word, other), **fields)

    return attribute("fmha_launch._Fmha.mask", build)


FLASH, CUTLASS = KEYS[:1], KEYS[1:]
TABLE: tuple[tuple[tuple[str, ...], str, Mutation, str], ...] = (
    (KEYS, "the caller's scale is dropped", passes(scale=64**-0.5), "scale"),
    (KEYS, "the mask is dropped", passes(attn_bias=None), "causal"),
    (KEYS, "the mask is dropped in the backward", passes("backward", attn_bias=None), "causal"),
    (KEYS, "the window is one key short, packed", mask(_window_size=lambda w: w - 1), "varlen_window_square"),
    (FLASH, "the window is one key short", mask(_window_size=lambda w: w - 1), "window_square"),
    (FLASH, "a window's side is one key short", mask(window_left=lambda w: w - 1), "window"),
    (FLASH, "an open side is closed", mask(window_right=lambda w: 0), "window_left"),
    (FLASH, "keys of a group are not expanded back", attribute("fmha_launch.sum_groups", first_of_group), "gqa"),
    (FLASH, "heads share keys the other way", attribute("fmha_launch.expand_heads", interleaved), "gqa"),
    (FLASH, "+inf is kept", attribute("flash_kernel.empty_rows_to_minus_inf", same), "causal_longer"),
    (FLASH, "the sinks are not folded in", attribute("flash_kernel.fold_sinks", no_sinks), "sinks"),
    (FLASH, "the gradient of lse is dropped", attribute("flash_kernel.with_dlse_column", no_dlse), "plain"),
    (FLASH, "rows past the end are left", attribute("flash_kernel.clear_past_end", same), "varlen_tail"),
    (CUTLASS, "the diagonal starts top-left", masks_named("FromBottomRight", ""), "varlen_cross_causal"),
    (CUTLASS, "the diagonal of a bias is dropped", masks_named("LowerTriangularMaskWithTensorBias", "_Plain"),
     "bias_forward"),
    (CUTLASS, "heads share keys the other way", attribute("cutlass_kernel.expand_heads", interleaved), "gqa"),
    (CUTLASS, "the sinks are not folded in", attribute("cutlass_kernel.fold_sinks", no_sinks), "sinks"),
    (CUTLASS, "the gradient of lse is dropped", attribute("cutlass_kernel.with_dlse_column", no_dlse), "plain"),
    (CUTLASS, "rows past the end are left", attribute("cutlass_kernel.clear_past_end", same), "varlen_tail"),
)  # fmt: skip
PARAMETERS = [
    pytest.param(name, mutation, case, id=f"{name}-{what}") for names, what, mutation, case in TABLE for name in names
]


@pytest.mark.parametrize(("name", "mutation", "case"), PARAMETERS)
def test_a_case_notices(name: str, mutation: Mutation, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[name]
    with adapter.installed(monkeypatch):
        assert check_backend(adapter.backend, EVERY_CASE[case], dtype=adapter.dtype, device=adapter.device).ran
        mutation(adapter, monkeypatch)
        with pytest.raises((AssertionError, RuntimeError, KeyError, ValueError)):
            check_backend(adapter.backend, EVERY_CASE[case], dtype=adapter.dtype, device=adapter.device)


def test_without_flash_kernels_cutlass_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS["xformers_flash"]
    with adapter.installed(monkeypatch) as source:
        monkeypatch.setattr(source.flash.FwOp, "is_available", lambda: False, raising=False)
        for name in ("causal_shorter", "gqa", "varlen_cross_causal"):
            assert check_backend(adapter.backend, EVERY_CASE[name], dtype=BF16, device=adapter.device).ran
        with pytest.raises(RuntimeError, match="windows with causal=True only"):
            kernel_call(adapter.backend, adapter.device)(*qkv(), window_size=(3, 3))


@pytest.fixture
def forget() -> Iterator[None]:
    library.forget()
    yield
    library.forget()


@pytest.mark.parametrize("key", ["xformers", "mslk"])
@pytest.mark.usefixtures("forget")
def test_not_installed(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = importlib.import_module(f"vllm_accel.backends.{key}").BACKEND

    class Nowhere:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if name.partition(".")[0] == key:
                raise ModuleNotFoundError(f"No module named {name!r}", name=key)

    for name in [name for name in sys.modules if name.partition(".")[0] == key]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nowhere, *sys.meta_path])
    reason = backend.unavailable_reason()
    assert reason.code == "not_installed" and "pip install" in reason.text


def _broken(monkeypatch: pytest.MonkeyPatch, key: str, error: BaseException) -> Any:
    class Loader:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> None:
            if name.partition(".")[0] == key:
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == key]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Loader, *sys.meta_path])
    return importlib.import_module(f"vllm_accel.backends.{key}").BACKEND.unavailable_reason()


@pytest.mark.usefixtures("forget")
def test_flash_attn_4_alone_breaks_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "No module named 'flash_attn.flash_attn_interface'"
    error = ModuleNotFoundError(text, name="flash_attn.flash_attn_interface")
    reason = _broken(monkeypatch, "xformers", error)
    assert reason.code == "broken" and text in reason.text


@pytest.mark.usefixtures("forget")
def test_a_shared_object_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = _broken(monkeypatch, "mslk", OSError("libcudart.so.12: cannot open shared object file"))
    assert reason.code == "broken" and "libcudart.so.12" in reason.text


def test_an_extension_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, extension = ADAPTERS["xformers_flash"], ModuleType("xformers._cpp_lib")
    text = "xFormers can't load C++/CUDA extensions. xFormers was built for:\n  PyTorch 2.10.0+cu128 with CUDA 1208"
    vars(extension).update(_built_with_cuda=False, _cpp_library_load_exception=RuntimeError(text))
    with adapter.installed(monkeypatch):
        assert adapter.backend.unavailable_reason() is None
        monkeypatch.setitem(sys.modules, "xformers._cpp_lib", extension)
        reason = adapter.backend.unavailable_reason()
    assert reason.code == "broken" and "PyTorch 2.10.0+cu128" in reason.text


@pytest.mark.parametrize(
    ("name", "code"),
    [("memory_efficient_attention_backward", "missing_function"), ("cutlass", "missing_function")],
)
def test_a_release_without_a_function(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS["xformers_flash"]
    with adapter.installed(monkeypatch):
        monkeypatch.delattr(sys.modules["xformers.ops.fmha"], name)
        reason = adapter.backend.unavailable_reason()
    assert reason.code == code and name in reason.text and "0.0.35" in reason.text


def test_a_release_without_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS["xformers_flash"]
    with adapter.installed(monkeypatch):
        module = sys.modules["xformers.ops.fmha"]
        monkeypatch.setattr(module, "memory_efficient_attention_forward", lambda query, key, value, attn_bias, p: None)
        reason = adapter.backend.unavailable_reason()
    assert reason.code == "missing_parameter" and "scale, op" in reason.text


def test_an_operator_that_does_not_know_this_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS["xformers_flash"]
    with adapter.installed(monkeypatch) as source:
        monkeypatch.setattr(source.cutlass.FwOp, "is_available", lambda: False, raising=False)
        reason = adapter.backend.unavailable_reason()
    assert reason.code == "broken" and torch.__version__ in reason.text


def test_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS["xformers_flash"]
    with adapter.installed(monkeypatch):
        monkeypatch.setattr(sys.modules["xformers"], "__version__", "0.0.20")
        reason = adapter.backend.unavailable_reason()
    assert reason.code == "version" and "0.0.20" in reason.text


def test_old_cuda_is_refused() -> None:
    device = dataclasses.replace(PRESETS["v100"], runtime_version=(11, 1))
    with pytest.raises(RuntimeError, match=r"needs CUDA 11\.3"):
        kernel_call(ADAPTERS["xformers_flash"].backend, device)(*qkv(FP16))
