"""`CacheStep`: one step over some sequences of a `PagedKVCache`, with what writing and attending need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_accel.ops.mla import attention_mla
from vllm_accel.ops.paged import attention_paged
from vllm_accel.ops.shared_prefix import attention_shared_prefix, pays
from vllm_accel.ops.write_kv import write_kv

if TYPE_CHECKING:
    from vllm_accel.ops.cache import PagedKVCache


@dataclass(frozen=True, slots=True)
class CacheStep:
    """One step over some sequences of a cache: the room for their new tokens, and everything that attention asks for.

    Attributes:
        cache: where the step happens. layer: which of its layers `write` and `attend` use; ``step[i]`` is another.
        cu_seqlens_q, max_seqlen_q: of the new tokens, packed. seqused_k, max_seqlen_k: of all, the new ones counted.
        block_table: int32 (B, max_blocks). slot_mapping: int64 (T,), where the new tokens go.
        prefix_blocks: how many blocks at the start all sequences of the step share (they were forked from one).
    """

    cache: PagedKVCache
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    block_table: Tensor
    seqused_k: Tensor
    max_seqlen_k: int
    slot_mapping: Tensor
    layer: int = 0
    prefix_blocks: int = 0

    def __getitem__(self, layer: int) -> CacheStep:
        """Return the same step for another layer."""
        if not 0 <= layer < self.cache.num_layers:
            raise IndexError(f"layer {layer} of a cache with {self.cache.num_layers} layers")
        return self if layer == self.layer else replace(self, layer=layer)

    def write(self, k: Tensor, v: Tensor | None = None) -> None:
        """Put the new tokens' keys (T, Hkv, D) and values (T, Hkv, Dv) in their slots; MLA has no values."""
        cache, layer = self.cache, self.layer
        v_cache = None if cache.mla else cache.v_caches[layer]
        scales = {} if cache.k_scale is None else {"k_scale": _of_layer(cache.k_scale, layer)}
        if cache.v_scale is not None and not cache.mla:
            scales["v_scale"] = _of_layer(cache.v_scale, layer)
        write_kv(k, v, cache.k_caches[layer], v_cache, slot_mapping=self.slot_mapping, **scales)

    def attend(self, q: Tensor, *, shared_prefix: bool | None = None, **options: Any) -> Any:
        """Attend from packed queries (T, H, D) to everything in the cache, as `attention_paged` or `attention_mla`.

        Args:
            q: the queries of the new tokens.
            shared_prefix: attend to the blocks that all sequences share once, and merge: exact, up to rounding. None
                does it where it pays, by the bytes that it saves (`ops.shared_prefix`), and never under torch.compile
                or while a CUDA graph is captured, which would freeze the number of blocks. True always does it.
            options: those of that function; ``causal=True`` belongs to steps of several tokens.

        Raises:
            ValueError: `shared_prefix` with an option that does not split, or with MLA. As that function.
        """
        cache = self.cache
        given: dict[str, Any] = {
            "cu_seqlens_q": self.cu_seqlens_q,
            "max_seqlen_q": self.max_seqlen_q,
            "block_table": self.block_table,
            "seqused_k": self.seqused_k,
            "max_seqlen_k": self.max_seqlen_k,
            "finite_tail": True,
            **options,
        }
        keys = cache.k_caches[self.layer]
        if cache.mla:
            if shared_prefix:
                raise ValueError("shared_prefix: attention_mla reads one latent head a token, and does not split")
            if cache.k_scale is not None:
                given["kv_descale"] = _of_layer(cache.k_scale, self.layer)
            return attention_mla(q, keys, head_dim_v=cache.head_dim_v, **given)
        if cache.k_scale is not None:
            given["k_descale"] = _of_layer(cache.k_scale, self.layer)
        if cache.v_scale is not None:
            given["v_descale"] = _of_layer(cache.v_scale, self.layer)
        values = cache.v_caches[self.layer]
        if shared_prefix or (shared_prefix is None and self.prefix_blocks and self._splits(q, keys, values, given)):
            return attention_shared_prefix(q, keys, values, prefix_blocks=self.prefix_blocks, **given)
        return attention_paged(q, keys, values, **given)

    def _splits(self, q: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any]) -> bool:
        """Tell whether to attend to the shared blocks once."""
        if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        tokens = self.prefix_blocks * self.cache.block_size
        return pays(q, keys, values, prefix_tokens=tokens, batch=self.seqused_k.shape[0], options=options)


def _of_layer(scale: Tensor, layer: int) -> Tensor:
    return scale[layer] if scale.dim() == 2 else scale
