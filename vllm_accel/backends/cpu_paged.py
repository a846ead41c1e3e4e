"""Our C++ kernels over a paged cache: keys and values are read in their blocks, 1-byte ones dequantised on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import PagedArgs
from vllm_accel.dispatch.spec import AttentionSpec
from vllm_accel.kernels.cpu import load, type_code

#: Caches beside those of q's dtype.
KV_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.int8})


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the result for queries of a dtype."""
    return dtype if dtype.itemsize > 1 else torch.bfloat16


class CpuPagedKernel:
    """Decode and chunked prefill; also MLA, whose values are the first channels of the keys."""

    def __init__(self, dtype: torch.dtype, kv_dtype: torch.dtype, *, isa: int = 0) -> None:
        self._forward = load().module.forward
        self._dtypes = (dtype, kv_dtype, out_dtype(dtype))
        self._types = type_code(*self._dtypes, None, None)
        self._isa = isa

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
        """Return out and lse (None unless needed)."""
        tokens, heads, _ = q.shape
        out = q.new_empty((tokens, heads, v_cache.shape[-1]), dtype=self._dtypes[2])
        lse = q.new_empty((heads, tokens), dtype=torch.float32) if args.need_lse else None
        types = self._types if args.sinks is None else type_code(*self._dtypes, None, args.sinks)
        left, right = args.window_size
        self._forward(
            q, k_cache, v_cache, out, lse, args.cu_seqlens_q, None, args.block_table, args.seqused_k,
            args.alibi_slopes, None, args.sinks, args.q_descale, args.k_descale, args.v_descale,
            types, args.softmax_scale, args.softcap, left, 0 if args.causal else right, torch.get_num_threads(),
            self._isa,
        )  # fmt: skip
        return out, lse


def bind_paged(spec: AttentionSpec) -> CpuPagedKernel:
    """Return the kernel of these dtypes."""
    return CpuPagedKernel(spec.dtype, spec.kv_dtype)
