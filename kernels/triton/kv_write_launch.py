"""From checked tensors to a launch of `kv_write.write_kv_rows`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_accel.kernels.triton.kv_write import write_kv_rows
from vllm_accel.kernels.triton.launch import Bound, Launch

_NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}
#: What a cache may hold, and k and v may be: float64 would be rounded to fp32 on its way.
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
CACHE_DTYPES = DTYPES | _NAMES.keys()
#: Numbers of one program: 32 for each of 128 threads.
_ELEMENTS = 4096
#: Launches kept: one per shape of k, so one per number of tokens.
_KEPT = 256
_bound: dict[Any, Bound] = {}


def write_kv_launch(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> Launch:  # fmt: skip
    """Return the launch that writes k and v to their slots.

    Args:
        k, v: (T, Hkv, D), (T, Hkv, Dv), innermost stride 1; v may be None. Dtypes: `DTYPES`.
        k_cache, v_cache: (num_blocks, block_size, Hkv, D / Dv), innermost stride 1. Dtypes: `CACHE_DTYPES`.
        slot_mapping: int32 or int64 (n,), contiguous, n <= T: a negative slot, or one past the cache, is skipped.
        k_scale, v_scale: fp32, scalar or (Hkv,), contiguous, or None: the cache gets k / k_scale, rounded to nearest
            even and saturated.
    """
    heads, head_dim = k.shape[1:]
    head_dim_v = v.shape[2] if v is not None else head_dim
    width, width_v = (1 << (n - 1).bit_length() for n in (head_dim, head_dim_v))
    block_h = max(1, min(1 << (heads - 1).bit_length(), _ELEMENTS // max(width, width_v)))
    copies = k.dtype is k_cache.dtype and k_scale is None and v_scale is None
    none3 = (0, 0, 0)
    return Launch(
        fn=write_kv_rows,
        grid=(slot_mapping.shape[0], -(-heads // block_h), 1),
        args=(
            *write_kv_tensors(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale),
            k_cache.shape[0] * k_cache.shape[1], heads, *k.stride()[:2], *(none3[:2] if v is None else v.stride()[:2]),
            *k_cache.stride()[:3], *(none3 if v_cache is None else v_cache.stride()[:3]),
        ),
        constexprs={
            "PAGE": k_cache.shape[1], "D": head_dim, "DV": head_dim_v, "BLOCK_H": block_h, "BLOCK_D": width,
            "BLOCK_DV": width_v, "K_SCALE": -1 if k_scale is None else k_scale.dim(),
            "V_SCALE": -1 if v_scale is None else v_scale.dim(),
            "KIND": "copy" if copies else _NAMES.get(k_cache.dtype, "cast"),
        },
        num_warps=4,
        num_stages=1,
    )  # fmt: skip


def write_kv_tensors(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the tensors of the launch, in the kernel's order; it writes FP8 as bytes."""
    if k_cache.dtype in _NAMES and k_cache.dtype.is_floating_point:
        k_cache = k_cache.view(torch.uint8)
        v_cache = None if v_cache is None else v_cache.view(torch.uint8)
    return (k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def write_kv(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    """Launch what `write_kv_launch` describes, on the current stream of the current device; prepared once per shape."""
    tensors = write_kv_tensors(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    kinds = tuple([None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors])
    key = (kinds, k_cache.dtype, k.device)  # the kinds know FP8 as bytes only
    bound = _bound.get(key)
    if bound is None:
        if len(_bound) >= _KEPT:
            _bound.clear()
        bound = Bound(write_kv_launch(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale))
        _bound[key] = bound
    bound(tensors)
