"""Paged decode, chunked prefill, MLA: numbers against the float64 oracle, with NaN wherever nothing may be read."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_accel.backends.triton import BACKEND
from vllm_accel.backends.triton_paged import TritonPaged, bind_paged
from vllm_accel.dispatch.backend import PagedArgs
from vllm_accel.dispatch.device import preset
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation
from vllm_accel.kernels.triton import join, paged_launch, pages, splits
from vllm_accel.kernels.triton import teams as teams_module
from vllm_accel.kernels.triton.launch import run
from vllm_accel.kernels.triton.tiles import Tile
from vllm_accel.testing.cases_paged import PAGED_CASES, PagedCase
from vllm_accel.testing.conformance_paged import check_paged_backend
from vllm_accel.testing.oracle import attention_paged_oracle, plain_attention_paged
from vllm_accel.testing.tolerance import assert_close, assert_lse_close

H200 = preset("h200")
#: Its kernels decode e4m3 by hand.
A100 = preset("a100")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(autouse=True)
def _empty_is_nan() -> Iterator[None]:
    """torch.empty gives NaN here: an output that nobody wrote, or a partial result that was read unwritten, shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Call:
    """A paged call. The caches hold NaN but for the keys there are; unused table entries name no block."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cu_seqlens_q: Tensor
    block_table: Tensor
    seqused_k: Tensor
    mla: bool = False

    @property
    def tables(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("cu_seqlens_q", "block_table", "seqused_k")}


def make(
    q_lens: list[int],
    k_lens: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    head_dim_v: int = 0,
    block_size: int = 16,
    dtype: torch.dtype = torch.float16,
    kv_dtype: torch.dtype | None = None,
    head_major: bool = False,
    tail: int = 0,
    mla: bool = False,
    seed: int = 0,
) -> Call:
    """Make a call; `tail` rows of q belong to no sequence."""
    g = torch.Generator().manual_seed(seed)
    head_dim_v, kv_dtype = head_dim_v or head_dim, kv_dtype or dtype
    wanted = [-(-n // block_size) for n in k_lens]
    blocks = sum(wanted) + 3
    order = torch.randperm(blocks, generator=g).tolist()
    shape = (blocks, kv_heads, block_size) if head_major else (blocks, block_size, kv_heads)

    def cache(width: int) -> Tensor:
        full = torch.full((*shape, width), float("nan")).to(kv_dtype)
        return full.transpose(1, 2) if head_major else full

    keys, values = cache(head_dim), cache(head_dim_v)
    table = torch.full((len(k_lens), max(wanted, default=0) + 2), 2**31 - 1, dtype=torch.int32)
    for b, (length, count) in enumerate(zip(k_lens, wanted, strict=True)):
        for j in range(count):
            block = order.pop()
            table[b, j] = block
            filled = min(block_size, length - j * block_size)
            for c in (keys, values):
                new = torch.randn((filled, kv_heads, c.shape[-1]), generator=g).to(kv_dtype)
                c[block, :filled].view(torch.uint8).copy_(new.view(torch.uint8))
    ends = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    q = torch.randn((sum(q_lens) + tail, heads, head_dim), generator=g).to(dtype)
    return Call(
        q, keys, keys[..., :head_dim_v] if mla else values, ends, table, torch.tensor(k_lens, dtype=torch.int32), mla
    )


def kernel_of(call: Call, num_splits: int = 0, device: Any = H200) -> TritonPaged:
    features = Feature.PAGED | (Feature.MLA if call.mla else Feature(0))
    spec = AttentionSpec(
        call.q.dtype, call.k_cache.dtype, call.q.shape[1], call.k_cache.shape[2], call.q.shape[2],
        call.v_cache.shape[3], 1, 1, 1, Relation.MIXED, features, call.k_cache.shape[1],
    )  # fmt: skip
    return bind_paged(spec, device, num_splits)


def arguments(call: Call, **options: Any) -> PagedArgs:
    lengths = call.cu_seqlens_q.diff()
    values = {
        "alibi_slopes": None, "sinks": None, "q_descale": None, "k_descale": None, "v_descale": None,
        "max_seqlen_q": int(lengths.max()), "max_seqlen_k": max(1, int(call.seqused_k.max())),
        "softmax_scale": call.q.shape[2] ** -0.5, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
        "need_lse": True, "deterministic": False, "batch_invariant": False,
    }  # fmt: skip
    return PagedArgs(**call.tables, **{**values, **options})


def check(call: Call, num_splits: int = 0, device: Any = H200, **options: Any) -> tuple[Tensor, Tensor]:
    """Compare out and lse with the oracle, and return them."""
    out, lse = kernel_of(call, num_splits, device=device).forward(
        call.q, call.k_cache, call.v_cache, arguments(call, **options)
    )
    assert lse is not None
    meaning = {n: v for n, v in options.items() if n not in ("batch_invariant", "max_seqlen_q", "max_seqlen_k")}
    given = (call.q, call.k_cache, call.v_cache)
    reference, expected_lse = attention_paged_oracle(*given, **call.tables, **meaning)
    plain, _ = plain_attention_paged(*given, **call.tables, **meaning)
    # Rows past the last sequence are 0 by definition: exact in any dtype.
    assert_close(out, reference, plain, what="out")
    assert_lse_close(lse, expected_lse, dtype=call.q.dtype)
    return out, lse


@pytest.mark.parametrize("block_size", [1, 24, 64])
def test_decode_over_blocks_of_any_size(block_size: int) -> None:
    edges = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100]
    check(make([1] * len(edges), edges, block_size=block_size, kv_heads=1))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 5, 8])
def test_splits_join_to_the_same_result(num_splits: int) -> None:
    call = make([1] * 6, [0, 255, 256, 257, 600, 1100], heads=1, kv_heads=1, head_dim=16)
    check(call, num_splits, max_seqlen_k=1100)


@triton.jit
def _count(seqused, sequences, firsts, counts, batch, most, goal):
    """Write down for a share whose it is, for a sequence where its shares begin and how many there are."""
    index = tl.program_id(0)
    sequence, nth, count = pages.find_share(index, seqused, batch, most, goal)
    tl.store(sequences + index, sequence)
    if sequence < batch:
        first, again = pages.shares_of(sequence, seqused, batch, most, goal)
        tl.store(firsts + index, first + nth)
        tl.store(counts + sequence, tl.where(again == count, count, -1))


def counts_of(lengths: list[int], goal: int, most: int = 2**31 - 1) -> list[int]:
    """Return how many shares each sequence has, once it is clear that every share is somebody's and nobody's twice."""
    batch, room = len(lengths), len(lengths) * (goal + 1)
    used = torch.tensor(lengths, dtype=torch.int32)
    sequences, firsts, counts = (torch.full((n,), -1, dtype=torch.int32) for n in (room + 1, room + 1, batch))
    _count[(room + 1,)](used, sequences, firsts, counts, batch, most, goal)
    found = counts.tolist()
    total = sum(found)
    assert min(found) >= 1 and total <= room
    assert sequences.tolist() == [b for b, n in enumerate(found) for _ in range(n)] + [batch] * (room + 1 - total)
    assert firsts[:total].tolist() == list(range(total))
    return found


def test_shares_go_to_the_sequences_that_have_the_keys() -> None:
    assert counts_of([4096] * 3, 2) == [2, 2, 2]
    assert counts_of([4096] * 3, 1) == [1, 1, 1]
    assert counts_of([4096, 4000, 4200] * 50, 2) == [2] * 150
    assert counts_of([16384] + [512] * 7, 2) == [13] + [1] * 7  # of a mean of 2496, halved
    assert counts_of([3000, 1000, 0, -5], 3) == [9, 3, 1, 1]
    assert counts_of([5000, 1000], 4, most=1000) == [4, 4]  # a window hides what one has more
    assert counts_of([0, 0, 0], 2) == [1, 1, 1]
    assert counts_of([2**31 - 1, 5], 3) == [6, 1]


def test_shares_always_have_room() -> None:
    g = torch.Generator().manual_seed(0)
    for batch, goal in ((1, 1), (3, 2), (130, 1), (40, 7)):
        scale = 10 ** (torch.rand(batch, generator=g) * 5)
        counts_of((torch.rand(batch, generator=g) * scale).int().tolist(), goal)
        counts_of([1] + [3] * (batch - 1), goal)  # as many halves as there can be


@triton.jit
def _ranges(
    cu_seqlens, seqused, found, batch, tokens, limit, num_blocks, teams, per, most, high_q, PAGE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Write down what `range_of_team` finds for each team."""
    team = tl.program_id(0)
    numbers = teams_module.range_of_team(
        team, cu_seqlens, seqused, batch, tokens, limit, num_blocks, teams, per, most, high_q, PAGE, UNIT,
    )  # fmt: skip
    for i in tl.static_range(5):
        tl.store(found + 5 * team + i, numbers[i])


def blocks_of_teams(
    lengths: list[int], teams: int, per: int = 0, q_lens: list[int] | None = None, most: int = 2**31 - 1,
    lie: paged_launch.Lie = "paged",
) -> list[dict[int, int]]:  # fmt: skip
    """Return how many blocks of which sequence each team has, once it is clear that every block is somebody's."""
    batch, q_lens, unit, high_q = len(lengths), q_lens or [1] * len(lengths), 128, 1 if lie == "dense" else 4
    ends = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    found = torch.full((teams, 5), -1, dtype=torch.int32)
    used = torch.tensor(lengths, dtype=torch.int32)
    limit, stored = 2**31 - 1, sum(lengths)
    if lie == "packed":
        used = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    elif lie == "dense":
        (limit,) = set(lengths)
    page = {"paged": 16, "dense": pages.DENSE.value, "packed": pages.PACKED.value}[lie]
    numbers = (batch, sum(q_lens), limit, stored, teams, per, most, high_q, page, unit)
    _ranges[(teams,)](*((None, None) if lie == "dense" else (ends, used)), found, *numbers)
    n = [max(1, -(-min(max(k, 0), most) // unit)) for k in lengths]
    n = [count if 0 < q <= high_q else 0 for count, q in zip(n, q_lens, strict=True)]
    starts = [0] * batch if per else torch.tensor([0, *n]).cumsum(0)[:-1].tolist()
    had: list[dict[int, int]] = []
    owners: dict[int, list[tuple[int, int]]] = {}
    for team, (share, start, stop, sequence, before) in enumerate(found.tolist()):
        mine = {}
        for b in range(sequence, batch):
            if before >= stop:
                break
            assert per or starts[b] == before
            count = min(stop, before + n[b]) - max(start, before)
            if count > 0:
                mine[b] = count
                # The first and the last team with blocks of the sequence, that `stream_attention` works out.
                place = team - start // share
                owners.setdefault(b, []).append((place + before // share, place + (before + n[b] - 1) // share))
            before += n[b]
        had.append(mine)
    assert [sum(mine.get(b, 0) for mine in had) for b in range(batch)] == n
    for b, named in owners.items():
        having = [team for team, mine in enumerate(had) if b in mine]
        assert named == [(having[0], having[-1])] * len(having)
    return had


def test_teams_have_equal_ranges_of_all_keys() -> None:
    assert blocks_of_teams([1024] * 3, 3) == [{0: 8}, {1: 8}, {2: 8}]
    assert blocks_of_teams([1024] * 3, 3, lie="dense") == [{0: 8}, {1: 8}, {2: 8}]
    assert blocks_of_teams([1024] * 3, 6) == [{0: 4}, {0: 4}, {1: 4}, {1: 4}, {2: 4}, {2: 4}]
    packed: tuple[paged_launch.Lie, ...] = ("paged", "packed")
    for lie in packed:
        assert blocks_of_teams([2000, 0, 100, 700], 4, lie=lie) == [{0: 6}, {0: 6}, {0: 4, 1: 1, 2: 1}, {3: 6}]
        assert blocks_of_teams([5000, 1000], 4, most=1000, lie=lie) == [{0: 4}, {0: 4}, {1: 4}, {1: 4}]  # by a window
    assert blocks_of_teams([5000] * 2, 4, most=1000, lie="dense") == [{0: 4}, {0: 4}, {1: 4}, {1: 4}]
    assert blocks_of_teams([1100] * 3, 4, lie="dense") == [{0: 7}, {0: 2, 1: 5}, {1: 4, 2: 3}, {2: 6}]
    assert blocks_of_teams([900], 9) == [{0: 2}] * 4 + [{}] * 5  # none has less than MIN_SPLIT
    assert blocks_of_teams([900] * 2, 9, lie="dense") == [{0: 2}] * 4 + [{1: 2}] * 4 + [{}]
    assert blocks_of_teams([0, 0, -5], 1) == [{0: 1, 1: 1, 2: 1}]
    # Sequences without query tokens, or with so many that another launch has them, have no keys here.
    assert blocks_of_teams([900, 900, 900, 900], 4, q_lens=[1, 0, 5, 4]) == [{0: 4}, {0: 4}, {3: 4}, {3: 4}]


def test_each_sequence_has_its_own_teams() -> None:
    assert blocks_of_teams([1024, 300, 0], 6, per=2) == [{0: 4}, {0: 4}, {1: 2}, {1: 1}, {2: 1}, {}]
    assert blocks_of_teams([1024, 300, 0], 6, per=2, lie="packed") == [{0: 4}, {0: 4}, {1: 2}, {1: 1}, {2: 1}, {}]
    assert blocks_of_teams([300] * 2, 4, per=2, lie="dense") == [{0: 2}, {0: 1}, {1: 2}, {1: 1}]
    assert blocks_of_teams([1024, 300, 0], 3, per=1) == [{0: 8}, {1: 3}, {2: 1}]


def test_teams_of_large_batches() -> None:
    g = torch.Generator().manual_seed(0)
    for batch, teams in ((127, 5), (128, 33), (129, 1), (300, 40)):
        lengths = (10 ** (torch.rand(batch, generator=g) * 4)).int().tolist()
        had = blocks_of_teams(lengths, teams)
        most = max(sum(mine.values()) for mine in had)
        assert most == max(2, -(-sum(sum(mine.values()) for mine in had) // teams))


@triton.jit
def _arrive(counters, found, members):
    """Count one more, of each counter."""
    i = tl.program_id(0)
    join.prepare(counters + i, tl.load(counters + i))
    tl.store(found + i, join.arrive(counters + i, members).to(tl.int32))


#: What scratch memory may hold: zeros and ones, the largest and smallest numbers, NaN of all sorts, what looks like a
#: counter almost, and what an earlier launch left behind.
HELD = [
    0, 1, -1, 2**63 - 1, 2**63 - 2, -(2**63), 0x7FFFFFFFFFFF0000, 0x7FFFFFFFFFFF0003, 0x7FFFFFFF7FFFFFFF,
    0x7FF8000000000000, 0x7FC07FC07FC07FC0, 0x7E007E007E007E00, join.KEY.value ^ (1 << 16), join.KEY.value - 1,
    join.KEY.value + (1 << 16), join.KEY.value,
]  # fmt: skip


def test_counters_work_in_memory_that_nobody_cleared() -> None:
    """The last of each knows that it is the last, and leaves a counter of nobody, whatever was there."""
    for members in (2, 3, 7):
        counters = torch.tensor(HELD)
        for n in range(1, 2 * members + 1):
            found = torch.full_like(counters, -1, dtype=torch.int32)
            _arrive[(len(HELD),)](counters, found, members)
            assert found.tolist() == [int(n % members == 0)] * len(HELD)
            assert (counters == join.KEY.value + n % members).all()


def test_scratch_memory_may_hold_anything() -> None:
    call = make([1, 1], [700, 900], heads=1, kv_heads=1, head_dim=16)
    args = arguments(call)
    sizes = paged_launch.sizes_of(call.q, call.v_cache, args)
    (work,) = splits.plan_work(sizes, lambda rows, form: Tile(16, 64, 4, 2), splits.Gpu(1))
    work = work._replace(teams=4)
    want, want_lse = attention_paged_oracle(call.q, call.k_cache, call.v_cache, **call.tables)
    part = torch.empty((work.scratch(sizes) + 1) // 2, dtype=torch.int64)
    for held in (*HELD, None):  # None: what the launch before left
        if held is not None:
            part.fill_(held)
        out, lse = torch.full_like(call.q, float("nan")), torch.full((1, 2), float("nan"))
        given = (call.q, call.k_cache, call.v_cache, out, lse, part.view(torch.float32), args)
        run(paged_launch.attention_launch(work, *given, chip=paged_launch.Chip(), mla=False))
        assert (out - want).abs().max() < 2e-3 and (lse - want_lse).abs().max() < 2e-3


@pytest.mark.parametrize("options", [{}, {"window_size": (900, 0)}, {"sinks": torch.tensor([0.5, -1.0])}], ids=str)
def test_uneven_lengths_join_to_the_same_result(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one team for all of them, with a few that begin and end anywhere, and with more than there are keys for."""
    call = make([1, 1, 1, 1, 1], [1100, 0, 300, 40, 700], heads=2, kv_heads=1, head_dim=16, tail=3)
    for count in (1, 5, 12):
        monkeypatch.setattr(splits, "choose_teams", lambda heads, batch, room, n=count: n)
        check(call, **options)
        check(make([2, 1, 3], [700, 2, 900], heads=2, kv_heads=1, head_dim=16), causal=True, **options)


def test_lengths_that_grow_need_no_other_plan() -> None:
    """What a captured graph replays: the same launches, while the teams wander from one sequence to the other."""
    call = make([1, 1], [1900, 1900], heads=1, kv_heads=1, head_dim=16)
    few = replace(H200, sm_count=1)
    kernel = kernel_of(call, device=few)
    for lengths in ([1900, 3], [2, 1900], [900, 1000]):
        now = replace(call, seqused_k=torch.tensor(lengths, dtype=torch.int32))
        args = arguments(now, max_seqlen_k=1900)
        out, lse = kernel.forward(now.q, now.k_cache, now.v_cache, args)
        given = (now.q, now.k_cache, now.v_cache)
        want, want_lse = attention_paged_oracle(*given, **now.tables)
        assert_close(out, want, plain_attention_paged(*given, **now.tables)[0], what="out")
        assert lse is not None
        assert_lse_close(lse, want_lse, dtype=now.q.dtype)
    assert len(kernel._prepared) == 1


def test_decode_of_every_sort_of_head() -> None:
    check(make([1, 1], [40, 3], heads=6, kv_heads=2, head_dim=80, head_dim_v=40))
    check(make([1, 1], [40, 3], heads=20, kv_heads=1, head_dim=16, head_dim_v=32))
    check(make([1, 1], [40, 3], heads=3, kv_heads=3, head_dim=5, head_dim_v=7, block_size=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunked_prefill_mixed_with_decode(dtype: torch.dtype) -> None:
    lengths = [1, 40, 0, 3, 21, 1], [65, 100, 17, 30, 21, 1]
    check(make(*lengths, dtype=dtype, tail=5), causal=True)


def test_prefill_beside_decodes_that_split() -> None:
    """Two launches: on a small GPU the long queries fill it, while the short ones share out their many keys."""
    call = make([1, 40, 3], [900, 60, 300], heads=4, kv_heads=1, head_dim=16, tail=2)
    small = replace(H200, sm_count=1)
    check(call, device=small, causal=True)
    sizes = paged_launch.sizes_of(call.q, call.v_cache, arguments(call))
    works = splits.plan_work(sizes, kernel_of(call, device=small)._tile_for, kernel_of(call, device=small)._gpu)
    assert [work.split for work in works] == [False, True]


def test_more_queries_than_keys() -> None:
    """The first rows of a causal sequence see nothing."""
    check(make([12, 3, 2], [5, 0, 1], heads=2, kv_heads=1), causal=True)
    check(make([3, 3, 2], [2, 0, 1], heads=2, kv_heads=1), causal=True, sinks=torch.tensor([0.5, -1.0]))


def test_speculative_tokens_share_the_keys() -> None:
    lengths = [4, 1, 0, 3, 4], [300, 33, 9, 3, 64]
    for heads, num_splits in ((4, 1), (8, 2), (40, 1)):
        check(make(*lengths, heads=heads, kv_heads=1, tail=3), num_splits, causal=True)


@pytest.mark.parametrize("window", [(20, -1), (0, 0), (-1, 5), (37, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_windows(window: tuple[int, int], causal: bool) -> None:
    check(make([1, 2, 5], [90, 40, 3], heads=1, kv_heads=1, head_dim=16), 2, window_size=window, causal=causal)
    check(make([25, 9], [70, 9], heads=1, kv_heads=1, head_dim=16), 2, window_size=window, causal=causal)


def test_rows_of_later_tiles_see_their_own_window() -> None:
    """More rows than the highest tile has: the tokens of a tile begin at its first row over the heads of the group."""
    check(make([70], [150], heads=4, kv_heads=1, head_dim=16), 1, causal=True, window_size=(30, -1))


def test_splits_share_out_a_window() -> None:
    """Most keys lie before the window: the splits begin where it does."""
    call = make([1, 2], [1300, 40], heads=1, kv_heads=1, head_dim=16)
    check(call, 3, window_size=(600, -1), causal=True)
    check(call, 3, window_size=(600, -1), causal=True, batch_invariant=True)


@pytest.mark.parametrize(("q_lens", "num_splits"), [([1, 1, 1], 2), ([3, 2, 1], 1), ([9, 1, 12], 2)])
def test_sinks_alibi_and_softcap(q_lens: list[int], num_splits: int) -> None:
    call = make(q_lens, [270, 2, 40], heads=4, kv_heads=1, head_dim=16)
    sinks = torch.tensor([0.3, 4.0, -2.0, float("-inf")])
    check(call, num_splits, causal=True, sinks=sinks)
    check(call, num_splits, causal=True, sinks=sinks.half(), softcap=2.0)
    check(call, num_splits, alibi_slopes=torch.tensor([0.5, 0.1, 0.02, 0.0]), softmax_scale=0.3)
    per_sequence = torch.rand((3, 4), generator=torch.Generator().manual_seed(1))
    check(call, num_splits, causal=True, alibi_slopes=per_sequence, window_size=(30, -1), softcap=5.0)


@pytest.mark.parametrize("kv_dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, H200), (torch.float16, A100)], ids=["cast", "by hand"])
def test_fp8_caches(dtype: torch.dtype, kv_dtype: torch.dtype, device: Any) -> None:
    call = make([1, 2, 12], [70, 33, 20], dtype=dtype, kv_dtype=kv_dtype)
    g = torch.Generator().manual_seed(3)
    check(call, device=device, causal=True)
    check(call, device=device, k_descale=torch.tensor(0.7), v_descale=torch.tensor([2.0, 0.5]))
    per_sequence = torch.rand((3, 2), generator=g) + 0.5
    check(call, device=device, k_descale=per_sequence, v_descale=per_sequence + 1.0, causal=True)


@pytest.mark.parametrize("device", [H200, A100], ids=["converted", "by hand"])
def test_fp8_queries_and_int8_caches(device: Any) -> None:
    g = torch.Generator().manual_seed(3)
    descales = {"q_descale": torch.tensor([1.5, 0.5]), "k_descale": torch.tensor(0.7), "v_descale": torch.tensor(2.0)}
    for dtype in (E4M3, E5M2):
        check(make([1, 10], [40, 33], dtype=dtype), device=device, **descales)
    call = make([1, 10], [40, 33], dtype=torch.bfloat16)
    k, v = (torch.randint(-127, 128, t.shape, generator=g, dtype=torch.int8) for t in (call.k_cache, call.v_cache))
    scale = torch.tensor([0.01, 0.02])
    check(replace(call, k_cache=k, v_cache=v), device=device, k_descale=scale, v_descale=scale)


def test_bfloat16_queries_keep_their_range_over_fp8() -> None:
    """Products are of float16 there: rows of 1e30 and of 1e-30 are scaled, and rows of zeros stay finite."""
    call = make([1, 1, 1], [40, 40, 40], dtype=torch.bfloat16, kv_dtype=E4M3, heads=2, kv_heads=1)
    size = torch.tensor([1e30, 1e-30, 0.0]).view(3, 1, 1)
    call = replace(call, q=(call.q.float() * size).bfloat16())
    check(call, softmax_scale=1e-30)
    check(call, softmax_scale=1.0 / 64)


@pytest.mark.parametrize("value", [0x7F, 0xFF])
def test_nan_in_an_fp8_cache_stays_nan(value: int) -> None:
    call = make([1, 1], [5, 5], kv_dtype=E4M3, kv_heads=1, heads=1)
    call.k_cache.view(torch.uint8)[call.block_table[0, 0], 2, 0, 0] = value
    for device in (H200, A100):
        out, lse = kernel_of(call, device=device).forward(call.q, call.k_cache, call.v_cache, arguments(call))
        assert lse is not None
        assert out[0].isnan().all()
        assert not out[1].isnan().any()


@pytest.mark.parametrize("kv_dtype", [E4M3, E5M2])
def test_fp8_values_of_every_byte(kv_dtype: torch.dtype) -> None:
    """One key a sequence: its values are the result, each of the 256 that a byte can be, in pairs or one by one."""
    call = make([1] * 4, [1] * 4, heads=1, kv_heads=1, head_dim=16, head_dim_v=64, kv_dtype=kv_dtype)
    first = call.block_table[:, 0].long()
    bytes_ = torch.arange(256, dtype=torch.uint8).view(4, 64)
    call.v_cache.view(torch.uint8)[first, 0, 0] = bytes_
    want = bytes_.view(kv_dtype).half()
    apart = torch.zeros((*call.v_cache.shape[:2], 1, 65), dtype=torch.uint8)[..., :64]  # an odd stride
    apart.copy_(call.v_cache.view(torch.uint8))
    for v_cache in (call.v_cache, apart.view(kv_dtype)):
        out, _ = kernel_of(call).forward(call.q, call.k_cache, v_cache, arguments(call))
        assert torch.equal(out[:, 0].nan_to_num(7.0, 9.0, -9.0), want.nan_to_num(7.0, 9.0, -9.0))


def test_any_layout() -> None:
    check(make([1, 3, 20], [70, 33, 20], head_major=True, block_size=24), causal=True)
    call = make([1, 3, 20], [70, 33, 20])
    wide = torch.full((24, 6, 80), float("nan"), dtype=torch.float16)
    wide[:, 1:5, :64] = call.q
    both = torch.stack((call.k_cache, call.v_cache), dim=1)
    check(replace(call, q=wide[:, 1:5, :64], k_cache=both[:, 0], v_cache=both[:, 1]), causal=True)


def test_offsets_beyond_two_to_the_31() -> None:
    """One block lies 2^31 elements behind the other, in memory that nobody ever touches."""
    call = make([1], [20], heads=1, kv_heads=1, head_dim=16)
    far = 2**31 + 16
    # Pages of zeros that exist once they are touched; torch.empty would be filled here.
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (far + 16 * 16)), dtype=torch.float16)
    cache = memory.as_strided((2, 16, 1, 16), (far, 16, 16, 1))
    for j in range(2):
        cache[j] = call.k_cache[call.block_table[0, j]]
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    check(replace(call, k_cache=cache, v_cache=cache, block_table=table))


@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("q_lens", [[20], [20, 1], [1, 2]], ids=str)
def test_every_row_past_the_last_sequence_is_zero(q_lens: list[int], num_splits: int) -> None:
    """Many more than there are programs: a batch that was padded to the size of a captured graph."""
    call = make(q_lens, [40] * len(q_lens), heads=4, kv_heads=2, head_dim=16, tail=700)
    out, lse = kernel_of(call, num_splits).forward(call.q, call.k_cache, call.v_cache, arguments(call, causal=True))
    assert lse is not None and not out[sum(q_lens) :].any() and (lse[:, sum(q_lens) :] == float("-inf")).all()


@pytest.mark.parametrize("q_lens", [[1, 1], [9, 1]])
def test_wrong_tables_touch_nothing_outside(q_lens: list[int]) -> None:
    """The interpreter reads through raw addresses: an access outside would crash, or bring in other numbers."""
    call = make(q_lens, [40, 30], heads=2, kv_heads=1)
    finite = replace(call, k_cache=torch.ones_like(call.k_cache), v_cache=torch.ones_like(call.v_cache))
    for wrong in (
        {"block_table": torch.full_like(call.block_table, 2**31 - 1)},
        {"block_table": torch.full_like(call.block_table, -(2**31))},
        {"seqused_k": torch.tensor([2**31 - 1, -5], dtype=torch.int32)},
        {"cu_seqlens_q": torch.tensor([-7, 2**30, 2**31 - 1], dtype=torch.int32)},
    ):
        broken = replace(finite, **wrong)
        args = arguments(call, causal=True)._replace(**broken.tables)
        out, _ = kernel_of(broken, 2).forward(broken.q, broken.k_cache, broken.v_cache, args)
        rows = out.float().abs().sum(-1)
        if "cu_seqlens_q" not in wrong:
            assert ((rows - 64).abs().lt(1e-3) | rows.eq(0)).all()


@pytest.mark.parametrize("sinks", [False, True])
def test_batch_invariance(sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence's bits depend on nothing but itself, while tiles, splits and launches of the batch change."""
    monkeypatch.setattr(splits, "INVARIANT_SPLIT", 64)
    extra = {"sinks": torch.tensor([0.1, 0.2])} if sinks else {}
    q_lens, k_lens = [1, 4, 12, 8], [150, 40, 60, 70]
    call = make(q_lens, k_lens, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32)
    whole, lse = check(call, causal=True, batch_invariant=True, **extra)
    for b in range(4):
        a, z = call.cu_seqlens_q[b], call.cu_seqlens_q[b + 1]
        alone = replace(
            call, q=call.q[a:z], cu_seqlens_q=torch.tensor([0, z - a], dtype=torch.int32),
            block_table=call.block_table[b : b + 1], seqused_k=call.seqused_k[b : b + 1],
        )  # fmt: skip
        out, own = check(alone, causal=True, batch_invariant=True, **extra)
        assert torch.equal(out, whole[a:z])
        assert torch.equal(own, lse[:, a:z])


@pytest.mark.parametrize(("heads", "num_splits"), [(16, 1), (40, 3), (128, 1)])
def test_mla(heads: int, num_splits: int) -> None:
    call = make([1, 2, 0, 1], [300, 33, 9, 64], heads=heads, kv_heads=1, head_dim=48, head_dim_v=32, mla=True, tail=2)
    check(call, num_splits, causal=True)


def test_uneven_latent_lengths_are_shared_out() -> None:
    """On a GPU with places for a few programs: three shares a mean sequence, of which the first gets most."""
    call = make([1, 1, 1, 1], [2100, 0, 300, 700], heads=4, kv_heads=1, head_dim=48, head_dim_v=32, mla=True, tail=3)
    few = replace(H200, sm_count=3)
    sizes = paged_launch.sizes_of(call.q, call.v_cache, arguments(call), mla=True)
    (work,) = splits.plan_work(sizes, kernel_of(call, device=few)._tile_for, kernel_of(call, device=few)._gpu)
    assert work.goal > 1 and not work.teams
    check(call, device=few)
    check(call, device=few, sinks=torch.tensor([0.5, -1.0, 0.0, 2.0]))


def test_mla_of_every_kind() -> None:
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 1, "mla": True}
    check(make([1, 1], [70, 5], head_dim=576, head_dim_v=512, block_size=64, dtype=torch.bfloat16, **sizes))
    check(make([20, 1], [70, 5], head_dim=50, head_dim_v=33, block_size=1, **sizes), causal=True)
    check(make([3, 1], [70, 5], head_dim=32, head_dim_v=32, **sizes), causal=True, softcap=3.0, window_size=(9, 2))
    sinks, scale = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor(0.6)
    for device in (H200, A100):
        call = make([1, 3], [70, 5], head_dim=96, head_dim_v=64, dtype=torch.bfloat16, kv_dtype=E4M3, **sizes)
        check(call, causal=True, sinks=sinks, k_descale=scale, v_descale=scale, device=device)


def test_a_prepared_call_serves_other_numbers() -> None:
    """Lengths, scale and softcap of a second call are its own; shapes decide what is kept."""
    kernel = kernel_of(make([1, 1], [40, 40]))
    for lengths, scale in (([40, 40], 0.1), ([3, 38], 0.5)):
        call = make([1, 1], lengths, seed=len(lengths))
        call = replace(call, block_table=call.block_table[:, :3].contiguous())
        args = arguments(call, softmax_scale=scale, max_seqlen_k=40)
        out, _ = kernel.forward(call.q, call.k_cache, call.v_cache, args)
        given = (call.q, call.k_cache, call.v_cache)
        reference, _ = attention_paged_oracle(*given, **call.tables, softmax_scale=scale)
        plain, _ = plain_attention_paged(*given, **call.tables, softmax_scale=scale)
        assert_close(out, reference, plain, what="out")


@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name)
def test_conformance(case: PagedCase) -> None:
    """Everything in the kit but what it refuses, which must be float64 or FP8 queries and nothing else."""
    device = A100 if case.name == "everything" else H200  # which refuses what one was seen to do wrongly
    outcome = check_paged_backend(BACKEND, case, dtype=torch.float16, device=device)
    assert outcome.ran or {reason.code for reason in outcome.reasons} <= {"dtype"}, outcome.reasons
