"""A tile search: what it checks is checked, a wrong kernel is never the fastest; on the CPU, by the interpreter."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import tile_search
from benchmarks.tile_problem import Data, Entry, Where
from benchmarks.tile_problems import KERNELS, entries
from vllm_accel.dispatch.device import Device, preset
from vllm_accel.kernels.triton import tiles
from vllm_accel.kernels.triton.launch import Launch, run
from vllm_accel.kernels.triton.tiles import Tile

CPU = Where(torch.device("cpu"), "sm_90", 4)
SMALL = {"m16": Tile(16, 32, 4, 1), "m32": Tile(32, 32, 4, 1), "m64": Tile(64, 32, 4, 1)}
ENTRIES = {(e.kernel, e.key): e for e in entries(tuple(KERNELS), (64,))}
CHECKED = [
    ("forward", "fp32_d64_causal"), ("forward", "d64_heavy"), ("backward", "dkv_d64"), ("backward", "dq_d64_heavy"),
    ("backward", "bias_d64"), ("paged", "m32_d64_8bit"), ("mla", "m16_d512"),
    *(("grouped_gemm", key) for key in ("16bit", "16bit_pointers", "16bit_depth", "8bit", "8bit_blocks")),
    *(("grouped_gemm", key) for key in ("widened_blocks_m16", "fp32")),
]  # fmt: skip


def tile_for(key: str) -> Tile:
    return SMALL.get(key.split("_")[0], Tile(64, 64, 4, 1))


@pytest.mark.parametrize(("kernel", "key"), CHECKED)
def test_a_check_compares_with_the_oracle(kernel: str, key: str) -> None:
    """What nobody computed is wrong, and what the kernel computed is right."""
    data = ENTRIES[kernel, key].check(CPU)
    launches = data.launches(tile_for(key))
    with pytest.raises(AssertionError):
        data.verify()
    for launch in launches:
        run(launch)
    data.verify()


def test_every_shipped_entry_can_be_searched() -> None:
    """For the usual head sizes: a table has no entry that no search would ever improve."""
    for kernel in tiles.kernels():
        found = {e.key for e in entries([kernel], (64, 128, 256))}
        row = set(tiles.shipped(kernel)["sm_90"])
        if kernel == "grouped_gemm":  # has no head sizes
            row = set().union(*tiles.shipped(kernel).values())
        elif kernel in ("forward", "backward", "paged"):
            row = {k for k in row if k.endswith(("d64", "d128", "d256"))}
        else:
            continue
        assert row <= found


@triton.jit
def iota_kernel(Out, BLOCK: tl.constexpr):
    tl.store(Out + tl.arange(0, BLOCK), tl.arange(0, BLOCK))


def toy(wrong: Tile, slow: Tile, fast: Tile) -> tuple[Entry, list[str]]:
    """Return an entry whose kernel leaves something out with one tile, and is launched often with another."""
    log: list[str] = []

    def data(where: Where) -> Data:
        out = torch.full((64,), -1, dtype=torch.int32)

        def launches(tile: Tile) -> tuple[Launch, ...]:
            log.append(str(tile))
            launch = Launch(iota_kernel, (1, 1, 1), (out,), {"BLOCK": 32 if tile == wrong else 64}, 4, 1)
            out.fill_(-1)
            return (launch,) * (30 if tile == slow else 1)

        def verify() -> None:
            if not torch.equal(out, torch.arange(64, dtype=torch.int32)):
                raise AssertionError("made wrong")

        return Data(launches, verify)

    return Entry("forward", "d64_causal", (wrong, slow, fast), data, lambda where: [data(where), data(where)]), log


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_search, "ROUNDS", 1)


WRONG, SLOW, FAST = Tile(32, 64, 4, 1), Tile(64, 32, 4, 1), Tile(64, 64, 4, 1)


def test_the_fastest_right_tile_wins() -> None:
    entry, log = toy(WRONG, SLOW, FAST)
    made = [tile_search.Candidate(t, registers=1) for t in entry.candidates]
    best = tile_search._fastest(entry, made, CPU)
    assert best is not None
    assert best.tile == FAST
    assert log.count(str(WRONG)) == 1  # checked, and never timed
    assert "made wrong" in made[0].error
    assert not made[0].rounds
    text = tile_search._report(entry, best, made, "sm_90")
    assert "64 x 64, 4 warps, 1 stages: " in text
    assert "1 failed: AssertionError: made wrong" in text


def test_no_right_tile_is_no_tile() -> None:
    entry, _ = toy(WRONG, SLOW, FAST)
    made = [tile_search.Candidate(WRONG, registers=1)]
    assert tile_search._fastest(entry, made, CPU) is None
    assert "is right and runs; 1 failed" in tile_search._report(entry, None, made, "sm_90")


def test_a_search_writes_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the whole search on a CPU that poses as an H100; then again, and with no time."""
    device: Device = preset("h100")
    entry, log = toy(WRONG, SLOW, FAST)
    other = entry._replace(key="d64")
    monkeypatch.setattr(tiles, "user_directory", lambda: tmp_path / "tables")
    monkeypatch.setattr(tile_search, "Where", lambda d, arch, count: CPU)
    monkeypatch.setattr(
        tile_search, "compile_all",
        lambda chosen, arch, jobs: iter([(e, [tile_search.Candidate(t, 1) for t in e.candidates]) for e in chosen]),
    )  # fmt: skip
    about = {"gpu": "H100", "packages": {"triton": "3.7.1"}, "torch": "2.13", "date": "today", "command": "me"}
    monkeypatch.setattr(tile_search.machine, "about", lambda module, where: about)
    monkeypatch.setattr(tile_search.machine, "describe", lambda facts: "an H100")
    given = Namespace(write=True, again=False, budget=0.0, jobs=1)
    assert tile_search._search([entry, other], device, given) == 0
    assert "the time is up; 1 entries are left" in capsys.readouterr().out
    data = json.loads((tmp_path / "tables" / "forward.json").read_text())
    assert data["sm_90"] == {"d64_causal": [64, 64, 4, 1]}
    assert data["provenance"]["sm_90 d64_causal"]["with"].startswith("H100, triton 3.7.1")
    assert tiles.lookup("forward", "sm_90", ["d64_causal"]) == FAST

    log.clear()
    assert tile_search._search([entry, other], device, given) == 0
    assert "1 entries were found before" in capsys.readouterr().out
    assert log.count(str(WRONG)) == 1  # one entry of two
    data = json.loads((tmp_path / "tables" / "forward.json").read_text())
    assert set(data["sm_90"]) == {"d64_causal", "d64"}

    about["packages"] = {"triton": "3.8.0"}  # what was found with another Triton is searched again
    assert tile_search._search([entry], device, given) == 0
    assert "were found before" not in capsys.readouterr().out
    assert not list((tmp_path / "tables").glob("*.tmp"))
    tiles.forget()
