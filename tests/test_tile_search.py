"""The tile search where there is no GPU: what it compiles, what it throws out, what it prints and refuses."""

from __future__ import annotations

import pickle

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import tile_search
from benchmarks.crosscompile import compile_launch
from benchmarks.tile_problem import Where, tiles
from benchmarks.tile_problems import KERNELS, entries
from benchmarks.tile_search import Candidate, survivors
from vllm_accel.kernels.triton.tiles import Tile


def test_every_kernel_has_entries_with_candidates() -> None:
    made = list(entries(tuple(KERNELS), (64, 128)))
    assert {e.kernel for e in made} == {"forward", "backward", "paged", "mla", "grouped_gemm"}
    assert len({(e.kernel, e.key) for e in made}) == len(made)
    assert all(len(set(e.candidates)) == len(e.candidates) >= 4 for e in made)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_candidate_reaches_the_kernel(kernel: str) -> None:
    """The tile that is searched is the tile that is compiled."""
    entry = next(iter(entries([kernel], (64,))))
    where = Where(torch.device("meta"), "sm_90")
    for tile in entry.candidates[:2]:
        (launch, *_) = entry.timed(where)[0].launches(tile)
        blocks = [value for name, value in launch.constexprs.items() if name in ("BLOCK_M", "BLOCK_N", "BM", "BN")]
        assert blocks == [tile.block_m, tile.block_n]
        assert (launch.num_warps, launch.num_stages, launch.maxnreg) == tile[2:]


def test_tiles_that_come_by_tma_are_searched_where_calls_read_them(capsys: pytest.CaptureFixture[str]) -> None:
    made = {e.key: e for e in entries(["forward"], (64, 128, 256)) if e.archs}
    assert set(made) == {"d64_tma", "d128_tma", "d256_tma"} and {e.archs for e in made.values()} == {("sm_90",)}
    where = Where(torch.device("meta"), "sm_90")
    for entry in made.values():
        calls = entry.timed(where)
        assert {call.launches(entry.candidates[0])[0].constexprs["RIGHT"] for call in calls} == {False, True}
        assert all(call.launches(entry.candidates[0])[0].constexprs["TMA"] for call in (*calls, entry.check(where)))
    with pytest.raises(SystemExit):
        tile_search.main(["--arch", "sm_80", "--kernel", "forward", "--keys", "d128_tma"])
    assert "no entry has 'd128_tma'" in capsys.readouterr().err


def test_what_spills_or_does_not_fit_is_out() -> None:
    (entry,) = (e for e in entries(["paged"], (128,)) if e.key == "m16_d128")
    fits, spills, large = Tile(16, 32, 4, 2), Tile(16, 32, 4, 2, 64), Tile(16, 128, 4, 4)
    made = [tile_search._compile(entry, tile, "sm_89") for tile in (fits, spills, large)]
    assert made[0].spills == 0 < made[1].spills
    assert f"{made[2].shared} B of shared memory; sm_89 has 101376" in made[2].error
    assert [c.tile for c in survivors(made)] == [fits]


def test_the_least_spills_survive() -> None:
    made = [Candidate(Tile(64, 64, 4, n), 100, spills, 0) for n, spills in ((1, 9), (2, 3), (3, 3))]
    made.append(Candidate(Tile(64, 64, 4, 4), 100, 0, 0, error="too large"))
    assert [c.tile.num_stages for c in survivors(made)] == [2, 3]
    assert survivors([]) == []


def test_the_score_is_the_mean_over_calls_of_medians_over_rounds() -> None:
    made = Candidate(Tile(64, 64, 4, 2), rounds=[[9.0, 1.0, 2.0], [8.0, 8.0, 100.0]])
    assert made.score == pytest.approx(4.0)
    assert Candidate(Tile(64, 64, 4, 2)).score == float("inf")


def test_warps_without_work_are_not_tried() -> None:
    assert tiles((16, 64), (32,), (4, 8), (2,), (0,)) == (Tile(16, 32, 4, 2), Tile(64, 32, 4, 2))
    assert len(tiles((64, 128), (64, 128), (4, 8), (1, 2), (0, 128))) == 4 * 2 * 2 + 3 * 2 * 2


def test_a_list_for_another_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = tile_search.entries
    few = (Tile(16, 32, 4, 2),)
    monkeypatch.setattr(tile_search, "entries", lambda *a: (e._replace(candidates=few) for e in real(*a)))
    arguments = ["--arch", "sm_90a", "--kernel", "paged", "--head-dims", "64", "--keys", "m16_d64_8bit", "--jobs", "1"]
    assert tile_search.main(arguments) == 0
    told = capsys.readouterr().out
    assert "paged m16_d64_8bit, sm_90" in told
    (row,) = (line for line in told.splitlines() if "16 x 32, 4 warps, 2 stages" in line)
    (entry,) = (e for e in real(["paged"], (64,)) if e.key == "m16_d64_8bit")
    made = compile_launch(entry.timed(Where(torch.device("meta"), "sm_90"))[0].launches(few[0])[0], "sm_90")
    assert [part.strip() for part in row.strip("│ ").split("│")][1:4] == [
        str(made.registers), str(made.spills), str(made.shared),
    ]  # fmt: skip
    # What another process would be asked, and answer.
    there = pickle.loads(pickle.dumps(tile_search._compile_named("paged", "m16_d64_8bit", few[0], "sm_90")))
    assert (there.registers, there.spills, there.shared) == (made.registers, made.spills, made.shared)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "no GPU here: name one with --arch"),
        (["--arch", "sm_90", "--keys", "d65"], "no entry has 'd65' in its name"),
        (["--kernel", "gemm"], "invalid choice"),
    ],
)
def test_wrong_use(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        tile_search.main(arguments)
    assert left.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("120s", 120.0), ("90", 90.0), ("2m", 120.0)])
def test_a_budget(text: str, seconds: float) -> None:
    assert tile_search._seconds(text) == seconds
