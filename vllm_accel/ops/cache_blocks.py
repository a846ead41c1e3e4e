"""Which blocks of a cache belong to which sequence, counted on the host: the bookkeeping of `PagedKVCache`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_accel.errors import VllmAccelError


class CacheFullError(VllmAccelError, RuntimeError):
    """Raise when a cache has no free block for the tokens that were to be added; the cache is as it was before."""


@dataclass(slots=True)
class Entry:
    """What is known of one sequence: its row in the table of blocks, its blocks, its tokens."""

    row: int
    blocks: list[int]
    length: int = 0


class BlockPool:
    """Hand out blocks to sequences that grow, share them between forks, and copy a shared one before it is written.

    Attributes:
        free: blocks that no sequence holds. shared: how many sequences hold each block.
        entries: the live sequences by number, oldest first.
        tables: int32 (rows, columns) on the host: the blocks of a sequence in its row. What lies past its end is a
            valid block number, so that a kernel that looks ahead reads nothing strange.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.free = list(range(num_blocks - 1, -1, -1))  # the lowest first
        self.shared = [0] * num_blocks
        self.entries: dict[int, Entry] = {}
        self.tables = torch.zeros(8, 8, dtype=torch.int32)
        self._rows = list(range(7, -1, -1))
        self._next = 0

    def get(self, sequence: int) -> Entry:
        """Return a live sequence.

        Raises:
            KeyError: there is no such sequence.
        """
        try:
            return self.entries[sequence]
        except KeyError:
            raise KeyError(f"the cache has no sequence {sequence!r}; live are {list(self.entries)}") from None

    def allocate(self) -> int:
        """Start an empty sequence and return its number."""
        return self._add(Entry(self._row(), []))

    def fork(self, sequence: int) -> int:
        """Start a sequence that shares every block of another."""
        parent = self.get(sequence)
        child = Entry(self._row(), list(parent.blocks), parent.length)
        self.tables[child.row] = self.tables[parent.row]
        for block in child.blocks:
            self.shared[block] += 1
        return self._add(child)

    def release(self, sequence: int) -> None:
        """End a sequence; blocks that no other one holds become free."""
        ended = self.get(sequence)
        for block in reversed(ended.blocks):
            self._drop(block)
        self._rows.append(ended.row)
        del self.entries[sequence]

    def extend(self, batch: Sequence[Entry], counts: Sequence[int]) -> list[tuple[int, int]]:
        """Let sequences grow; return the (from, to) of blocks whose content has to be copied first.

        Raises:
            CacheFullError: not enough free blocks; nothing has changed.
        """
        needed = self._needed(batch, counts)
        if needed > len(self.free):
            raise CacheFullError(
                f"{sum(counts)} new tokens need {needed} more blocks of {self.block_size} tokens; {len(self.free)} of "
                f"{len(self.shared)} are free",
                fix="free a sequence, or make the cache larger",
            )
        copies = []
        for entry, count in zip(batch, counts, strict=True):
            if count and entry.length % self.block_size and self.shared[old := entry.blocks[-1]] > 1:
                entry.blocks.pop()
                copies.append((old, self._take(entry)))
                self._drop(old)
            entry.length += count
            while len(entry.blocks) * self.block_size < entry.length:
                self._take(entry)
        return copies

    def common(self, batch: Sequence[Entry], counts: Sequence[int]) -> int:
        """Count the blocks at the start that all sequences of a step share, full and before any of their new tokens."""
        if len(batch) < 2 or batch[0].blocks[:1] != batch[1].blocks[:1]:
            return 0
        full = min(entry.length - count for entry, count in zip(batch, counts, strict=True)) // self.block_size
        # Between the first and the last in the order of their blocks lie all others.
        low, high = (choose(entry.blocks[:full] for entry in batch) for choose in (min, max))
        return next((n for n, (a, b) in enumerate(zip(low, high, strict=True)) if a != b), full)

    def _needed(self, batch: Sequence[Entry], counts: Sequence[int]) -> int:
        """Count the blocks that growing takes, copies of shared ones included."""
        needed = 0
        writers: dict[int, int] = {}
        for entry, count in zip(batch, counts, strict=True):
            needed += -(-(entry.length + count) // self.block_size) - len(entry.blocks)
            if count and entry.length % self.block_size:
                writers[entry.blocks[-1]] = writers.get(entry.blocks[-1], 0) + 1
        # Of those who hold a block and write into it all copy it, but for one that then holds it alone.
        return needed + sum(min(count, self.shared[block] - 1) for block, count in writers.items())

    def _add(self, entry: Entry) -> int:
        number, self._next = self._next, self._next + 1
        self.entries[number] = entry
        return number

    def _row(self) -> int:
        if not self._rows:
            size = self.tables.shape[0]
            self.tables = torch.cat([self.tables, torch.zeros_like(self.tables)])
            self._rows = list(range(2 * size - 1, size - 1, -1))
        return self._rows.pop()

    def _drop(self, block: int) -> None:
        self.shared[block] -= 1
        if not self.shared[block]:
            self.free.append(block)

    def _take(self, entry: Entry) -> int:
        block = self.free.pop()
        self.shared[block] = 1
        column = len(entry.blocks)
        if column >= self.tables.shape[1]:
            self.tables = torch.cat([self.tables, torch.zeros_like(self.tables)], dim=1)
        self.tables[entry.row, column] = block
        entry.blocks.append(block)
        return block
