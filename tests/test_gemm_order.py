"""What automatic choice takes first for each product on GPUs that are not here, with everything installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_accel import explain, fused_moe, gemm, grouped_gemm, scaled_gemm
from vllm_accel.dispatch import warm
from vllm_accel.dispatch.device import preset
from vllm_accel.dispatch.selection import Selection, State
from vllm_accel.dispatch.selector import Question, select

T, K, N, E = 4096, 1024, 2048, 8
E4M3 = torch.float8_e4m3fn
FACTORS = {"tensor": ((1,), (E,)), "row": ((T,), (E, N)), "1x128": ((T, K // 128), (E, K // 128, N)),
           "128x128": ((T // 128, K // 128), (E, K // 128, N // 128))}  # fmt: skip


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def asked(what: str, dtype: torch.dtype, device: str) -> Selection:
    """Explain one product: a form and, for quantised ones, two scalings."""
    form, *scalings = what.split()
    a, b, offs = _meta(T, K, dtype=dtype), _meta(E, N, K, dtype=dtype).mT, _meta(E, dtype=torch.int32)
    dense = form == "dense"
    if scalings:
        factors: list[Any] = [_meta(*FACTORS[scaling][i]) for i, scaling in enumerate(scalings)]
        if dense:
            factors[1] = factors[1][0] if factors[1].dim() > 1 else factors[1][:1]
        given = (a, b[0] if dense else b, factors[0], scalings[0], factors[1], scalings[1])
        return explain(scaled_gemm, *given, offs=None if dense else offs, device=device)
    if form == "layer":
        up, down = _meta(E, 2 * N, K, dtype=dtype).mT, _meta(E, K, N, dtype=dtype).mT
        return explain(fused_moe, a, up, down, _meta(T, 2), _meta(T, 2, dtype=torch.int32), device=device)
    if dense:
        return explain(gemm, a, b[0], device=device)
    if form == "batch":
        return explain(grouped_gemm, _meta(E, T, K, dtype=dtype), b, device=device)
    return explain(
        grouped_gemm, *((a, b) if form == "rows" else (a.t(), _meta(T, N, dtype=dtype))), offs, device=device
    )


FLOATS = ("dense", "batch", "rows", "depth", "layer")
DENSE_QUANTISED = ("dense tensor tensor", "dense row row", "dense 1x128 128x128")
GROUPS_QUANTISED = ("rows tensor tensor", "rows row row", "rows 1x128 128x128")
EVERYTHING = [
    *((what, dtype) for what in FLOATS for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    *((what, dtype) for what in (*DENSE_QUANTISED, *GROUPS_QUANTISED) for dtype in (E4M3, torch.int8)),
]
PRESETS = ("h200", "h100", "b200", "a100", "rtx3090", "rtx4090", "mi300x")


@pytest.mark.parametrize("device", PRESETS)
def test_groups_and_blocks_take_our_kernel_and_the_rest_cublas(device: str) -> None:
    """Nothing that Triton or cuBLAS can run falls to the reference, which multiplies all rows once for every group."""
    for what, dtype in EVERYTHING:
        plain = what.split()[0] in ("dense", "batch") and "128" not in what
        assert asked(what, dtype, device).chosen == ("cublas" if plain else "triton"), (what, dtype)


@pytest.mark.parametrize("device", ["t4", "v100"])
def test_before_ampere_groups_are_masked(device: str) -> None:
    """There every kernel for groups reads the ends on the host, which is not done unasked."""
    for what, dtype in EVERYTHING:
        if dtype is torch.int8 and device == "v100":
            continue
        selection = asked(what, dtype, device)
        plain = what.split()[0] in ("dense", "batch") and "128" not in what
        assert selection.chosen == ("cublas" if plain else "reference"), (what, dtype)
        able = [c.name for c in selection.candidates if c.state in (State.ABLE, State.HELD_BACK)]
        assert plain or "128" in what or "cublas" in able, (what, dtype)


def test_on_a_cpu() -> None:
    for what, dtype in EVERYTHING:
        wanted = "reference" if dtype is torch.int8 and "128" in what else "cpu"
        assert asked(what, dtype, "cpu").chosen == wanted, (what, dtype)


def test_the_next_in_line() -> None:
    """Without Triton, groups go to PyTorch's kernels where those leave the host alone."""
    shown = asked("rows", torch.bfloat16, "h200")
    names = [c.name for c in shown.candidates if c.state in (State.CHOSEN, State.ABLE)]
    assert names == ["triton", "torch_grouped", "reference"]
    assert any("before torch_grouped" in note for note in shown["triton"].notes)
    assert not any("before torch_grouped" in note for note in asked("rows", torch.bfloat16, "a100")["triton"].notes)


@pytest.mark.parametrize(("device", "said"), [("h200", False), ("rtx4090", False), ("a100", True), ("mi300x", True)])
def test_fp8_is_said_to_be_widened_where_it_is(device: str, said: bool) -> None:
    notes = asked("rows row row", E4M3, device)["triton"].notes
    assert any("widens FP8 to fp16" in note for note in notes) is said
    assert not any("widens" in note for note in asked("rows row row", torch.int8, device)["triton"].notes)


def test_what_compiles_has_to_have_run_before_a_graph_is_captured() -> None:
    spec, device = asked("rows", torch.bfloat16, "h200").spec, preset("h200")
    question = Question("gemm", spec, device, capturing=True, assume_available=True)
    before = select(question)
    assert before.chosen == "torch_grouped" and "run the call once before" in before["triton"].why
    warm.note_run("gemm", "triton", spec, device)
    try:
        assert select(question).chosen == "triton"
    finally:
        warm._ran.clear()
