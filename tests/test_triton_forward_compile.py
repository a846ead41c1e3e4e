"""The forward kernel compiled for GPUs that are not here: hardly a spill, shared memory that fits, the matrix unit
used.

A selection of the table of tiles; ``COMPILE_ALL_TILES=1 python -m pytest tests/test_triton_forward_compile.py`` takes
every row (about 250 kernels, ten minutes on two cores).
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
from crosscompile import ARCHS, assert_fits, compile_launch
from sass_loops import main_loops
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.kernels.triton.forward_launch import choose_tile, forward_launch
from vllm_accel.kernels.triton.launch import Launch
from vllm_accel.kernels.triton.tiles import Tile

HEAVY = ("bias", "mask window", "alibi softcap window descale", "dropout")
SIZES = (16, 32, 64, 128, 256)


class Kernel(NamedTuple):
    """One row of the table in one use: what follows the size is heavy unless it is "plain"."""

    arch: str
    head_dim: int
    options: str = "plain"
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"{self.arch}-{self.dtype}-d{self.head_dim}-{self.options.replace(' ', '_')}"


EVERY = [Kernel(arch, size, options) for arch in ARCHS for size in SIZES for options in ("plain", *HEAVY)]
EVERY += [
    Kernel(arch, size, options, "fp32") for arch in ARCHS for size in SIZES for options in ("plain", "mask window")
]
#: One of each architecture, and of each kind of code on Hopper; with the slow tests a few more.
SOME = [Kernel(arch, 128) for arch in ARCHS]
SOME += [
    Kernel("sm_90", 64),
    Kernel("sm_90", 256),
    Kernel("sm_90", 128, HEAVY[2]),
    Kernel("sm_90", 64, "plain", "fp32"),
]
MORE = [Kernel("sm_90", 16), Kernel("sm_90", 256, "plain", "fp32"), Kernel("gfx942", 128, "plain", "fp32")]
MORE += [Kernel("sm_90", 128, options) for options in HEAVY if options != HEAVY[2]]
MORE += [Kernel(arch, 64, "mask window") for arch in ("sm_80", "sm_90", "gfx942")]
MORE += [Kernel(arch, 256) for arch in ("sm_80", "sm_86", "gfx942")]
CHOSEN = [*SOME, *[pytest.param(kernel, marks=pytest.mark.slow) for kernel in MORE]]


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launch(
    kernel: Kernel,
    *,
    head_dim_v: int = 0,
    varlen: bool = False,
    tile: Tile | None = None,
    tma: bool = False,
) -> Launch:
    """Describe a causal call of 4 x 4096 tokens with grouped heads, lse and the options of `kernel`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kernel.dtype]
    batch, tokens, heads, kv_heads = 4, 4096, 32, 8
    lead = (batch * tokens,) if varlen else (batch, tokens)
    q = _meta(*lead, heads, kernel.head_dim, dtype=dtype)
    k = _meta(*lead, kv_heads, kernel.head_dim, dtype=dtype)
    v, out = (_meta(*lead, n, head_dim_v or kernel.head_dim, dtype=dtype) for n in (kv_heads, heads))
    lse = _meta(*((heads, batch * tokens) if varlen else (batch, heads, tokens)), dtype=torch.float32)
    cu = _meta(batch + 1, dtype=torch.int32) if varlen else None
    args = AttentionArgs(
        cu, cu, *(None,) * 6, tokens, tokens, 0.125, True, (-1, -1), 0.0, 0.0, True, False, False
    )  # fmt: skip
    given = {
        "bias": {"attn_bias": _meta(1, heads, tokens, tokens, dtype=dtype)},
        "mask": {"attn_bias": _meta(batch, 1, 1, tokens, dtype=torch.bool)},
        "window": {"window_size": (1000, -1)},
        "alibi": {"alibi_slopes": _meta(heads, dtype=torch.float32)},
        "softcap": {"softcap": 30.0},
        "descale": {"q_descale": _meta(dtype=torch.float32), "v_descale": _meta(batch, kv_heads, dtype=torch.float32)},
        "dropout": {"dropout_p": 0.1},
        "plain": {"sinks": _meta(heads, dtype=torch.float32)},
    }
    for option in kernel.options.split():
        args = args._replace(**given[option])
    rng = _meta(2, dtype=torch.int64) if args.dropout_p else None
    heavy = kernel.options != "plain"
    chosen = choose_tile(kernel.arch, dtype, kernel.head_dim, v.shape[-1], causal=True, heavy=heavy, tma=tma)
    return forward_launch(q, k, v, out, lse, rng, args, tile or chosen, tma=tma)


@pytest.mark.parametrize("kernel", EVERY if os.environ.get("COMPILE_ALL_TILES") else CHOSEN, ids=str)
def test_a_row_of_the_table_fits_its_chip(kernel: Kernel) -> None:
    made = _launch(kernel)
    compiled = compile_launch(made, kernel.arch)
    # With many options ptxas stops at 128 registers and spills a handful of scalars. IEEE fp32 products have no tensor
    # cores on NVIDIA; AMD's matrix cores take fp32. A limit on registers buys a second block per multiprocessor with a
    # few spills: where the table has one, it was timed.
    matrix = kernel.dtype != "fp32" or kernel.arch.startswith("gfx")
    assert_fits(compiled, kernel.arch, tensor_cores=matrix, max_spills=48 if made.maxnreg else 8)
    if kernel.arch == "sm_90" and kernel.dtype == "bf16":
        assert compiled.instructions["HGMMA"] and not compiled.instructions["HMMA"]
    if made.maxnreg == 128:
        assert_fits(compiled, kernel.arch, max_spills=48, blocks=2)


@pytest.mark.parametrize(
    ("arch", "head_dim", "head_dim_v"), [("sm_90", 192, 128), pytest.param("sm_80", 72, 40, marks=pytest.mark.slow)]
)
def test_packed_calls_of_other_head_sizes_fit(arch: str, head_dim: int, head_dim_v: int) -> None:
    compiled = compile_launch(_launch(Kernel(arch, head_dim), head_dim_v=head_dim_v, varlen=True), arch)
    assert_fits(compiled, arch)


def _loops(sass: str) -> list[str]:
    """Return the text of every loop: from a label to a branch back to it."""
    lines, labels, found = sass.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = i
        elif (branch := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and branch[1] in labels:
            found.append("\n".join(lines[labels[branch[1]] : i]))
    return found


def test_the_interior_loop_masks_nothing() -> None:
    """Of the three loops over keys of a windowed call one selects no logit: the one whose keys every row sees."""
    kernel = Kernel("sm_90", 64, "window")
    loops = [text for text in _loops(compile_launch(_launch(kernel), "sm_90").sass) if "HGMMA" in text]
    assert sorted("FSEL" in text for text in loops) == [False, True, True]


@pytest.mark.parametrize(("head_dim", "blocks"), [(64, 3), (128, 3), (256, 2)])
def test_tiles_come_by_tma_and_programs_share_a_multiprocessor(head_dim: int, blocks: int) -> None:
    """What makes this fast: one warpgroup waits while that of another program computes."""
    compiled = compile_launch(_launch(Kernel("sm_90", head_dim), tma=True), "sm_90")
    assert_fits(compiled, "sm_90", blocks=blocks)
    assert compiled.threads == 128 and compiled.instructions["UTMALDG"]


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("head_dim", "order"), [(128, "HHHHHHHHWHHHHW"), (256, "HHHHHHHHHHHHHHHHWHHW")])
@pytest.mark.parametrize("causal", [False, True])
def test_q_is_held_in_registers(causal: bool, head_dim: int, order: str, dtype: str) -> None:
    """A loop's products (H) read their left operand there, none is under way at its end, and waits (W) are two.

    ptxas waits after every product where it finds too few registers (docs/triton.md), and q is read from shared memory
    again and again where it is put into registers within the loop.
    """
    made = _launch(Kernel("sm_90", head_dim, "plain", dtype), tma=True)
    made = made._replace(constexprs={**made.constexprs, "RIGHT": causal})
    assert made.constexprs["HELD"]
    loops = main_loops(compile_launch(made, "sm_90").sass)
    assert len(loops) == 2
    for loop in loops:
        products = [operands.split(",")[1] for name, operands in loop if name.startswith("HGMMA")]
        found = "".join(name[0] for name, _ in loop if name.startswith(("HGMMA", "WARPGROUP.DEPBAR")))
        assert all(re.match(r" R\d", left) for left in products), products
        assert found == order
        assert not any(name.startswith(("LDS", "STL", "LDL")) for name, _ in loop)
