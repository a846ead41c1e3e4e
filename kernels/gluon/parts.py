"""How many parts the keys of a forward's tiles are cut into, so that few tiles fill the device."""

from __future__ import annotations

#: A part has at least so many keys, and a tile at most so many parts.
LEAST_KEYS, MOST_PARTS = 512, 16
#: What takes time beside keys, in keys of one tile: a wave of tiles or parts; the join, once, and every part, as many at a
#: time as multiprocessors. Fitted to 222 calls of an H200 (2026-12-01): NOTES.md.
TILE_KEYS, JOIN_KEYS, JOIN_PART_KEYS = 512, 128, 96
#: Parts have to take less than this share of the time without.
GAIN = 0.9
#: From so many waves on there is no such gain in them.
_WAVES = 8


def choose_parts(seqlen_q: int, seqlen_k: int, heads: int, causal: bool, rows: int, sm_count: int) -> int:
    """Return how many parts suit tiles of `rows` rows, one at a time on a multiprocessor.

    Tiles and parts run in waves, of which the last takes as long as a full one, and the longest tiles come first.

    Args:
        heads: of all sequences together.
    """
    tiles = -(-seqlen_q // rows) * heads
    most = min(MOST_PARTS, seqlen_k // LEAST_KEYS)
    if most <= 1 or not 0 < tiles < _WAVES * sm_count:
        return 1
    mean = float(seqlen_k)
    if causal:
        ends = [min(start + rows, seqlen_q) for start in range(0, seqlen_q, rows)]
        mean = sum(max(0, end + seqlen_k - seqlen_q) for end in ends) / len(ends)

    def spent(parts: int) -> float:
        waves = -(-tiles * parts // sm_count)
        time = max(seqlen_k, waves * mean) / parts + waves * TILE_KEYS
        return time + (parts > 1) * (JOIN_KEYS + JOIN_PART_KEYS * parts * tiles / sm_count)

    best = min(range(1, most + 1), key=spent)
    return best if spent(best) < GAIN * spent(1) else 1
