"""The cross-compiler compiles what a launch on the GPU would, and counts what is in the binary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from crosscompile import ARCHS, SHARED_LIMIT, Compiled, assert_fits, compile_launch
from vllm_accel.kernels.triton.assembling import assembling
from vllm_accel.kernels.triton.launch import Launch, compile_options


@triton.jit(do_not_specialize=["rows"])
def scale_kernel(X, Bias, factor, rows, stride, step, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    at = row * stride + tl.arange(0, WIDTH) * step
    x = tl.load(X + at, mask=row < rows, other=0.0)
    if Bias is not None:
        x += tl.load(Bias + tl.arange(0, WIDTH))
    tl.store(X + at, x * factor, mask=row < rows)


@triton.jit
def product_kernel(A, B, Out, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK):
        acc = tl.dot(A.load([tl.program_id(0) * BM, k]), B.load([k, 0]), acc)
    tl.store(Out + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], tl.exp2(acc))


@gluon.jit
def copy_kernel(X, Out, BM: gl.constexpr, BN: gl.constexpr):
    held = gl.allocate_shared_memory(X.dtype, X.block_type.shape, X.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, X.block_type.nbytes)
    tma.async_copy_global_to_shared(X, [0, 0], bar, held)
    mbarrier.wait(bar, phase=0)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    gl.store(Out + rows[:, None] * BN + columns[None, :], held.load(layout))


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scale(**changed: Any) -> Launch:
    given: dict[str, Any] = {"X": meta(64, 1024), "Bias": None, "factor": 0.5, "rows": 64, "stride": 1024, "step": 1}
    args = tuple({**given, **changed}.values())
    return Launch(scale_kernel, (64, 1, 1), args, {"WIDTH": 1024}, num_warps=4, num_stages=2)


def product(stages: int = 2, warps: int = 4, maxnreg: int = 0, block: int = 64) -> Launch:
    a, b = meta(1024, 1024), meta(1024, block)
    args = (
        TensorDescriptor(a, [1024, 1024], [1024, 1], [128, 64]),
        TensorDescriptor(b, [1024, block], [block, 1], [64, block]),
        meta(128, block, dtype=torch.float32),
        1024,
    )
    return Launch(product_kernel, (8, 1, 1), args, {"BM": 128, "BN": block, "BK": 64}, warps, stages, maxnreg)


def copy() -> Launch:
    x = meta(64, 64)
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    args = (GluonDescriptor(x, [64, 64], [64, 1], [64, 64], layout), meta(64, 64))
    return Launch(copy_kernel, (1, 1, 1), args, {"BM": 64, "BN": 64}, num_warps=4, num_stages=1)


class Hopper(DriverBase):
    """A driver that says it has an H100, so that ``warmup`` compiles; nothing can be launched."""

    def __init__(self) -> None:
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> None:
        return None

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@pytest.fixture
def _hopper() -> Iterator[None]:
    triton.runtime.driver.set_active(Hopper())
    yield
    triton.runtime.driver._active = None


LAUNCHES = {
    "aligned": scale(),
    "misaligned stride": scale(stride=1025),
    "step of 16": scale(step=16),
    "long stride": scale(stride=2**33),
    "bias": scale(Bias=meta(1024)),
    "rows are not specialised": scale(rows=1),
    "descriptors": product(),
    "registers": product(maxnreg=96),
    "gluon": copy(),
}


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("name", LAUNCHES)
def test_the_launch_is_compiled_as_triton_would(name: str) -> None:
    launch = LAUNCHES[name]
    options = {**launch.constexprs, **compile_options(launch)}
    with assembling(launch.constexprs, GPUTarget("cuda", 90, 32)) as more:
        told = launch.fn.warmup(*launch.args, grid=launch.grid, **options, **more)
    made = compile_launch(launch, "sm_90")
    assert made.ptx == told.asm["ptx"]
    assert (made.shared, made.threads) == (told.metadata.shared, told.metadata.num_warps * 32)


def test_a_launch_is_specialised() -> None:
    ptx = {name: compile_launch(LAUNCHES[name], "sm_90").ptx for name in LAUNCHES}
    assert "ld.global.v4" in ptx["aligned"]
    assert "ld.global.v4" not in ptx["misaligned stride"]
    assert ptx["rows are not specialised"] == ptx["aligned"]
    assert len({ptx[n] for n in ("aligned", "misaligned stride", "step of 16", "long stride", "bias")}) == 5


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_read_of_a_product(arch: str) -> None:
    made = compile_launch(product(), arch)
    assert_fits(made, arch, max_spills=4)  # 3.6.0 spills a little for sm_80 and sm_120
    amd = arch.startswith("gfx")
    assert made.threads == 4 * (64 if amd else 32) or arch == "sm_100"  # warps for the tensor core are extra
    assert 32 <= made.registers <= (512 if amd else 255)
    exponentials = made.instructions["v_exp" if amd else "MUFU.EX2"]
    assert exponentials == 128 * 64 // (256 if amd else 128)  # one for each element that a thread holds
    kind = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx90a": "v_mfma", "gfx942": "v_mfma"}.get(arch, "HMMA")
    assert made.instructions[kind] > 0
    if kind == "HMMA":  # m16n8k16 for each 64 columns of K, by 4 warps; prologue and epilogue may repeat them
        assert made.instructions["HMMA.16816.F32"] % (128 // 16 * 64 // 8 * 64 // 16 // 4) == 0
    if kind == "HGMMA":
        assert made.instructions["HGMMA"] % (64 // 16 * 128 // 64) == 0
    assert (made.instructions["UTMALDG"] > 0) is (arch in ("sm_90", "sm_100", "sm_120"))
    assert (made.tensor_memory > 0) is (arch == "sm_100")


def test_registers_and_spills_follow_the_limit() -> None:
    free, tight = compile_launch(product(), "sm_90"), compile_launch(product(maxnreg=64), "sm_90")
    assert free.spills == 0
    assert free.stack == 0
    assert tight.registers <= 64 < free.registers
    assert tight.spills > 0
    assert tight.stack > 0
    assert tight.spills == tight.instructions["STL"] + tight.instructions["LDL"]
    with pytest.raises(AssertionError, match="at most 0 spills are accepted"):
        assert_fits(tight, "sm_90")
    assert_fits(tight, "sm_90", max_spills=tight.spills)


def test_too_much_shared_memory_is_refused() -> None:
    made = compile_launch(product(stages=8, warps=8, block=128), "sm_90")
    assert made.shared > SHARED_LIMIT["sm_90"]
    with pytest.raises(AssertionError, match=f"{SHARED_LIMIT['sm_90']} B shared memory"):
        assert_fits(made, "sm_90")


BASE = Compiled("sm_90", 128, 0, 0, 100 * 1024, 256, 0, Counter({"HGMMA": 8}), "", "", "")


@pytest.mark.parametrize(
    ("changed", "arguments", "refused"),
    [
        ({}, {}, ""),
        ({}, {"blocks": 2}, ""),
        ({"shared": 113 * 1024}, {"blocks": 2}, ""),
        ({"shared": 113 * 1024 + 8}, {"blocks": 2}, "2 blocks do not fit"),
        ({"registers": 129}, {"blocks": 2}, "2 blocks of 256 threads do not fit"),
        ({"tensor_memory": 513}, {}, "tensor memory"),
        ({"instructions": Counter({"FFMA": 9})}, {}, "no tensor cores"),
        ({"instructions": Counter({"FFMA": 9})}, {"tensor_cores": False}, ""),
        ({"arch": "sm_80"}, {}, "compiled for sm_80"),
    ],
)
def test_what_fits(changed: dict[str, Any], arguments: dict[str, Any], refused: str) -> None:
    made = replace(BASE, **changed)
    if not refused:
        assert_fits(made, "sm_90", **arguments)
        return
    with pytest.raises(AssertionError, match=refused):
        assert_fits(made, "sm_90", **arguments)


def test_the_limits_are_those_of_the_presets() -> None:
    """The same numbers, kept by hand in two places."""
    from vllm_accel.dispatch.device import PRESETS

    known = {d.arch: d.shared_memory_per_block for d in PRESETS.values() if d.arch in SHARED_LIMIT}
    assert {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"} <= known.keys()
    assert all(SHARED_LIMIT[arch] == limit for arch, limit in known.items())


def test_what_cannot_be_compiled() -> None:
    with pytest.raises(ValueError, match="'sm_70' is not one of sm_80"):
        compile_launch(scale(), "sm_70")
    with pytest.raises(TypeError, match="builtin_function_or_method: only what"):
        compile_launch(scale()._replace(fn=len), "sm_90")


def test_nothing_of_the_users_is_touched(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert triton.knobs.cache.dir.startswith(str(tmp_path_factory.getbasetemp()))
