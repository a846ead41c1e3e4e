"""From a checked call to the launches of its backward pass (see `backward`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_accel.kernels.triton.backward_bias import bias_kernel
from vllm_accel.kernels.triton.backward_delta import delta_kernel, sinks_kernel
from vllm_accel.kernels.triton.backward_dkv import dkv_kernel
from vllm_accel.kernels.triton.backward_dq import dq_kernel
from vllm_accel.kernels.triton.launch import Launch
from vllm_accel.kernels.triton.tiles import Tile

#: Programs that share the walk of a small, widely broadcast bias: two for each of the 132 multiprocessors of an H100.
#: The same everywhere, so that the bits do not depend on the GPU's size. Compiled, not timed.
_BIAS_PROGRAMS = 264
_DELTA_ROWS = 16
_SINKS_ROWS = 1024


class Problem(NamedTuple):
    """One attention call and what its forward pass returned.

    Dense q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), or packed (T, heads, D) with int32 cu_seqlens;
    innermost stride 1, other strides free. out contiguous, like q with Dv; lse fp32 (B, H, Sq) or (H, Tq), natural;
    rng int64 (2,) on the device with dropout. dout like out, dlse like lse or None. attn_bias (B or 1, H or 1, Sq or
    1, Sk or 1), bool or floating.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    rng: Tensor | None
    dout: Tensor
    dlse: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    alibi_slopes: Tensor | None
    attn_bias: Tensor | None
    sinks: Tensor | None
    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    window_size: tuple[int, int]
    softcap: float
    dropout_p: float
    tf32: bool


def block_of(head_dim: int) -> int:
    """Return the width of a tile for a head size: a power of two, at least the 16 that `tl.dot` asks."""
    return max(16, 1 << (head_dim - 1).bit_length())


def delta_launch(problem: Problem, delta: Tensor) -> Launch:
    """Return the launch that fills delta. A packed tensor is one sequence of all its tokens."""
    return row_delta_launch(problem.out, problem.dout, problem.dlse, delta)


def row_delta_launch(out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor) -> Launch:
    """Return the launch that fills delta from tensors as in `Problem`."""
    tokens, heads, head_dim_v = out.shape[-3:]
    batch = 1 if out.dim() == 3 else out.shape[0]
    tiles = -(-tokens // _DELTA_ROWS)
    return Launch(
        fn=delta_kernel,
        grid=(tiles * heads * batch, 1, 1),
        args=(out, dout, dlse, delta, *_strides(dout), tokens, tiles, heads),
        constexprs={
            "HEAD_DIM_V": head_dim_v, "BLOCK": _DELTA_ROWS, "BLOCK_DV": block_of(head_dim_v),
            "WIDE": _is_wide(_DELTA_ROWS, out, dout), "DLSE": dlse is not None,
        },
        num_warps=max(1, block_of(head_dim_v) // 128),
        num_stages=1,
    )  # fmt: skip


def sinks_launch(problem: Problem, row_dot: Tensor, dsinks: Tensor) -> Launch:
    """Return the launch that sums the gradient of the sinks, from what the dQ kernel left in row_dot."""
    heads, tokens = problem.lse.shape[-2:]
    batch = problem.lse.numel() // (heads * tokens)
    return Launch(
        fn=sinks_kernel,
        grid=(heads, 1, 1),
        args=(problem.sinks, problem.lse, row_dot, problem.dlse, dsinks, tokens, batch, heads),
        constexprs={"DLSE": problem.dlse is not None, "BLOCK": _SINKS_ROWS},
        num_warps=4,
        num_stages=1,
    )


def dkv_launch(problem: Problem, delta: Tensor, dk: Tensor, dv: Tensor, dq_sum: Tensor | None, tile: Tile) -> Launch:
    """Return the launch that fills dk and dv, and adds to dq_sum (fp32, zeros) if it is given."""
    heads, kv_heads = problem.q.shape[-2], problem.k.shape[-2]
    tiles = max(1, -(-problem.max_seqlen_k // tile.block_n))
    return Launch(
        fn=dkv_kernel,
        grid=(tiles * kv_heads * _batch(problem), 1, 1),
        args=(
            problem.q, problem.k, problem.v, problem.dout, problem.lse, delta, dk, dv, dq_sum,
            problem.cu_seqlens_q, problem.cu_seqlens_k, *_optional(problem), *_floats(problem), *_all_strides(problem),
            problem.q.shape[-3], problem.k.shape[-3], *problem.window_size, tiles, heads, heads // kv_heads,
        ),
        constexprs={**_flags(problem, tile), "DQ_ATOMIC": dq_sum is not None},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
    )  # fmt: skip


def dq_launch(problem: Problem, delta: Tensor, dq: Tensor, row_dot: Tensor | None, tile: Tile) -> Launch:
    """Return the launch that fills dq, and row_dot (fp32, like lse) if it is given."""
    heads, kv_heads = problem.q.shape[-2], problem.k.shape[-2]
    tiles = max(1, -(-problem.max_seqlen_q // tile.block_m))
    return Launch(
        fn=dq_kernel,
        grid=(tiles * heads * _batch(problem), 1, 1),
        args=(
            problem.q, problem.k, problem.v, problem.dout, problem.lse, delta, dq, row_dot,
            problem.cu_seqlens_q, problem.cu_seqlens_k, *_optional(problem), *_floats(problem), *_all_strides(problem),
            problem.q.shape[-3], problem.k.shape[-3], *problem.window_size, tiles, heads, heads // kv_heads,
        ),
        constexprs={**_flags(problem, tile), "ROW_DOT": row_dot is not None},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
    )  # fmt: skip


def bias_parts(problem: Problem, tile: Tile) -> int:
    """Return how many programs share the walk over what one tile of the bias was broadcast to."""
    assert problem.attn_bias is not None
    batch, heads, rows, keys = problem.attn_bias.shape
    blocks_q = -(-problem.max_seqlen_q // tile.block_m)
    blocks_k = -(-problem.max_seqlen_k // tile.block_n)
    own = batch * heads * (1 if rows == 1 else blocks_q) * (1 if keys == 1 else blocks_k)
    steps = problem.q.shape[0] * problem.q.shape[2] * blocks_q * blocks_k // own
    return int(max(1, min(steps, _BIAS_PROGRAMS // own)))


def bias_launch(problem: Problem, delta: Tensor, sums: Tensor, tile: Tile) -> Launch:
    """Return the launch that fills the parts of the bias's gradient, (parts, *attn_bias.shape)."""
    parts, batch, bias_heads, rows, keys = sums.shape
    heads, kv_heads = problem.q.shape[-2], problem.k.shape[-2]
    blocks_q = 1 if rows == 1 else -(-problem.max_seqlen_q // tile.block_m)
    blocks_k = 1 if keys == 1 else -(-problem.max_seqlen_k // tile.block_n)
    flags = _flags(problem, tile)
    del flags["VARLEN"], flags["BIAS"]
    return Launch(
        fn=bias_kernel,
        grid=(parts * batch * bias_heads * blocks_q * blocks_k, 1, 1),
        args=(
            problem.q, problem.k, problem.v, problem.dout, problem.lse, delta, sums, *_optional(problem),
            *_floats(problem), *_all_strides(problem),
            problem.max_seqlen_q, problem.max_seqlen_k, *problem.window_size, problem.q.shape[0], heads,
            heads // kv_heads, batch, bias_heads, rows, keys, parts,
        ),
        constexprs={**flags, "SUM_ROWS": rows == 1, "SUM_KEYS": keys == 1},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
    )  # fmt: skip


def _batch(problem: Problem) -> int:
    return problem.q.shape[0] if problem.cu_seqlens_q is None else problem.cu_seqlens_q.shape[0] - 1


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Return the strides of batch (0 in a packed tensor), token and head."""
    return (0, t.stride(0), t.stride(1)) if t.dim() == 3 else (t.stride(0), t.stride(1), t.stride(2))


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    if bias is None:
        return (0, 0, 0, 0)
    return tuple(s if n > 1 else 0 for n, s in zip(bias.shape, bias.stride(), strict=True))


def _all_strides(problem: Problem) -> tuple[int, ...]:
    tensors = (problem.q, problem.k, problem.v, problem.dout)
    return (*(s for t in tensors for s in _strides(t)), *_bias_strides(problem.attn_bias))


def _optional(problem: Problem) -> tuple[Tensor | None, ...]:
    descales = (problem.q_descale, problem.k_descale, problem.v_descale)
    return (problem.alibi_slopes, problem.attn_bias, *descales, problem.rng)


def _floats(problem: Problem) -> tuple[float, float, float]:
    return (problem.softmax_scale, problem.softcap, problem.dropout_p)


def _is_wide(block: int, *tensors: Tensor) -> bool:
    """Tell whether offsets within a tile of `block` rows pass 2^31."""
    return any(abs(_strides(t)[1]) * block + t.shape[-1] >= 1 << 31 for t in tensors)


def _flags(problem: Problem, tile: Tile) -> dict[str, Any]:
    head_dim, head_dim_v = problem.q.shape[-1], problem.v.shape[-1]
    bias = problem.attn_bias
    left, right = problem.window_size
    _, _, bias_q, bias_k = _bias_strides(bias)
    wide = _is_wide(max(tile.block_m, tile.block_n), problem.q, problem.k, problem.v, problem.dout)

    def dims(t: Tensor | None) -> int:
        return -1 if t is None else t.dim()

    return {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": block_of(head_dim),
        "BLOCK_DV": block_of(head_dim_v),
        "BM": tile.block_m,
        "BN": tile.block_n,
        "VARLEN": problem.cu_seqlens_q is not None,
        "LEFT": left >= 0,
        "RIGHT": right >= 0,
        "SOFTCAP": problem.softcap != 0.0,
        "ALIBI": 0 if problem.alibi_slopes is None else problem.alibi_slopes.dim(),
        "BIAS": 0 if bias is None else 2 if bias.dtype is torch.bool else 1,
        "WIDE": wide or problem.max_seqlen_q * abs(bias_q) + problem.max_seqlen_k * abs(bias_k) >= 1 << 31,
        "DROPOUT": problem.rng is not None,
        "Q_DESCALE": dims(problem.q_descale),
        "K_DESCALE": dims(problem.k_descale),
        "V_DESCALE": dims(problem.v_descale),
        "PRECISION": "tf32" if problem.tf32 else "ieee",
    }
