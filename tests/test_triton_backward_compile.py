"""What the compiler makes of the backward kernels of our own Triton attention, for GPUs that are not here."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from crosscompile import ARCHS, SHARED_LIMIT, TENSOR_CORES, Compiled, assert_fits, compile_launch
from vllm_accel.kernels.triton import backward_launch
from vllm_accel.kernels.triton.launch import Launch
from vllm_accel.kernels.triton.tiles import Tile, lookup, shipped

SEQLEN, HEADS, KV_HEADS = 2048, 8, 2


def problem(
    head_dim: int, dtype: torch.dtype = torch.bfloat16, *, causal: bool = True, softcap: float = 0.0,
    dropout: bool = False, bias: torch.dtype | None = None, varlen: bool = False, stride: int = 0, tf32: bool = False,
) -> backward_launch.Problem:  # fmt: skip
    """Describe a call by meta tensors; `stride` puts tokens that far apart."""

    def meta(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=to, device="meta")

    lead = (2 * SEQLEN,) if varlen else (2, SEQLEN)
    q, k = meta(*lead, HEADS, head_dim), meta(*lead, KV_HEADS, head_dim)
    if stride:
        q = torch.empty_strided(q.shape, (SEQLEN * stride, stride, head_dim, 1), dtype=dtype, device="meta")
    lse = meta(*lead[:-1], HEADS, lead[-1], to=torch.float32)
    cu = meta(3, to=torch.int32) if varlen else None
    return backward_launch.Problem(
        q=q, k=k, v=k, out=meta(*lead, HEADS, head_dim), lse=lse, rng=meta(2, to=torch.int64) if dropout else None,
        dout=meta(*lead, HEADS, head_dim), dlse=lse, cu_seqlens_q=cu, cu_seqlens_k=cu, alibi_slopes=None,
        attn_bias=None if bias is None else meta(2, 1, SEQLEN, SEQLEN, to=bias), sinks=meta(HEADS, to=torch.float32),
        q_descale=None, k_descale=None, v_descale=None, max_seqlen_q=SEQLEN, max_seqlen_k=SEQLEN, softmax_scale=0.125,
        window_size=(-1, 0 if causal else -1), softcap=softcap, dropout_p=0.1 if dropout else 0.0, tf32=tf32,
    )  # fmt: skip


def launch(kind: str, call: backward_launch.Problem, tile: Tile) -> Launch:
    delta = call.lse
    dk, dv = torch.empty_like(call.k), torch.empty_like(call.v)
    if kind == "fused":
        dq_sum = torch.empty(call.q.shape, dtype=torch.float32, device="meta")
        return backward_launch.dkv_launch(call, delta, dk, dv, dq_sum, tile)
    if kind == "dkv":
        return backward_launch.dkv_launch(call, delta, dk, dv, None, tile)
    if kind == "dq":
        return backward_launch.dq_launch(
            call, delta, torch.empty(call.q.shape, device="meta", dtype=call.q.dtype), None, tile
        )
    assert call.attn_bias is not None
    sums = torch.empty((1, *call.attn_bias.shape), dtype=torch.float32, device="meta")
    return backward_launch.bias_launch(call, delta, sums, tile)


@functools.cache
def compiled(kind: str, arch: str, head_dim: int, heavy: bool = False, **options: Any) -> Compiled:
    """Compile a kernel with its shipped tile."""
    call = problem(head_dim, bias=torch.bfloat16, **options) if kind == "bias" else problem(head_dim, **options)
    size = f"{'fp32_' if call.q.dtype is torch.float32 else ''}d{head_dim}"
    keys = [f"{kind}_{size}_heavy"] if heavy else []
    return compile_launch(launch(kind, call, lookup("backward", arch, [*keys, f"{kind}_{size}"])), arch)


def spills_in_the_loop(sass: str) -> int:
    """Count spill instructions in the innermost loops that hold matrix products (NVIDIA's disassembly)."""
    lines = sass.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if branch and labels[branch[1]] < i:
            body = lines[labels[branch[1]] : i]
            if any(re.search(r"\b(HMMA|HGMMA|UTCHMMA)\b", instruction) for instruction in body):
                loops.append((labels[branch[1]], i))
    assert loops, "no loop with matrix products was found"
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return sum(len(re.findall(r"\b(?:STL|LDL)\b", "\n".join(lines[first:last]))) for first, last in inner)


#: kind, head size -> spill instructions that are accepted: in all, and in the innermost loop. The others lie in the
#: loop over the query heads of a group. Two accumulators of 64 x 128 fp32 numbers in 4 warps (64 x 256 in 8) take 128
#: of 255 registers, and the products' operands most of the rest. Triton 3.7.1 (3.6.0): 17 (11); 129 (138), 7 (9)
#: in the loop; 52 (62). On an H200 they are faster than larger tiles without spills (benchmarks/results/h200).
HOPPER_SPILLS = {("dkv", 64): (20, 0), ("dkv", 128): (145, 10), ("dkv", 256): (70, 0)}


@pytest.mark.parametrize(
    ("kind", "head_dim"),
    [("dkv", 64), ("dq", 64), ("dkv", 128), ("dq", 128), ("dkv", 256), ("dq", 256)],
)
def test_hopper(kind: str, head_dim: int) -> None:
    """Products by wgmma, and no spill in the loop but the few that are stated."""
    found = compiled(kind, "sm_90", head_dim)
    total, inner = HOPPER_SPILLS.get((kind, head_dim), (0, 0))
    assert_fits(found, "sm_90", max_spills=total)
    assert found.instructions["HGMMA"] >= 12 and not found.instructions["HMMA"]
    assert spills_in_the_loop(found.sass) <= inner


#: Every kind where it is the default or most used, and dkv, the largest, everywhere; all of them with the slow tests.
OTHERS = [("fused", "sm_80"), ("dq", "sm_80"), ("dq", "gfx942"), *[("dkv", arch) for arch in ARCHS if arch != "sm_90"]]
SLOW = [
    pytest.param(kind, arch, marks=pytest.mark.slow)
    for arch in ARCHS
    for kind in ("fused", "dq")
    if arch != "sm_90" and (kind, arch) not in OTHERS
]


@pytest.mark.parametrize(("kind", "arch"), [*OTHERS, *SLOW])
def test_other_architectures(kind: str, arch: str) -> None:
    """Head size 128, the widest that models use: fits, on the matrix unit, without spills."""
    assert_fits(compiled(kind, arch, 128), arch)


def test_heavy_logits_take_smaller_tiles() -> None:
    assert_fits(compiled("dkv", "sm_90", 128, heavy=True, softcap=3.0), "sm_90")


def test_forms_with_one_program_per_sum_have_no_atomics() -> None:
    """The split form is the deterministic one: nothing is added to memory. The fused form adds."""
    for kind in ("dkv", "dq", "bias"):
        assert not re.search(r"\b(red|atom)\.", compiled(kind, "sm_80", 64).ptx), kind
    assert re.search(r"\b(red|atom)\.", compiled("fused", "sm_80", 64).ptx)


def test_tiles_that_need_no_mask_have_none() -> None:
    """Without a window nothing of the size of a tile is compared; with one, only behind a branch."""
    tile = re.compile(r"arith\.cmpi .*tensor<\d{2,}x\d{2,}xi32")
    full = compiled("dkv", "sm_80", 64, causal=False).ttgir
    assert not tile.search(full)
    causal = compiled("dkv", "sm_80", 64).ttgir
    masks = [match.start() for match in tile.finditer(causal)]
    assert masks
    for at in masks:
        opened = causal.rfind("scf.if", 0, at)
        assert opened > max(causal.rfind("scf.for", 0, at), causal.rfind("tt.dot", 0, at))


def test_small_kernels() -> None:
    """delta and the sinks: no matrix products, no spills."""
    call = problem(128)
    for made in (
        backward_launch.delta_launch(call, call.lse),
        backward_launch.sinks_launch(call, call.lse, torch.empty(HEADS, device="meta")),
    ):
        assert_fits(compile_launch(made, "sm_90"), "sm_90", tensor_cores=False)


def test_far_apart_rows_take_64_bit_offsets() -> None:
    """Tokens 2^25 numbers apart: a tile of 64 spans 2^31."""
    call = problem(64, stride=1 << 25)
    made = launch("dq", call, lookup("backward", "sm_80", ["dq_d64"]))
    assert made.constexprs["WIDE"] and not launch("dq", problem(64), Tile(64, 64, 4, 2)).constexprs["WIDE"]
    assert compile_launch(made, "sm_80").instructions["HMMA"]


@pytest.mark.parametrize(
    "arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90", pytest.param("gfx942", marks=pytest.mark.slow)]
)
def test_fp32(arch: str) -> None:
    """IEEE products on NVIDIA are not on tensor cores (their TF32 is not fp32); with TF32 allowed they are."""
    found = compiled("dkv", arch, 64, dtype=torch.float32)
    assert found.shared <= SHARED_LIMIT[arch]
    if arch.startswith("sm_"):
        assert not any(found.instructions[op] for op in TENSOR_CORES)
        assert_fits(compiled("dkv", arch, 64, dtype=torch.float32, tf32=True), arch, max_spills=200)


def test_every_architecture_has_every_size() -> None:
    table = shipped("backward")
    assert set(table) == set(ARCHS)
    for arch, row in table.items():
        for size in (16, 32, 64, 128, 256):
            for kind in ("dkv", "dq", "bias"):
                assert f"{kind}_d{size}" in row and f"{kind}_fp32_d{size}" in row, (arch, kind, size)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_whole_table(arch: str) -> None:
    """Every entry compiles and fits; the spills of a heavy call (softcap) stay within what a loop over heads takes."""
    wrong = []
    for key in shipped("backward")[arch]:
        kind, _, size = key.partition("_")
        fp32, heavy, head_dim = size.startswith("fp32"), size.endswith("heavy"), int(re.findall(r"d(\d+)", size)[0])
        dtype = torch.float32 if fp32 else torch.bfloat16
        found = compiled(kind, arch, head_dim, heavy, dtype=dtype, softcap=3.0 if heavy else 0.0)
        if found.shared > SHARED_LIMIT[arch] or found.spills > 145:
            wrong.append(f"{key}: {found}")
    assert not wrong, "\n".join(wrong)
