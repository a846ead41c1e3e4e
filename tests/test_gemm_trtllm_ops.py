"""Dense e4m3 products through ``torch.ops.trtllm`` over a stand-in with the schema and conventions of its sources."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from fakes import trtllm_ops as fake
from vllm_accel.backends import library
from vllm_accel.backends.gemm import tensorrt_llm, trtllm_ops
from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.device import PRESETS, Device
from vllm_accel.dispatch.gemm_spec import Form, GemmSizes, GemmSpec, Scaling
from vllm_accel.dispatch.spec import Feature
from vllm_accel.errors import BackendUnavailableError, Reason
from vllm_accel.testing import GEMM_CASES, GemmCase, check_gemm_backend

BACKEND = tensorrt_llm.BACKEND
BLOCKS = ("1x128", "128x128")
DEVICES: dict[int, Device] = {
    89: PRESETS["rtx4090"], 90: PRESETS["h200"], 100: PRESETS["b200"],
    103: replace(PRESETS["b200"], compute_capability=(10, 3), arch="sm_103"),
}  # fmt: skip
CASES = (
    GemmCase("whole", "nothing to fill up", m=64, n=256, k=384, scaling=BLOCKS),
    GemmCase("odd", "M off 4, N and K off 16 and 128", m=70, n=150, k=300, scaling=BLOCKS),
    GemmCase("one_row", "decoding", m=1, n=128, k=256, scaling=BLOCKS),
    GemmCase("one_block", "factors with a dimension of 1", m=20, n=60, k=100, scaling=BLOCKS),
    GemmCase("slice", "a off 16 bytes and not dense", m=32, n=128, k=256, scaling=BLOCKS, layout_a="slice"),
    GemmCase("columns", "a by columns", m=32, n=128, k=256, scaling=BLOCKS, layout_a="column"),
    GemmCase("square", "as many rows as blocks of K: (M, K / 128) or its transpose", m=4, n=128, k=512, scaling=BLOCKS),
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without FlashInfer and TensorRT-LLM, whatever is installed here."""
    find = tensorrt_llm.importlib.util.find_spec
    absent = ("flashinfer", "tensorrt_llm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in absent else find(name, *more))
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", None)
    library.forget()
    yield
    library.forget()


def check(case: GemmCase, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "ARCH", arch)
    outcome = check_gemm_backend(BACKEND, case, dtype=torch.bfloat16, device=DEVICES[arch])
    assert outcome.ran, (case.name, outcome.reasons)


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("name", ["fp8_block_scaling_gemm", "fp8_block_scaling_gemm_impl"])
def test_every_case_is_right(name: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake.registered(name):
        for case in CASES:
            check(case, arch, monkeypatch)


def test_every_other_case_is_refused() -> None:
    with fake.registered():
        for case in GEMM_CASES:
            for device in (*DEVICES.values(), PRESETS["a100"], PRESETS["mi300x"]):
                assert not check_gemm_backend(BACKEND, case, dtype=torch.bfloat16, device=device).ran, case.name


def test_the_dispatch_to_deep_gemm_reads_the_same_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "DEEP_GEMM", True)
    with fake.registered():
        for case in CASES:
            check(case, 90, monkeypatch)


def test_factors_may_have_any_strides() -> None:
    inputs = CASES[1].make(torch.bfloat16)
    args = GemmArgs(scale_a=inputs.kwargs["scale_a"], scale_b=inputs.kwargs["scale_b"])
    with fake.registered():
        kernel = BACKEND.bind(SPEC, DEVICES[90])
        want = kernel.forward(inputs.a, inputs.b, args)
        wide = torch.full((2, 2 * max(args.scale_a.shape), 9), float("nan"))
        spread = [
            t[::2, 1 : 1 + s.shape[1]][: s.shape[0]].copy_(s)
            for t, s in zip(wide, (args.scale_a, args.scale_b), strict=True)
        ]
        assert torch.equal(kernel.forward(inputs.a, inputs.b, GemmArgs(scale_a=spread[0], scale_b=spread[1])), want)


MUTATIONS: dict[str, tuple[str, Any, str, int]] = {
    "no padding": ("padded", lambda t, rows, columns: t, "odd", 90),
    "rows not filled up": ("_ROWS", 1, "one_row", 90),
    "operands as they come": ("_dense", lambda t: t, "columns", 89),
    "strides looked at, not addresses": ("_dense", lambda t: t if t.stride(-1) == 1 else t.contiguous(), "slice", 90),
    "factors by rows": ("_factors", lambda s: torch.nn.functional.pad(s, (0, 0, 0, -s.shape[0] % 4)), "whole", 90),
    "factors by rows on sm_100": ("_factors", lambda s: s.contiguous(), "whole", 100),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_conversion_is_noticed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attribute, broken, name, arch = MUTATIONS[mutation]
    case = next(case for case in CASES if case.name == name)
    with fake.registered():
        check(case, arch, monkeypatch)
        monkeypatch.setattr(trtllm_ops, attribute, broken)
        with pytest.raises((AssertionError, RuntimeError)):
            check(case, arch, monkeypatch)


@pytest.mark.parametrize(("arch", "flat", "deep_gemm"), [(90, False, True), (100, True, False)])
def test_the_shape_of_factors_matters(arch: int, flat: bool, deep_gemm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix on sm_90 could be read as either order where it is square; sm_100 refuses one dimension."""
    monkeypatch.setattr(fake, "ARCH", arch)
    monkeypatch.setattr(fake, "DEEP_GEMM", deep_gemm)
    made = trtllm_ops.TrtllmProduct.__init__

    def other(self: Any, call: Any, device: Device) -> None:
        made(self, call, device)
        self._flat = flat

    monkeypatch.setattr(trtllm_ops.TrtllmProduct, "__init__", other)
    with fake.registered(), pytest.raises((AssertionError, RuntimeError)):
        check(CASES[-1], arch, monkeypatch)


SPEC = GemmSpec(
    Form.DENSE, torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16, 64, 256, 384, 0,
    scaling_a=Scaling.BLOCK_1x128, scaling_b=Scaling.BLOCK_128x128,
)  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], Device, str]] = {
    "bias": ({"features": Feature.BIAS}, DEVICES[90], "adds no bias"),
    "deterministic": ({"features": Feature.DETERMINISTIC}, DEVICES[90], "promises no fixed bits"),
    "fp16 result": ({"out_dtype": torch.float16}, DEVICES[90], "does not give float16"),
    "e5m2": ({"dtype": torch.float8_e5m2, "b_dtype": torch.float8_e5m2}, DEVICES[90], "e4m3"),
    "bf16": (
        {"dtype": torch.bfloat16, "b_dtype": torch.bfloat16, "scaling_a": Scaling.NONE, "scaling_b": Scaling.NONE},
        DEVICES[90], "multiplies e4m3 with factors",
    ),
    "rows": ({"scaling_a": Scaling.ROW, "scaling_b": Scaling.ROW}, DEVICES[90], "scaling row x row"),
    "groups": ({"form": Form.GROUPED_M, "groups": 4}, DEVICES[90], "rows in groups"),
    "sm_120": ({}, replace(PRESETS["b200"], compute_capability=(12, 0), arch="sm_120"), "powers of two on sm_120"),
    "sm_80": ({}, PRESETS["a100"], "sm_80"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_refuses_says_why(what: str) -> None:
    changes, device, said = REFUSED[what]
    with fake.registered():
        assert BACKEND.capability.unsupported_reasons(SPEC, DEVICES[90]) == ()
        reasons = BACKEND.capability.unsupported_reasons(replace(SPEC, **changes), device)
    assert any(said in reason.text for reason in reasons), reasons


def test_layers_stay_in_16_bits() -> None:
    layer = replace(SPEC, form=Form.MOE, scaling_a=Scaling.NONE, scaling_b=Scaling.NONE, groups=4, activation="silu")
    for changes in ({}, {"dtype": torch.float16, "b_dtype": torch.float16}):
        reasons = BACKEND.capability.unsupported_reasons(replace(layer, **changes), DEVICES[90])
        assert [reason.code for reason in reasons] == ["kinds"], reasons


def test_large_matrices_are_refused() -> None:
    sizes = _sizes(64, 256, 384)
    assert BACKEND.capability.guard_reasons(SPEC, sizes) == ()
    (reason,) = BACKEND.capability.guard_reasons(SPEC, sizes._replace(m=2**20, n=2**11))
    assert reason.code == "sizes" and "2147483648" in reason.text


def _sizes(m: int, n: int, k: int, a: tuple[int, int] | None = None, b: tuple[int, int] | None = None) -> GemmSizes:
    return GemmSizes(m, n, k, 0, (m, k), a or (k, 1), (k, n), b or (1, k))


def test_what_it_copies_is_said() -> None:
    def said(sizes: GemmSizes) -> tuple[str, ...]:
        return BACKEND.capability.exact_remarks(SPEC, sizes, DEVICES[90])

    assert said(_sizes(64, 256, 384)) == ()
    assert "copies a, 0.0234 MiB" in said(_sizes(64, 256, 384, a=(400, 1)))[0]
    assert "copies b" in said(_sizes(64, 256, 384, b=(256, 1)))[0]
    assert said(_sizes(65, 250, 384)) == (
        "pads K 384 and N 250 to multiples of 128, copying; pads M 65 to a multiple of 4, copying a",
    )


OTHER = {
    "optional factors": "(Tensor mat1, Tensor mat2, Tensor? mat1Scale, Tensor? mat2Scale) -> Tensor",
    "one more argument": "(Tensor mat1, Tensor mat2, Tensor alpha, Tensor mat1Scale, Tensor mat2Scale) -> Tensor",
    "a default": "(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, SymInt tune_max_num_tokens=4096) -> Tensor",
    "another order": "(Tensor mat1, Tensor mat2, Tensor mat2Scale, Tensor mat1Scale) -> Tensor",
}


@pytest.mark.parametrize("what", OTHER)
def test_another_schema_is_not_called(what: str) -> None:
    with fake.registered(schema=OTHER[what]):
        reason = BACKEND.unavailable_reason()
        assert reason is not None and reason.code == "schema" and OTHER[what][:20] in reason.text
        with pytest.raises(BackendUnavailableError):
            BACKEND.bind(SPEC, DEVICES[90])
    with fake.registered("fp8_block_scaling_gemm_impl"), fake.registered(schema=OTHER[what]):
        assert BACKEND.unavailable_reason() is None  # the one behind it is called


def test_an_absent_operator_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = BACKEND.unavailable_reason()
    assert reason is not None and reason.code == "not_installed"
    assert "FlashInfer" in reason.text and "TensorRT-LLM is not installed" in reason.text
    assert BACKEND.capability.unsupported_reasons(SPEC, DEVICES[90]) == (), "what it declares needs nothing installed"

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: object())
    found = trtllm_ops.operator()
    assert isinstance(found, Reason) and found.code == "not_imported" and "import tensorrt_llm first" in found.text
    assert "tensorrt_llm" not in sys.modules

    monkeypatch.setitem(sys.modules, "tensorrt_llm", ModuleType("tensorrt_llm"))
    found = trtllm_ops.operator()
    assert isinstance(found, Reason) and found.code == "missing_function"


def test_one_half_does_not_stand_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = replace(SPEC, form=Form.MOE, dtype=torch.bfloat16, b_dtype=torch.bfloat16, activation="silu",
                    scaling_a=Scaling.NONE, scaling_b=Scaling.NONE, groups=4)  # fmt: skip
    assert BACKEND.capability.unsupported_reasons(layer, DEVICES[90]) == ()
    with fake.registered():
        assert BACKEND.unavailable_reason() is None
        (reason,) = BACKEND.capability.unsupported_reasons(layer, DEVICES[90])
        assert reason.code == "library" and "FlashInfer" in reason.text

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: object() if name == "flashinfer" else None)
    (reason,) = BACKEND.capability.unsupported_reasons(SPEC, DEVICES[90])
    assert reason.code == "library" and "torch.ops.trtllm" in reason.text


def test_the_version_is_that_of_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorrt_llm")
    module.__dict__["__version__"] = "1.2.3"
    monkeypatch.setitem(sys.modules, "tensorrt_llm", module)
    monkeypatch.setattr(tensorrt_llm, "installed_version", lambda library: None)
    assert BACKEND.version() == "1.2.3"
