"""Where the FlashAttention adapters say no: GPUs, CUDA versions, builds, sizes, and every state of an installation."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from fakes import install
from flash_attn_adapters import ADAPTERS, EVERY_CASE, one_thread
from vllm_accel import Device, attention, explain
from vllm_accel.backends import flash_attn_2, flash_attn_3, flash_attn_4, library
from vllm_accel.dispatch.backend import Backend
from vllm_accel.dispatch.device import KIB, PRESETS
from vllm_accel.dispatch.selector import Question, walk
from vllm_accel.dispatch.spec import PLAIN, AttentionSpec, Feature, Relation
from vllm_accel.ops.arguments import AttentionSizes
from vllm_accel.testing import check_backend

BACKENDS: dict[str, Backend] = {b.name: b for b in (flash_attn_2.BACKEND, flash_attn_3.BACKEND, flash_attn_4.BACKEND)}
MODULES = ("flash_attn", "flash_attn_3", "flash_attn_interface", "flash_attn_config")
G, D, C = Feature.GRAD, Feature.DROPOUT, Feature.SOFTCAP


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for path in [path for path in sys.modules if path.split(".")[0] in MODULES]:
        monkeypatch.delitem(sys.modules, path)
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    library.forget()
    with one_thread():
        yield
    library.forget()


def put(monkeypatch: pytest.MonkeyPatch, fake: str) -> None:
    """Install a fake where nothing was."""
    for name in MODULES:
        if sys.modules.get(name, name) is None:
            monkeypatch.delitem(sys.modules, name)
    install.install(monkeypatch, fake)
    library.forget()


def spec(features: Feature = PLAIN, dim: int = 64, dim_v: int = 0, **changes: Any) -> AttentionSpec:
    base = AttentionSpec(
        torch.bfloat16, torch.bfloat16, 8, 8, dim, dim_v or dim, 4, 1024, 1024, Relation.EQUAL, features
    )
    return dataclasses.replace(base, **changes)


def codes(backend: Backend, device: Device | str, *args: Any, **kwargs: Any) -> list[str]:
    on = PRESETS[device] if isinstance(device, str) else device
    return [reason.code for reason in backend.capability.unsupported_reasons(spec(*args, **kwargs), on)]


def gpu(cc: tuple[int, int], cuda: tuple[int, int] = (12, 8), kib: int = 99) -> Device:
    return dataclasses.replace(
        PRESETS["rtx4090"], name="", compute_capability=cc, arch=f"sm_{cc[0]}{cc[1]}", runtime_version=cuda,
        shared_memory_per_block=kib * KIB,
    )  # fmt: skip


RUNS = {
    "flash_attn_2": {"a100", "rtx3080", "rtx3090", "rtx4080", "rtx4090", "h100", "h200", "b200"},
    "flash_attn_3": {"h100", "h200"},
    "flash_attn_4": {"h100", "h200", "b200"},
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_gpus(name: str, preset: str) -> None:
    refused = codes(BACKENDS[name], preset)
    assert (not refused) == (preset in RUNS[name])
    assert set(refused) <= {"platform", "compute_capability"}


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("flash_attn_2", gpu((8, 7)), []),
        ("flash_attn_2", gpu((12, 0)), []),
        ("flash_attn_2", gpu((12, 1)), ["compute_capability"]),  # newer than the list: no hope
        ("flash_attn_2", gpu((8, 0), (11, 7)), ["cuda_version"]),
        ("flash_attn_2", gpu((8, 0), (11, 8)), []),
        ("flash_attn_2", gpu((10, 0), (12, 6)), ["cuda_version"]),
        ("flash_attn_3", gpu((9, 0), (12, 1)), ["cuda_version"]),
        ("flash_attn_3", gpu((12, 0)), ["compute_capability"]),
        ("flash_attn_4", gpu((12, 0)), ["compute_capability"]),
    ],
)
def test_exact_lists(name: str, device: Device, expected: list[str]) -> None:
    assert codes(BACKENDS[name], device) == expected


@pytest.mark.parametrize(
    ("name", "device", "features", "dims", "expected"),
    [
        ("flash_attn_2", "a100", D | C, (64,), ["dropout_softcap"]),
        ("flash_attn_2", "rtx4090", D | G, (256,), ["dropout_backward"]),
        ("flash_attn_2", "rtx4090", D, (256,), []),
        ("flash_attn_2", "rtx4090", D | G, (192,), []),
        ("flash_attn_2", "rtx4090", D | G | Feature.LSE_GRAD, (192,), ["dropout_backward"]),  # one column more
        ("flash_attn_2", "rtx4090", D | G, (128, 200), ["dropout_backward"]),
        ("flash_attn_2", "a100", D | G, (256,), []),
        ("flash_attn_2", "a100", G | Feature.LSE_GRAD, (256,), ["dlse_column"]),
        ("flash_attn_2", "a100", G | Feature.LSE_GRAD, (256, 255), []),
        ("flash_attn_3", "h100", G | Feature.LSE_GRAD, (256,), ["dlse_column"]),
        ("flash_attn_3", "h100", D, (64,), ["feature:dropout"]),
        ("flash_attn_3", "h100", Feature.ALIBI, (64,), ["feature:alibi"]),
        ("flash_attn_3", "h100", Feature.DETERMINISTIC, (64,), []),
        ("flash_attn_3", "h100", Feature.DETERMINISTIC | G, (64,), ["deterministic_backward"]),
        ("flash_attn_4", "h100", G | Feature.LSE_GRAD | C, (256,), []),
        ("flash_attn_4", "b200", G | C, (256,), ["blackwell_256"]),
        ("flash_attn_4", "b200", G | Feature.WINDOW_LEFT, (160,), ["blackwell_256"]),  # padded to 256
        ("flash_attn_4", "b200", C | Feature.WINDOW_LEFT, (256,), []),
        ("flash_attn_4", "b200", G | Feature.LSE_GRAD, (192, 128), []),
        ("flash_attn_4", "h100", D, (64,), ["feature:dropout"]),
        ("flash_attn_2", "a100", Feature.PAGED, (64,), []),
        ("flash_attn_2", "a100", Feature.PAGED, (64, 48), ["paged_head_dim"]),
        ("flash_attn_3", "h100", Feature.PAGED, (64,), ["finite_tail"]),
        ("flash_attn_4", "h100", Feature.PAGED, (64,), ["finite_tail"]),
        ("flash_attn_4", "h100", Feature.PAGED | Feature.FINITE_TAIL, (256,), []),
        ("flash_attn_4", "b200", Feature.PAGED | Feature.FINITE_TAIL, (136,), ["paged_blackwell"]),
    ],
)
def test_combinations(name: str, device: str, features: Feature, dims: tuple[int, ...], expected: list[str]) -> None:
    assert codes(BACKENDS[name], device, features, *dims) == expected


@pytest.mark.parametrize("name", BACKENDS)
def test_grids(name: str) -> None:
    capability = BACKENDS[name].capability
    assert [r.code for r in capability.guard_reasons(spec(), AttentionSizes(65536, 1, 8))] == ["grid_batch"]
    assert not capability.guard_reasons(spec(), AttentionSizes(65535, 1, 8))
    assert codes(BACKENDS[name], "h100", num_heads=65536, num_kv_heads=65536) == ["grid_heads"]


def test_flash_attn_4_waits_for_a_warm_up() -> None:
    q = torch.empty(1, 512, 8, 64, dtype=torch.bfloat16, device="meta")
    held = explain(attention, q, q, q, device="b200")["flash_attn_4"]
    assert [reason.code for reason in held.reasons] == ["first_call"]


def test_flash_attn_3_is_not_imported_for_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trap:
        def find_spec(self, name: str, *_: Any) -> None:
            assert not name.startswith("flash_attn"), f"{name} is imported"

    for name in MODULES:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Trap(), *sys.meta_path])
    for device in (gpu((12, 0)), gpu((8, 9)), PRESETS["b200"]):
        question = Question("attention", spec(Feature.GRAD), device, asked=("flash_attn_3",))
        (verdict,) = walk(question, everything=False)
        assert [reason.code for reason in verdict.candidate.reasons] == ["compute_capability"]


@pytest.mark.parametrize("name", BACKENDS)
def test_absent(name: str) -> None:
    reason = BACKENDS[name].unavailable_reason()
    assert reason is not None and reason.code == "not_installed"
    assert "is not installed" in reason.text


def test_with_flash_attn_4_alone_flash_attn_2_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "flash_attn_4")
    assert flash_attn_4.BACKEND.unavailable_reason() is None
    assert flash_attn_4.BACKEND.version() == "4.0.0b36"
    reason = flash_attn_2.BACKEND.unavailable_reason()
    assert reason is not None and reason.code == "not_installed"
    assert "flash_attn is only an empty namespace here" in reason.text
    assert flash_attn_2.BACKEND.version() is None


def test_both_flash_attn_packages_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "flash_attn_2")
    put(monkeypatch, "flash_attn_4")
    assert flash_attn_2.BACKEND.unavailable_reason() is None and flash_attn_2.BACKEND.version() == "2.8.3"
    assert flash_attn_4.BACKEND.unavailable_reason() is None and flash_attn_4.BACKEND.version() == "4.0.0b36"


def test_the_placeholder_of_flash_attn_3(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn_interface", "flash_attn_config"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    reason = flash_attn_3.BACKEND.unavailable_reason()
    assert reason is not None and reason.code == "placeholder"
    assert "a placeholder" in reason.text
    assert codes(flash_attn_3.BACKEND, "h100") == []


def test_flash_attn_3_inside_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "flash_attn_3")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    library.forget()
    assert flash_attn_3.BACKEND.unavailable_reason() is None
    assert flash_attn_3.BACKEND.version() == "3.0.0"


def _form_of_2_6(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
):  # fmt: skip
    raise AssertionError("must not be called")


@pytest.mark.parametrize(
    ("fake", "path", "function", "version", "code"),
    [
        ("flash_attn_2", "flash_attn.flash_attn_interface", "_flash_attn_forward", "2.6.3", "missing_parameter"),
        ("flash_attn_2", "flash_attn", None, "2.6.3", "version"),
        ("flash_attn_2", "flash_attn", None, "3.1.0", "version"),
        ("flash_attn_4", "flash_attn.cute.interface", "_flash_attn_bwd", None, "missing_parameter"),
    ],
)
def test_other_releases(
    monkeypatch: pytest.MonkeyPatch, fake: str, path: str, function: str | None, version: str | None, code: str
) -> None:
    put(monkeypatch, fake)
    if function:
        monkeypatch.setattr(sys.modules[path], function, _form_of_2_6)
    if version:
        monkeypatch.setattr(sys.modules["flash_attn"], "__version__", version)
    library.forget()
    reason = BACKENDS[fake].unavailable_reason()
    assert reason is not None and reason.code == code
    assert version is None or version in reason.text


def test_an_old_beta_of_flash_attn_4(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "flash_attn_4")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0b12")
    library.forget()
    reason = flash_attn_4.BACKEND.unavailable_reason()
    assert reason is not None and reason.code == "version" and "4.0.0b12" in reason.text


def test_flash_attn_2_before_2_7_3_has_no_code_for_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.__dict__["__version__"] = "2.7.2.post1"
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert codes(flash_attn_2.BACKEND, "b200") == ["cuda_version"]
    assert codes(flash_attn_2.BACKEND, "h100") == []
    module.__dict__["__version__"] = "2.7.4.post1"
    assert codes(flash_attn_2.BACKEND, "b200") == []


BUILDS = [
    ("BACKWARD", G, 64, "FLASHATTENTION_DISABLE_BACKWARD"),
    ("LOCAL", Feature.WINDOW_LEFT, 64, "FLASHATTENTION_DISABLE_LOCAL"),
    ("SOFTCAP", C, 64, "FLASHATTENTION_DISABLE_SOFTCAP"),
    ("VARLEN", Feature.VARLEN, 64, "FLASHATTENTION_DISABLE_VARLEN"),
    ("HDIM256", Feature(0), 200, "head sizes up to 192; this call has 200"),
    ("HDIM64", Feature(0), 64, None),  # a larger kernel does it
    ("SPLIT", G | C, 64, None),
]


@pytest.mark.parametrize(("flag", "features", "dim", "text"), BUILDS)
def test_what_a_build_of_flash_attn_3_left_out(
    monkeypatch: pytest.MonkeyPatch, flag: str, features: Feature, dim: int, text: str | None
) -> None:
    module = ModuleType("flash_attn_config")
    flags = {f"FLASHATTENTION_DISABLE_{name}": name == flag for name in ("BACKWARD", "HDIM64", "FP16", flag)}
    module.__dict__["CONFIG"] = {"build_flags": flags}
    monkeypatch.setitem(sys.modules, "flash_attn_config", module)
    reasons = flash_attn_3.BACKEND.capability.unsupported_reasons(spec(features, dim), PRESETS["h100"])
    assert [reason.code for reason in reasons] == (["build_flags"] if text else [])
    assert text is None or text in reasons[0].text


def test_a_build_of_flash_attn_3_without_the_mla_kernel_gets_equal_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn_config")
    module.__dict__["CONFIG"] = {"build_flags": {"FLASHATTENTION_DISABLE_HDIMDIFF192": True}}
    monkeypatch.setitem(sys.modules, "flash_attn_config", module)
    adapter = ADAPTERS["fa3"]
    with adapter.installed(monkeypatch):
        kernel = flash_attn_3.BACKEND.bind(spec(dim=192, dim_v=128), adapter.device)
        assert flash_attn_3._kernel_dims(192, 128, kernel._mla) == (192, 192)
        case = EVERY_CASE["mla_prefill"]
        assert check_backend(adapter.backend, case, dtype=torch.bfloat16, device=adapter.device).ran
