"""Into which launches a paged call is cut, and each sequence's keys into how many parts: plain Python, no tensors.

A sequence with few query tokens has one or two tiles of rows per key head, so that a small batch leaves most of the GPU
idle unless several programs share its keys (FlashDecoding). Decodes are a stream (`stream.py`) but for a few kinds: as
many teams of programs as keep the memory busy share all keys of the batch. How many is decided by numbers that the host
has; where the keys are cut, by the real lengths, on the device. So a CUDA graph stays valid while sequences grow. Of
other calls each sequence is cut into as many parts, and so are chunks of a prompt whose tiles are too few for the GPU.
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
#: Bytes that a multiprocessor has to have on their way before the memory is busy. On an H200 one program with 64 KiB
#: reaches 73 % of what two reach, and three are no faster (16 sequences of 16k keys, 2026-11-30).
IN_FLIGHT = 128 * 1024
#: Shared memory of a decode program beside its stages: q, the reductions, and what the device keeps.
_BESIDE = 7 * 1024
#: Keys of a split where nothing about the batch may change a sum. Compiled, not timed.
INVARIANT_SPLIT = 1024
#: What a part of a tile of many rows costs beside its keys, in keys: its partial results are written, read and joined.
#: An H200 took as long as this says for 24 to 96 tiles of 128 rows, 3843 to 11632 keys in 1 to 7 parts (2026-12-01).
PART = 430
#: Warps that share a multiprocessor in a prefill, by their registers.
_PREFILL_WARPS = 8
#: Rows of a sequence and key head up to which equally long sequences are a stream. It has one launch, which saves the
#: host 8 us; but the last of a sequence's programs joins all of its rows, and with 8 and 16 that took 5 and 7 us more
#: than another launch to join them does (4 x 8k with 64 heads, 7 x 3k with 4 queries; an H200, 2026-12-01).
STREAM_ROWS = 4
#: Keys up to which a sequence is not worth cutting, and has a team of a stream to itself: 16 x 512 with 64 heads took
#: 19 us so, and 25 in equal parts.
NOT_CUT = 2 * MIN_SPLIT
#: Any number of query tokens.
UNLIMITED = 2**31 - 1


class Sizes(NamedTuple):
    """The exact sizes of a paged call.

    Attributes:
        window: the most keys that one query sees, 0 for all.
        row_bytes: of a key and its value. even: every sequence has max_seqlen_k keys.
        most: keys of a sequence that a decode reads at most: a window hides the others, or the table has no room.
        mla: latent attention, whose partial results are large, so that joining them takes a launch of its own.
    """

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
    row_bytes: int = 512
    even: bool = False
    most: int = 2**31 - 1
    mla: bool = False


class Gpu(NamedTuple):
    """What decides how many programs a GPU runs at a time: multiprocessors, and the shared memory of each."""

    sm_count: int
    shared: int = 227 * 1024


class Work(NamedTuple):
    """One launch of an attention kernel, and where `split`, but for a stream, one that joins its partial results.

    Attributes:
        search: programs find their sequence (prefill); else the launch has `tiles` per sequence (decode).
        tiles: tiles of rows of one sequence, with `search` regions of the batch.
        low_q, high_q: sequences with so many query tokens are computed.
        num_splits, fixed: see `pages.split_range`. split: results may be partial. Those of a stream it joins itself.
        goal: shares of a mean sequence (`pages.find_share`), num_splits then those of the batch; 0: see num_splits.
        part_rows: rows of the partial results of one split (of a share, of one slot of a team).
        tail: it also writes the rows past the last sequence.
        teams: of a stream, 0 where it is none. num_splits are then those of each sequence, 0 where teams share all keys
            (`per` of `teams.py`). unit: keys of a block that teams share, a multiple of the tile's. most: see `Sizes`.
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
    teams: int = 0
    unit: int = 0
    most: int = 0

    def parts(self, batch: int) -> int:
        """Return how many programs there are for each tile and key head."""
        if self.search:
            return self.num_splits
        return self.teams or (self.num_splits if self.goal else self.num_splits * batch) + self.tail

    @property
    def grows(self) -> bool:
        """Whether its kernel is the same with partial results and without: it is given some memory in any case."""
        return not (self.search or self.fixed)

    def scratch(self, sizes: Sizes) -> int:
        """Return the floats of its partial results, and of a stream's counters, two for each row of a team."""
        if not self.split:
            return 0
        heads, width = sizes.num_heads, sizes.head_dim_v + 1
        if self.teams:
            return 2 * self.teams * self.part_rows * heads * (width + 1)
        return self.num_splits * self.part_rows * heads * width


class Places(NamedTuple):
    """How many programs a GPU runs at a time, and how many keep its memory busy."""

    all: int
    busy: int


def on_their_way(tile: Tile, row_bytes: int) -> int:
    """Return the bytes that a program of a tile has on their way."""
    return max(1, tile.num_stages - 1) * tile.block_n * row_bytes


def places(tile: Tile, row_bytes: int, gpu: Gpu, warps: int = 16) -> Places:
    """Return the places for programs of a tile.

    As many as share a multiprocessor by shared memory, and by registers, of which decode tiles take 128 a thread and
    more (tests/test_triton_paged_compile.py checks how many share one): at most 16 warps.

    Args:
        warps: at most, where it is fewer: tiles of a prefill take 200 registers a thread.
    """
    ahead = on_their_way(tile, row_bytes)
    resident = max(1, min(warps // tile.num_warps, gpu.shared // (ahead + _BESIDE)))
    return Places(gpu.sm_count * resident, gpu.sm_count * min(resident, -(-IN_FLIGHT // ahead)))


def choose_splits(blocks: int, room: Places, keys: int, most: int = MAX_SPLITS) -> int:
    """Return how many splits suit a launch of `blocks` programs.

    Programs run in waves of `room.all`; the last one takes as long as one of `room.busy` where it has fewer, since each
    program waits for memory most of the time. Of the numbers with at least MIN_SPLIT keys a split that come within 5 %
    of the shortest time the smallest is taken: more splits mean more partial results to write and join. From four waves
    on, none.
    """
    most = min(most, -(-keys // MIN_SPLIT))
    if most <= 1 or blocks >= 4 * room.all:
        return 1

    def spent(splits: int) -> float:
        waves, rest = divmod(blocks * splits, room.all)
        return (waves * room.all + (max(rest, room.busy) if rest else 0)) / (blocks * splits)

    enough = min(map(spent, range(1, most + 1))) / 0.95
    return next(n for n in range(1, most + 1) if spent(n) <= enough)


def choose_parts(blocks: int, room: Places, keys: int) -> int:
    """Return into how many parts the keys are cut for `blocks` tiles that wait for products, not for the memory.

    Programs run in waves of `room.all`, and one that is not full takes as long; a part takes PART more than its keys.
    """

    def spent(parts: int) -> float:
        return -(-blocks * parts // room.all) * (keys / parts + PART * (parts > 1))

    return min(range(1, max(1, min(MAX_SPLITS, keys // MIN_SPLIT)) + 1), key=spent)


def choose_teams(heads: int, batch: int, room: Places) -> int:
    """Return how many teams suit a launch, of a program for each of so many key heads and tiles.

    As many as keep the memory busy, one more rather than one less, if they find places at a time. Up to 6 % fewer if
    that makes them a multiple or a part of the batch: then equally long sequences are cut into equal parts, or not.
    """
    if heads > room.all:  # several waves, of which the last is not full: no less than four
        return -(-4 * room.all // heads)
    teams = min(-(-room.busy // heads), room.all // heads)
    near = range(teams, teams - 1 - teams * 6 // 100, -1) if batch <= 2 * teams else ()
    return next((n for n in near if batch % n == 0 or n % batch == 0), teams)


def plan_work(sizes: Sizes, tile_for: Callable[[int, str], Tile], gpu: Gpu, num_splits: int = 0) -> tuple[Work, ...]:
    """Return the launches of a call.

    Args:
        tile_for: the tile for so many rows of a sequence and key head (query tokens times heads of a group), by form:
            "many" where there are more programs than the usual one leaves places for.
        num_splits: forced for the launches that may split; 0 chooses.
    """
    group = sizes.num_heads // sizes.num_kv_heads
    if sizes.max_seqlen_q <= DECODE_TOKENS:
        return (_decode(sizes, group, tile_for, gpu, num_splits, tail=True),)
    tile = tile_for(UNLIMITED, "")
    tiles = sizes.tokens * group // tile.block_m + sizes.batch + 1
    # Regions, of which about one a sequence is empty (`pages.find_sequence`).
    blocks = -(-sizes.tokens * group // tile.block_m) * sizes.num_kv_heads
    if sizes.even:
        blocks = sizes.batch * -(-sizes.max_seqlen_q * group // tile.block_m) * sizes.num_kv_heads
    room = places(tile, sizes.row_bytes, gpu, _PREFILL_WARPS)
    everything = Work(tile, True, tiles, 0, UNLIMITED, 1, 0, 0, False, sizes.tokens, True)
    if not sizes.batch_invariant:
        # Few tiles: one launch, with splits for long and short queries alike.
        splits = num_splits or choose_parts(blocks, room, _keys(sizes))
        # Nor another launch where no sequence can be as short as a decode, unless q has rows past the last one; then
        # that sequence is only slower. (Not with batch_invariant: the launch decides how it is summed.)
        long_only = sizes.tokens > (sizes.batch - 1) * sizes.max_seqlen_q + DECODE_TOKENS
        if splits > 1 or sizes.batch == 1 or long_only:
            return (everything._replace(num_splits=splits, split=splits > 1),)
    decode = _decode(sizes, group, tile_for, gpu, num_splits, tail=False)
    return everything._replace(low_q=DECODE_TOKENS + 1), decode


def _decode(
    sizes: Sizes, group: int, tile_for: Callable[[int, str], Tile], gpu: Gpu, num_splits: int, tail: bool
) -> Work:  # fmt: skip
    """Return the launch for sequences of at most DECODE_TOKENS query tokens."""
    most, batch = min(sizes.max_seqlen_q, DECODE_TOKENS), sizes.batch
    # The tile must not depend on the batch's longest query where a sequence's bits may not.
    rows = 1 if sizes.batch_invariant else most * group
    tile = tile_for(rows, "")
    tiles = -(-most * group // tile.block_m)
    if sizes.batch_invariant:
        num_splits = max(1, -(-sizes.max_seqlen_k // INVARIANT_SPLIT))
        # A sink is added where splits are joined, or with one split in the kernel: equal numbers, but not equal bits.
        split = num_splits > 1 or sizes.sinks
        return Work(tile, False, tiles, 0, most, num_splits, 0, INVARIANT_SPLIT, split, batch * most, tail)
    heads, room, keys = tiles * sizes.num_kv_heads, places(tile, sizes.row_bytes, gpu), _keys(sizes)
    # One sequence has parts of its own as well, but in a stream its programs would have to read how long it is first.
    even = most * group > STREAM_ROWS and keys > NOT_CUT if sizes.even else batch == 1
    if even or sizes.mla:
        if heads * batch > room.all:
            tile = tile_for(rows, "many")
            tiles, room = -(-most * group // tile.block_m), places(tile, sizes.row_bytes, gpu)
        blocks, part_rows, goal = tiles * sizes.num_kv_heads * batch, batch * most, 0
        forced, num_splits = num_splits, num_splits or choose_splits(blocks, room, keys)
        # Where lengths may differ, a long sequence may need shares though the mean one does not; unless most places are
        # taken as it is.
        if not (forced or even) and 5 * blocks < 4 * room.all and keys > NOT_CUT:
            goal, num_splits, part_rows = num_splits, batch * (num_splits + 1), most
        return Work(tile, False, tiles, 0, most, num_splits, goal, 0, num_splits > 1, part_rows, tail, most=sizes.most)
    # Sequences that are not worth cutting have a team each.
    per = num_splits or int(keys <= NOT_CUT)
    teams = per * batch or choose_teams(heads, batch, room)
    assert (per or teams) < 1 << 16, "a counter of `join.py` counts so far"
    return Work(tile, False, tiles, 0, most, per, 0, 0, per != 1, most, tail, teams, tile.block_n, sizes.most)


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
    return max((work.scratch(sizes) for work in works), default=0)
