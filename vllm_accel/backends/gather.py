"""A paged cache for kernels that know none: keys and values are copied out of their blocks, then attended packed.

The copy reads and writes every key and value once more, at every call. It is what a backend without paged kernels can
do, on any device, and its price is part of that backend's time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import AttentionArgs, AttentionKernel, PagedArgs
from vllm_accel.dispatch.capability import FEATURE_TEXT, Capability, Note, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature

KV_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.int8})
_DESCALES = Feature.K_DESCALE | Feature.V_DESCALE
COPY = "copies keys and values out of the cache at every call"


def with_gather(capability: Capability, note: str = COPY) -> Capability:
    """Return the capability of a backend whose packed kernel also serves paged calls, over copies.

    Its rules and guards judge a paged call by the packed call that it becomes. Factors of the cache are applied by the
    copy, where the kernel takes fp32: rounded to 16 bits after the factor, an int8 cache moves a log-sum-exp by 0.05.
    Those of dense tensors are refused as before.
    """
    new = _DESCALES & ~capability.features if torch.float32 in capability.dtypes else Feature(0)
    descales = tuple(_dense_descale(flag) for flag in Feature if flag in new)
    return replace(
        capability,
        features=capability.features | Feature.PAGED | Feature.MLA | new,
        kv_dtypes=KV_DTYPES,
        rules=(*(_of_packed(rule) for rule in capability.rules), *descales),
        guards=tuple(_of_packed(guard) for guard in capability.guards),
        notes=(*capability.notes, Note(Feature.PAGED, note)),
    )


def packed_spec(spec: AttentionSpec) -> AttentionSpec:
    """Return the spec of the packed call that a paged one becomes."""
    own = Feature.PAGED | Feature.MLA | Feature.FINITE_TAIL | _DESCALES
    dtype = _wide(spec.dtype) if spec.features & _DESCALES else spec.dtype
    return replace(spec, features=spec.features & ~own | Feature.VARLEN, dtype=dtype, kv_dtype=dtype, block_size=0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _of_packed(limit: Any) -> Any:
    """Make a rule or guard see the packed call."""

    def check(spec: Any, other: Any) -> str | None:
        paged = isinstance(spec, AttentionSpec) and Feature.PAGED in spec.features
        text: str | None = limit.check(packed_spec(spec) if paged else spec, other)
        return text

    return replace(limit, check=check)


def _dense_descale(flag: Feature) -> Rule:
    name = (flag.name or "").lower()

    def check(spec: AttentionSpec, device: Device) -> str | None:
        dense = flag in spec.features and Feature.PAGED not in spec.features
        return f"does not do {FEATURE_TEXT[name]}" if dense else None

    return Rule(f"feature:{name}", check)


class GatherKernel:
    """A paged kernel made of a packed one; `mla` says that the values are a part of the keys."""

    def __init__(self, kernel: AttentionKernel, mla: bool) -> None:
        self._kernel, self._mla = kernel, mla

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
        """Copy, then attend; lengths are read on the host where they are there already."""
        dtype = q.dtype
        if args.k_descale is not None or args.v_descale is not None:
            q = q.to(_wide(dtype))
        pages = pages_on_host(args, k_cache) if q.device.type == "cpu" else pages_on_device(args, k_cache)
        k = pages.take(k_cache, args.k_descale, q.dtype)
        v = k[..., : v_cache.shape[-1]] if self._mla else pages.take(v_cache, args.v_descale, q.dtype)
        packed = AttentionArgs(
            args.cu_seqlens_q, pages.cu_seqlens_k, args.alibi_slopes, None, args.sinks, None, None, None,
            min(args.max_seqlen_q, q.shape[0]), min(args.max_seqlen_k, k.shape[0]), args.softmax_scale, args.causal,
            args.window_size, args.softcap, 0.0, args.need_lse, args.deterministic, args.batch_invariant,
        )  # fmt: skip
        out, lse, _ = self._kernel.forward(q, k, v, packed)
        return out.to(dtype), lse


class Pages:
    """Where the keys of all sequences lie, one after another.

    Attributes:
        cu_seqlens_k: int32 (B + 1,). block, slot: (Tk,) of each key. sequence: (Tk,), which one it belongs to.
    """

    def __init__(self, cu_seqlens_k: Tensor, block: Tensor, slot: Tensor, sequence: Tensor) -> None:
        self.cu_seqlens_k, self.block, self.slot, self.sequence = cu_seqlens_k, block, slot, sequence

    def take(self, cache: Tensor, descale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the keys or values (Tk, Hkv, D) in `dtype`, with their factor."""
        found = bits(cache)[self.block, self.slot].view(cache.dtype)
        if descale is not None:
            factor = descale[self.sequence] if descale.dim() == 2 else descale
            return found.to(dtype) * factor.to(dtype).unsqueeze(-1)
        return found.to(dtype)


def pages_on_host(args: PagedArgs, cache: Tensor) -> Pages:
    """Find every key, with lengths read."""
    used = args.seqused_k.to(torch.int64)
    ends = torch.zeros(used.shape[0] + 1, dtype=torch.int32)
    torch.cumsum(used, 0, dtype=torch.int32, out=ends[1:])
    sequence = torch.repeat_interleave(used)
    position = torch.arange(sequence.shape[0]) - ends[:-1].long()[sequence]
    block_size = cache.shape[1]
    block = args.block_table[sequence, torch.div(position, block_size, rounding_mode="floor")].long()
    return Pages(ends, block, position % block_size, sequence)


def pages_on_device(args: PagedArgs, cache: Tensor) -> Pages:
    """Lay out as many rows as there can be; those past the last key repeat some key and belong to no sequence."""
    (num_blocks, block_size), width = cache.shape[:2], args.block_table.shape[1]
    batch, longest = args.seqused_k.shape[0], min(args.max_seqlen_k, width * block_size)
    ends = torch.zeros(batch + 1, dtype=torch.int32, device=cache.device)
    torch.cumsum(args.seqused_k.clamp(0, longest), 0, dtype=torch.int32, out=ends[1:])
    rows = torch.arange(batch * longest, device=cache.device)
    sequence = torch.searchsorted(ends[1:], rows, right=True).clamp(max=batch - 1)
    position = (rows - ends[sequence]) % longest
    block = args.block_table[sequence, torch.div(position, block_size, rounding_mode="floor")]
    return Pages(ends, block.long().clamp(0, num_blocks - 1), position % block_size, sequence)


def bits(cache: Tensor) -> Tensor:
    """Return the cache as something that every device can index: 8-bit floats have no indexing kernels on some."""
    return cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache


def sequence(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """Return the keys or values (length, Hkv, D) of one sequence from its row of the block table."""
    block_size = cache.shape[1]
    taken = bits(cache)[blocks[: -(-length // block_size)].long()].flatten(0, 1)[:length]
    return taken.view(cache.dtype)


def padded(cache: Tensor, table: Tensor, used: Tensor, longest: int) -> Tensor:
    """Return keys or values (B, longest, Hkv, D), zeros past each length; nothing is read on the host."""
    num_blocks, block_size = cache.shape[:2]
    steps = torch.arange(longest, device=cache.device)
    blocks = table[:, torch.div(steps, block_size, rounding_mode="floor")].long().clamp(0, num_blocks - 1)
    taken = bits(cache)[blocks, (steps % block_size).expand_as(blocks)]
    inside = (steps < used[:, None])[..., None, None]
    return torch.where(inside, taken, torch.zeros((), dtype=taken.dtype, device=taken.device)).view(cache.dtype)


def serve_paged(bind: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backend's ``bind`` answer for paged specs too: the kernel of the packed call, over copies."""

    @functools.wraps(bind)
    def bound(self: Any, spec: AttentionSpec, device: Device) -> Any:
        if Feature.PAGED in spec.features:
            return GatherKernel(bind(self, packed_spec(spec), device), Feature.MLA in spec.features)
        return bind(self, spec, device)

    return bound
