"""The serving kernels for GPUs that are not here: registers, spills, shared memory; how a call is cut into launches."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from crosscompile import ARCHS, SHARED_LIMIT, Compiled, assert_fits, compile_launch
from vllm_accel.dispatch.backend import PagedArgs
from vllm_accel.kernels.triton import kv_write_launch, merge_launch, paged_launch, pages, splits
from vllm_accel.kernels.triton.launch import Launch
from vllm_accel.kernels.triton.splits import Sizes, Work
from vllm_accel.kernels.triton.tiles import Tile

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
H200 = splits.Gpu(132)
#: Query tokens and heads of a group that take each height of tile.
HEIGHTS = {"m16": (1, 4), "m32": (4, 8), "m64": (8, 8), "prefill": (64, 4)}


def launch_of(
    arch: str,
    height: str = "m16",
    head_dim: int = 128,
    dtype: torch.dtype = BF16,
    kv_dtype: torch.dtype | None = None,
    block_size: int = 16,
    mla: bool = False,
    chip: paged_launch.Chip | None = None,
    kv_heads: int = 2,
    **options: Any,
) -> tuple[Launch, Launch]:
    """Return the attention and combine launches of a kind of call on an architecture, made of meta tensors."""
    kv_dtype = kv_dtype or dtype
    q_len, group = HEIGHTS[height]
    heads, kv_heads, head_dim_v = (q_len * group, 1, 512) if mla else (group * kv_heads, kv_heads, head_dim)
    if mla:
        q_len, head_dim = 1, 576

    def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, device="meta", dtype=of)

    ints, floats = torch.int32, torch.float32
    tokens = 32 * q_len
    q, k = meta(tokens, heads, head_dim), meta(100, block_size, kv_heads, head_dim, of=kv_dtype)
    v = k[..., :head_dim_v]
    descale = meta(of=floats) if kv_dtype.itemsize == 1 else None
    values = {
        "alibi_slopes": None, "sinks": None, "q_descale": None, "k_descale": descale, "v_descale": descale,
        "max_seqlen_q": q_len, "max_seqlen_k": 4096, "softmax_scale": 0.1, "causal": q_len > 1, "window_size": (-1, -1),
        "softcap": 0.0, "need_lse": True, "deterministic": False, "batch_invariant": False,
    }  # fmt: skip
    args = PagedArgs(meta(33, of=ints), meta(32, 256, of=ints), meta(32, of=ints), **{**values, **options})
    sizes = paged_launch.sizes_of(q, v, args, mla=mla)
    (work,) = splits.plan_work(
        sizes,
        lambda rows, form: paged_launch.choose_tile(arch, rows, head_dim, head_dim_v, dtype, kv_dtype, mla, form),
        H200,
    )
    out, lse = meta(tokens, heads, head_dim_v), meta(heads, tokens, of=floats)
    part = meta(splits.scratch((work,), sizes), of=floats)
    chip = chip or paged_launch.chip_of(arch)
    attention = paged_launch.attention_launch(work, q, k, v, out, lse, part, args, chip=chip, mla=mla)
    return attention, paged_launch.combine_launch(work._replace(num_splits=4), out, lse, part, args)


def spills_between_products(compiled: Compiled) -> int:
    """Count what is spilled from the first product to the last. Before and after, it costs microseconds once."""
    code = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", compiled.sass, re.MULTILINE)
    products = [i for i, op in enumerate(code) if op in ("HMMA", "HGMMA", "UTCHMMA")]
    assert products, str(compiled)
    return sum(op in ("STL", "LDL") for op in code[products[0] : products[-1]])


def assert_good(launch: Launch, arch: str, blocks: int = 1, spills: int = 0) -> None:
    compiled = compile_launch(launch, arch)
    on_nvidia = arch.startswith("sm_")
    assert_fits(compiled, arch, max_spills=10**6 if on_nvidia else 0, blocks=blocks)
    if on_nvidia:
        assert spills_between_products(compiled) <= spills, str(compiled)


#: What tiles spill that are taken all the same, by architecture, height and kind. 64 latent rows on Hopper: the tile
#: that spills is the fastest (181 us for 128 heads, 32 x 4096 tokens; the next ones, which do not or hardly, 210 and
#: 250 us: `benchmarks/results/h200/triton_tiles_mla.json`), so wide heads keep 64 rows there too, which is not timed.
#: Wide heads in fp32 on Ampere: no tile of those that were tried spills less.
#: Chunks of 256 channels on Hopper: of bf16 Triton 3.7.1 spills 5 and 3.6.0 none, of e4m3 10 and 8; an H200's tiles do
#: not change before others are timed.
SPILLED: dict[tuple[str, str, Any], int] = {
    ("sm_90", "m64", "mla"): 50, ("sm_90", "prefill", "mla"): 50,
    ("sm_90", "prefill", (256, BF16)): 5, ("sm_90", "prefill", (256, E4M3)): 10,
    ("sm_90", "m64", (256, E4M3)): 50, ("sm_90", "m64", (512, BF16)): 50,
    ("sm_80", "m32", (256, torch.float32)): 20, ("sm_80", "m64", (256, torch.float32)): 20,
}  # fmt: skip


#: An FP8 cache where e4m3 is decoded by hand, by the chip, and on AMD; the rest with the slow tests.
FP8_TOO = ("sm_80", "sm_90", "gfx942")
DECODES = [pytest.param(BF16, arch, id=f"16 bit-{arch}") for arch in ARCHS]
DECODES += [
    pytest.param(E4M3, arch, id=f"e4m3-{arch}", marks=() if arch in FP8_TOO else pytest.mark.slow) for arch in ARCHS
]


@pytest.mark.parametrize(("kv_dtype", "arch"), DECODES)
def test_decode_fits(kv_dtype: torch.dtype, arch: str) -> None:
    """As many blocks share a multiprocessor as a stream has teams for: their loads hide each other's latency."""
    attention, _ = launch_of(arch, kv_dtype=kv_dtype)
    blocks = 1
    if arch.startswith("sm_"):
        tile = Tile(16, attention.constexprs["BLOCK_N"], attention.num_warps, attention.num_stages)
        blocks = splits.places(tile, 2 * 128 * kv_dtype.itemsize, splits.Gpu(1, SHARED_LIMIT[arch])).busy
        assert blocks >= 2 or arch in ("sm_86", "sm_89", "sm_120")
    assert_good(attention, arch, blocks=blocks)


@pytest.mark.parametrize("kv_dtype", [E4M3, torch.float8_e5m2])
def test_fp8_values_leave_shared_memory_in_pairs(kv_dtype: torch.dtype) -> None:
    """They were read byte by byte, 128 times a step of 128 keys: 57 % of the copy rate on an H200, 77 % in pairs."""
    sass = compile_launch(launch_of("sm_90", kv_dtype=kv_dtype)[0], "sm_90").sass
    assert "LDS.U8" not in sass and "LDSM.16.MT88.4" in sass
    assert "LDS.U8" in compile_launch(launch_of("sm_90", kv_dtype=kv_dtype, chip=paged_launch.Chip())[0], "sm_90").sass


@pytest.mark.parametrize("kv_dtype", [BF16, E4M3])
def test_pages_come_from_lanes(kv_dtype: torch.dtype) -> None:
    """Look-ups were a third of a step's instructions, and keys waited for them: 143 us where there are now 138."""
    compiled = compile_launch(launch_of("sm_90", kv_dtype=kv_dtype)[0], "sm_90")
    (body,) = [
        text for text in re.findall(r"scf\.for .*?\n +scf\.yield", compiled.ttgir, re.DOTALL) if "tt.dot" in text
    ]
    step = body[body.rindex("scf.for") :]
    # One entry a thread, of the pages after the next 32. What it replaces had a load for each key or page of a tile.
    assert re.findall(r"tt\.load .*", step) and all("!tt.ptr<i32> loc" in t for t in re.findall(r"tt\.load .*", step))
    assert step.count("tt.load ") == 1
    assert step.count("shfl.sync.idx") == launch_of("sm_90", kv_dtype=kv_dtype)[0].constexprs["BLOCK_N"] // 16


def test_which_pages_come_from_lanes() -> None:
    def entries(arch: str = "sm_90", **options: Any) -> bool:
        return bool(launch_of(arch, **options)[0].constexprs["ENTRIES"])

    assert [n for n in (1, 4, 8, 16, 24, 32, 64, 128, 256) if entries(block_size=n)] == [8, 16, 32]
    assert entries("sm_90", height="m32") and not entries("sm_90", height="prefill")
    assert not (entries("sm_90", mla=True) or entries("sm_80") or entries("sm_100") or entries("gfx942"))


def test_chips() -> None:
    assert [paged_launch.chip_of(a).native_e4m3 for a in ("sm_86", "sm_89", "sm_90", "sm_120", "gfx942", "")] == [
        False, True, True, True, True, True,
    ]  # fmt: skip
    assert [paged_launch.chip_of(a).pairs for a in ("sm_86", "sm_89", "sm_120", "gfx942", "")] == [
        False, True, True, False, False,
    ]  # fmt: skip


def launch_without_pages(arch: str, lie: paged_launch.Lie, group: int = 4) -> Launch:
    """Return the launch of a decode of 32 sequences of 4097 keys each."""
    q, k = (torch.empty(shape, device="meta", dtype=BF16) for shape in ((32, 8 * group, 128), (32, 4097, 8, 128)))
    if lie == "packed":
        k = k.view(-1, 1, 8, 128)
    ints = [torch.empty(n, device="meta", dtype=torch.int32) for n in (33, 33, 33)]
    args = PagedArgs(*ints, *(None,) * 5, 1, 4097, 0.1, True, (-1, -1), 0.0, True, False, False)
    sizes = paged_launch.sizes_of(q, k, args, lie=lie)
    (work,) = splits.plan_work(
        sizes, lambda rows, form: paged_launch.choose_tile(arch, rows, 128, 128, BF16, BF16, False, form), H200
    )
    out, lse = torch.empty_like(q), torch.empty(8 * group, 32, device="meta")
    part = torch.empty(max(1, splits.scratch((work,), sizes)), device="meta")
    return paged_launch.attention_launch(
        work, q, k, k, out, lse, part, args, mla=False, chip=paged_launch.chip_of(arch), lie=lie
    )


@pytest.mark.parametrize("lie", ["dense", "packed"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_decodes_without_pages_fit(arch: str, lie: paged_launch.Lie) -> None:
    """As many programs share a multiprocessor as over pages."""
    made = launch_without_pages(arch, lie)
    assert made.fn.__name__ == "stream_attention"
    assert made.constexprs["PAGE"] == {"dense": pages.DENSE, "packed": pages.PACKED}[lie].value
    # A captured graph needs nothing that a plan holds, which may be gone when it is replayed.
    assert [t is None for t in made.args[3:6]] == ([True] * 3 if lie == "dense" else [False, True, False])
    # One sequence has so many parts: as many at a time as there are registers for.
    assert made.constexprs["JOIN_S"] == (32 if (arch, lie) == ("sm_90", "dense") else 16)
    blocks = 1
    if arch.startswith("sm_"):
        tile = Tile(16, made.constexprs["BLOCK_N"], made.num_warps, made.num_stages)
        blocks = splits.places(tile, 512, splits.Gpu(1, SHARED_LIMIT[arch])).busy
    assert_good(made, arch, blocks=blocks)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_dense_decodes_in_equal_parts_fit(arch: str) -> None:
    """Three programs share a multiprocessor."""
    made = launch_without_pages(arch, "dense", group=8)
    assert made.fn.__name__ == "paged_attention"
    assert_good(made, arch, blocks=3)


@pytest.mark.parametrize("arch", [pytest.param("sm_86", marks=pytest.mark.slow), "sm_90", "gfx942"])
@pytest.mark.parametrize("height", ["m64", "prefill"])
def test_longer_queries_fit(arch: str, height: str) -> None:
    assert_good(launch_of(arch, height)[0], arch)


@pytest.mark.parametrize("arch", [pytest.param("sm_86", marks=pytest.mark.slow), "sm_90", "gfx942"])
def test_mla_fits(arch: str) -> None:
    assert_good(launch_of(arch, "m16", mla=True)[0], arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize(
    "kind", [*itertools.product((64, 128, 256, 512), (BF16, E4M3, torch.float32)), "mla", "mla e4m3"]
)
def test_every_tile_fits(arch: str, height: str, kind: Any) -> None:
    if isinstance(kind, str):
        launch, _ = launch_of(arch, height, mla=True, kv_dtype=E4M3 if "e4m3" in kind else BF16)
        assert_good(launch, arch, spills=SPILLED.get((arch, height, kind), 0))
        return
    head_dim, dtype = kind
    spills = SPILLED.get((arch, height, kind), 0)
    if dtype is torch.float32:
        compiled = compile_launch(launch_of(arch, height, head_dim, dtype)[0], arch)
        assert_fits(compiled, arch, tensor_cores=False, max_spills=spills)
        return
    assert_good(launch_of(arch, height, head_dim, kv_dtype=dtype)[0], arch, spills=spills)


def test_every_option_at_once_compiles() -> None:
    def f32(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    options = {
        "alibi_slopes": f32(32, 8), "sinks": f32(8), "q_descale": f32(2), "k_descale": f32(32, 2), "softcap": 5.0,
        "window_size": (100, 5), "batch_invariant": True,
    }  # fmt: skip
    attention, combine = launch_of("sm_90", dtype=E4M3, **options)
    assert_good(attention, "sm_90")
    assert_fits(compile_launch(combine, "sm_90"), "sm_90", tensor_cores=False)


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90", "gfx942"])
def test_combine_merge_and_write_fit(arch: str) -> None:
    def meta(*shape: int, of: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, device="meta", dtype=of)

    k, cache = meta(9, 8, 128), meta(40, 16, 8, 128, of=E4M3)
    outs, lses = [meta(2, 9, 8, 128)] * 4, [meta(2, 8, 9, of=torch.float32)] * 4
    scale, slots = meta(of=torch.float32), meta(9, of=torch.int64)
    for launch in (
        launch_of(arch)[1],
        launch_of(arch, mla=True)[1],
        kv_write_launch.write_kv_launch(k, k, cache, cache, slots, scale, scale),
        merge_launch.merge_launch(outs, lses, None, outs[0], lses[0]),
    ):
        assert_fits(compile_launch(launch, arch), arch, tensor_cores=False)


# --- how a call is cut up --------------------------------------------------------------------------------------------


def test_the_shortest_split_is_the_same_on_host_and_device() -> None:
    assert pages.MIN_SPLIT.value == splits.MIN_SPLIT


@pytest.mark.parametrize(
    ("blocks", "room", "keys"),
    [*itertools.product((1, 8, 64, 256, 500, 900), ((132, 132), (396, 264), (528, 528)), (1, 300, 4096, 2**20))],
)
def test_splits_keep_the_memory_busy(blocks: int, room: tuple[int, int], keys: int) -> None:
    chosen = splits.choose_splits(blocks, splits.Places(*room), keys)
    most = max(1, min(splits.MAX_SPLITS, -(-keys // 256)))
    assert 1 <= chosen <= most

    def spent(n: int) -> float:
        """Return the time in units of what a busy memory takes."""
        waves, rest = blocks * n // room[0], blocks * n % room[0]
        return (waves * room[0] + (max(rest, room[1]) if rest else 0)) / (blocks * n)

    best = min(spent(n) for n in range(1, most + 1))
    if blocks < 4 * room[0]:
        assert spent(chosen) <= best / 0.95
        assert all(spent(n) > best / 0.95 for n in range(1, chosen))
    else:
        assert chosen == 1


def test_known_cases() -> None:
    """What an H200 was fastest with, 8 key heads of 128 channels in bf16."""
    tall, flat = (splits.places(tile, 512, H200) for tile in (Tile(16, 64, 4, 3), Tile(16, 32, 4, 4)))
    assert (tall, flat) == ((3 * 132, 2 * 132), (4 * 132, 3 * 132))
    assert splits.choose_splits(32 * 8, tall, 4096) == 1
    assert splits.choose_splits(16 * 8, tall, 16384) == 2
    assert splits.choose_splits(8, tall, 16384) in range(30, 34)
    assert splits.choose_splits(64 * 8, flat, 2048) == 1
    assert splits.choose_splits(32 * 8, flat, 4096) == 2
    assert splits.choose_splits(200 * 8, tall, 4096) == 1
    assert splits.choose_splits(8, tall, 256) == 1
    latent = splits.places(Tile(16, 32, 4, 3), 576 * 2, H200)
    assert (latent, splits.choose_splits(32, latent, 4096)) == ((2 * 132, 2 * 132), 8)


def test_a_decode_has_as_many_teams_as_keep_the_memory_busy() -> None:
    """Whatever the batch: lengths are known on the device alone, where the teams share all keys."""

    def planned(batch: int, keys: int = 4096, **options: Any) -> Work:
        sizes = Sizes(batch, batch, 32, 8, 128, 1, keys, 0, False, False)._replace(**options)
        (work,) = splits.plan_work(sizes, lambda rows, form: Tile(16, 64, 4, 3), H200)
        return work

    for batch, teams in ((7, 33), (16, 32), (32, 32), (33, 33), (64, 32), (256, 33), (5000, 33)):
        work = planned(batch)
        assert (work.teams, work.num_splits, work.split, work.unit) == (teams, 0, True, 64)
        assert work.parts(batch) == teams
    # Sequences that are not worth cutting have a team each, and nothing is joined.
    short = planned(3, keys=512)
    assert (short.teams, short.num_splits, short.split) == (3, 1, False)
    # Equal lengths are no different where a sequence has few rows. Else, and of one sequence over pages, they are cut
    # into equal parts, which another launch joins if there are some.
    assert planned(16, even=True) == planned(16) and planned(1, even=True).teams == 33
    for rows in ({"num_heads": 40}, {"max_seqlen_q": 2, "tokens": 800}):
        for even, splits_of in ((planned(400, even=True, **rows), 1), (planned(16, 16384, even=True, **rows), 2)):
            assert (even.teams, even.num_splits, even.split, even.grows) == (0, splits_of, splits_of > 1, True)
        uncut = planned(16, 512, even=True, **rows)
        assert (uncut.teams, uncut.num_splits, uncut.split) == (16, 1, False)
    alone = planned(1, keys=32768)
    assert alone.teams == 0 and alone.num_splits > 16
    # Latent attention has shares, of which a mean sequence has some, unless its sequences fill the GPU.
    for batch, goal, splits_of, programs in ((32, 1, 64, 64), (64, 0, 2, 128)):
        latent = planned(batch, mla=True)
        assert (latent.teams, latent.goal, latent.num_splits, latent.parts(batch)) == (0, goal, splits_of, programs + 1)


def test_known_parts_of_chunks() -> None:
    """What an H200 was fastest with, of those that were tried: tiles of 128 rows, 128 channels."""
    room = splits.places(Tile(128, 64, 8, 3), 512, H200, 8)
    assert room.all == 132  # one a multiprocessor
    for tiles, keys, parts in ((28, 3843, 4), (60, 11632, 2), (72, 8192, 5), (112, 8192, 1), (128, 4096, 1)):
        assert splits.choose_parts(tiles, room, keys) == parts
    assert splits.choose_parts(1, room, 2**20) <= splits.MAX_SPLITS and splits.choose_parts(1, room, 300) == 1
    # Of equally long sequences the tiles are known: 3 of 537 rows for each key head have 15, not 13.
    sizes = Sizes(537, 3, 12, 4, 128, 179, 11632, 0, False, False, even=True)
    (work,) = splits.plan_work(sizes, lambda rows, form: Tile(128, 64, 8, 3), H200)
    assert (work.num_splits, work.search) == (2, True)


def test_known_numbers_of_teams() -> None:
    room = splits.Places(396, 264)
    assert [splits.choose_teams(heads, 1, room) for heads in (1, 8, 40, 100, 300, 396)] == [264, 33, 7, 3, 1, 1]
    assert splits.choose_teams(40, 7, room) == 7 and splits.choose_teams(1, 250, room) == 250
    assert splits.choose_teams(1, 240, room) == 264  # 24 programs less are more than equal lengths would gain
    for heads in (397, 500, 2000):  # more than there is room for: waves, and the last is a small part of them
        assert splits.choose_teams(heads, 1, room) * heads >= 4 * 396


def rows_computed(work: Work, sizes: Sizes, q_len: int) -> int:
    """Return how many rows of a sequence and key head a launch computes."""
    group = sizes.num_heads // sizes.num_kv_heads
    if not work.low_q <= q_len <= work.high_q:
        return 0
    return q_len * group if work.search else min(q_len * group, work.tiles * work.tile.block_m)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    "lengths", [[1], [1] * 40, [4, 1, 8], [9], [700], [700, 1, 1, 8, 9], [2000, 2000], [1, 0, 33], [5, 100000, 1]]
)
def test_every_row_is_computed_once(lengths: list[int], batch_invariant: bool) -> None:
    for group, max_k, sinks in itertools.product((1, 3, 128), (1, 700, 100000), (False, True)):
        sizes = Sizes(sum(lengths) + 3, len(lengths), 2 * group, 2, 64, max(lengths), max_k, 0, batch_invariant, sinks)

        def tile(rows: int, form: str) -> Tile:
            return Tile(16 if rows <= 16 else 32 if rows <= 32 else 64, 32, 4, 2)

        works = splits.plan_work(sizes, tile, H200)
        for q_len in lengths:
            assert sum(rows_computed(work, sizes, q_len) for work in works) == q_len * group
        assert sum(work.tail for work in works) == 1
        for work in works:
            assert work.split or work.num_splits == 1
            assert work.num_splits * max(work.fixed, 1) >= max_k or not work.fixed
            if work.search:
                regions = sum(-(-(n * group) // work.tile.block_m) for n in [*lengths, 3])
                assert work.tiles >= regions
        # Sums and a log-sum-exp of each row; of a stream in two slots a team, with one counter of 64 bits for both.
        needed = max(((2 * w.teams * 66 or w.num_splits * 65) * w.part_rows for w in works if w.split), default=0)
        assert splits.scratch(works, sizes) == needed * sizes.num_heads
        if batch_invariant and max(lengths) >= 5:
            # Tile and splits of a sequence of 5 tokens are those it has alone.
            alone = splits.plan_work(sizes._replace(tokens=5, batch=1, max_seqlen_q=5), tile, H200)
            mine = [w for w in works if w.low_q <= 5 <= w.high_q]
            assert [(w.tile, w.fixed, w.split) for w in mine] == [(w.tile, w.fixed, w.split) for w in alone]


def test_scratch_is_bounded_by_the_device() -> None:
    """Splits multiply the rows of few tiles only: never more than about what the device runs at a time."""
    for tokens, batch in ((100000, 1), (3000, 3), (64, 1), (16, 16), (4096, 4096)):
        sizes = Sizes(tokens, batch, 32, 8, 128, max(1, tokens // batch), 131072, 0, False, False)
        works = splits.plan_work(sizes, lambda rows, form: Tile(16 if rows <= 16 else 64, 32, 4, 2), H200)
        assert splits.scratch(works, sizes) <= 2 * 4 * 2 * 4 * 132 * 64 * 129


def test_nothing_of_a_batch_is_compiled_in() -> None:
    """Long, short, few, many, shared out or not: a decode that goes on never compiles another kernel."""
    kinds = set()
    for batch, keys in ((1, 100), (1, 40000), (2, 100), (32, 4096), (33, 300), (5000, 2000)):
        q, k = (torch.empty(s, device="meta", dtype=BF16) for s in ((batch, 32, 128), (64, 16, 8, 128)))
        ints = [
            torch.empty(n, device="meta", dtype=torch.int32) for n in ((batch + 1,), (batch, -(-keys // 16)), (batch,))
        ]
        args = PagedArgs(*ints, *(None,) * 5, 1, keys, 0.1, True, (-1, -1), 0.0, True, False, False)
        sizes = paged_launch.sizes_of(q, k, args)
        (work,) = splits.plan_work(sizes, lambda rows, form: Tile(16, 64, 4, 3), H200)
        out, lse = torch.empty_like(q), torch.empty(32, batch, device="meta")
        part = torch.empty(max(1, splits.scratch((work,), sizes)), device="meta")
        made = [
            paged_launch.attention_launch(work, q, k, k, out, lse, part, args, chip=paged_launch.Chip(), mla=False)
        ]  # fmt: skip
        if work.split and not work.teams:
            made.append(paged_launch.combine_launch(work, out, lse, part, args))
        for launch in made:
            named = dict(zip(launch.fn.arg_names, launch.args, strict=False))
            free = {p.name for p in launch.fn.params if p.do_not_specialize}
            compiled = {n: v if isinstance(v, int) else type(v) for n, v in named.items() if n not in free}
            kinds.add((launch.fn.__name__, *compiled.items(), *launch.constexprs.items()))
    assert sorted(kind[0] for kind in kinds) == ["combine_splits", "paged_attention", "stream_attention"]


def test_another_tile_computes_the_same_rows() -> None:
    for tokens, batch, longest in ((12, 3, 4), (3000, 3, 1000)):
        sizes = Sizes(tokens, batch, 32, 4, 128, longest, 4096, 0, False, False)
        for rows in (16, 64):
            for work in splits.plan_work(sizes, lambda _, form, rows=rows: Tile(rows, 32, 4, 2), H200):
                small = splits.with_tile(work, Tile(16, 16, 4, 1), sizes)
                assert splits.with_tile(small, work.tile, sizes) == work
                assert rows_computed(small, sizes, longest) == rows_computed(work, sizes, longest)
