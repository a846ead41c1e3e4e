"""`Attention`: the drop-in module for model code, with vLLM's constructor arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_accel.ops.attention import attention, attention_varlen
from vllm_accel.ops.cache import PagedKVCache
from vllm_accel.ops.cache_step import CacheStep


class Attention(nn.Module):
    """Attend inside a model; holds no weights but the sinks it is given.

    Args:
        num_heads: query heads. head_size: of q, k and v. scale: softmax scale.
        num_kv_heads: key heads, default num_heads.
        alibi_slopes: one per head. sliding_window: keys that a query sees, itself included (vLLM's convention).
        logits_soft_cap: softcap, None or 0 is off. sinks: (num_heads,) tensor, kept as given (a Parameter trains).
        causal: decoder attention. backend: as in `attention`.

    Raises:
        ValueError: sizes that do not fit together.
    """

    alibi_slopes: Tensor | None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: Sequence[float] | Tensor | None = None,
        sliding_window: int | None = None,
        logits_soft_cap: float | None = None,
        sinks: Tensor | None = None,
        causal: bool = True,
        backend: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads <= 0 or num_kv_heads <= 0 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a positive multiple of num_kv_heads={num_kv_heads}")
        if head_size <= 0:
            raise ValueError(f"head_size={head_size} must be positive")
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window={sliding_window} must be at least 1 (it counts the query's own key)")
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.causal, self.backend = scale, causal, backend
        self.window_size = (
            (-1, -1) if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
        )
        self.softcap = logits_soft_cap or 0.0
        slopes = None if alibi_slopes is None else torch.as_tensor(alibi_slopes, dtype=torch.float32)
        self.register_buffer("alibi_slopes", slopes, persistent=False)
        if isinstance(sinks, nn.Parameter):
            self.sinks: Tensor | None = sinks
        else:
            self.register_buffer("sinks", sinks, persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cache: PagedKVCache | CacheStep | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attend, in any of the layouts that model code uses; the result has the layout of the query.

        Args:
            query: (B, S, H*D), (B, S, H, D), or packed (T, H*D) / (T, H, D) with `cu_seqlens`. key, value: likewise.
            cache: append key and value, then attend to everything in it; forward only. A `CacheStep` of
                ``cache.extend(sequences, counts)`` says which sequences the rows are, ``step[i]`` for layer i. A
                `PagedKVCache` of one layer means its live sequences in order (none yet: B new ones); the counts of
                packed rows are then read from cu_seqlens, on a GPU with a synchronisation.
            cu_seqlens: int32 (batch + 1,), where packed sequences start and end; with a step (T, H*D) needs none.
            max_seqlen: longest of them; not needed with a cache.

        Raises:
            ValueError: a shape that is none of these, packed tensors without cu_seqlens and max_seqlen, or tokens that
                are not those of the step. CacheFullError: the cache has no room for the tokens.
        """
        packed = cu_seqlens is not None or (isinstance(cache, CacheStep) and query.dim() == 2)
        q = self._split(query, self.num_heads, packed, "query")
        k = self._split(key, self.num_kv_heads, packed, "key")
        v = self._split(value, self.num_kv_heads, packed, "value")
        options: dict[str, Any] = {
            "causal": self.causal,
            "window_size": self.window_size,
            "softmax_scale": self.scale,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
            "backend": self.backend,
        }
        out: Any
        if cache is not None:
            out = self._with_cache(q, k, v, cache, cu_seqlens, options)
        elif cu_seqlens is None:
            out = attention(q, k, v, **options)
        elif max_seqlen is None:
            raise ValueError("packed sequences need max_seqlen, a Python int, beside cu_seqlens")
        else:
            options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            out = attention_varlen(q, k, v, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, **options)
        assert isinstance(out, Tensor)
        return out.flatten(-2) if query.dim() == (2 if packed else 3) else out

    def _with_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: PagedKVCache | CacheStep,
        cu_seqlens: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Write k and v into the cache, and attend from q to all that it holds."""
        step = cache if isinstance(cache, CacheStep) else _next_step(cache, q, cu_seqlens)
        if step.cache.mla:
            raise ValueError("an MLA cache holds latents, not keys and values; use step.write and step.attend")
        packed = [t.flatten(0, 1) if t.dim() == 4 else t for t in (q, k, v)]
        sequences = step.seqused_k.shape[0] if q.dim() == 3 else q.shape[0]
        if step.seqused_k.shape[0] != sequences or step.slot_mapping.shape[0] != packed[1].shape[0]:
            raise ValueError(
                f"the step is about {step.seqused_k.shape[0]} sequences and {step.slot_mapping.shape[0]} new tokens; "
                f"key is {tuple(k.shape)}"
            )
        step.write(packed[1], packed[2])
        out = step.attend(packed[0], **options)
        assert isinstance(out, Tensor)
        return out if q.dim() == 3 else out.view(*q.shape[:3], out.shape[-1])

    def _split(self, tensor: Tensor, heads: int, packed: bool, name: str) -> Tensor:
        flat = 2 if packed else 3
        if tensor.dim() == flat and tensor.shape[-1] % heads == 0:
            return tensor.view(*tensor.shape[:-1], heads, tensor.shape[-1] // heads)
        if tensor.dim() == flat + 1 and tensor.shape[-2] == heads:
            return tensor
        form = "(T, H*D) or (T, H, D)" if packed else "(B, S, H*D) or (B, S, H, D)"
        raise ValueError(f"{name} must be {form} with {heads} heads; got {tuple(tensor.shape)}")

    def extra_repr(self) -> str:
        """Describe the module when a model is printed."""
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"{heads}, head_size={self.head_size}, causal={self.causal}"


def _next_step(cache: PagedKVCache, q: Tensor, cu_seqlens: Tensor | None) -> CacheStep:
    """Return the step of new tokens for every live sequence of a cache."""
    if cache.num_layers > 1:
        raise ValueError(
            f"the cache has {cache.num_layers} layers: pass step[i] of step = cache.extend(...) to layer i"
        )
    counts = [q.shape[1]] * q.shape[0] if cu_seqlens is None else cu_seqlens.diff().tolist()
    sequences = cache.sequences or tuple(cache.allocate() for _ in counts)
    if len(sequences) != len(counts):
        raise ValueError(f"query has {len(counts)} sequences, the cache {len(sequences)}; name yours with cache.extend")
    return cache.extend(sequences, counts)
