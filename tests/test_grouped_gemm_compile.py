"""The grouped product kernel compiled for GPUs that are not here: spills, shared memory, the matrix unit, TMA."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
from crosscompile import ARCHS, assert_fits, compile_launch
from vllm_accel.kernels.triton.clear import clear_launch
from vllm_accel.kernels.triton.grouped_gemm import BATCH, DEPTH, ROWS
from vllm_accel.kernels.triton.grouped_gemm_launch import Scale, choose_tile, gemm_launch, has_tma, natively_fp8
from vllm_accel.kernels.triton.launch import Launch

E4M3 = torch.float8_e4m3fn


class Kernel(NamedTuple):
    """One use of one row of the table: 8 groups of `rows` on average, K and N 4096."""

    arch: str
    dtype: torch.dtype = torch.bfloat16
    form: int = ROWS
    rows: int = 512
    scaling: str = ""
    tma: bool = True

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        loads = "tma" if self.tma else "pointers"
        return f"{self.arch}-{name}-form{self.form}-m{self.rows}-{self.scaling or 'plain'}-{loads}"


def kinds(arch: str) -> list[Kernel]:
    """Return every kind of product that has a tile of its own."""
    made = [Kernel(arch, rows=rows) for rows in (16, 64, 512)]
    made += [Kernel(arch, form=DEPTH), Kernel(arch, form=BATCH), Kernel(arch, torch.float32, tma=False)]
    made += [Kernel(arch, E4M3, rows=rows, scaling="blocks") for rows in (16, 512)]
    made += [Kernel(arch, dtype, scaling="rows") for dtype in (E4M3, torch.int8)]
    return [kernel._replace(tma=kernel.tma and has_tma(arch)) for kernel in made]


EVERY = [kernel for arch in ARCHS for kernel in kinds(arch)] + [Kernel("sm_90", tma=False)]
SOME = [Kernel(arch, tma=has_tma(arch)) for arch in ("sm_80", "sm_90", "gfx942")]
SOME += [Kernel("sm_90", E4M3, scaling="blocks"), Kernel("sm_90", form=DEPTH), Kernel("sm_80", E4M3, tma=False)]


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launch(kernel: Kernel) -> Launch:
    groups, k, n, dtype = 8, 4096, 4096, kernel.dtype
    tokens = groups * kernel.rows
    result = torch.float32 if dtype is torch.float32 else torch.bfloat16
    a, b = {
        ROWS: lambda: (_meta(tokens, k, dtype=dtype), _meta(groups, n, k, dtype=dtype).transpose(1, 2)),
        DEPTH: lambda: (_meta(tokens, k, dtype=dtype).t(), _meta(tokens, n, dtype=dtype)),
        BATCH: lambda: (_meta(groups, kernel.rows, k, dtype=dtype), _meta(groups, k, n, dtype=dtype)),
    }[kernel.form]()
    shape = {ROWS: (tokens, n), DEPTH: (groups, k, n), BATCH: (groups, kernel.rows, n)}[kernel.form]
    blocks = 32 if kernel.scaling == "blocks" else 1
    scaled = kernel.scaling != ""
    native = natively_fp8(kernel.arch)
    return gemm_launch(
        a, b, _meta(*shape, dtype=result),
        tile=choose_tile(
            kernel.arch, dtype, form=kernel.form, blockwise=blocks > 1, rows=kernel.rows, native_fp8=native,
            tma=kernel.tma,
        ),
        programs=132, offs=None if kernel.form == BATCH else _meta(groups, dtype=torch.int32),
        a_scale=Scale(_meta(1, tokens, blocks, dtype=torch.float32)) if scaled else None,
        b_scale=Scale(_meta(groups, blocks, 32 if blocks > 1 else n, dtype=torch.float32), 128 if blocks > 1 else 1)
        if scaled else None,
        tma=kernel.tma, native_fp8=native,
    )  # fmt: skip


@pytest.mark.parametrize("kernel", EVERY if os.environ.get("COMPILE_ALL_TILES") else SOME, ids=str)
def test_a_row_of_the_table_fits_its_chip(kernel: Kernel) -> None:
    compiled = compile_launch(_launch(kernel), kernel.arch)
    # IEEE fp32 products have no tensor cores on NVIDIA; AMD's matrix cores take fp32. Those of int8 have other names.
    matrix = kernel.dtype not in (torch.float32, torch.int8) or kernel.arch.startswith("gfx")
    assert_fits(compiled, kernel.arch, tensor_cores=matrix)
    if kernel.dtype is torch.int8 and not matrix and kernel.arch != "sm_100":  # whose tensor cores have no int8
        assert compiled.instructions["IMMA"] or compiled.instructions["IGMMA"]
    if kernel.arch != "sm_90":
        return
    if kernel.tma:
        assert compiled.instructions["UTMALDG"] and not compiled.instructions["LDGSTS"]
    if kernel.rows == 512 and kernel.dtype is torch.bfloat16:
        # The next product is issued while the last one runs: of two in flight, one is waited for.
        assert compiled.instructions["HGMMA"] and not compiled.instructions["HMMA"]
        assert re.search(r"WARPGROUP\.DEPBAR\S* gsb0, 0x1", compiled.sass)


@pytest.mark.parametrize("scaling", ["blocks", "rows"])
def test_fp8_sums_leave_the_tensor_cores_every_128_products(scaling: str) -> None:
    """One step of K 128 is four products of 32; the first starts a new sum, so each step ends in fp32 additions."""
    compiled = compile_launch(_launch(Kernel("sm_90", E4M3, scaling=scaling)), "sm_90")
    assert compiled.instructions["QGMMA"] == 4
    starts_anew = re.findall(r"QGMMA\S* .*RZ", compiled.sass)
    assert len(starts_anew) >= 1, "no product starts from zero: sums would stay on the tensor cores"


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("shape", [(4096, 28672), (8, 4096, 14336), (100, 77)])
def test_what_clears_the_results_of_others(arch: str, shape: tuple[int, ...]) -> None:
    launch = clear_launch(_meta(*shape, dtype=torch.bfloat16), _meta(8, dtype=torch.int32))
    assert_fits(compile_launch(launch, arch), arch, tensor_cores=False)
