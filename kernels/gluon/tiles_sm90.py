"""Which tiles a block of threads takes: its one, or with PERSISTENT many of all; and which rows and keys a tile is.

With PERSISTENT a tile's begin and end run under the products of another, and no block of threads has to start for it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS = gl.constexpr(64)  # query rows, or keys, of one consumer: the M of one wgmma


@gluon.jit
def tile_of_turn(turn, PERSISTENT: gl.constexpr):
    """Return which tile this block of threads takes next: there and back again, since they are in order of weight."""
    index = gl.program_id(0)
    if PERSISTENT:
        index = gl.where(turn % 2 == 0, index, gl.num_programs(0) - 1 - index) + turn * gl.num_programs(0)
    return index


@gluon.jit
def turns(total, PERSISTENT: gl.constexpr):
    """Return how many of all tiles this block takes; one that the compiler knows to be one costs fewer registers."""
    if PERSISTENT:
        each = total // gl.num_programs(0)
        return each + gl.where(tile_of_turn(each, True) < total, 1, 0)
    else:
        return 1


@gluon.jit
def sequence_at(slot, slots, num_sequences, seqlen, cu_seqlens, TILE: gl.constexpr):
    """Return which packed sequence one of a head's slots is for, which tile of it, and how many rows it is at most.

    What is past the last sequence counts as one more. The host gives the fewer slots of two ways to share them out:
    as many for each sequence as the longest needs, and one for all that is past the last; or for sequence b those from
    cu_seqlens[b] // TILE + b on, which are at least as many as its tiles, whatever the lengths, and at most one more.
    """
    sequence = 0
    rows = seqlen
    if slots <= seqlen // TILE + num_sequences:
        each = (slots - 1) // num_sequences
        sequence = slot // each
        tile = slot - sequence * each
    else:
        high = num_sequences
        while sequence < high:
            middle = (sequence + high + 1) // 2
            found = gl.load(cu_seqlens + middle) // TILE + middle <= slot
            sequence = gl.where(found, middle, sequence)
            high = gl.where(found, high, middle - 1)
        tile = slot - gl.load(cu_seqlens + sequence) // TILE - sequence
        rows = gl.minimum(seqlen, TILE)
    return sequence, tile, rows


@gluon.jit
def extent(batch, num_sequences, seqlen, cu_seqlens):
    """Return where a packed sequence starts and its length; of sequence `num_sequences`, what is past the last one."""
    first = gl.load(cu_seqlens + batch)
    end = gl.load(cu_seqlens + gl.minimum(batch + 1, num_sequences))
    return first, gl.where(batch < num_sequences, end, seqlen) - first


@gluon.jit
def tile_at(
    index, tiles, BM: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr, VARLEN: gl.constexpr, SPLIT: gl.constexpr
):
    """Say which rows tile `index` is. Heads go in groups of `heads_together` (their K and V fit in L2), and within a
    group all heads' heaviest causal tiles come first (of each packed sequence).

    Where `blocks` is 0, rows from `start` to `len_q`, if any, belong to no sequence. With SPLIT it is one part of a
    tile's keys: `first_k` and `len_k` are shifted to where that begins, and all tiles' first parts come first.
    """
    # In a packed batch seqlen_q is the number of all rows.
    (
        num_tiles,
        tiles_per_head,
        heads_together,
        num_sequences,
        num_heads,
        seqlen_q,
        seqlen_k,
        cu_seqlens_q,
        cu_seqlens_k,
    ) = tiles
    heads = num_heads
    if not VARLEN:
        heads = num_heads * num_sequences
    part = 0
    if SPLIT:
        part = index // (tiles_per_head * heads)
        index -= part * (tiles_per_head * heads)
    group = index // (tiles_per_head * heads_together)
    inside = index - group * (tiles_per_head * heads_together)
    width = gl.minimum(heads_together, heads - group * heads_together)
    row_tile = inside // width
    head = group * heads_together + inside - row_tile * width
    if CAUSAL:
        row_tile = tiles_per_head - 1 - row_tile
    batch = 0
    first_q = 0
    first_k = 0
    len_q = seqlen_q
    len_k = seqlen_k
    if VARLEN:
        sequence, row_tile, rows = sequence_at(row_tile, tiles_per_head, num_sequences, seqlen_q, cu_seqlens_q, BM)
        first_q, len_q = extent(sequence, num_sequences, seqlen_q, cu_seqlens_q)
        first_k, len_k = extent(sequence, num_sequences, seqlen_k, cu_seqlens_k)
    else:
        batch = head // num_heads
        head -= batch * num_heads
    start = row_tile * BM
    visible = len_k
    if CAUSAL:
        visible = gl.minimum(visible, gl.minimum(start + BM, len_q) + len_k - len_q)
    # A tile without keys runs one block with everything masked.
    blocks = (gl.maximum(visible, 1) + BN - 1) // BN
    if VARLEN:
        is_none = sequence == num_sequences
        blocks = gl.where(is_none | (start >= len_q), 0, blocks)
        len_q = gl.where(is_none, gl.minimum(start + rows, len_q), len_q)
    if SPLIT:
        parts = num_tiles // (tiles_per_head * heads)
        low = blocks * part // parts
        blocks = blocks * (part + 1) // parts - low
        first_k += low * BN
        # A part without blocks runs one with everything masked, as a tile without keys does.
        len_k = gl.where(blocks > 0, len_k - low * BN, 0)
        blocks = gl.maximum(blocks, 1)
    return part, batch, head, start, first_q, first_k, len_q, len_k, blocks
