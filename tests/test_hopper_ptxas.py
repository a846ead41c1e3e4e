"""ptxas 12.8 writes wrong code for Hopper, and another one assembles our kernels there: what each makes of a PTX.

The two kernels here are those of the conformance cases `everything`, which gave an illegal memory access and wrong
numbers on an H200 (Triton 3.6.0, ptxas 12.8.93, 2026-11-27).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.crosscompile import assemble
from benchmarks.sass_flow import bad_descriptors, overwritten_inputs
from crosscompile import assert_fits, compile_launch
from vllm_accel.backends.triton import BACKEND
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.kernels.triton import launch, toolchain
from vllm_accel.kernels.triton.assembling import assembling
from vllm_accel.kernels.triton.forward import attention_forward
from vllm_accel.testing import CASES, PAGED_CASES, Case
from vllm_accel.testing.conformance import kernel_call
from vllm_accel.testing.conformance_paged import paged_kernel_call

USUAL = {"D": 64, "DV": 32, "BLOCK_D": 64, "BLOCK_DV": 32}
LARGE = {**USUAL, "SOFTCAP": True}
HOPPER, AMPERE = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32)
OLD = re.compile(r"^\.version \d+\.\d+", re.MULTILINE)


class Nothing:
    """Stands for a compiled kernel."""

    run = function = packed_metadata = None


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[launch.Launch]:
    """What would be launched on an H200: nothing is, and out holds whatever it held."""
    made: list[launch.Launch] = []
    monkeypatch.setattr(launch, "run", lambda given: made.append(given) or Nothing())
    return made


def _dense() -> None:
    inputs = next(c for c in CASES if c.name == "everything").make(torch.bfloat16)
    kernel_call(BACKEND, PRESETS["h200"])(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.options)


def _paged() -> None:
    inputs = next(c for c in PAGED_CASES if c.name == "everything").make(torch.bfloat16)
    paged_kernel_call(BACKEND, PRESETS["h200"])(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options)


@pytest.mark.parametrize("call", [pytest.param(_dense, marks=pytest.mark.slow), _paged], ids=["dense", "paged"])
def test_the_kernels_that_were_wrong(call: Callable[[], None], launches: list[launch.Launch]) -> None:
    call()
    compiled = compile_launch(launches[0], "sm_90")
    assert compiled.instructions["HGMMA"] == 24
    assert_fits(compiled, "sm_90", max_spills=10**6)
    own = toolchain.ptxas("sm_90")
    if own is None or own.release != "12.8":
        pytest.skip("this Triton's own ptxas is another one")
    wrong = assemble(OLD.sub(".version 8.7", compiled.ptx), "sm_90", own.path)
    assert len(bad_descriptors(wrong)) == 9, "of each loop's product with V all steps but the first"
    with pytest.raises(AssertionError, match="at random"):
        assert_fits(dataclasses.replace(compiled, sass=wrong), "sm_90", max_spills=10**6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_the_usual_kernels_are_sound(size: int, launches: list[launch.Launch]) -> None:
    """Those that Triton's own ptxas assembles, forward and backward: any may be called, so each is looked at."""
    lengths = (None, ((17, 17), (5, 33)))
    for causal, packed, sinks in itertools.product((False, True), lengths, (False, True)):
        case = Case(
            "usual", "", lengths=packed, num_heads=4, num_kv_heads=2, head_dim=size, head_dim_v=size, sinks=sinks,
            options={"causal": causal}, lse_grad=True,
        )  # fmt: skip
        inputs = case.make(torch.bfloat16)
        leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        call = kernel_call(BACKEND, PRESETS["h200"])
        call(inputs.q, inputs.k, inputs.v, **inputs.options)
        out, lse = call(*leaves, return_lse=True, **inputs.options)
        torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    seen = set()
    for made in launches:
        kind = (made.fn.__name__, *made.constexprs.values(), *[t is None for t in made.args])
        if kind not in seen:
            seen.add(kind)
            with assembling(made.constexprs, HOPPER) as other:
                assert not other
            assert not bad_descriptors(compile_launch(made, "sm_90").sass), kind
    assert len(seen) >= 12


# --- the choice ------------------------------------------------------------------------------------------------------


def _posing(path: Path, release: str, archs: str = "'sm_86','sm_90a','sm_100a'") -> str:
    text = f'#!/bin/sh\n[ "$1" = --help ] && echo "{archs}" || echo "Cuda compilation tools, release {release}, V0"\n'
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], tuple[str, str]]:
    """Put two programs in the places of ptxas and of ptxas-blackwell."""

    def put(release: str, blackwell: str, **options: str) -> tuple[str, str]:
        paths = _posing(tmp_path / "ptxas", release), _posing(tmp_path / "ptxas-blackwell", blackwell, **options)
        monkeypatch.setenv("TRITON_PTXAS_PATH", paths[0])
        monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", paths[1])
        toolchain.forget()
        return paths

    return put


def _release_in(target: GPUTarget, **constexprs: Any) -> tuple[str, dict[str, int]]:
    with assembling(constexprs or LARGE, target) as options:
        return triton.knobs.nvidia.ptxas.version, options


def test_hopper_takes_the_other_ptxas(pair) -> None:
    ptxas, _ = pair("12.8", "12.9")
    assert _release_in(HOPPER) == ("12.9", {"ptx_version": 88})
    assert _release_in(AMPERE) == ("12.8", {})
    assert _release_in(GPUTarget("hip", "gfx942", 64)) == ("12.8", {})
    backward = {"HEAD_DIM": 64, "HEAD_DIM_V": 128, "BLOCK_D": 64, "BLOCK_DV": 128}
    for usual in (USUAL, backward, {"CAUSAL": True, "D": 128, "HEAD_DIM": 80}, {"BLOCK_K": 64}):
        assert _release_in(HOPPER, **usual) == ("12.8", {})
    for other in ("LEFT", "SOFTCAP", "ALIBI", "BIAS", "PAGE"):
        assert _release_in(HOPPER, **USUAL, **{other: 1}) == ("12.9", {"ptx_version": 88})
    for narrower in (USUAL | {"DV": 24}, USUAL | {"D": 40}, backward | {"HEAD_DIM": 40}):
        assert _release_in(HOPPER, **narrower) == ("12.9", {"ptx_version": 88})
    assert triton.knobs.nvidia.ptxas.path == ptxas
    assert not [p for p in toolchain.problems("sm_90") if p.code == "ptxas"]


@pytest.mark.parametrize(("target", "options"), [(HOPPER, {"ptx_version": 88}), (AMPERE, {})], ids=["sm_90", "sm_80"])
def test_a_launch_is_assembled_so(target: GPUTarget, options: dict[str, int], pair, monkeypatch) -> None:
    pair("12.8", "12.9")
    seen = []

    def told(self: object, *args: object, grid: object, warmup: bool, **given: int) -> None:
        seen.append((given, triton.knobs.nvidia.ptxas.version))

    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(triton.runtime.JITFunction, "run", told)
    launch.run(launch.Launch(attention_forward, (1, 1, 1), (), LARGE, 4, 2, 0))
    assert seen == [({**LARGE, "num_warps": 4, "num_stages": 2, **options}, "12.9" if options else "12.8")]


@pytest.mark.parametrize("release", ["12.6", "12.9", "13.0"])
def test_a_sound_ptxas_stays(release: str, pair) -> None:
    pair(release, "13.1")
    assert _release_in(HOPPER) == (release, {})


@pytest.mark.parametrize(("blackwell", "archs"), [("12.8", "'sm_90a','sm_100a'"), ("13.9", "'sm_100a'")])
def test_without_a_better_one_hopper_is_refused(blackwell: str, archs: str, pair) -> None:
    pair("12.8", blackwell, archs=archs)
    assert _release_in(HOPPER) == ("12.8", {})
    (problem,) = (p for p in toolchain.problems("sm_90") if p.code == "ptxas")
    assert "wrong code of large kernels for sm_90; set TRITON_PTXAS_PATH to the ptxas of CUDA 12.9" in str(problem)
    assert not [p for p in toolchain.problems("sm_86") if p.code == "ptxas"]


def test_threads_that_compile_at_once_all_take_it(pair) -> None:
    """The setting is the process's: seen by another thread it would look like a person's own choice of 12.9."""
    pair("12.8", "12.9")
    inside, seen = threading.Event(), []

    def other() -> None:
        inside.wait(10)
        seen.append(_release_in(HOPPER))

    thread = threading.Thread(target=other)
    thread.start()
    with assembling(LARGE, HOPPER):
        inside.set()
        thread.join(0.3)
        assert not seen, "it has to wait"
    thread.join(10)
    assert seen == [("12.9", {"ptx_version": 88})]


# --- the looks at machine code ---------------------------------------------------------------------------------------

SOUND = """
        /*0000*/                   UMOV UR4, 0x400 ;
        /*0010*/                   S2UR UR5, SR_CgaCtaId ;
        /*0020*/                   ULEA UR4, UR5, UR4, 0x18 ;
        /*0030*/                   UIADD3 UR10, UR4, 0x4000, URZ ;
.L_x_0:
        /*0040*/                   UMOV UR11, 0x80000020 ;
        /*0050*/                   F2FP.F16.F32.PACK_AB R24, R48, R41 ;
        /*0060*/                   HGMMA.64x32x16.F32 R56, R24, gdesc[UR8].tnspB, R56, gsb0 ;
        /*0070*/                   FADD R28, R28, R29 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   FADD R24, R24, R25 ;
        /*00a0*/              @!P3 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
"""


def test_a_sound_listing_has_nothing_to_tell() -> None:
    assert bad_descriptors(SOUND) == overwritten_inputs(SOUND) == []


@pytest.mark.parametrize(
    "low",
    ["ULDC.64 UR10, c[0x0][0x270]", "UIADD3 UR10, UR12, 0x40, URZ", "@P0 UIADD3 UR10, UR4, 0x4000, URZ"],
    ids=["parameter", "nothing", "not on every way"],
)
def test_descriptors_of_anything_else_are_told(low: str) -> None:
    listing = SOUND.replace("UIADD3 UR10, UR4, 0x4000, URZ", low)
    assert bad_descriptors(listing) == ["0060 HGMMA.64x32x16.F32 UR10"]
    both = listing.replace("R24, gdesc", "gdesc")  # A from shared memory too, by a descriptor that nothing set
    assert bad_descriptors(both) == ["0060 HGMMA.64x32x16.F32 UR8", "0060 HGMMA.64x32x16.F32 UR10"]


@pytest.mark.parametrize("writer", ["FADD R27, R28, R29", "LDS.128 R24, [R2]", "SHFL.BFLY PT, R26, R8, 0x2, 0x1f"])
def test_inputs_written_before_the_wait_are_told(writer: str) -> None:
    (told,) = overwritten_inputs(SOUND.replace("FADD R28, R28, R29", writer))
    assert told.startswith("0060 HGMMA.64x32x16.F32: 0070")
    later = SOUND.replace("FADD R24, R24, R25", writer)  # after the wait
    assert overwritten_inputs(later) == []
    one_pending = SOUND.replace("gsb0, 0x0", "gsb0, 0x1")  # leaves the last group to run
    assert len(overwritten_inputs(one_pending)) == 2  # in this turn of the loop and in the next


@pytest.mark.parametrize(("before_wait", "told"), [(True, 1), (False, 0)])
def test_a_register_input_that_the_next_turn_of_a_loop_overwrites_is_named(before_wait: bool, told: int) -> None:
    """As Triton compiles a loop whose last product is waited for in the next turn: an H200 then read infinities."""
    write, wait = "/*0010*/ MUFU.EX2 R26, R4 ;", "/*0020*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    turn = [write, wait] if before_wait else [wait, write]
    product = "/*0030*/ HGMMA.64x128x16.F32.BF16 R40, R24, gdesc[UR12].tnspB, R40, gsb0 ;"
    end = ["/*0040*/ @!P0 BRA `(.L_x_0) ;", "/*0050*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "/*0060*/ EXIT ;"]
    assert len(overwritten_inputs("\n".join([".L_x_0:", *turn, product, *end]))) == told
