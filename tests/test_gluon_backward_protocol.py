"""The Gluon backward kernels' own source, run on the CPU with its partitions in random order (`gluon_interpreter`).

Shows what a GPU cannot: that no order of events deadlocks or overwrites a tile in use, as far as random orders go; and
that masks, tile arithmetic and the sum over a group are right.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest

from gluon_interpreter import Descriptor, Machine, Pointer
from vllm_accel.kernels.gluon.forward_sm90_launch import slots

KERNELS = Path(__file__).parent.parent / "kernels/gluon"
DKV, DQ = KERNELS / "backward_sm90_dkv.py", KERNELS / "backward_sm90_dq.py"
D = 8


def pairs(edges):
    return itertools.pairwise(edges)


def oracle(q, k, v, dout, dlse, scale, causal):
    """(heads, S, D) each, dlse (heads, Sq) -> lse, delta (heads, Sq), dq, dk, dv, in float64."""
    q, k, v, dout = (t.astype(np.float64) for t in (q, k, v, dout))
    group = len(q) // len(k)
    wide_k, wide_v = k.repeat(group, 0), v.repeat(group, 0)
    scores = np.einsum("hid,hjd->hij", q, wide_k) * scale
    rows, columns = np.indices(scores.shape[1:])
    if causal:
        scores = np.where(columns <= rows + scores.shape[2] - scores.shape[1], scores, -np.inf)
    highest = scores.max(2, initial=-np.inf)
    shift = np.where(np.isneginf(highest), 0, highest)
    p = np.exp(scores - shift[..., None])
    total = p.sum(2)
    p /= np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        lse = shift + np.log(total)
    dp = np.einsum("hid,hjd->hij", dout, wide_v)
    delta = (p * dp).sum(2) - dlse
    ds = p * (dp - delta[..., None]) * scale

    def per_key_head(t):
        return t.reshape(len(k), group, *t.shape[1:]).sum(1)

    dk, dv = per_key_head(np.einsum("hij,hid->hjd", ds, q)), per_key_head(np.einsum("hij,hid->hjd", p, dout))
    return lse, delta, np.einsum("hij,hjd->hid", ds, wide_k), dk, dv


def run(
    *, seed=0, batch=1, heads=2, kv_heads=1, seqlen_q=128, seqlen_k=100, causal=False, lengths=None, together=3, bm=32,
    bn=16, stages=2, form="plain", programs=0, dkv=DKV, dq=DQ, which=("dkv", "dq"),
):  # fmt: skip
    """Run both kernels and compare. Packed tensors end in rows of NaN, and so do the keys of the last sequence.

    form: of `FORMS`. programs: of a persistent launch, 0 for one that is not.
    """
    rng = np.random.default_rng(seed)
    scale, group = 0.3, heads // kv_heads
    sequences = batch
    cu_q = cu_k = None
    if lengths:
        batch, sequences = 1, len(lengths)
        cu_q, cu_k = (np.cumsum([0, *[pair[i] for pair in lengths]]) for i in (0, 1))
        longest = [max(pair[i] for pair in lengths) for i in (0, 1)]
        seqlen_q, seqlen_k = cu_q[-1] + 300, cu_k[-1] + 300

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q, dout = draw(batch, heads, seqlen_q, D), draw(batch, heads, seqlen_q, D)
    k, v = draw(batch, kv_heads, seqlen_k, D), draw(batch, kv_heads, seqlen_k, D)
    dlse = draw(batch, heads, seqlen_q)
    lse, delta = (np.full((batch, heads, seqlen_q), np.nan, np.float32) for _ in range(2))
    pieces = [(b, slice(0, seqlen_q), slice(0, seqlen_k)) for b in range(batch)]
    if lengths:
        for tensor, end in ((q, cu_q[-1]), (dout, cu_q[-1]), (k, cu_k[-1]), (v, cu_k[-1])):
            tensor[:, :, end:] = np.nan
        pieces = [(0, slice(*rows), slice(*keys)) for rows, keys in zip(pairs(cu_q), pairs(cu_k), strict=True)]
    want = []
    for b, rows, keys in pieces:
        lse[b, :, rows], delta[b, :, rows], *grads = oracle(
            q[b, :, rows], k[b, :, keys], v[b, :, keys], dout[b, :, rows], dlse[b, :, rows], scale, causal
        )
        want.append(grads)
    statistics = (Pointer(lse.reshape(-1)), Pointer(delta.reshape(-1)))
    cu = tuple(None if t is None else Pointer(t) for t in (cu_q, cu_k))
    constexprs = {
        "D": D, "HEAD_DIM": D, "STAGES": stages, "CAUSAL": causal, "VARLEN": bool(lengths), "PERSISTENT": programs > 0,
        "PAIRED": form == "paired", "CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24,
    }  # fmt: skip

    def compare(got, which):
        for (b, rows, keys), grads in zip(pieces, want, strict=True):
            part = got[b, keys if which else rows].swapaxes(0, 1)
            np.testing.assert_allclose(part, grads[which], rtol=1e-3, atol=1e-3)
        if lengths:
            assert not got[0, (cu_k if which else cu_q)[-1] :].any(), "rows of no sequence are not zeroed"

    if "dkv" in which:
        dk, dv = (np.full((batch, seqlen_k, kv_heads, D), 7, np.float32) for _ in range(2))
        tiles = slots(seqlen_k, sequences, longest[1], 128) if lengths else -(-seqlen_k // 128)
        args = (
            Descriptor(q, (1, 1, bm, D)), Descriptor(k, (1, 1, 64, D)), Descriptor(v, (1, 1, 64, D)),
            Descriptor(dout, (1, 1, bm, D)), *statistics, Pointer(dk.reshape(-1)), Pointer(dv.reshape(-1)), *cu, scale,
            seqlen_q, seqlen_k, sequences, kv_heads, group, together, tiles,
        )  # fmt: skip
        more = {"BM": bm, "HEAD_DIM_V": D}
        grid = tiles * kv_heads * batch
        Machine(dkv, seed).launch("attention_dkv", min(programs, grid) or grid, args, constexprs | more)
        compare(dk, 1)
        compare(dv, 2)
    if "dq" in which:
        got = np.full((batch, seqlen_q, heads, D), 7, np.float32)
        tiles = slots(seqlen_q, sequences, longest[0], 128) if lengths else -(-seqlen_q // 128)
        args = (
            Descriptor(q, (1, 1, 64, D)), Descriptor(k, (1, 1, bn, D)), Descriptor(v, (1, 1, bn, D)),
            Descriptor(dout, (1, 1, 64, D)), *statistics, Pointer(got.reshape(-1)), *cu, scale, seqlen_q, seqlen_k,
            sequences, heads, group, together, tiles,
        )  # fmt: skip
        more = {"BN": bn, "OVERLAP": form == "overlap"}
        grid = tiles * heads * batch
        Machine(dq, seed).launch("attention_dq", min(programs, grid) or grid, args, constexprs | more)
        compare(got, 0)


#: Of the dQ kernel; the dK and dV kernel has two, and takes "overlap" as "plain".
FORMS = ("plain", "overlap", "paired")
LENGTHS = [(40, 40), (1, 50), (0, 5), (30, 0), (190, 90), (20, 33), (33, 150)]
ALIKE = [(250, 140), (130, 250), (140, 200), (240, 0)]  # as many slots for each: see `slots`
SHAPES = [
    {"seqlen_q": 16, "seqlen_k": 16, "heads": 1},
    {"seqlen_q": 150, "seqlen_k": 70, "causal": True},
    {"seqlen_q": 70, "seqlen_k": 300, "causal": True, "heads": 4, "kv_heads": 2},
    {"seqlen_q": 1, "seqlen_k": 200, "causal": True, "batch": 2},
    {"seqlen_q": 300, "seqlen_k": 1, "causal": True},
    {"seqlen_q": 130, "seqlen_k": 140, "heads": 6, "kv_heads": 2},
    {"seqlen_q": 260, "seqlen_k": 260, "causal": True, "heads": 3, "batch": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_shape_is_right_and_never_stuck(shape, form):
    for seed, stages in ((0, 2), (1, 3)):
        run(seed=seed, stages=stages, form=form, **shape)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_do_not_see_each_other(form, causal):
    for seed, stages in ((0, 2), (1, 3)):
        run(seed=seed, lengths=LENGTHS, stages=stages, form=form, causal=causal)
        run(seed=seed, lengths=ALIKE, stages=stages, form=form, causal=causal, heads=1)


@pytest.mark.parametrize("programs", [1, 2, 3])
@pytest.mark.parametrize("shape", [*SHAPES[2:4], *SHAPES[5:]], ids=str)
def test_persistent_blocks_take_every_tile_once(shape, programs):
    """From one to four tiles a block of threads and more, so that both slots for what a tile keeps are used again."""
    run(seed=programs, form="paired", programs=programs, **shape)


@pytest.mark.parametrize("causal", [False, True])
def test_persistent_blocks_of_packed_sequences(causal):
    for programs, lengths in ((1, LENGTHS), (3, LENGTHS), (2, ALIKE)):
        run(seed=programs, lengths=lengths, form="paired", causal=causal, programs=programs)


@pytest.mark.parametrize("together", [1, 2, 5])
def test_tiles_are_a_permutation_whatever_heads_go_together(together):
    run(batch=3, heads=2, kv_heads=2, seqlen_q=200, seqlen_k=150, causal=True, together=together)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("dkv", "((n // STAGES) & 1) ^ 1)", "((n // STAGES) & 1))"),
        ("dkv", "mbarrier.init(empty.index(i), count=2)", "mbarrier.init(empty.index(i), count=1)"),
        ("dkv", "mbarrier.init(full.index(i), count=2)", "mbarrier.init(full.index(i), count=1)"),
        ("dkv", "mbarrier.wait(kv_full.index(kv), (used // KV_SLOTS) & 1)", "pass"),
        ("dkv", "mbarrier.wait(kv_empty.index(kv), ((used // KV_SLOTS) & 1) ^ 1)", "pass"),
        ("dkv", "mbarrier.arrive(kv_empty.index(kv), count=1)", "pass"),
        ("dkv", "    mbarrier.arrive(empty.index(before), count=1)\n", ""),
        ("dkv", "    mbarrier.arrive(empty.index(slot), count=1)\n    return", "    return"),
        ("dkv", "s = warpgroup_mma_wait(2, deps=[s])", "s = warpgroup_mma_wait(3, deps=[s])"),
        ("dkv", "dp, dk, ds = warpgroup_mma_wait(1", "dp, dk, ds = warpgroup_mma_wait(2"),
        ("dkv", "dp_a = warpgroup_mma_wait(2", "dp_a = warpgroup_mma_wait(3"),
        ("dkv", "s_b = warpgroup_mma_wait(3", "s_b = warpgroup_mma_wait(4"),
        ("dkv", "dp_b, dk, ds_a = warpgroup_mma_wait(1", "dp_b, dk, ds_a = warpgroup_mma_wait(2"),
        ("dkv", "shift - BM, scale", "shift, scale"),
        ("dkv", "lse_s.index(slot).slice(BM, BM)", "lse_s.index(slot).slice(0, BM)"),
        ("dkv", "delta_s.index(slot).slice(BM, BM)", "delta_s.index(slot).slice(0, BM)"),
        ("dkv", "gl.maximum(row, 0) // BM", "gl.maximum(row + 30, 0) // BM"),
        ("dkv", "gl.maximum(row + BN - 1, 0)", "gl.maximum(row + BN - 33, 0)"),
        ("dkv", "member == 0, 1, 0", "member == 1, 1, 0"),
        ("dkv", "is_none | (first >= len_k)", "(first >= len_k)"),
        ("dkv", "gl.minimum(first + rows, len_k)", "first"),
        ("dkv", "begin = first_k + first + c", "begin = first_k + first + 1"),
        ("dkv", "zero_past_end(as_matrix(q_s.index(slot * HALVES + h)), left - h * BM, BM, D)", "pass"),
        ("dkv", "zero_past_end(as_matrix(do_s.index(slot * HALVES + h)), left - h * BM, BM, D)", "pass"),
        ("dkv", "(rows < left)[:, None]", "(rows <= left)[:, None]"),
        ("dkv", "if left < (i + 1) * CHUNK:", "if left < i * CHUNK:"),
        ("dkv", "gl.where(left < ROWS_OF_BLOCK, STAGES, slot)", "slot"),
        ("dkv", "ragged += 1", "pass"),
        ("dkv", "count=1)\n                mbarrier.arrive(full.index(slot), count=1)", "count=1)"),
        ("dkv", "mbarrier.wait(full.index(STAGES)", "(lambda *_: 0)(full.index(STAGES)"),
        ("dq", "is_none | (first >= len_q)", "(first >= len_q)"),
        ("dq", "gl.minimum(first + rows, len_q)", "first"),
        ("dq", "first_q + first + c, first_q", "first_q + first, first_q"),
        ("dq", "zero_rows_from(as_matrix(k_s.index(slot * HALVES + h)), left", "(lambda *_: 0)(0"),
        ("dq", "zero_rows_from(as_matrix(v_s.index(slot * HALVES + h)), left", "(lambda *_: 0)(0"),
        ("dq", "- h * BN\n", "\n"),
        ("dq", "((n // STAGES) & 1) ^ 1)", "((n // STAGES) & 1))"),
        ("dq", "mbarrier.init(empty.index(i), count=2)", "mbarrier.init(empty.index(i), count=1)"),
        ("dq", "        mbarrier.arrive(empty.index(before), count=1)\n        return", "        return"),
        ("dq", "        mbarrier.arrive(empty.index(slot), count=1)\n        return", "        return"),
        ("dq", "    mbarrier.arrive(empty.index(slot), count=1)\n    return dq\n", "    return dq\n"),
        ("dq", "mbarrier.wait(q_full.index(mine), (used // Q_SLOTS) & 1)", "pass"),
        ("dq", "mbarrier.wait(q_empty.index(mine), ((used // Q_SLOTS) & 1) ^ 1)", "pass"),
        ("dq", "mbarrier.arrive(q_empty.index(mine), count=1)", "pass"),
        ("dq", "warpgroup_mma_wait(1, deps=[dp])", "warpgroup_mma_wait(2, deps=[dp])"),
        ("dq", "warpgroup_mma_wait(2, deps=[s_b])", "warpgroup_mma_wait(3, deps=[s_b])"),
        ("dq", "2 * (last - n) + 1", "2 * (last - n)"),
        ("dq", "first_free += n", "pass"),
        ("dq", "n += work[7]", "n += 1"),
        ("dq", "free = gl.maximum(gl.minimum(free, first + 1", "free = gl.maximum(gl.minimum(free, first + 17"),
        ("dq", 'highest == float("-inf")', "highest > float('inf')"),
        ("dq", "gl.maximum(visible, 1)", "visible"),
        ("parts", "(rows < length - row)", "(rows <= length - row)"),
        ("tiles", "gl.num_programs(0) - 1 - index", "gl.num_programs(0) - index"),
        ("tiles", "< total, 1, 0)", "<= total, 1, 0)"),
        ("parts", "total *= num_sequences", "pass"),
    ],
)  # fmt: skip
def test_a_broken_kernel_is_noticed(tmp_path, kind, old, new):
    """The interpreter itself: each of these would hang, race or be wrong on a GPU."""
    sources = {"dkv": DKV, "dq": DQ, "parts": DKV.with_name("backward_sm90_parts.py")}
    sources["tiles"] = DKV.with_name("tiles_sm90.py")
    copies = {name: tmp_path / source.name for name, source in sources.items()}
    for name, source in sources.items():
        text = source.read_text()
        if name == kind:
            assert text.count(old) >= 1
            text = text.replace(old, new)
        copies[name].write_text(text)
    which = (kind,) if kind in ("dkv", "dq") else ("dkv", "dq")

    def runs():
        options = {"which": which, "dkv": copies["dkv"], "dq": copies["dq"]}
        for form in FORMS:
            options["form"] = form
            run(heads=2, seqlen_q=150, seqlen_k=90, **options)
            run(seed=9, heads=1, seqlen_q=190, seqlen_k=140, causal=True, **options)
            run(seed=9, heads=1, seqlen_q=300, seqlen_k=20, causal=True, **options)
            run(seed=9, lengths=LENGTHS, causal=form == "overlap", **options)
            run(seed=9, heads=1, lengths=ALIKE, causal=form == "overlap", **options)
        run(heads=4, kv_heads=2, seqlen_q=300, seqlen_k=300, programs=2, together=1, **options)
        run(heads=1, seqlen_q=400, seqlen_k=20, batch=2, programs=1, **options)
        for seed in range(20):  # what only an unlucky order shows
            run(seed=seed, heads=1, seqlen_q=40, seqlen_k=90, **options | {"form": FORMS[seed % 3]})
            run(seed=seed, heads=1, seqlen_q=90, seqlen_k=500, batch=2, programs=1, **options)
            run(seed=seed, heads=1, seqlen_q=500, seqlen_k=10, programs=1, **options)

    with pytest.raises((AssertionError, ZeroDivisionError)):  # a Deadlock is one of these
        runs()
