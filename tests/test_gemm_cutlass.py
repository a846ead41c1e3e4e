"""The GEMM backend `cutlass` without a GPU: its adapter over a stand-in of the C interface, its build, its sources."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_accel import explain, grouped_gemm, warmup
from vllm_accel.backends.gemm import cutlass as adapter
from vllm_accel.backends.gemm.cutlass import BACKEND
from vllm_accel.dispatch.backend import MoeArgs
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.kernels.cutlass import build, library
from vllm_accel.ops.gemm_arguments import spec_of
from vllm_accel.ops.moe_arguments import MoeOptions, describe_moe
from vllm_accel.testing import GEMM_CASES, GemmCase, moe_oracle
from vllm_accel.testing.conformance_gemm import check_gemm_backend
from vllm_accel.testing.tolerance import assert_close

SOURCES = Path(build.__file__).parent
BYTES = 16


class Stand:
    """What a library does with `VllmAccelGroupedGemm` (kernels/cutlass/setup.cuh), on the CPU and from addresses alone.

    Conventions as CUTLASS has them: rows of a and out are contiguous, b is contiguous along K or N by the variant
    (include/cutlass/layout/matrix.h), addresses and strides are multiples of 16 bytes (the alignments in the sources),
    factors run along K first (include/cutlass/detail/blockwise_scale_layout.hpp with Major::K).
    """

    def __init__(self, variant: build.Variant) -> None:
        self.variant = variant

    def __call__(
        self, a: Tensor, b: Tensor, out: Tensor, offs: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, sms: int
    ) -> None:
        call: Any = library.describe(a, b, out, offs, a_scale, b_scale, sms)
        element = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}[self.variant.element]
        result = torch.bfloat16 if self.variant.element == "e4m3" else element
        step = 128 if self.variant.element == "e4m3" else BYTES // element.itemsize
        assert sms > 0 and call.k % step == 0 and call.n % step == 0
        for stride, size in (
            (call.a_stride, element),
            (call.b_stride, element),
            (call.b_group, element),
            (call.out_stride, result),
        ):
            assert stride * size.itemsize % BYTES == 0
        assert call.a % BYTES == 0 and call.b % BYTES == 0 and call.out % BYTES == 0
        rows, k, n, groups = call.rows, call.k, call.n, call.groups
        a = _at(call.a, element, (rows, k), (call.a_stride, 1))
        inner = (1, call.b_stride) if self.variant.along_k else (call.b_stride, 1)
        b = _at(call.b, element, (groups, k, n), (call.b_group, *inner))
        out = _at(call.out, result, (rows, n), (call.out_stride, 1))
        wide_a, wide_b = a.float(), b.float()
        if self.variant.element == "e4m3":
            of_a = _at(call.a_scale, torch.float32, (rows, k // 128), (k // 128, 1))
            of_b = _at(call.b_scale, torch.float32, (groups, n // 128, k // 128), (n * k // 128**2, k // 128, 1))
            wide_a = wide_a * of_a.repeat_interleave(128, 1)
            wide_b = wide_b * of_b.mT.repeat_interleave(128, 1).repeat_interleave(128, 2)
        ends = _at(call.offs, torch.int32, (groups,), (1,)).clamp(0, rows).cummax(0).values.tolist()
        out.zero_()
        for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            out[start:end] = wide_a[start:end] @ wide_b[group]


def _at(address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    numbers = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (numbers * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let every kernel count as built, and `load` give the stand-in of the variant that the file is named after."""
    monkeypatch.setattr(build, "path_of", lambda variant: tmp_path / f"{variant}.so")
    found = {}
    for arch in ("sm_80", "sm_90"):
        for variant in build.variants(arch):
            found[tmp_path / f"{variant}.so"] = variant
            (tmp_path / f"{variant}.so").touch()
    monkeypatch.setattr(adapter, "load", lambda path: Stand(found[path]))
    return tmp_path


def takes(case: GemmCase, gpu: str) -> bool:
    """Tell what the backend is made for: tokens by expert, 16-bit, or e4m3 by blocks on Hopper."""
    if not case.grouped or case.form != "rows" or case.wide or "batch_invariant" in case.options:
        return False
    return case.scaling is None or (gpu == "h200" and case.scaling == ("1x128", "128x128"))


@pytest.mark.parametrize("gpu", ["a100", "h200"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_conformance_cases(built: Path, gpu: str, dtype: torch.dtype) -> None:
    ran = 0
    for case in GEMM_CASES:
        outcome = check_gemm_backend(BACKEND, case, dtype=dtype, device=PRESETS[gpu])
        fp8_result = case.scaling is not None and dtype is not torch.bfloat16
        assert outcome.ran == (takes(case, gpu) and not fp8_result), (case.name, outcome)
        ran += outcome.ran
    assert ran > 10


def every_case() -> None:
    for case in GEMM_CASES:
        check_gemm_backend(BACKEND, case, device=PRESETS["h200"])


@pytest.mark.parametrize("name", ["padded", "row_major", "column_major", "add_group_bias"])
def test_every_conversion_is_needed(built: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Without one of them, some case fails."""
    harmless = {"padded": lambda t, rows, columns: t, "add_group_bias": lambda out, args: out}
    monkeypatch.setattr(adapter, name, harmless.get(name, lambda t: t))
    with pytest.raises(AssertionError):
        every_case()


def test_factors_of_b_are_turned(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in GEMM_CASES if case.name == "fp8_rows_block")
    monkeypatch.setattr(Tensor, "transpose", lambda t, *dims: t)
    with pytest.raises((AssertionError, RuntimeError)):
        check_gemm_backend(BACKEND, case, device=PRESETS["h200"])


def test_a_layer_runs_on_two_products(built: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(s, generator=g).bfloat16() * 0.3 for s in ((9, 32), (4, 32, 48), (4, 24, 32)))
    ids = torch.randint(4, (9, 2), generator=g)
    weights = torch.rand(9, 2, generator=g)
    described = describe_moe(x, up, down, MoeArgs(weights, ids), MoeOptions(), False)
    spec = spec_of(described.kind)
    device = PRESETS["a100"]
    assert BACKEND.capability.unsupported_reasons(spec, device) == ()
    made = BACKEND.bind(spec, device).forward(x, up, down, MoeArgs(weights, ids))
    given = {"w_gate_up": up, "w_down": down, "topk_weights": weights, "topk_ids": ids}
    want, plain = (moe_oracle(x, **given, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    assert_close(made, want, plain, what="layer")


def test_the_struct_is_that_of_the_sources() -> None:
    body = re.search(r"struct VllmAccelGroupedGemm \{(.*?)\};", (SOURCES / "setup.cuh").read_text(), re.DOTALL)
    assert body
    kinds = {
        "void const*": ctypes.c_void_p,
        "void*": ctypes.c_void_p,
        "int64_t": ctypes.c_int64,
        "int32_t": ctypes.c_int32,
    }
    declared = []
    for kind, names in re.findall(r"(void const\*|void\*|int64_t|int32_t) ([\w, ]+);", body[1]):
        declared += [(name, kinds[kind]) for name in names.split(", ")]
    assert declared == library._Call._fields_


def test_it_is_refused_until_warmup_has_built_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is compiled inside a call, and automatic choice never waits for a build."""
    monkeypatch.setattr(build, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(build, "problems", lambda: ())
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a compiler was started"))
    a, b = (
        torch.empty(64, 32, dtype=torch.bfloat16, device="meta"),
        torch.empty(4, 32, 48, dtype=torch.bfloat16, device="meta"),
    )
    offs = torch.empty(4, dtype=torch.int32, device="meta")
    found = explain(grouped_gemm, a, b, offs, device="h100")["cutlass"]
    assert [reason.code for reason in found.reasons] == ["not_built"] and "warmup" in found.reasons[0].text


def test_warmup_builds_what_a_call_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_accel.ops import warmup as ops_warmup

    wanted: list[str] = []
    monkeypatch.setattr(type(BACKEND), "build", lambda self, spec, device: wanted.append(spec.form.name))
    shown = explain
    a, b = (
        torch.empty(64, 32, dtype=torch.bfloat16, device="meta"),
        torch.empty(4, 32, 48, dtype=torch.bfloat16, device="meta"),
    )
    offs = torch.empty(4, dtype=torch.int32, device="meta")
    monkeypatch.setattr(build, "problems", lambda: ())
    selection = shown(grouped_gemm, a, b, offs, device="h100")
    assert ops_warmup._build(selection) == ("cutlass",) and wanted == ["GROUPED_M"]
    assert warmup is ops_warmup.warmup


# --- the toolchain ----------------------------------------------------------------------------------------------------


def fake_nvcc(directory: Path, release: str, body: str = "") -> str:
    path = directory / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}"; exit; fi\n{body}\n'
    )
    path.chmod(0o755)
    return str(directory)


def fake_headers(directory: Path, version: tuple[int, int, int]) -> str:
    folder = directory / "include" / "cutlass"
    folder.mkdir(parents=True, exist_ok=True)
    names = zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
    (folder / "version.h").write_text("".join(f"#define CUTLASS_{name} {number}\n" for name, number in names))
    return str(directory)


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give a compiler that writes a file, headers, and an empty cache."""
    script = 'while [ "$1" != -o ]; do shift; done; echo built > "$2"'
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path / "cuda", "13.0, V13.0.48", script))
    monkeypatch.setenv("CUTLASS_PATH", fake_headers(tmp_path / "cutlass", (4, 2, 0)))
    monkeypatch.setattr(build, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for cached in (build._release, build._version, build._key):
        cached.cache_clear()
    return tmp_path


def test_a_complete_toolchain_has_no_problem(toolchain: Path) -> None:
    assert build.problems() == () and BACKEND.unavailable_reason() is None and BACKEND.version() == "4.2.0"


def test_what_is_missing_is_named(toolchain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(toolchain / "old", "11.8, V11.8.89"))
    monkeypatch.setenv("CUTLASS_PATH", fake_headers(toolchain / "older", (3, 5, 1)))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    texts = build.problems()
    assert len(texts) == 3
    assert "11.8" in texts[0] and "C++ compiler" in texts[1] and "3.5.1" in texts[2] and "nvidia-cutlass" in texts[2]


def test_without_the_headers_it_is_absent_and_without_a_compiler_broken(
    toolchain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = BACKEND.unavailable_reason()
    assert missing is not None and missing.code == "toolchain" and "no C++ compiler" in missing.text
    monkeypatch.setattr(build, "headers", lambda: None)
    missing = BACKEND.unavailable_reason()
    assert missing is not None and missing.code == "not_installed" and "headers of CUTLASS" in missing.text


def test_a_build_is_kept_and_keyed_by_the_toolchain(toolchain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = build.variants("sm_90")[:2]
    assert build.build(wanted) == {}
    paths = [build.path_of(one) for one in wanted]
    assert all(path.read_text() == "built\n" for path in paths)
    assert sorted(path.name for path in (toolchain / "cache").iterdir()) == sorted(path.name for path in paths)
    monkeypatch.setattr(build, "_build", lambda one: pytest.fail("built twice"))
    assert build.build(wanted) == {}
    monkeypatch.setenv("CUTLASS_PATH", fake_headers(toolchain / "newer", (4, 3, 0)))
    assert build.path_of(wanted[0]) != paths[0] and not build.path_of(wanted[0]).exists()


def test_a_failed_build_leaves_its_message_and_no_file(toolchain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "CUDA_HOME", fake_nvcc(toolchain / "bad", "13.0", "echo 'error: no such instruction' >&2; exit 1")
    )
    wanted = build.variants("sm_80")[0]
    assert "no such instruction" in build.build([wanted])[wanted]
    assert list((toolchain / "cache").iterdir()) == []


# --- the sources ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(bool(build.problems()), reason="; ".join(build.problems()))
@pytest.mark.parametrize("variant", [build.variants("sm_80")[0], *build.variants("sm_90")[1::7]], ids=str)
def test_the_sources_compile(variant: build.Variant, tmp_path: Path) -> None:
    """With nvcc for sm_80 and sm_90a, and the library exports its two functions; 25 to 100 CPU seconds each."""
    target = tmp_path / "made.so"
    done = subprocess.run(build.command(variant, target), capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    made = ctypes.CDLL(str(target))
    made.vllm_accel_workspace.restype = ctypes.c_int64
    assert made.vllm_accel_grouped_gemm and made.vllm_accel_workspace(8, 132) > 0
