"""From checked tensors to a launch of `grouped_gemm.grouped_gemm`."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_accel.kernels.triton.grouped_gemm import BATCH, BLOCKS, DEPTH, LAST, NO_SCALE, ROWS, grouped_gemm
from vllm_accel.kernels.triton.launch import Launch
from vllm_accel.kernels.triton.tiles import Tile, lookup

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_BLOCK = 128
#: Bytes of one row of a block along K: a full line of the 128-byte swizzle that TMA and wgmma share.
_LINE = 128
#: Rows of blocks that go down before the next columns: at 128 rows, 1024 rows of a and all columns in turn.
_GROUP_M = 8
#: The groups are searched in one vector.
MAX_GROUPS = 4096
#: Bytes of shared memory per block that leave room for a second one, with the 1 KiB that the chip keeps for each.
_HALF = 113 * 1024


class Scale(NamedTuple):
    """Factors of one operand.

    Attributes:
        factors: fp32. For a (groups or 1, rows or 1, ceil(K / 128) or 1), for b (groups or 1, ceil(K / 128) or 1,
            columns, blocks of columns, or 1), strides free. A dimension of 1 is shared.
        columns: of b: how many columns share a factor, 1 or 128.
    """

    factors: Tensor
    columns: int = 1


def choose_tile(
    arch: str, a: torch.dtype, *, form: int, blockwise: bool, rows: int, native_fp8: bool, tma: bool
) -> Tile:
    """Return the tile of a kind of product.

    Args:
        a: dtype of a. form: ROWS, DEPTH or BATCH. blockwise: scales change along K.
        rows: of an average group; the same number for every call that has to have the same bits.
        native_fp8: the chip multiplies FP8. tma: operands come through descriptors; pointers take registers.
    """
    kind = "fp32" if a is torch.float32 else "16bit"
    if a is torch.int8 or (a in FP8 and native_fp8):
        kind = "8bit"
    elif a in FP8:
        kind = "widened"
    size = "m16" if rows <= 16 else "m64" if rows <= 64 else "m128"
    kinds = [f"{kind}_blocks_{size}", f"{kind}_blocks"] if blockwise else []
    if not tma and rows > 64:
        kinds.append(f"{kind}_pointers")
    if form == DEPTH:
        kinds.append(f"{kind}_depth")
    return lookup("grouped_gemm", arch, [*kinds, f"{kind}_{size}", kind])


def natively_fp8(arch: str) -> bool:
    """Tell whether a chip has FP8 tensor cores that Triton uses for float8_e4m3fn and float8_e5m2."""
    return _number(arch) >= 89


def has_tma(arch: str) -> bool:
    """Tell whether a chip has the tensor memory accelerator."""
    return _number(arch) >= 90


def _number(arch: str) -> int:
    found = re.fullmatch(r"sm_(\d+)[af]?", arch)
    return int(found[1]) if found else 0


def describable(t: Tensor) -> bool:
    """Tell whether TMA can read a matrix or a stack of them: one contiguous dimension, others multiples of 16 bytes.

    A stack must have its matrices one after the other, so that it is a matrix itself. The address has to be a multiple
    of 16 bytes too, which may differ from call to call.
    """
    if 1 not in t.stride()[-2:] or min(t.shape) == 0:
        return False
    inner, outer = (t.dim() - 1, t.dim() - 2) if t.stride(-1) == 1 else (t.dim() - 2, t.dim() - 1)
    if t.stride(outer) < t.shape[inner] or t.stride(outer) * t.element_size() % 16:
        return False
    stacked = t.dim() == 2 or t.shape[0] == 1 or t.stride(0) == t.shape[outer] * t.stride(outer)
    return stacked and t.numel() < 1 << 40 and t.shape[0] * t.shape[outer] < 1 << 31


def described(t: Tensor, block_outer: int, block_inner: int) -> TensorDescriptor:
    """Describe a matrix or a stack of them as one matrix with the contiguous dimension last."""
    if t.stride(-1) != 1:
        t = t.transpose(-1, -2)
    stack = t.shape[0] if t.dim() == 3 else 1
    return TensorDescriptor(t, [stack * t.shape[-2], t.shape[-1]], [t.stride(-2), 1], [block_outer, block_inner])


def form_of(a: Tensor, b: Tensor) -> int:
    """Return ROWS, DEPTH or BATCH by the dimensions of a and b."""
    return {(2, 3): ROWS, (2, 2): DEPTH, (3, 3): BATCH}[a.dim(), b.dim()]


def gemm_launch(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    tile: Tile,
    programs: int,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    a_scale: Scale | None = None,
    b_scale: Scale | None = None,
    tma: bool = False,
    native_fp8: bool = True,
    tf32: bool = False,
) -> Launch:
    """Return the launch that writes out.

    Args:
        a, b, out: the shapes of one FORM (`grouped_gemm`), any strides. Dense products are a batch of one.
        offs: int32 (E,), contiguous, with FORM 0 and 1. bias: (N,) or (E, N). gather: (T,) ids of rows of a.
        programs: how many run at once, the grid's limit.
        tma: load through descriptors; a and b are `describable`, at addresses that are multiples of 16.
        native_fp8: the chip multiplies FP8. tf32: products of fp32 inputs may round to TF32.
    """
    form = form_of(a, b)
    groups = offs.shape[0] if offs is not None else b.shape[0]
    depth, n = b.shape[-2:]
    m = 0 if form == ROWS else a.shape[-2]
    rows_total = {ROWS: out.shape[0], DEPTH: b.shape[0], BATCH: 0}[form]
    upcast = a.dtype in FP8 and not native_fp8
    bits = [upcast and t.dtype is torch.float8_e4m3fn for t in (a, b)]
    fp8 = a.dtype in FP8
    a, b = as_read(a, b, native_fp8)
    block_k = _LINE // (2 if upcast else a.element_size())
    n_tiles = -(-n // tile.block_n)
    most = n_tiles * ((rows_total // tile.block_m + groups + 1) if form == ROWS else groups * -(-m // tile.block_m))
    kinds = _kind(a_scale, 2), _kind(b_scale, 1)
    described_pair = _descriptors(a, b, tile, block_k) if tma else (None, None)
    factors = [None if s is None else s.factors for s in (a_scale, b_scale)]
    return Launch(
        fn=grouped_gemm,
        grid=(max(1, min(most, programs)), 1, 1),
        args=(
            *described_pair, a, b, out, offs, bias, gather, *factors,
            *_strides(a), *_strides(b), *_strides(out), *_bias_strides(bias),
            *_shared(factors[0]), *_shared(factors[1]),
            rows_total, m, n, depth, groups, a.shape[-2],
        ),
        constexprs={
            "FORM": form, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": block_k,
            "BLOCK_E": 1 << (groups - 1).bit_length() if form != BATCH else 1, "GROUP_M": _GROUP_M, "TMA": tma,
            "A_ALONG_M": a.stride(-1) != 1, "B_ALONG_K": b.stride(-1) != 1,
            "EVEN_K": form != DEPTH and depth % block_k == 0,
            "UPCAST": upcast, "A_BITS": bits[0], "B_BITS": bits[1], "A_SCALE": kinds[0], "B_SCALE": kinds[1],
            "B_SCALE_N": _columns(b_scale, n), "INTEGER": a.dtype is torch.int8,
            "IMPRECISE": block_k if fp8 else None, "PRECISION": "tf32" if tf32 else "ieee",
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
    )  # fmt: skip


def gemm_launches(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    arch: str,
    sm_count: int,
    rows: int,
    tile: Tile | None = None,
    allow_tma: bool = True,
    native_fp8: bool,
    a_scale: Scale | None = None,
    b_scale: Scale | None = None,
    **more: Any,
) -> tuple[Launch, Launch | None]:
    """Return the launch that loads by pointers and the one with TMA descriptors, None where they are not fit.

    Args:
        rows: of an average group, for the choice of tiles; `tile` takes its place. more: as in `gemm_launch`.
    """
    blockwise = any(_kind(s, k) == BLOCKS for s, k in ((a_scale, 2), (b_scale, 1)))
    form, scales = form_of(a, b), dict[str, Any](a_scale=a_scale, b_scale=b_scale)

    def make(tma: bool) -> Launch:
        chosen = tile or choose_tile(
            arch, a.dtype, form=form, blockwise=blockwise, rows=rows, native_fp8=native_fp8, tma=tma
        )
        programs = blocks_at_once(chosen, sm_count)
        return gemm_launch(
            a, b, out, tile=chosen, programs=programs, tma=tma, native_fp8=native_fp8, **scales, **more
        )  # fmt: skip

    fit = allow_tma and has_tma(arch) and more.get("gather") is None and describable(a) and describable(b)
    return make(False), make(True) if fit else None


def as_read(a: Tensor, b: Tensor, native_fp8: bool) -> tuple[Tensor, Tensor]:
    """Return a and b as the kernel reads them: e4m3 as bytes where the chip does not multiply FP8."""
    if native_fp8:
        return a, b
    as_bytes = [t.view(torch.uint8) if t.dtype is torch.float8_e4m3fn else t for t in (a, b)]
    return as_bytes[0], as_bytes[1]


def blocks_at_once(tile: Tile, sm_count: int) -> int:
    """Return a number of programs that fills the GPU: two per multiprocessor where their shared memory allows it."""
    shared = tile.num_stages * (tile.block_m + tile.block_n) * _LINE
    together = 2 if shared <= _HALF and tile.num_warps <= 8 else 1
    return sm_count * together


def _descriptors(a: Tensor, b: Tensor, tile: Tile, block_k: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    a_block = (tile.block_m, block_k) if a.stride(-1) == 1 else (block_k, tile.block_m)
    b_block = (block_k, tile.block_n) if b.stride(-1) == 1 else (tile.block_n, block_k)
    return described(a, *a_block), described(b, *b_block)


def _kind(scale: Scale | None, along_k: int) -> int:
    if scale is None:
        return NO_SCALE
    return BLOCKS if scale.factors.shape[along_k] > 1 else LAST


def _strides(t: Tensor) -> tuple[int, ...]:
    return t.stride() if t.dim() == 3 else (0, *t.stride())


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    if bias is None:
        return 0, 0
    return bias.stride() if bias.dim() == 2 else (0, *bias.stride())


def _shared(factors: Tensor | None) -> tuple[int, ...]:
    """Return strides that stay in place along a dimension of 1."""
    if factors is None:
        return 0, 0, 0
    return tuple(s if n > 1 else 0 for n, s in zip(factors.shape, factors.stride(), strict=True))


def _columns(scale: Scale | None, n: int) -> int:
    """Return how many columns share a factor of b; one factor for all is one for a power of two that holds them."""
    if scale is None:
        return 1
    return scale.columns if scale.factors.shape[2] > 1 else 1 << max(8, n.bit_length())
