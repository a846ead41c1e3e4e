"""`PagedKVCache`: keys and values of many sequences in blocks of one memory, for serving without an engine.

Which blocks a sequence has is kept on the host; the device sees tensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_accel.ops.cache_blocks import BlockPool, Entry
from vllm_accel.ops.cache_step import CacheStep

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, *_EIGHT_BITS)


class PagedKVCache:
    """Hold keys and values of many sequences in equal blocks (Kwon et al. 2023), with prefixes shared until written.

    >>> cache = PagedKVCache(1024, 16, num_kv_heads=8, head_dim=128, num_layers=32, dtype=torch.bfloat16, device="cuda")
    >>> prompts = [cache.allocate() for _ in range(2)]
    >>> step = cache.extend(prompts, [17, 300])       # room for the new tokens: all host work of one step
    >>> step[layer].write(k, v); out = step[layer].attend(q, causal=True)

    The memory is zero at creation, so that what lies past a sequence's end is finite as long as what is written is
    (FP8 and int8 saturate, and so always are). Not safe to change from several threads at once.

    Args:
        num_blocks, block_size: of the memory. num_kv_heads, head_dim, head_dim_v: of keys and values (head_dim_v
            defaults to head_dim). num_layers: memories with one bookkeeping.
        dtype: fp16, bf16, fp32, or FP8 (e4m3fn, e5m2) or int8 with scales.
        device: any torch device.
        k_scale, v_scale: for an 8-bit dtype: what values are divided by; a float, or fp32 (Hkv,) or (layers, Hkv).
        mla: values are the first `head_dim_v` channels of keys: one memory (num_blocks, block_size, head_dim).
        head_major: keep (num_blocks, Hkv, block_size, D) in memory and hand out transposed views; the default on the
            CPU, where the rows of one head then lie one after another.

    Attributes:
        k_caches, v_caches: per layer (num_blocks, block_size, Hkv, D / Dv) views; for MLA k_caches are
            (num_blocks, block_size, D) and v_caches is empty. k_cache, v_cache: of layer 0.

    Raises:
        ValueError, TypeError: sizes, a dtype or a scale that make no sense.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        *,
        num_layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        mla: bool = False,
        head_major: bool | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {
            "num_blocks": num_blocks, "block_size": block_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
            "head_dim_v": head_dim_v, "num_layers": num_layers,
        }  # fmt: skip
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive int, not {size!r}")
        if dtype not in _DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, not {dtype}")
        if mla and (num_kv_heads != 1 or head_dim_v > head_dim):
            raise ValueError(
                f"an MLA cache has num_kv_heads=1 and head_dim_v up to head_dim; got {num_kv_heads}, {head_dim_v}"
            )
        self.num_blocks, self.block_size, self.num_kv_heads = num_blocks, block_size, num_kv_heads
        self.head_dim, self.head_dim_v, self.num_layers, self.mla = head_dim, head_dim_v, num_layers, mla
        self.dtype, self.device = dtype, torch.device(device)
        self.head_major = self.device.type == "cpu" and not mla if head_major is None else head_major and not mla
        self.k_scale, self.v_scale = (self._scale(n, s) for n, s in (("k_scale", k_scale), ("v_scale", v_scale)))
        if mla and v_scale is not None:
            raise ValueError("an MLA cache has one memory and so one scale: k_scale")
        self._memories = [self._memory(size) for size in ((head_dim,) if mla else (head_dim, head_dim_v))]
        views = [self._views(memory) for memory in self._memories]
        self.k_caches: list[Tensor] = views[0]
        self.v_caches: list[Tensor] = [] if mla else views[1]
        self._pool = BlockPool(num_blocks, block_size)

    @property
    def k_cache(self) -> Tensor:
        """Return the keys of layer 0."""
        return self.k_caches[0]

    @property
    def v_cache(self) -> Tensor:
        """Return the values of layer 0 (a view of the keys for MLA)."""
        return self.k_caches[0][..., : self.head_dim_v] if self.mla else self.v_caches[0]

    @property
    def sequences(self) -> tuple[int, ...]:
        """Return the live sequences, oldest first."""
        return tuple(self._pool.entries)

    @property
    def free_blocks(self) -> int:
        """Return how many blocks no sequence holds."""
        return len(self._pool.free)

    def length(self, sequence: int) -> int:
        """Return the number of tokens of a sequence."""
        return self._pool.get(sequence).length

    def blocks(self, sequence: int) -> tuple[int, ...]:
        """Return the blocks of a sequence, in order."""
        return tuple(self._pool.get(sequence).blocks)

    def allocate(self) -> int:
        """Start an empty sequence and return its number; it takes blocks as it grows."""
        return self._pool.allocate()

    def fork(self, sequence: int) -> int:
        """Start a sequence with the tokens of another; they share blocks until one writes into the last.

        Raises:
            KeyError: there is no such sequence.
        """
        return self._pool.fork(sequence)

    def free(self, sequence: int) -> None:
        """End a sequence; blocks that no other one shares become free.

        Raises:
            KeyError: there is no such sequence.
        """
        self._pool.release(sequence)

    def extend(self, sequences: Sequence[int], counts: Sequence[int]) -> CacheStep:
        """Make room for new tokens, and return the step that writes them and attends.

        Args:
            sequences: numbers from `allocate` or `fork`, none twice: the batch, in its order.
            counts: new tokens of each, which are also its queries; 0 for a sequence that rests.

        Raises:
            CacheFullError: not enough free blocks; nothing has changed. KeyError: no such sequence.
            ValueError: counts that do not belong to the sequences.
        """
        batch = [self._pool.get(sequence) for sequence in sequences]
        if len(batch) != len(counts) or len(set(sequences)) != len(batch):
            raise ValueError(f"counts must be one a sequence, and no sequence twice; got {sequences!r} and {counts!r}")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in counts):
            raise ValueError(f"counts must be ints, at least 0; got {counts!r}")
        starts = [entry.length for entry in batch]
        if copies := self._pool.extend(batch, counts):
            old, new = (torch.tensor(column, device=self.device) for column in zip(*copies, strict=True))
            for memory in self._memories:  # every layer at once
                bits = memory.view(torch.uint8) if memory.dtype.itemsize == 1 else memory
                bits[:, new] = bits[:, old]
        return self._step(batch, starts, counts)

    def append(self, k: Tensor, v: Tensor | None, sequences: Sequence[int], counts: Sequence[int]) -> CacheStep:
        """Make room for new tokens and write them into layer 0: `extend`, then `CacheStep.write`."""
        step = self.extend(sequences, counts)
        step.write(k, v)
        return step

    def _step(self, batch: Sequence[Entry], starts: Sequence[int], counts: Sequence[int]) -> CacheStep:
        """Build the tensors of a step on the host, and send each to the device once."""
        rows = torch.tensor([entry.row for entry in batch], dtype=torch.int64)
        width = max((len(entry.blocks) for entry in batch), default=0)
        table = self._pool.tables[:, : max(1, width)][rows]
        used = torch.tensor([entry.length for entry in batch], dtype=torch.int32)
        added = torch.tensor(counts, dtype=torch.int64)
        ends = torch.zeros(len(batch) + 1, dtype=torch.int32)
        torch.cumsum(added, 0, dtype=torch.int32, out=ends[1:])
        sequence = torch.repeat_interleave(added)
        place = (
            torch.arange(sequence.shape[0])
            - ends[:-1].long()[sequence]
            + torch.tensor(starts, dtype=torch.int64)[sequence]
        )
        block = table[sequence, torch.div(place, self.block_size, rounding_mode="floor")].long()
        slots = block * self.block_size + place % self.block_size
        ends, table, used, slots = (t.to(self.device, non_blocking=True) for t in (ends, table, used, slots))
        longest = max((entry.length for entry in batch), default=0)
        common = self._pool.common(batch, counts)
        return CacheStep(self, ends, max(counts, default=0), table, used, longest, slots, prefix_blocks=common)

    def _scale(self, name: str, scale: float | Tensor | None) -> Tensor | None:
        if scale is None:
            return None
        if self.dtype not in _EIGHT_BITS:
            raise ValueError(f"{name} is for FP8 and int8 caches; this one is {self.dtype}")
        tensor = torch.as_tensor(scale, dtype=torch.float32, device=self.device)
        if tuple(tensor.shape) not in ((), (self.num_kv_heads,), (self.num_layers, self.num_kv_heads)):
            raise ValueError(
                f"{name} must be a float, ({self.num_kv_heads},) or ({self.num_layers}, {self.num_kv_heads}); "
                f"got {tuple(tensor.shape)}"
            )
        return tensor

    def _memory(self, size: int) -> Tensor:
        heads, block = self.num_kv_heads, self.block_size
        inner = (block,) if self.mla else (heads, block) if self.head_major else (block, heads)
        return torch.zeros((self.num_layers, self.num_blocks, *inner, size), dtype=self.dtype, device=self.device)

    def _views(self, memory: Tensor) -> list[Tensor]:
        return [layer.transpose(1, 2) if self.head_major else layer for layer in memory.unbind(0)]

    def __repr__(self) -> str:
        """Say what it holds."""
        return (
            f"PagedKVCache({self.num_blocks} blocks of {self.block_size}, {self.free_blocks} free; "
            f"{len(self.sequences)} sequences, {self.num_layers} layers, {self.dtype}, {self.device})"
        )
