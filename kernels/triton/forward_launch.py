"""From checked tensors to a launch of `forward.attention_forward`."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.kernels.triton.forward import attention_forward
from vllm_accel.kernels.triton.launch import Described, Launch
from vllm_accel.kernels.triton.scores import ADDITIVE, BOOLEAN, NO_BIAS, folds
from vllm_accel.kernels.triton.tiles import Tile, lookup

#: Keys and values of the heads that run side by side should fit the L2 cache. On an H200 (causal, 128, 32 heads of
#: 8192, bf16, 2026-11-23) one head at a time gives 445 TFLOP/s, 5 MB 440, 10 MB 457, 20 MB 462, 40 MB 464, all heads
#: 461.
_L2_BYTES = 20 << 20

#: Head sizes with which tiles that come by TMA were the fastest on an H200 (docs/triton.md).
_BY_TMA = (64, 128, 256)
#: Of those, with which q in registers was faster too.
_HELD = (128, 256)
#: The interpreter knows no PTX.
_COMPILED = isinstance(attention_forward, triton.runtime.JITFunction)
#: Operations of a call from which that pays: descriptors cost the host 14 us there, and this takes the device 70.
TMA_WORK = 3e10


def padded(head_dim: int) -> int:
    """Return the width of a tile for a head size: a power of two, at least 16, as `tl.dot` asks."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose_tile(
    arch: str, dtype: torch.dtype, head_dim: int, head_dim_v: int, *, causal: bool, heavy: bool, tma: bool = False
) -> Tile:
    """Return the tile of a kind of call. It depends on no length and no batch, so a sequence's bits depend on neither.

    Args:
        heavy: the logits need more registers (softcap, ALiBi, bias, mask, window, dropout or descales).
        tma: tiles come by TMA.
    """
    widths = padded(head_dim), padded(head_dim_v)
    heavy = heavy or widths != (head_dim, head_dim_v)  # so do masks along the head
    size = f"d{max(widths)}"
    if dtype is torch.float32:
        size = f"fp32_{size}"
    kinds = [f"{size}_heavy"] if heavy else []
    kinds += [f"{size}_tma"] if tma else []
    kinds += [f"{size}_causal"] if causal else []
    return lookup("forward", arch, [*kinds, size])


def by_tma(
    arch: str, dtype: torch.dtype, head_dim: int, head_dim_v: int, *, heavy: bool, packed: bool, invariant: bool
) -> bool:
    """Tell whether tiles of a kind of call come by TMA (see `forward`).

    That is for calls of `TMA_WORK` and more with tensors that are `describable`, at addresses that are multiples of 16.
    Others are read by pointers.

    Args:
        invariant: bits may not depend on how much there is to compute.
    """
    light = head_dim == head_dim_v and head_dim in _BY_TMA and dtype is not torch.float32 and not heavy
    return arch == "sm_90" and light and not packed and not invariant


def work_of(q: Tensor, k: Tensor, causal: bool) -> float:
    """Return the operations of a dense call: q, k (B, S, heads, D), as many channels of V."""
    batch, seqlen_q, heads, head_dim = q.shape
    return 4.0 * batch * heads * seqlen_q * k.shape[1] * head_dim * (0.5 if causal and seqlen_q == k.shape[1] else 1.0)


def worth_tma(q: Tensor, k: Tensor, causal: bool, block_m: int, sm_count: int) -> bool:
    """Tell whether tiles of a dense call should come by TMA.

    Those are of 64 rows, of which one takes as long as three at a time. Where 128 rows at a time find a multiprocessor
    each they are faster: 64, 96 and 128 tiles of 128 rows took 136 to 140 us and 173 to 178 by TMA, 144 and 160 tiles
    264 and 181 (causal, 8k keys of 128 channels on an H200, 2026-12-01; others were not timed).

    Args:
        block_m: rows of a tile that comes by pointers. sm_count: multiprocessors, 0 if unknown.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    few = causal and head_dim == 128 and batch * heads * -(-seqlen_q // block_m) <= sm_count
    return work_of(q, k, causal) >= TMA_WORK and not few


def describable(*tensors: Tensor) -> bool:
    """Tell whether TMA can read (..., tokens, heads, size): not empty, and strides positive multiples of 16 bytes."""
    for t in tensors:
        strides = zip(t.stride()[:-1], t.shape[:-1], strict=True)
        if not t.numel() or not all(n == 1 or (s > 0 and s * t.element_size() % 16 == 0) for s, n in strides):
            return False
    return True


def _described(t: Tensor, rows: int) -> Described:
    """Describe (B, S, heads, D) as (B, heads, S, D) in tiles of some rows."""
    batch, tokens, heads, size = t.shape
    shape = [batch, heads, tokens, size]
    strides = (t.stride(0), t.stride(2), t.stride(1))
    # The stride of a dimension of 1 is never used, but checked; any valid one does.
    used = [s if n > 1 else tokens * heads * size for s, n in zip(strides, shape, strict=False)]
    return shape, [*used, 1], [1, 1, rows, size]


def forward_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    rng: Tensor | None,
    args: AttentionArgs,
    tile: Tile,
    tf32: bool = False,
    tma: bool = False,
) -> Launch:
    """Return the launch that writes out and lse.

    Args:
        q, k, v: (B, S, H, D) or packed (T, H, D), innermost stride 1, other strides free.
        out: contiguous, q's shape with Dv. lse: contiguous fp32 (B, H, Sq) or (H, Tq), or None.
        rng: int64 (2,) on the device, exactly with dropout. tf32: products of fp32 inputs may round to TF32.
        tma: tiles come by TMA, where `by_tma` and `describable` allow it.
    """
    varlen = args.cu_seqlens_q is not None
    heads, head_dim = q.shape[-2:]
    kv_heads, head_dim_v = v.shape[-2:]
    batch = args.cu_seqlens_q.shape[0] - 1 if args.cu_seqlens_q is not None else q.shape[0]
    strides = [s for t in (q, k, v) for s in ((0, *t.stride()[:2]) if varlen else t.stride()[:3])]
    bias = args.attn_bias
    bias_strides = (
        (0,) * 4 if bias is None else [s if n > 1 else 0 for n, s in zip(bias.shape, bias.stride(), strict=True)]
    )
    left, right = args.window_size
    right = 0 if args.causal else right
    descales = (args.q_descale, args.k_descale, args.v_descale)
    dims = [0 if t is None else t.dim() for t in descales]
    alibi = 0 if args.alibi_slopes is None else args.alibi_slopes.dim()
    bias_kind = NO_BIAS if bias is None else BOOLEAN if bias.dtype is torch.bool else ADDITIVE
    tiles = -(-args.max_seqlen_q // tile.block_m)
    reach = max(strides[1::3]) * max(tile.block_m, tile.block_n) + padded(head_dim) + padded(head_dim_v)
    if bias is not None:
        reach = max(reach, args.max_seqlen_q * bias_strides[2] + args.max_seqlen_k * bias_strides[3])
    constexprs = {
        "D": head_dim, "DV": head_dim_v, "BLOCK_D": padded(head_dim), "BLOCK_DV": padded(head_dim_v),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "VARLEN": varlen, "LEFT": left >= 0, "RIGHT": right >= 0,
        "FOLD": folds(args.softcap != 0.0, alibi != 0, bias_kind, descales[0] is not None or descales[1] is not None),
        "SOFTCAP": args.softcap != 0.0, "ALIBI": alibi, "BIAS": bias_kind,
        "Q_DESCALE": dims[0], "K_DESCALE": dims[1], "V_DESCALE": dims[2],
        "WIDE": reach >= 1 << 31, "PRECISE": q.dtype is torch.float32, "PRECISION": "tf32" if tf32 else "ieee",
        "TMA": tma, "HELD": tma and head_dim in _HELD and _COMPILED,
    }  # fmt: skip
    described: tuple[Described | None, ...] = (None, None, None)
    if tma:
        described = (_described(q, tile.block_m), _described(k, tile.block_n), _described(v, tile.block_n))
    return Launch(
        fn=attention_forward,
        grid=(tiles * heads * (batch + varlen), 1, 1),
        args=(
            *varying(q, k, v, out, lse, rng, args), args.softmax_scale, args.softcap, args.dropout_p,
            *strides, *bias_strides,
            q.shape[-3], k.shape[-3], batch, heads, kv_heads, tiles,
            _together(k, v, heads // kv_heads, args.max_seqlen_k) if right >= 0 else 1, left, right,
        ),
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.maxnreg,
        described=described,
    )  # fmt: skip


def varying(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, rng: Tensor | None, args: AttentionArgs
) -> tuple[Tensor | None, ...]:
    """Return the tensors of a launch, in the kernel's order (see `launch.Bound`)."""
    return (
        q, k, v, out, lse, args.cu_seqlens_q, args.cu_seqlens_k, args.alibi_slopes, args.attn_bias, args.sinks,
        args.q_descale, args.k_descale, args.v_descale, rng,
    )  # fmt: skip


def _together(k: Tensor, v: Tensor, group: int, max_seqlen_k: int) -> int:
    """Return how many query heads share the L2 cache at a time: whole groups, at least one."""
    per_group = max_seqlen_k * (k.shape[-1] + v.shape[-1]) * k.element_size()
    return group * max(1, _L2_BYTES // per_group)
