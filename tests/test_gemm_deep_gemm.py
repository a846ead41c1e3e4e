"""DeepGEMM's adapter over a stand-in with the conventions of 2.8.0."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from fakes import deep_gemm as fake
from vllm_accel.backends import library
from vllm_accel.backends.gemm import deep_gemm
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.errors import Reason
from vllm_accel.ops.gemm_arguments import GemmOptions, describe, spec_of
from vllm_accel.testing import GEMM_CASES, GemmCase, check_gemm_backend
from vllm_accel.testing.conformance_gemm import gemm_kernel_call

H200 = PRESETS["h200"]
RUNS = {case.name for case in GEMM_CASES if case.grouped and case.form == "rows" and not (
    case.scaling or case.wide or case.options
)} | {"fp8_block", "fp8_rows_block"}  # fmt: skip
#: Beside the kit's: groups larger than the alignment, and rows of many groups.
LARGE = (
    GemmCase("long", "", groups=(150, 0, 300, 128, 1), k=200, n=72, tail=3, bias=True),
    GemmCase("long_fp8", "", groups=(150, 0, 300, 128), k=300, n=200, scaling=("1x128", "128x128"), tail=3),
    GemmCase("many", "more groups than rows", groups=(1, 0, 0, 2, 0, 0, 0, 1, 0), k=64),
    GemmCase("one_block", "factors with a dimension of 1", groups=(20, 9), k=100, n=60, scaling=("1x128", "128x128")),
)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("deep_gemm")
    module.__dict__.update({name: value for name, value in vars(fake).items() if not name.startswith("__")})
    module.__version__ = fake.__version__
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    library.forget()
    yield module
    library.forget()


def test_every_case_is_right_or_refused() -> None:
    for case in (*GEMM_CASES, *LARGE):
        outcome = check_gemm_backend(deep_gemm.BACKEND, case, dtype=torch.bfloat16, device=H200)
        assert outcome.ran is (case.name in RUNS or case in LARGE), (case.name, outcome.reasons)


@pytest.mark.parametrize("device", ["b200", "a100", "mi300x"])
def test_elsewhere_it_says_why_not(device: str) -> None:
    groups, blocks = (_spec(next(c for c in GEMM_CASES if c.name == name)) for name in ("rows", "fp8_block"))
    of_groups, of_blocks = (
        deep_gemm.BACKEND.capability.unsupported_reasons(s, PRESETS[device]) for s in (groups, blocks)
    )
    if device == "b200":
        assert not of_groups and "powers of two on sm_100" in of_blocks[0].text
    else:
        assert of_groups and of_blocks


def _spec(case: GemmCase) -> Any:
    from vllm_accel.ops import gemm as gemm_ops

    inputs = case.make(torch.bfloat16)
    more = {"out_dtype": None} if not case.scaling else {}
    given: dict[str, Any] = {"bias": None, "deterministic": False, "batch_invariant": False, "offs": None, **more}
    args, options = gemm_ops.arguments(a=inputs.a, b=inputs.b, **{**given, **inputs.kwargs})
    return spec_of(describe(inputs.a, inputs.b, args, options, False).kind)


def test_lying_ends_stay_within_the_rows() -> None:
    case = next(c for c in GEMM_CASES if c.name == "rows_long")
    inputs = case.make(torch.bfloat16)
    inputs.kwargs["offs"] = torch.tensor([150, 100, 9999, -3], dtype=torch.int32)
    out = gemm_kernel_call(deep_gemm.BACKEND, H200, case)(inputs.a, inputs.b, **inputs.kwargs)
    want = torch.cat([inputs.a[:150] @ inputs.b[0], inputs.a[150:] @ inputs.b[2]])
    assert (out - want).abs().max() < 0.1


def test_another_alignment_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "ALIGNMENT", 256)
    for case in LARGE:
        assert check_gemm_backend(deep_gemm.BACKEND, case, dtype=torch.bfloat16, device=H200).ran


def test_the_layout_has_room_for_any_sizes() -> None:
    for ends in ([0, 0, 300], [1, 2, 3], [128, 256, 300], [127, 129, 300], [300, 300, 300], [0, 0, 0]):
        room = deep_gemm.laid_out(torch.tensor(ends, dtype=torch.int32), 300, 128)
        assert room.group.shape[0] % 128 == 0 and room.source.shape == room.group.shape
        counts = torch.bincount(room.group[room.group >= 0].long(), minlength=3)
        assert counts.tolist() == [ends[0], ends[1] - ends[0], ends[2] - ends[1]]
        rows = torch.arange(ends[2])
        assert torch.equal(room.source[room.place[: ends[2]]], rows)


def strided_factors() -> None:
    """Factors of b that are columns of a wider tensor, and ones with a dimension of 1 whose stride means nothing."""
    for n in (200, 100):
        case = GemmCase("strided", "", groups=(20, 9), k=300, n=n, scaling=("1x128", "128x128"))
        inputs = case.make(torch.bfloat16)
        call = gemm_kernel_call(deep_gemm.BACKEND, H200, case)
        want = call(inputs.a, inputs.b, **inputs.kwargs)
        factors = inputs.kwargs["scale_b"]
        wide = torch.full((*factors.shape[:2], 5), float("nan"))
        inputs.kwargs["scale_b"] = wide[..., : factors.shape[2]].copy_(factors)
        assert torch.equal(call(inputs.a, inputs.b, **inputs.kwargs), want)


def test_factors_may_have_any_strides() -> None:
    strided_factors()


MUTATIONS: dict[str, tuple[str, Any]] = {
    "no padding": ("padded", lambda t, rows, columns: t),
    "factors as they come": ("_turned", lambda factors: factors),
    "factors only turned": ("_turned", lambda factors: factors.mT),
    "rows as they come": ("_chosen", lambda t, index: t),
    "rows past the end left": ("zero_past_end", lambda out, args: out),
    "no bias": ("add_group_bias", lambda out, args: out),
    "no strides": ("row_major", lambda t: t),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_conversion_is_noticed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = GemmCase("fp8_block_slice", "", scaling=("1x128", "128x128"), k=256, n=128, layout_a="slice")
    assert check_gemm_backend(deep_gemm.BACKEND, slices, device=H200).ran
    name, broken = MUTATIONS[mutation]
    monkeypatch.setattr(deep_gemm, name, broken)
    cases = (*(c for c in GEMM_CASES if c.name in RUNS), *LARGE, slices)
    checks = [lambda c=case: check_gemm_backend(deep_gemm.BACKEND, c, device=H200) for case in cases]  # type: ignore[misc]
    noticed = 0
    for check in (*checks, strided_factors):
        try:
            check()
        except Exception:  # a wrong number, or what the stand-in refuses
            noticed += 1
    assert noticed


def test_it_is_there_at_versions_that_are_known(installed: ModuleType) -> None:
    assert deep_gemm.BACKEND.unavailable_reason() is None and deep_gemm.BACKEND.version() == "2.8.0"
    installed.__version__ = "3.0.0"
    library.forget()
    reason = deep_gemm.BACKEND.unavailable_reason()
    assert isinstance(reason, Reason) and reason.code == "version"
    del installed.fp8_gemm_nt
    library.forget()
    reason = deep_gemm.BACKEND.unavailable_reason()
    assert reason is not None and reason.code == "missing_function"


def test_without_nvcc_nothing_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(deep_gemm.shutil, "which", lambda name: None)
    reason = deep_gemm.BACKEND.unavailable_reason()
    assert reason is not None and reason.code == "no_compiler"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert deep_gemm.BACKEND.unavailable_reason() is None


def test_what_it_costs_is_said() -> None:
    case = next(c for c in GEMM_CASES if c.name == "rows_odd")
    inputs = case.make(torch.bfloat16)
    args = deep_gemm.GemmArgs(inputs.kwargs["offs"])
    described = describe(inputs.a, inputs.b, args, GemmOptions(deep_gemm.Form.GROUPED_M), False)
    (said,) = deep_gemm.BACKEND.capability.exact_remarks(spec_of(described.kind), described.sizes, H200)
    assert "pads K 37 to a multiple of 128" in said and "start at multiples of 128" in said
