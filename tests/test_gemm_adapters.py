"""The adapters over PyTorch's GPU products: the kit over stand-ins that refuse what the real ones refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fakes import aten_gemm
from vllm_accel.backends.gemm import cublas, reference, torch_grouped
from vllm_accel.dispatch.device import Device, preset
from vllm_accel.testing import GEMM_CASES, GemmCase, check_gemm_backend, gemm_kernel_call

NAMES = ("_scaled_mm", "_grouped_mm", "_scaled_grouped_mm", "_int_mm", "mm", "bmm")
BACKENDS = {"cublas": cublas.BACKEND, "torch_grouped": torch_grouped.BACKEND}


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setattr(torch, name, getattr(aten_gemm, name))
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", aten_gemm.scaled_mm)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _device(name: str) -> Device:
    return replace(preset(name), runtime_version=(12, 9))


def _refused(name: str, case: GemmCase, device: str, dtype: torch.dtype) -> bool:
    """Say what the documentation of each adapter says."""
    if "batch_invariant" in case.options:
        return True
    blocks = case.scaling is not None and any(scaling.endswith("128") for scaling in case.scaling)
    if name == "cublas":
        return blocks and device != "h100"
    if case.scaling is not None:
        grouped = case.grouped and device in ("h100", "b200") and dtype is torch.bfloat16
        e4m3 = case.formats == ("e4m3", "e4m3")
        return not (grouped and e4m3 and case.scaling == ("row", "row") and not case.wide)
    return not case.grouped or case.wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["h100", "b200", "a100", "t4"])
@pytest.mark.parametrize("name", BACKENDS)
def test_right_or_refused(name: str, device: str, dtype: torch.dtype) -> None:
    for case in GEMM_CASES:
        outcome = check_gemm_backend(BACKENDS[name], case, dtype=dtype, device=_device(device))
        assert outcome.ran is not _refused(name, case, device, dtype), (case.name, outcome.reasons)


def test_the_reference_masks_on_a_gpu() -> None:
    for case in GEMM_CASES:
        assert check_gemm_backend(reference.BACKEND, case, dtype=torch.float32, device=_device("v100")).ran


def test_ends_that_go_down_are_put_in_order() -> None:
    case = next(case for case in GEMM_CASES if case.name == "rows_long")
    inputs = case.make(torch.bfloat16)
    inputs.kwargs["offs"] = torch.tensor([150, 100, 9999, -3], dtype=torch.int32)
    out = gemm_kernel_call(torch_grouped.BACKEND, _device("h100"), case)(inputs.a, inputs.b, **inputs.kwargs)
    want = torch.cat([inputs.a[:150] @ inputs.b[0], inputs.a[150:] @ inputs.b[2]])
    assert (out - want).abs().max() < 0.1


#: Conversions of the adapters, by what breaks them; some case has to notice each.
MUTATIONS = {
    "no padding of FP8": (cublas, "padded", lambda t, rows, columns: t),
    "rows left as they are": (torch_grouped, "row_major", lambda t: t),
    "columns left as they are": (cublas, "column_major", lambda t: t),
    "rows past the end left unwritten": (torch_grouped, "zero_past_end", lambda out, args: out),
    "no bias": (torch_grouped, "add_group_bias", lambda out, args: out),
    "empty groups left unwritten": (torch_grouped, "_zero_empty", lambda out, offs: out),
    "factors of blocks untransposed": (cublas, "_block_factors", lambda scale, scaling, rows: scale),
    "factors not spread": (cublas, "spread", lambda scale, scaling, shape, of_a: torch.ones(1, 1)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_conversion_is_noticed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, broken = MUTATIONS[mutation]
    monkeypatch.setattr(module, name, broken)
    noticed = 0
    for case in GEMM_CASES:
        try:
            check_gemm_backend(module.BACKEND, case, dtype=torch.bfloat16, device=_device("h100"))
        except Exception:  # a wrong number, or what the stand-in refuses
            noticed += 1
    assert noticed


def test_results_are_cleared_by_our_kernel_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with Triton no mask runs over the result; what the kernel is told to clear is what has to be."""
    cleared = []

    def clear(out: torch.Tensor, offs: torch.Tensor | None) -> bool:
        assert offs is not None and offs.dtype is torch.int32 and out.is_contiguous()
        cleared.append(out.dim())
        if out.dim() == 2:
            out[int(offs[-1]) :] = 0
        else:
            out[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = 0
        return True

    monkeypatch.setattr(torch_grouped, "clearing", lambda device: clear)
    monkeypatch.setattr(torch_grouped, "zero_past_end", lambda out, args: pytest.fail("a mask over the result"))
    monkeypatch.setattr(torch_grouped, "_zero_empty", lambda out, offs: pytest.fail("a mask over the result"))
    for case in GEMM_CASES:
        check_gemm_backend(torch_grouped.BACKEND, case, dtype=torch.bfloat16, device=_device("h100"))
    assert {2, 3} == set(cleared)


def test_the_clearing_kernel_gives_way(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    launched: list[object] = []
    capturing, fails = True, False

    class Bound:
        def __init__(self, launch: object) -> None:
            if fails:
                raise RuntimeError("no compiler")
            launched.append(launch)

        def __call__(self, tensors: object) -> None:
            launched.append(tensors)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr("vllm_accel.kernels.triton.launch.Bound", Bound)
    clear, out, offs = torch_grouped._Clear(), torch.zeros(4, 6), torch.tensor([2], dtype=torch.int32)
    assert not clear(out, offs) and not launched, "compiled during a capture"
    capturing = False
    assert clear(out, offs) and clear(out, offs) and len(launched) == 3
    capturing = True
    assert clear(out, offs), "compiled before"
    capturing, fails = False, True
    with caplog.at_level("WARNING", "vllm_accel"):
        assert not clear(torch.zeros(5, 6), offs) and not clear(torch.zeros(5, 6), offs)
    assert len(caplog.records) == 1 and "no compiler" in caplog.text
    assert not torch_grouped.clearing(_device("cpu"))(out, offs)
