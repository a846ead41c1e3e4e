"""Into which launches a paged call is cut, and each sequence's keys into how many splits: plain Python, no tensors.

A sequence with few query tokens has one or two tiles of rows per key head, so that a small batch leaves most of the GPU
idle unless several programs share its keys (FlashDecoding). How many is decided by numbers that the host has; where the
keys are cut, by the real lengths, on the device. So a CUDA graph stays valid while sequences grow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vllm_accel.kernels.triton.tiles import Tile

#: Query tokens of a sequence up to which it is decoded rather than prefilled: speculative decoding proposes 1 to 7.
DECODE_TOKENS = 8
#: As `pages.MIN_SPLIT`, which this must equal: the device makes no shorter splits.
MIN_SPLIT = 256
#: Splits of one launch at most: 64k keys and one key head still fill half of an H200's 4 * 132 places.
MAX_SPLITS = 256
#: A sequence may get so many times the splits of a mean one. Programs without keys end at once, and are launched last.
UNEVEN = 4
#: Keys of a split where nothing about the batch may change a sum. Compiled, not timed.
INVARIANT_SPLIT = 1024
#: Any number of query tokens.
UNLIMITED = 2**31 - 1


class Sizes(NamedTuple):
    """The exact sizes of a paged call. `window` is the most keys that one query sees, 0 for all."""

    tokens: int
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim_v: int
    max_seqlen_q: int
    max_seqlen_k: int
    window: int
    batch_invariant: bool
    sinks: bool


class Work(NamedTuple):
    """One launch of the attention kernel, and where `split` one of `combine_splits`.

    Attributes:
        search: programs find their sequence (prefill); else the launch has `tiles` per sequence (decode).
        tiles: tiles of rows of one sequence, with `search` regions of the batch.
        low_q, high_q: sequences with so many query tokens are computed.
        num_splits, fixed: see `pages.split_range`. goal: see `pages.shares`. split: results are partial.
        part_rows: rows of the partial results of one split.
        tail: it also writes the rows past the last sequence.
    """

    tile: Tile
    search: bool
    tiles: int
    low_q: int
    high_q: int
    num_splits: int
    goal: int
    fixed: int
    split: bool
    part_rows: int
    tail: bool


def choose_splits(blocks: int, places: int, keys: int, most: int = MAX_SPLITS) -> int:
    """Return how many splits give a launch of `blocks` programs a good fill of a GPU that runs `places` at a time.

    The smallest number within 85 % of the best fill of the last wave (FlashAttention's rule), of at least MIN_SPLIT
    keys each: more splits mean more partial results to write and join. From four waves on, none.
    """
    most = min(most, -(-keys // MIN_SPLIT))
    if most <= 1 or blocks >= 4 * places:
        return 1

    def fill(splits: int) -> float:
        return blocks * splits / (-(-blocks * splits // places) * places)

    enough = 0.85 * max(map(fill, range(1, most + 1)))
    return next(n for n in range(1, most + 1) if fill(n) >= enough)


def resident(tile: Tile) -> int:
    """Return how many programs a multiprocessor is taken to run at a time: 16 warps' worth.

    What the decode tiles are made for (128 registers a thread; tests/test_triton_paged_compile.py checks it).
    """
    return max(1, 16 // tile.num_warps)


def plan_work(sizes: Sizes, tile_for: Callable[[int], Tile], sm_count: int, num_splits: int = 0) -> tuple[Work, ...]:
    """Return the launches of a call.

    Args:
        tile_for: the tile for so many rows of a sequence and key head (query tokens times heads of a group).
        sm_count: multiprocessors of the device.
        num_splits: forced for the launches that may split; 0 chooses.
    """
    group = sizes.num_heads // sizes.num_kv_heads
    if sizes.max_seqlen_q <= DECODE_TOKENS:
        return (_decode(sizes, group, tile_for, sm_count, num_splits, tail=True),)
    tile = tile_for(UNLIMITED)
    tiles = sizes.tokens * group // tile.block_m + sizes.batch + 1
    # Regions, of which about one a sequence is empty (`pages.find_sequence`).
    blocks = -(-sizes.tokens * group // tile.block_m) * sizes.num_kv_heads
    places = sm_count * resident(tile)
    everything = Work(tile, True, tiles, 0, UNLIMITED, 1, 0, 0, False, sizes.tokens, True)
    if not sizes.batch_invariant:
        # Few tiles: one launch, with splits for long and short queries alike.
        splits = num_splits or (choose_splits(blocks, places, _keys(sizes)) if 5 * blocks < 4 * places else 1)
        # Nor another launch where no sequence can be as short as a decode, unless q has rows past the last one; then
        # that sequence is only slower. (Not with batch_invariant: the launch decides how it is summed.)
        long_only = sizes.tokens > (sizes.batch - 1) * sizes.max_seqlen_q + DECODE_TOKENS
        if splits > 1 or sizes.batch == 1 or long_only:
            return (everything._replace(num_splits=splits, split=splits > 1),)
    decode = _decode(sizes, group, tile_for, sm_count, num_splits, tail=False)
    return everything._replace(low_q=DECODE_TOKENS + 1), decode


def _decode(
    sizes: Sizes, group: int, tile_for: Callable[[int], Tile], sm_count: int, num_splits: int, tail: bool
) -> Work:
    """Return the launch for sequences of at most DECODE_TOKENS query tokens."""
    most = min(sizes.max_seqlen_q, DECODE_TOKENS)
    # The tile must not depend on the batch's longest query where a sequence's bits may not.
    tile = tile_for(1 if sizes.batch_invariant else most * group)
    tiles = -(-most * group // tile.block_m)
    fixed = INVARIANT_SPLIT if sizes.batch_invariant else 0
    goal = 0
    if fixed:
        num_splits = max(1, -(-sizes.max_seqlen_k // fixed))
    elif not num_splits:
        blocks = tiles * sizes.batch * sizes.num_kv_heads
        num_splits = choose_splits(blocks, sm_count * resident(tile), _keys(sizes))
        if num_splits > 1 and sizes.batch > 1:
            goal, num_splits = num_splits, min(UNEVEN * num_splits, MAX_SPLITS, -(-_keys(sizes) // MIN_SPLIT))
    # A sink is added where splits are joined, or with one split in the kernel: equal numbers, but not equal bits.
    split = num_splits > 1 or bool(fixed and sizes.sinks)
    return Work(tile, False, tiles, 0, most, num_splits, goal, fixed, split, sizes.batch * most, tail)


def with_tile(work: Work, tile: Tile, sizes: Sizes) -> Work:
    """Return the same work with another tile; partial results stay where they are."""
    group = sizes.num_heads // sizes.num_kv_heads
    if work.search:
        return work._replace(tile=tile, tiles=sizes.tokens * group // tile.block_m + sizes.batch + 1)
    return work._replace(tile=tile, tiles=-(-work.high_q * group // tile.block_m))


def _keys(sizes: Sizes) -> int:
    return min(sizes.max_seqlen_k, sizes.window + sizes.max_seqlen_q) if sizes.window else sizes.max_seqlen_k


def scratch(works: tuple[Work, ...], sizes: Sizes) -> int:
    """Return the floats of partial results: for each split and row, head_dim_v sums and a log-sum-exp per head."""
    parts = [work.num_splits * work.part_rows for work in works if work.split]
    return max(parts, default=0) * sizes.num_heads * (sizes.head_dim_v + 1)
