"""From checked tensors to the launches of a paged call."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from vllm_accel.dispatch.backend import AttentionArgs, PagedArgs
from vllm_accel.kernels.triton import pages, splits
from vllm_accel.kernels.triton.combine import combine_splits
from vllm_accel.kernels.triton.launch import Launch
from vllm_accel.kernels.triton.paged import paged_attention
from vllm_accel.kernels.triton.scores import folds
from vllm_accel.kernels.triton.splits import DECODE_TOKENS, Sizes, Work
from vllm_accel.kernels.triton.stream import stream_attention
from vllm_accel.kernels.triton.tiles import Tile, lookup

_E4M3 = torch.float8_e4m3fn
_FP8 = (_E4M3, torch.float8_e5m2)
_PRODUCTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
#: Splits that `combine_splits` joins at a time where bits may not depend on how many there are, and at least.
_JOINED = 8
#: Floats of those at most, 32 for each of 128 threads. A row of a batch of one has 64 splits, and eight steps that wait
#: for memory one after the other were most of its time (40 us on an H200 for 67 MB of keys, 2026-11-27).
_JOINED_FLOATS = 4096
#: Floats of partial results that a program of a stream joins at a time: 64 for each of 128 threads, of four rows.
_STREAM_FLOATS, _STREAM_ROWS = 8192, 4


#: Keys that a sequence has at most, and offsets within a block.
_LONGEST = 2**31 - 1
#: Keys that a tile may read past the last one's place.
LONGEST_STEP = 128

#: Where a call's sequences are: cu_seqlens_q, block_table, seqused_k, of which only pages need all.
Where = tuple[Tensor | None, Tensor | None, Tensor | None]
#: How keys lie: "paged"; "dense", as many of each sequence, each of which is a block; "packed", one sequence behind the
#: other, where every token is a block of one slot, seqused_k is cu_seqlens_k and nobody reads the table.
Lie = Literal["paged", "dense", "packed"]
#: Small tensors that a call may have: alibi_slopes, sinks, q_descale, k_descale, v_descale. Read as contiguous.
Options = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def where_of(args: PagedArgs, lie: Lie = "paged") -> Where:
    """Return the tensors that say where a call's sequences are."""
    if lie == "dense":
        return None, None, None
    return args.cu_seqlens_q, args.block_table if lie == "paged" else None, args.seqused_k


def options_of(args: PagedArgs | AttentionArgs) -> Options:
    """Return the small tensors of a call."""
    return args.alibi_slopes, args.sinks, args.q_descale, args.k_descale, args.v_descale


def contiguous(options: Options) -> Options:
    """Return the small tensors as the kernels read them."""
    alibi, sinks, q, k, v = (None if t is None else t.contiguous() for t in options)
    return alibi, sinks, q, k, v


#: False under the interpreter, which knows no PTX.
_COMPILED = isinstance(paged_attention, triton.runtime.JITFunction)


class Chip(NamedTuple):
    """What a chip can do beyond what every chip can.

    Attributes:
        native_e4m3: convert e4m3; else the kernel does (q and caches may be uint8 views or e4m3).
        pairs: convert two FP8 numbers of a 16-bit integer (`pages.halves`): NVIDIA's from compute capability 8.9 on.
        shuffles: look pages up in the lanes of a warp (`entries.py`): all of NVIDIA's could, timed on Hopper only.
    """

    native_e4m3: bool = True
    pairs: bool = False
    shuffles: bool = False


def chip_of(arch: str) -> Chip:
    """Return what a chip can do, by its architecture ("sm_90", "gfx942", "" for others)."""
    if not arch.startswith("sm_"):
        return Chip()
    number = int(arch[3:])
    return Chip(number >= 89, number >= 89, number == 90)


def padded(head_dim: int) -> int:
    """Return the width of a tile for a head size: a power of two, at least 16, as `tl.dot` asks."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose_tile(
    arch: str, rows: int, head_dim: int, head_dim_v: int, dtype: torch.dtype, kv_dtype: torch.dtype, mla: bool,
    form: str = "",
) -> Tile:  # fmt: skip
    """Return the tile for so many rows of a sequence and key head (query tokens times heads that share it).

    Args:
        form: "many": there are more programs than the usual tile leaves places for at a time; a smaller one leaves
            more, so that whoever is done makes room for others.
    """
    height = "m16" if rows <= 16 else "m32" if rows <= 32 else "m64" if rows <= 64 else "prefill"
    size = f"d{max(64, padded(head_dim_v if mla else max(head_dim, head_dim_v)))}"
    kind = "_fp32" if dtype is torch.float32 else "_8bit" if kv_dtype.itemsize == 1 else ""
    name = f"{height}_{size}{kind}"
    return lookup("mla" if mla else "paged", arch, [f"{name}_{form}", name] if form else [name])


def limit_of(k_cache: Tensor, v_cache: Tensor, args: PagedArgs, lie: Lie) -> int:
    """Return how many keys of a sequence the kernel reads at most; of dense keys exactly."""
    if lie == "dense":
        return v_cache.shape[1]
    if lie == "packed":
        return min(v_cache.shape[0], _LONGEST // max(k_cache.stride(0), v_cache.stride(0), 1) - LONGEST_STEP)
    return min(args.block_table.shape[1] * v_cache.shape[1], _LONGEST)


def row_bytes_of(q: Tensor, v_cache: Tensor, mla: bool) -> int:
    """Return the bytes of a key and its value."""
    return int((q.shape[2] + (0 if mla else v_cache.shape[3])) * v_cache.dtype.itemsize)


def sizes_of(q: Tensor, v_cache: Tensor, args: PagedArgs, *, mla: bool = False, lie: Lie = "paged") -> Sizes:
    """Return the exact sizes of a call, that decide how it is cut up."""
    left, right = args.window_size
    right = 0 if args.causal else right
    window = left + right + 1 if left >= 0 and right >= 0 else 0
    return Sizes(
        tokens=q.shape[0], batch=args.cu_seqlens_q.shape[0] - 1, num_heads=q.shape[1], num_kv_heads=v_cache.shape[2],
        head_dim_v=v_cache.shape[3], max_seqlen_q=args.max_seqlen_q, max_seqlen_k=args.max_seqlen_k, window=window,
        batch_invariant=args.batch_invariant, sinks=args.sinks is not None,
        row_bytes=row_bytes_of(q, v_cache, mla), even=lie == "dense",
        most=min(
            left + max(right, 0) + DECODE_TOKENS if left >= 0 else _LONGEST,
            limit_of(v_cache, v_cache, args, lie),
        ),
        mla=mla,
    )  # fmt: skip


def attention_launch(
    work: Work, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor | None, part: Tensor | None,
    args: PagedArgs, *, chip: Chip, mla: bool, tf32: bool = False, lie: Lie = "paged",
) -> Launch:  # fmt: skip
    """Return the launch that computes out and lse, or partial results where `work` splits.

    Args:
        q, k_cache, v_cache: innermost stride 1, other strides free. With `mla` v_cache is a view of k_cache.
        out: (Tq, H, Dv), contiguous. lse: fp32 (H, Tq), contiguous, or None.
        part: fp32, as many as `splits.scratch` says, at least one where a work `grows`; else None.
        chip: what it can do.
        tf32: products of fp32 inputs may round to TF32.
        lie: how keys lie. Packed ones have a dimension of 1 behind the first, as wide as a token.
    """
    heads, head_dim = q.shape[1:]
    num_blocks, page, kv_heads, head_dim_v = v_cache.shape
    page = {"paged": page, "dense": pages.DENSE.value, "packed": pages.PACKED.value}[lie]
    rope = head_dim - head_dim_v if mla else 0
    left, right = args.window_size
    right = 0 if args.causal else right
    # One query stands on the last key: neither a causal mask nor a right edge hides anything from it.
    looks_right = right >= 0 and args.max_seqlen_q > 1
    eight_bits = k_cache.dtype.itemsize == 1
    descales = (args.q_descale, args.k_descale, args.v_descale)
    q_dim, k_dim, v_dim = (-1 if d is None else d.dim() for d in descales)
    softcap, alibi = args.softcap != 0.0, 0 if args.alibi_slopes is None else args.alibi_slopes.dim()
    norm = eight_bits and q.dtype is torch.bfloat16
    product = tl.float16 if norm else _PRODUCTS.get(q.dtype, tl.float16)
    # 64 rows and more are multiplied from shared memory, which conversions have to pass through in any case.
    pairs = (
        chip.pairs and v_cache.dtype in _FP8 and not mla and product is tl.float16 and work.tile.block_m < 64
        and all(n % 2 == 0 for n in (head_dim_v, *v_cache.stride()[:3]))
    )  # fmt: skip
    # More than eight pages are not worth an instruction each. Tiles of 64 rows wait for products rather than for keys.
    per_tile, rest = divmod(work.tile.block_n, page) if page > 0 else (0, 0)
    entries = chip.shuffles and not mla and work.tile.block_m < 64 and rest == 0 and 2 <= per_tile <= 8
    where = where_of(args, lie)
    row_bytes = row_bytes_of(q, v_cache, mla)
    constexprs = {
        "GROUP": heads // kv_heads, "D": head_dim - rope, "DV": head_dim_v, "BLOCK_D": padded(head_dim - rope),
        "BLOCK_DV": padded(head_dim_v), "PAGE": page, "BLOCK_M": work.tile.block_m, "BLOCK_N": work.tile.block_n,
        "LEFT": left >= 0, "RIGHT": looks_right, "SOFTCAP": softcap, "ALIBI": alibi, "SINKS": args.sinks is not None,
        "Q_DESCALE": q_dim, "K_DESCALE": k_dim, "V_DESCALE": v_dim, "ROPE": rope, "BLOCK_R": padded(max(rope, 1)),
        "FOLD": folds(softcap, alibi != 0, 0, q_dim >= 0 or k_dim >= 0), "PRECISE": q.dtype is torch.float32,
        "PRECISION": "tf32" if tf32 else "ieee", "BITS": k_cache.dtype is _E4M3 and not chip.native_e4m3,
        "Q_BITS": q.dtype is _E4M3 and not chip.native_e4m3, "NORM": norm,
        "DTYPE": product, "PAIRS": pairs, "E5M2": v_cache.dtype is torch.float8_e5m2, "ASM": _COMPILED,
        "ENTRIES": entries,
        # Where registers are limited there is no room for so many.
        "EACH": not work.tile.maxnreg and work.tile.block_m * work.tile.block_n <= 2048,
    }  # fmt: skip
    tokens, batch = q.shape[0], args.cu_seqlens_q.shape[0] - 1
    if work.teams:
        together = max(1, _STREAM_FLOATS // (_STREAM_ROWS * padded(head_dim_v)))
        # One dense sequence has 33 parts on an H200. 32 at a time take 3 us less than 16 (27.1 us for 8k keys,
        # 2026-12-01), and registers, which programs have that need not share a multiprocessor with two others.
        if lie == "dense" and 2 * splits.on_their_way(work.tile, row_bytes) >= splits.IN_FLIGHT:
            together *= 2
        constexprs |= {"UNIT": work.unit, "JOIN_S": together, "JOIN_R": _STREAM_ROWS}
        cut: tuple[int, ...] = (work.teams, work.num_splits, work.most, work.tiles, work.high_q, int(work.tail))
    else:
        constexprs |= {"SEARCH": work.search, "SPLIT": work.split or work.grows, "FIXED": work.fixed}
        constexprs |= {"SPREAD": work.goal > 0}
        constexprs |= {"PEEL": work.search}
        cut = (work.num_splits, work.goal, work.most, work.tiles, work.low_q, work.high_q, work.part_rows)
    return Launch(
        fn=stream_attention if work.teams else paged_attention,
        grid=(work.tiles * work.parts(batch) * kv_heads, 1, 1),
        args=(
            *attention_tensors(q, k_cache, v_cache, out, lse, part, where, options_of(args), chip.native_e4m3),
            args.softmax_scale, args.softcap, max(left, 0), max(right, 0), tokens, batch, num_blocks,
            limit_of(k_cache, v_cache, args, lie), kv_heads, *cut,
            *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            args.block_table.stride(0) if lie == "paged" else 0,
        ),
        constexprs=constexprs,
        num_warps=work.tile.num_warps,
        num_stages=work.tile.num_stages,
        maxnreg=work.tile.maxnreg,
    )  # fmt: skip


def attention_tensors(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor | None, part: Tensor | None, where: Where,
    options: Options, native_e4m3: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the tensors of `attention_launch`, in the kernel's order (see `launch.Bound`)."""
    if not native_e4m3:
        q, k_cache, v_cache = (t.view(torch.uint8) if t.dtype is _E4M3 else t for t in (q, k_cache, v_cache))
    return (q, k_cache, v_cache, *where, out, lse, part, *options)


def combine_launch(
    work: Work, out: Tensor, lse: Tensor | None, part: Tensor, args: PagedArgs, lie: Lie = "paged"
) -> Launch:
    """Return the launch that joins the splits of `attention_launch`."""
    tokens, heads, head_dim_v = out.shape
    batch, width = args.cu_seqlens_q.shape[0] - 1, padded(head_dim_v)
    # A prefill has many rows of few parts: one warp for each, and 30 us less than four for 72 tiles over 8k keys.
    together = _JOINED if work.fixed or work.search else max(_JOINED, _JOINED_FLOATS // width)
    return Launch(
        fn=combine_splits,
        grid=(tokens if work.search else batch * work.high_q, heads, 1),
        args=(
            *combine_tensors(out, lse, part, where_of(args, lie), args.sinks), tokens, batch, heads, work.num_splits,
            work.goal, work.most, work.low_q, work.high_q, work.part_rows,
        ),
        constexprs={
            "DV": head_dim_v, "BLOCK_DV": width, "BLOCK_S": together, "SEARCH": work.search,
            "SPREAD": work.goal > 0, "SINKS": args.sinks is not None,
        },
        num_warps=1 if work.search else 4,
        num_stages=2,
    )  # fmt: skip


def combine_tensors(
    out: Tensor, lse: Tensor | None, part: Tensor, where: Where, sinks: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the tensors of `combine_launch`, in the kernel's order."""
    return (part, where[0], where[2], sinks, out, lse)
