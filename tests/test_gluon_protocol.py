"""The Gluon forward kernel's own source, run on the CPU with its partitions in random order (`gluon_interpreter`).

Shows what a GPU cannot: that no order of events deadlocks or overwrites a tile in use, as far as random orders go, in
every variant, for tiles of 0, 1, 2, 3 and more blocks; and that masks, tile arithmetic and packed rows are right.
"""

from pathlib import Path

import numpy as np
import pytest

from gluon_interpreter import Descriptor, Machine, Pointer
from vllm_accel.kernels.gluon.forward_sm90_launch import slots

SOURCE = Path(__file__).parent.parent / "kernels/gluon/forward_sm90.py"
BN, D = 16, 8  # a block of keys is a quarter of a consumer's rows, so that diagonals cross many blocks
LENGTHS = [(40, 40), (1, 50), (0, 5), (30, 0), (140, 90), (20, 33), (9, 9)]
ALIKE = [(250, 40), (130, 50), (0, 5), (240, 0), (140, 90), (256, 33), (9, 9)]  # as many slots for each: see `slots`

VARIANTS = {
    "plain": {"OVERLAP": False},
    "overlap": {},
    "ping-pong": {"PINGPONG": True},
    "persistent": {"PERSISTENT": True, "Q_SLOTS": 2},
    "persistent, held": {"PERSISTENT": True, "Q_SLOTS": 2, "HELD": True},
    "persistent, plain": {"PERSISTENT": True, "OVERLAP": False},
    "persistent, ping-pong": {"PERSISTENT": True, "PINGPONG": True},
    "one stage": {"STAGES": 1},
    "three stages": {"STAGES": 3, "PERSISTENT": True},
    "three consumers": {"CONSUMERS": 3, "PERSISTENT": True},
}


def oracle(q, k, v, scale, causal):
    """(heads, S, D) each -> out (Sq, heads, D), lse (heads, Sq), in float64."""
    repeats = len(q) // len(k)
    k, v = k.repeat(repeats, 0), v.repeat(repeats, 0)
    scores = np.einsum("hid,hjd->hij", q.astype(np.float64), k) * scale
    rows, columns = np.indices(scores.shape[1:])
    if causal:
        scores = np.where(columns <= rows + scores.shape[2] - scores.shape[1], scores, -np.inf)
    highest = scores.max(2, initial=-np.inf)
    shift = np.where(np.isneginf(highest), 0, highest)
    p = np.exp(scores - shift[..., None])
    total = p.sum(2)
    out = np.einsum("hij,hjd->ihd", p, v) / np.where(total == 0, 1, total).T[..., None]
    with np.errstate(divide="ignore"):
        return out, shift + np.log(total)


def join(outs, lses):
    """(parts, B, S, heads, D), (parts, B, heads, S) -> one of each; what a part without keys wrote has to be zeros."""
    if len(outs) == 1:
        return outs[0], lses[0]
    assert (outs[np.isneginf(lses).swapaxes(2, 3)] == 0).all()
    highest = lses.max(0)
    weights = np.exp(lses - np.where(np.isneginf(highest), 0, highest))
    total = weights.sum(0)
    joined = (outs * weights.swapaxes(2, 3)[..., None]).sum(0) / np.where(total == 0, 1, total).swapaxes(1, 2)[
        ..., None
    ]
    with np.errstate(divide="ignore"):
        return joined, highest + np.log(total)


def run(
    *, seed=0, batch=1, heads=2, kv_heads=1, seqlen_q=128, seqlen_k=64, causal=False, lengths=None, together=3,
    source=SOURCE, blocks=2, splits=1, **options,
):  # fmt: skip
    """Run the kernel and compare; packed tensors end in rows of NaN, and the last sequence's K and V are all NaN."""
    rng = np.random.default_rng(seed)
    scale, tail = 0.3, 300
    if lengths:
        batch, sequences = 1, len(lengths)
        seqlen_q, seqlen_k = (sum(pair[i] for pair in lengths) + tail for i in (0, 1))
        cu_q, cu_k = (np.cumsum([0, *[pair[i] for pair in lengths]]) for i in (0, 1))
    else:
        sequences, cu_q, cu_k = batch, None, None

    def draw(heads, tokens):
        return rng.standard_normal((batch, heads, tokens, D)).astype(np.float32)

    q, k, v = draw(heads, seqlen_q), draw(kv_heads, seqlen_k), draw(kv_heads, seqlen_k)
    if lengths:
        q[:, :, cu_q[-1] :] = k[:, :, cu_k[-2] :] = v[:, :, cu_k[-2] :] = np.nan
    out = np.full((splits, batch, seqlen_q, heads, D), 7, np.float32)
    lse = np.full((splits, batch, heads, seqlen_q), 7, np.float32)
    constexprs = {
        "CONSUMERS": 2, "BN": BN, "D": D, "HEAD_DIM": D, "STAGES": 2, "Q_SLOTS": 1, "CAUSAL": causal,
        "VARLEN": bool(lengths), "OVERLAP": True, "PINGPONG": False, "PERSISTENT": False, "HELD": False,
        "SPLIT": splits > 1,
        "CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24, **options,
    }  # fmt: skip
    rows = 64 * constexprs["CONSUMERS"]
    tiles_per_head = -(-seqlen_q // rows)
    if lengths:
        tiles_per_head = slots(seqlen_q, sequences, max(pair[0] for pair in lengths), rows)
    tiles = tiles_per_head * heads * batch * splits
    args = (
        Descriptor(q, (1, 1, 64, D)), *(Descriptor(t, (1, 1, constexprs["BN"], D)) for t in (k, v)),
        Pointer(out.reshape(-1)), Pointer(lse.reshape(-1)), Pointer(cu_q) if lengths else None,
        Pointer(cu_k) if lengths else None, scale, seqlen_q, seqlen_k, sequences, heads, heads // kv_heads, together,
        tiles_per_head, tiles,
    )  # fmt: skip
    grid = min(blocks, tiles) if constexprs["PERSISTENT"] else tiles
    Machine(source, seed).launch("attention_forward", grid, args, constexprs)

    out, lse = join(out, lse)
    pieces = [(q[b], k[b], v[b], out[b], lse[b]) for b in range(batch)]
    if lengths:
        assert (out[0, cu_q[-1] :] == 0).all()
        assert np.isneginf(lse[0, :, cu_q[-1] :]).all()
        edges = list(zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False))[:-1]
        pieces = [(q[0, :, a:b], k[0, :, x:y], v[0, :, x:y], out[0, a:b], lse[0, :, a:b]) for a, b, x, y in edges]
    for q_, k_, v_, got_out, got_lse in pieces:
        want_out, want_lse = oracle(q_, k_, v_, scale, causal)
        np.testing.assert_allclose(got_out, want_out, rtol=1e-4, atol=2e-4)
        np.testing.assert_allclose(got_lse, want_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_right_and_never_stuck(variant):
    assert slots(300 + sum(n for n, _ in LENGTHS), len(LENGTHS), 140, 128) == 12 and slots(1325, 7, 256, 128) == 15
    options = VARIANTS[variant]
    for blocks in (1, 2, 3, 6):
        run(seed=blocks, heads=1, seqlen_k=BN * blocks, **options)
    run(seed=7, batch=2, seqlen_q=150, seqlen_k=70, causal=True, **options)
    run(seed=8, kv_heads=2, seqlen_q=70, seqlen_k=150, causal=True, **options)
    run(seed=9, lengths=LENGTHS, causal=True, **options)
    run(seed=10, lengths=LENGTHS, causal=False, **options)
    run(seed=12, lengths=ALIKE, causal=True, heads=1, **options)
    run(seed=11, lengths=[(70, 20), (9, 9)], BN=48, **options)  # what is zeroed is shared out


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_of_a_tiles_keys_are_right_in_every_variant(variant):
    """Even and uneven parts, parts without a block, those that causal rows do not reach, rows without keys."""
    options = VARIANTS[variant]
    run(seed=1, heads=1, seqlen_k=BN * 6, splits=3, **options)
    run(seed=2, heads=1, seqlen_k=BN * 5 + 3, splits=2, **options)
    run(seed=3, heads=1, seqlen_k=BN, splits=3, **options)
    run(seed=4, heads=1, seqlen_k=0, splits=2, **options)
    run(seed=5, batch=2, seqlen_q=150, seqlen_k=70, causal=True, splits=4, **options)
    run(seed=6, kv_heads=2, seqlen_q=70, seqlen_k=150, causal=True, splits=5, **options)


@pytest.mark.parametrize("together", [1, 2, 4, 6])
def test_tiles_are_a_permutation_whatever_heads_go_together(together):
    run(batch=3, heads=2, seqlen_q=300, seqlen_k=40, causal=True, together=together)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("((n + 1) // STAGES) & 1) ^ 1)", "((n + 1) // STAGES) & 1))"),
        ("k_empty.index(i), count=CONSUMERS", "k_empty.index(i), count=1"),
        ("        mbarrier.arrive(v_empty.index(v_slot), count=1)\n    return", "    return"),
        ("            mbarrier.arrive(v_empty.index(v_slot), count=1)\n\n", "\n"),
        ("            mbarrier.arrive(q_empty.index(q_index), count=1)", "            pass"),
        ("            mbarrier.wait(q_full.index(q_index), (work // Q_SLOTS) & 1)", "            pass"),
        ("mbarrier.wait(v_full.index(v_slot), (last // STAGES) & 1)", "mbarrier.wait(v_full.index(v_slot), last & 1)"),
        ("        mbarrier.wait(k_full.index((n + 1) % STAGES)", "        mbarrier.wait(k_full.index(n % STAGES)"),
        ("named_arrive(FIRST_NAMED_BARRIER)", "pass"),
        ("named_arrive(FIRST_NAMED_BARRIER + 1 - c)", "named_arrive(FIRST_NAMED_BARRIER + c)"),
        ("warpgroup_mma_wait(1, deps=[s_token])", "warpgroup_mma_wait(2, deps=[s_token])"),
        ("acc, p, p_next = warpgroup_mma_wait(0", "acc, p, p_next = warpgroup_mma_wait(1"),
        ("v_s.index(used % STAGES)), len_k", "v_s.index(used % STAGES)), 1 + len_k"),
        ("(i % CONSUMERS == c)", "(i % CONSUMERS == 0)"),
        ("TILE + middle <= slot", "TILE <= slot"),
        ("gl.where(batch < num_sequences, end, seqlen)", "end"),
        ("is_none | (start >= len_q)", "(start >= len_q)"),
        ("gl.minimum(start + rows, len_q)", "start"),
        ("each = (slots - 1) // num_sequences", "each = slots // num_sequences"),
        ("begin = first_q + start - c * ROWS + c", "begin = first_q + start - c * ROWS"),
        ("gl.store(lse + head.to(gl.int64) * total_q", "gl.store(lse"),
        ("    named_sync(CONSUMERS_BARRIER, CONSUMERS * 128)\n", "    pass\n"),
        ('shift = gl.where(highest == float("-inf"), 0.0, highest)', "shift = highest"),
        ("free = gl.minimum(free, start + 1", "free = gl.minimum(free, start + 17"),
        ("(rows < len_q - start)", "(rows <= len_q - start)"),
        ("batch += part * tiles[3]", "batch += part"),
        ("first_k += low * BN", "pass"),
        ("gl.where(blocks > 0, len_k - low * BN, 0)", "len_k - low * BN"),
        ("blocks = blocks * (part + 1) // parts - low", "blocks = blocks * (part + 1) // parts"),
        ("        blocks = gl.maximum(blocks, 1)", "        pass"),
    ],
)
def test_a_broken_protocol_is_noticed(tmp_path, old, new):
    """The interpreter itself: each of these would hang, race or be wrong on a GPU."""
    texts = {path.name: path.read_text() for path in (SOURCE, SOURCE.with_name("tiles_sm90.py"))}
    assert sum(text.count(old) for text in texts.values()) >= 1
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace(old, new))
    broken = tmp_path / SOURCE.name

    def runs():
        for options in ({"PINGPONG": True}, {"PINGPONG": True, "PERSISTENT": True}, {"PERSISTENT": True}):
            run(source=broken, heads=1, seqlen_q=150, seqlen_k=90, **options)
            for lengths in (LENGTHS, ALIKE, ALIKE[:1]):
                run(source=broken, seed=9, lengths=lengths, causal=True, **options)
            run(source=broken, seed=11, lengths=[(70, 20), (9, 9)], BN=48, **options)
            for seqlen_k in (BN, BN * 5 + 3):
                run(source=broken, batch=2, heads=1, seqlen_q=150, seqlen_k=seqlen_k, splits=3, causal=True, **options)

    with pytest.raises(AssertionError):  # a Deadlock is one
        runs()
