"""The paged cases that every backend with Feature.PAGED is held against: small, each with the reason why it exists."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Descale = Literal["scalar", "heads", "batch"]

#: What table entries hold that no kernel may follow.
GARBAGE = (-1, 2**31 - 1, -(2**31), 10**6)


@dataclass(frozen=True, slots=True)
class PagedCase:
    """One call of `attention_paged`, or of `attention_mla`, with its options.

    Attributes:
        name: unique. why: the rule or the public report that it guards.
        lengths: (queries, keys) of each sequence; the keys count the queries' own.
        block_size, num_heads, num_kv_heads, head_dim, head_dim_v: sizes.
        cache: dtype of the cache; None is q's. descale: factors of the cache, by their shape. q_descale: one for q too.
        q_dtype: overrides the dtype asked for (FP8 queries).
        head_major: the cache is (num_blocks, Hkv, block_size, D) in memory.
        tail: rows of q past the last sequence, NaN. finite: what lies past the ends is zero, and the call says so.
        spare: how much larger than needed both maxima are. wide: columns that the block table has too many.
        mla: call `attention_mla`; values are the first head_dim_v channels of keys.
        options, alibi, sinks, scale_inputs: as in `Case`.
    """

    name: str
    why: str
    lengths: tuple[tuple[int, int], ...] = ((1, 40), (1, 3), (1, 129), (1, 16))
    block_size: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    cache: torch.dtype | None = None
    descale: Descale | None = None
    q_descale: bool = False
    q_dtype: torch.dtype | None = None
    head_major: bool = False
    tail: int = 0
    finite: bool = False
    spare: int = 0
    wide: int = 2
    mla: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    alibi: Literal["heads", "batch"] | None = None
    sinks: bool = False
    scale_inputs: float = 1.0

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> PagedInputs:
        """Draw the tensors of the case; the same numbers on every device.

        Blocks are handed out in a random order, unused slots and blocks hold NaN (where the dtype has one; the largest
        number in an int8 cache), and unused table entries hold `GARBAGE`.
        """
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        q_dtype = self.q_dtype or dtype
        q = draw(sum(n for n, _ in self.lengths) + self.tail, self.num_heads, self.head_dim) * self.scale_inputs
        q = q.to(q_dtype)
        if self.tail:
            q[-self.tail :] = math.nan
        table, num_blocks = self._table(g)
        kv_heads = 1 if self.mla else self.num_kv_heads
        k_cache = self._cache(draw, num_blocks, kv_heads, self.head_dim, q_dtype, table)
        v_cache = k_cache[..., : self.head_dim_v]
        if not self.mla:
            v_cache = self._cache(draw, num_blocks, kv_heads, self.head_dim_v, q_dtype, table)
        used = torch.tensor([n for _, n in self.lengths], dtype=torch.int32)
        ends = torch.tensor([0, *(n for n, _ in self.lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        options: dict[str, Any] = {
            **self.options,
            "cu_seqlens_q": ends,
            "block_table": table,
            "seqused_k": used,
            "max_seqlen_q": max((n for n, _ in self.lengths), default=0) + self.spare,
            "max_seqlen_k": max((n for _, n in self.lengths), default=0) + self.spare,
        }
        if self.finite:
            options["finite_tail"] = True
        batch = len(self.lengths)
        if self.alibi:
            shape = (self.num_heads,) if self.alibi == "heads" else (batch, self.num_heads)
            options["alibi_slopes"] = draw(*shape).abs() * 0.3
        if self.sinks:
            options["sinks"] = draw(self.num_heads)
        forms = {"scalar": (), "heads": (kv_heads,), "batch": (batch, kv_heads)}
        if self.descale:
            options["k_descale"] = draw(*forms[self.descale]).abs() * 0.2 + 0.3
            options["v_descale"] = options["k_descale"] if self.mla else draw(*forms[self.descale]).abs() + 0.5
        if self.q_descale:
            options["q_descale"] = draw(*forms[self.descale or "scalar"]).abs() + 0.5
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
        k_cache = _on(k_cache, device)
        v_cache = k_cache[..., : self.head_dim_v] if self.mla else _on(v_cache, device)
        return PagedInputs(q.to(device), k_cache, v_cache, moved, self)

    def _table(self, g: torch.Generator) -> tuple[Tensor, int]:
        """Return the block table and the number of blocks; two blocks more than needed."""
        needed = [-(-n // self.block_size) for _, n in self.lengths]
        num_blocks = sum(needed) + 2
        order = torch.randperm(num_blocks, generator=g).tolist()
        width = max(needed, default=0) + self.wide
        rows = []
        for n in needed:
            rows.append([order.pop() for _ in range(n)] + [GARBAGE[i % len(GARBAGE)] for i in range(width - n)])
        return torch.tensor(rows, dtype=torch.int32).view(len(needed), width), num_blocks

    def _cache(
        self, draw: Any, num_blocks: int, kv_heads: int, size: int, q_dtype: torch.dtype, table: Tensor
    ) -> Tensor:
        dtype = self.cache or q_dtype
        shape = (num_blocks, kv_heads, self.block_size, size)
        drawn = draw(*shape) * (20.0 if dtype is torch.int8 else 1.0)
        cache = (drawn.round().clamp(-127, 127) if dtype is torch.int8 else drawn).to(dtype)
        unused = torch.ones(num_blocks, self.block_size, dtype=torch.bool)
        for blocks, (_, n) in zip(table.tolist(), self.lengths, strict=True):
            for j in range(n):
                unused[blocks[j // self.block_size], j % self.block_size] = False
        junk = torch.tensor(127 if dtype is torch.int8 else math.nan).to(dtype)
        hidden = unused[:, None, :, None].expand(shape)
        bits = torch.uint8 if dtype.itemsize == 1 else dtype  # torch.where knows no 8-bit floats
        spare = torch.zeros((), dtype=bits) if self.finite else junk.view(bits)
        cache = torch.where(hidden, spare, cache.view(bits)).view(dtype)
        cache = cache.transpose(1, 2)
        return cache if self.head_major else cache.contiguous()


@dataclass(frozen=True, slots=True)
class PagedInputs:
    """The tensors and options of one drawn paged case; for MLA v_cache is a view of k_cache."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    options: dict[str, Any]
    case: PagedCase


def _on(cache: Tensor, device: torch.device | str) -> Tensor:
    """Move a cache and keep its strides."""
    if cache.is_contiguous():
        return cache.to(device)
    return cache.transpose(1, 2).to(device).transpose(1, 2)


_DECODE = ((1, 40), (1, 3), (1, 129), (1, 16))
_CHUNK = ((17, 45), (33, 33), (8, 150))
_SPECULATIVE = ((4, 50), (4, 4), (4, 133))
_MIXED = ((1, 70), (0, 9), (23, 23), (3, 0), (1, 1), (12, 90), (9, 5))
_CAUSAL: dict[str, Any] = {"causal": True}
_FP8, _FP8_WIDE = torch.float8_e4m3fn, torch.float8_e5m2

PAGED_CASES: tuple[PagedCase, ...] = (
    PagedCase("decode", "one query each"),
    PagedCase("decode_causal", "the mask makes no difference to one query", options=_CAUSAL),
    PagedCase("prefill", "chunks of prompts, bottom-right", _CHUNK, options=_CAUSAL),
    PagedCase("prefill_full", "no mask: cross attention", _CHUNK),
    PagedCase("speculative", "a few queries each", _SPECULATIVE, options=_CAUSAL),
    PagedCase("mixed", "decode and prefill, and lengths of 0", _MIXED, options=_CAUSAL),
    PagedCase("mixed_full", "rows without keys", _MIXED),
    PagedCase("no_keys", "nothing in the cache yet", ((1, 0), (2, 0)), options=_CAUSAL),
    PagedCase("tail", "rows of no sequence are 0, and NaN there stays there", _MIXED, tail=5, options=_CAUSAL),
    PagedCase("spare_maxima", "maxima are bounds, not lengths", _MIXED, spare=100, options=_CAUSAL),
    PagedCase("narrow_table", "a table without spare columns", wide=0),
    PagedCase("finite", "the promise of a PagedKVCache", _MIXED, finite=True, options=_CAUSAL),
    PagedCase("block_1", "a block a token", ((1, 19), (5, 21)), block_size=1, options=_CAUSAL),
    PagedCase("block_24", "not a power of two", _MIXED, block_size=24, options=_CAUSAL),
    PagedCase("block_64", "", _CHUNK, block_size=64, options=_CAUSAL),
    PagedCase("block_128", "", ((1, 300), (20, 129)), block_size=128, options=_CAUSAL),
    PagedCase("block_256", "FlashAttention 2 takes no smaller one", ((1, 300), (20, 256), (1, 7)), block_size=256,
              options=_CAUSAL),
    PagedCase("head_major", "a transposed view", _MIXED, head_major=True, options=_CAUSAL),
    PagedCase("mha", "a key head a query head", _MIXED, num_kv_heads=4, options=_CAUSAL),
    PagedCase("mqa", "one key head", _MIXED, num_heads=6, num_kv_heads=1, options=_CAUSAL),
    PagedCase("gqa_8", "many query heads a key head", num_heads=16, num_kv_heads=2),
    PagedCase("long", "several splits of one sequence", ((1, 1100), (1, 20)), num_heads=8, num_kv_heads=2),
    PagedCase("window", "both sides", _MIXED, options={"window_size": (20, 4)}),
    PagedCase("window_causal", "a sliding window", _CHUNK, options={"window_size": (15, -1), **_CAUSAL}),
    PagedCase("window_decode", "blocks before the window are never read", options={"window_size": (30, 0)}),
    PagedCase("window_zero", "the newest key alone", options={"window_size": (0, 0)}),
    PagedCase("scale", "a caller's scale", _CHUNK, options={"softmax_scale": 0.31, **_CAUSAL}),
    PagedCase("softcap", "Gemma 2", _MIXED, options={"softcap": 3.0, **_CAUSAL}),
    PagedCase("large_logits", "no overflow", _CHUNK, scale_inputs=20.0, options=_CAUSAL),
    PagedCase("alibi", "slopes per head", _MIXED, alibi="heads", options=_CAUSAL),
    PagedCase("alibi_batch", "slopes per sequence", _MIXED, alibi="batch", options=_CAUSAL),
    PagedCase("sinks", "one more logit per head", _MIXED, sinks=True, options=_CAUSAL),
    PagedCase("sinks_window", "gpt-oss", _CHUNK, sinks=True, num_heads=8, options={"window_size": (11, -1), **_CAUSAL}),
    PagedCase("sinks_tail", "no sink where there is no row", _MIXED, sinks=True, tail=3, options=_CAUSAL),
    PagedCase("value_dim", "Dv below D", _MIXED, head_dim=48, head_dim_v=32, options=_CAUSAL),
    PagedCase("value_dim_larger", "Dv above D", _MIXED, head_dim=32, head_dim_v=64, options=_CAUSAL),
    PagedCase("head_40", "not a multiple of 16", _MIXED, head_dim=40, head_dim_v=40, options=_CAUSAL),
    PagedCase("head_128", "", _MIXED, head_dim=128, head_dim_v=128, options=_CAUSAL),
    PagedCase("head_256", "", _MIXED, head_dim=256, head_dim_v=256, options=_CAUSAL),
    PagedCase("fp8_scalar", "an FP8 cache, one factor", _MIXED, cache=_FP8, descale="scalar", options=_CAUSAL),
    PagedCase("fp8_heads", "a factor a key head", cache=_FP8, descale="heads"),
    PagedCase("fp8_batch", "a factor a sequence and key head", _CHUNK, cache=_FP8, descale="batch", options=_CAUSAL),
    PagedCase("fp8_plain", "an FP8 cache without factors", cache=_FP8),
    PagedCase("fp8_wide", "e5m2", _MIXED, cache=_FP8_WIDE, descale="heads", options=_CAUSAL),
    PagedCase("fp8_head_major", "", cache=_FP8, descale="heads", head_major=True),
    PagedCase("fp8_queries", "q in FP8 too gives bf16", q_dtype=_FP8, descale="heads", q_descale=True),
    PagedCase("int8_scalar", "an int8 cache", _MIXED, cache=torch.int8, descale="scalar", options=_CAUSAL),
    PagedCase("int8_heads", "", _CHUNK, cache=torch.int8, descale="heads", options=_CAUSAL),
    PagedCase("int8_batch", "", cache=torch.int8, descale="batch"),
    PagedCase("q_descale", "a factor for q", q_descale=True),
    PagedCase("deterministic", "same bits", _MIXED, options={"deterministic": True, **_CAUSAL}),
    PagedCase("batch_invariant", "bits of one sequence", _MIXED, options={"batch_invariant": True, **_CAUSAL}),
    PagedCase("everything", "all options that combine", _MIXED, head_dim=40, head_dim_v=24, alibi="batch", sinks=True,
              cache=_FP8, descale="batch", head_major=True, tail=2, spare=7,
              options={"window_size": (12, 2), "softcap": 4.0, "softmax_scale": 0.2, **_CAUSAL}),
    PagedCase("mla", "DeepSeek: 512 latent and 64 rotary channels", num_heads=16, head_dim=576, head_dim_v=512,
              mla=True, options={"softmax_scale": 192**-0.5}),
    PagedCase("mla_prefill", "several queries", ((5, 30), (1, 0), (20, 20)), num_heads=4, head_dim=576, head_dim_v=512,
              mla=True, block_size=64, options={"softmax_scale": 192**-0.5, **_CAUSAL}),
    PagedCase("mla_small", "any sizes", _MIXED, head_dim=80, head_dim_v=64, mla=True,
              options={"softmax_scale": 0.1, **_CAUSAL}),
    PagedCase("mla_fp8", "", head_dim=576, head_dim_v=512, cache=_FP8, descale="scalar", mla=True,
              options={"softmax_scale": 192**-0.5}),
    PagedCase("mla_window", "", _MIXED, head_dim=80, head_dim_v=64, mla=True, sinks=True,
              options={"softmax_scale": 0.1, "window_size": (20, 0), "softcap": 5.0}),
    PagedCase("mla_invariant", "", _MIXED, head_dim=576, head_dim_v=512, mla=True,
              options={"softmax_scale": 192**-0.5, "batch_invariant": True, **_CAUSAL}),
)  # fmt: skip
