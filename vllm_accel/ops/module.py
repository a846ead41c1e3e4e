"""`Attention`: the drop-in module for model code, with vLLM's constructor arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_accel.ops.attention import attention, attention_varlen


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
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attend, in any of the layouts that model code uses; the result has the layout of the query.

        Args:
            query: (B, S, H*D), (B, S, H, D), or packed (T, H*D) / (T, H, D) with `cu_seqlens`. key, value: likewise.
            cu_seqlens: int32 (batch + 1,), where packed sequences start and end. max_seqlen: longest of them.

        Raises:
            ValueError: a shape that is none of these, or packed tensors without cu_seqlens and max_seqlen.
        """
        packed = cu_seqlens is not None
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
        if cu_seqlens is None:
            out = attention(q, k, v, **options)
        elif max_seqlen is None:
            raise ValueError("packed sequences need max_seqlen, a Python int, beside cu_seqlens")
        else:
            options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            out = attention_varlen(q, k, v, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, **options)
        assert isinstance(out, Tensor)
        return out.flatten(-2) if query.dim() == (2 if packed else 3) else out

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
