"""How many parts the keys of a forward's tiles are cut into, so that few tiles fill the device."""

from __future__ import annotations

#: A part has at least so many keys, and a tile at most so many parts.
LEAST_KEYS, MOST_PARTS = 512, 16
#: What takes time beside keys, in keys of one tile: a wave of tiles or parts; the join, once; every part to join, which
#: goes as fast as there are multiprocessors. Fitted to 222 calls of an H200 (2026-12-01): NOTES.md.
TILE_KEYS, JOIN_KEYS, JOIN_PART_KEYS = 512, 128, 96
#: Parts have to take less than this share of the time without.
GAIN = 0.9
#: By tile of the head size: so many keys one after another take about 60 us on an H200. A second launch costs its host
#: up to 25 us, more than parts save in a shorter call outside of a CUDA graph.
SHORTEST = {64: 6000, 128: 4600, 256: 2400}
#: From so many waves on there is no such gain in them.
_WAVES = 8


def choose_parts(
    seqlen_q: int, seqlen_k: int, heads: int, causal: bool, tile_dim: int, rows: int, sm_count: int
) -> int:  # fmt: skip
    """Return how many parts suit tiles of `rows` rows, one at a time on a multiprocessor.

    Tiles and parts run in waves, of which the last takes as long as a full one, and the longest tiles come first.

    Args:
        heads: of all sequences together. tile_dim: the compiled head size.
    """
    tiles = -(-seqlen_q // rows) * heads
    most = min(MOST_PARTS, seqlen_k // LEAST_KEYS)
    if most <= 1 or not 0 < tiles < _WAVES * sm_count:
        return 1
    mean = float(seqlen_k)
    if causal:
        ends = [min(start + rows, seqlen_q) for start in range(0, seqlen_q, rows)]
        mean = sum(max(0, end + seqlen_k - seqlen_q) for end in ends) / len(ends)

    def in_turn(parts: int) -> float:
        return max(seqlen_k, waves(parts) * mean) / parts

    def waves(parts: int) -> int:
        return -(-tiles * parts // sm_count)

    def spent(parts: int) -> float:
        join = (parts > 1) * (JOIN_KEYS + JOIN_PART_KEYS * parts * tiles / sm_count)
        return in_turn(parts) + waves(parts) * TILE_KEYS + join

    if in_turn(1) < SHORTEST[tile_dim]:
        return 1
    best = min(range(1, most + 1), key=spent)
    return best if spent(best) < GAIN * spent(1) else 1
