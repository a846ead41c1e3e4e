"""Dense and packed calls of few queries in `triton`: the kernels over pages, with keys that lie in none.

The forward kernel gives each query head a tile of rows of its own, so that one query fills a 128th of it and nobody
shares out the keys: 32 sequences of 4096 keys took 564 us on an H200, with the heads of a group in a tile and the keys
in equal shares 135 (2026-12-01). Sharing them also pays for a chunk whose tiles are too few for the GPU: 159 us instead
of 465 (113 queries, 46k keys, 24 heads).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_accel.backends.triton import tf32_allowed, tidy
from vllm_accel.backends.triton_paged import Prepared, TritonPaged
from vllm_accel.dispatch.backend import AttentionArgs, PagedArgs
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.kernels.triton.paged_launch import LONGEST_STEP, Lie, Where, options_of
from vllm_accel.kernels.triton.splits import DECODE_TOKENS, MIN_SPLIT

#: What the paged kernel does not do, and what promises bits that do not depend on the batch: splits do.
_NOT = (Feature.BIAS, Feature.MASK, Feature.DROPOUT, Feature.BATCH_INVARIANT)
_MAX_OFFSET = 2**31 - 1  # within a block, which here is a sequence
#: A chunk: tiles of 128 rows, at most three for four multiprocessors, and so many keys for each that would be idle. On
#: an H200 96 tiles took 129 us and 137 without (8k keys), 72 tiles 67 and 73 (4k), but 112 tiles 144 and 141 (8k).
_TILE, _WORTH = 128, 1250


def shares_keys(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, sm_count: int) -> bool:
    """Tell whether programs should share out the keys: of a decode (up to eight queries), or of a chunk of few tiles.

    A chunk is dense. Of sequences in one tensor the host does not know how many tiles there are.

    Args:
        sm_count: multiprocessors, 0 if unknown.
    """
    keys, queries = args.max_seqlen_k, args.max_seqlen_q
    reach = (keys + LONGEST_STEP) * max(k.stride(-3), v.stride(-3))
    if any(feature in spec.features for feature in _NOT) or reach > _MAX_OFFSET:
        return False
    if queries <= DECODE_TOKENS:
        return keys >= MIN_SPLIT
    if Feature.VARLEN in spec.features:
        return False
    tiles = q.shape[0] * q.shape[2] * -(-queries // _TILE)
    if spec.dtype is torch.float32 and (3 * tiles > sm_count or keys < 4096):  # not timed, and its tiles are smaller
        return False
    idle = keys * (sm_count - tiles) >= _WORTH * sm_count > 0
    return idle and 4 * tiles <= 3 * sm_count and args.window_size[0] < 0


def prepare_shared(
    spec: AttentionSpec, device: Device, q: Tensor, args: AttentionArgs
) -> Callable[[Tensor, Tensor, Tensor, AttentionArgs], tuple[Tensor, Tensor | None, Tensor | None]]:
    """Return `forward` for calls with these sizes and options; tensors and floats may differ.

    Args:
        q: (B, Sq, H, D) or packed (T, H, D). args: with windows that no sum of positions overflows with.
    """
    heads, head_dim = q.shape[-2:]
    packed = args.cu_seqlens_k is not None
    lie: Lie = "packed" if packed else "dense"
    paged = TritonPaged(spec, device, lie=lie)
    rows_of, out_shape = (-1, heads, head_dim), (*q.shape[:-1], -1)
    # A launch reads an address, and the strides that it was prepared with: no view is needed where rows are one.
    in_place = q.reshape(rows_of).data_ptr() == q.data_ptr()
    small = (*options_of(args), args.cu_seqlens_q, args.cu_seqlens_k)
    untidy = any(t is not None and not t.is_contiguous() for t in small)
    window = args.window_size
    fp32 = spec.dtype is torch.float32 and device.platform == "cuda"
    ways: dict[bool, Prepared] = {}  # with fp32: whether products round to TF32, which may change between two calls

    def prepared(q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, tf32: bool) -> Prepared:
        # Whatever is None here nobody reads: it says how many sequences there are.
        batch = args.cu_seqlens_q.shape[0] - 1 if args.cu_seqlens_q is not None else q.shape[0]
        unread = torch.empty(batch + 1, device="meta")
        ends, table, used = [unread if t is None else t for t in where_of(args)]
        paged_args = PagedArgs(
            ends, table, used, *options_of(args), args.max_seqlen_q,
            args.max_seqlen_k, args.softmax_scale, args.causal, window, args.softcap, args.need_lse,
            args.deterministic, False,
        )  # fmt: skip
        if packed:
            k, v = (t.as_strided((t.shape[0], 1, *t.shape[1:]), (t.stride(0), *t.stride())) for t in (k, v))
        ways[tf32] = found = paged.prepare(q.reshape(rows_of), k, v, paged_args, tf32)
        return found

    def where_of(args: AttentionArgs) -> Where:
        return args.cu_seqlens_q, None, args.cu_seqlens_k

    def forward(q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tf32 = fp32 and tf32_allowed()
        if untidy:
            args = tidy(args)
        way = ways.get(tf32) or prepared(q, k, v, args, tf32)
        out, lse = way(
            q if in_place else q.reshape(rows_of), k, v, where_of(args), options_of(args), args.softmax_scale,
            args.softcap,
        )  # fmt: skip
        if lse is not None and not packed:
            lse = lse.view(heads, *out_shape[:2]).transpose(0, 1).contiguous()
        return out.view(out_shape), lse, None

    return forward
