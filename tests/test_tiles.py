"""Tile tables: what is looked up, whose entry wins, what a broken file does, and how a tile is made to fit."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_accel.dispatch.device import PRESETS
from vllm_accel.kernels.triton import tiles
from vllm_accel.kernels.triton.tiles import Tile, lookup, nearest, smaller

GOOD: dict[str, Any] = {
    "provenance": {"how": "made up"},
    "sm_86": {"d64": [64, 32, 4, 2]},
    "sm_90": {"d64": [128, 64, 8, 3], "d128": [128, 64, 8, 2, 128], "d128_causal": [128, 128, 8, 2]},
    "gfx942": {"d64": [128, 32, 4, 1]},
}
Write = Callable[[Any], Path]


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "toy.json").write_text(json.dumps(GOOD))
    monkeypatch.setattr(tiles, "_SHIPPED", shipped)
    monkeypatch.setattr(tiles, "user_directory", lambda: tmp_path / "user")
    tiles.forget()
    yield
    tiles.forget()


@pytest.fixture
def user(tmp_path: Path) -> Write:
    def write(data: Any) -> Path:
        path = tmp_path / "user" / "toy.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        tiles.forget()
        return path

    return write


def test_the_first_key_that_is_there_wins() -> None:
    assert lookup("toy", "sm_90", ["d128_causal", "d128"]) == Tile(128, 128, 8, 2, 0)
    assert lookup("toy", "sm_90", ["d128_window", "d128"]) == Tile(128, 64, 8, 2, 128)
    assert lookup("toy", "sm_90", ("d64",)) == Tile(128, 64, 8, 3)


@pytest.mark.parametrize(
    ("kernel", "arch", "keys", "text"),
    [
        ("toy", "sm_90", ["d96"], "the tiles of 'toy' for sm_90 have none of d96; they have d64, d128, d128_causal"),
        ("toy", "sm_75", ["d64"], "no tiles for sm_75; there are some for sm_86, sm_90, gfx942"),
        ("toy", "gfx1100", ["d64"], "no tiles for gfx1100"),
        ("toi", "sm_90", ["d64"], "no tiles for a kernel 'toi'; there are toy"),
    ],
)
def test_what_is_not_there(kernel: str, arch: str, keys: list[str], text: str) -> None:
    with pytest.raises(LookupError) as raised:
        lookup(kernel, arch, keys)
    assert text in str(raised.value)


KNOWN = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")


@pytest.mark.parametrize(
    ("arch", "row"),
    [(arch, arch) for arch in KNOWN]
    + [
        ("sm_87", "sm_86"), ("sm_88", "sm_86"), ("sm_90a", "sm_90"), ("sm_100a", "sm_100"), ("sm_100f", "sm_100"),
        ("sm_103", "sm_100"), ("sm_110", "sm_100"), ("sm_121", "sm_120"), ("sm_130", "sm_86"), ("sm_95", "sm_90"),
        ("gfx942:sramecc+:xnack-", "gfx942"), ("gfx950", "gfx942"), ("gfx940", "gfx942"),
    ],
)  # fmt: skip
def test_the_nearest_relative(arch: str, row: str) -> None:
    assert nearest(arch, KNOWN) == row


def test_an_older_gpu_takes_the_oldest_of_its_generation() -> None:
    assert nearest("sm_80", ("sm_86", "sm_89", "sm_90")) == "sm_86"
    with pytest.raises(LookupError):
        nearest("sm_75", KNOWN)
    with pytest.raises(LookupError):
        nearest("sm_100", ("sm_90",))  # tiles of Hopper need not fit elsewhere


def test_no_relative_has_more_shared_memory() -> None:
    """Tiles fit where they are lent: the row's own GPU has no more shared memory than the GPU that takes it."""
    limits = {d.arch: d.shared_memory_per_block for d in PRESETS.values() if d.arch} | {"sm_120": 99 << 10}
    # CUDA C++ programming guide, compute capabilities: opt-in maximum per block.
    for arch, limit in {"sm_87": 163, "sm_103": 227, "sm_110": 227, "sm_121": 99, "sm_130": 99}.items():
        assert limits[nearest(arch, KNOWN)] <= limit << 10


def test_a_users_entries_win_one_by_one(user: Write) -> None:
    user({"provenance": {}, "sm_90": {"d128": [64, 64, 4, 2]}, "sm_89": {"d64": [64, 64, 4, 3]}})
    assert lookup("toy", "sm_90", ["d128"]) == Tile(64, 64, 4, 2)
    assert lookup("toy", "sm_90", ["d64"]) == Tile(128, 64, 8, 3)
    assert lookup("toy", "sm_89", ["d64"]) == Tile(64, 64, 4, 3)
    assert tiles.shipped("toy")["sm_90"]["d128"] == Tile(128, 64, 8, 2, 128)


def test_tables_are_read_once(user: Write) -> None:
    assert lookup("toy", "sm_90", ["d64"]) == Tile(128, 64, 8, 3)
    path = user({"provenance": {}, "sm_90": {"d64": [64, 64, 4, 2]}})
    assert lookup("toy", "sm_90", ["d64"]) == Tile(64, 64, 4, 2)
    path.unlink()
    assert lookup("toy", "sm_90", ["d64"]) == Tile(64, 64, 4, 2)
    assert lookup("toy", "sm_90", ["d128", "d64"]) == Tile(128, 64, 8, 2, 128)


def row(entry: Any) -> dict[str, Any]:
    return {"provenance": {}, "sm_90": {"d64": entry}}


BROKEN: list[tuple[Any, str]] = [
    ("{", "Expecting property name"),
    ([], "an object with"),
    ({"sm_90": {}}, 'an object with "provenance"'),
    ({"provenance": "me", "sm_90": {"d64": [64, 64, 4, 2]}}, "itself an object"),
    ({"provenance": {}, "hopper": {"d64": [64, 64, 4, 2]}}, "'hopper' is not an architecture"),
    ({"provenance": {}, "sm_90": {}}, "sm_90 has to be an object with entries"),
    ({"provenance": {}, "sm_90": [64, 64, 4, 2]}, "sm_90 has to be an object with entries"),
    (row([64, 64, 4]), "sm_90 d64 has to be 4 or 5 integers"),
    (row([64, 64, 4, 2, 0, 0]), "4 or 5 integers"),
    (row([64, 64, 4, 2.0]), "4 or 5 integers"),
    (row([64, 64, 4, True]), "4 or 5 integers"),
    (row("64,64,4,2"), "4 or 5 integers"),
    (row([48, 64, 4, 2]), "block_m is 48 and has to be a power of two from 16 to 256"),
    (row([8, 64, 4, 2]), "block_m is 8"),
    (row([64, 512, 4, 2]), "block_n is 512"),
    (row([64, 64, 3, 2]), "num_warps is 3 and has to be 1, 2, 4, 8 or 16"),
    (row([64, 64, 32, 2]), "num_warps is 32"),
    (row([64, 64, 4, 0]), "num_stages is 0 and has to be from 1 to 8"),
    (row([64, 64, 4, 9]), "num_stages is 9"),
    (row([64, 64, 4, 2, 16]), "maxnreg is 16 and has to be 0 or from 24 to 255"),
    (row([64, 64, 4, 2, 256]), "maxnreg is 256"),
    (row([-64, 64, 4, 2]), "block_m is -64"),
]


@pytest.mark.parametrize(("data", "text"), BROKEN)
def test_a_broken_file_is_ignored_with_one_message(
    data: Any, text: str, user: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = user(data)
    with caplog.at_level(logging.WARNING, "vllm_accel"):
        for keys in (["d64"], ["d128"], ["d64"]):
            assert lookup("toy", "sm_90", keys) == Tile(*GOOD["sm_90"][keys[0]])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{path} is ignored, and the shipped tiles are used: ")
    assert text in message
    assert message.endswith("python -m benchmarks.tile_search --write")


def test_a_file_that_cannot_be_read(user: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = user("")
    path.unlink()
    path.mkdir()
    assert lookup("toy", "sm_90", ["d64"]) == Tile(128, 64, 8, 3)
    assert "Is a directory" in caplog.text


def test_a_broken_shipped_file_raises(tmp_path: Path) -> None:
    (tmp_path / "shipped" / "toy.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting property name"):
        lookup("toy", "sm_90", ["d64"])


def shared(tile: Tile) -> int:
    return 2 * (tile.block_m + 2 * tile.num_stages * tile.block_n) * 128


@pytest.mark.parametrize(
    ("limit_kib", "fits"),
    [
        (227, Tile(128, 128, 8, 2, 128)),
        (160, Tile(128, 128, 8, 2, 128)),
        (159, Tile(128, 128, 8, 1, 128)),
        (95, Tile(128, 64, 8, 1, 128)),
        (50, Tile(128, 32, 8, 1, 128)),
        (40, Tile(128, 16, 8, 1, 128)),
        (39, Tile(64, 16, 4, 1, 128)),
        (12, Tile(16, 16, 4, 1, 128)),
    ],
)
def test_stepping_down(limit_kib: int, fits: Tile) -> None:
    tile: Tile | None = Tile(128, 128, 8, 4, 128)  # asks for 288 KiB
    while tile is not None and shared(tile) > limit_kib << 10:
        tile = smaller(tile)
    assert tile == fits


def test_nothing_is_smaller_than_the_smallest() -> None:
    assert smaller(Tile(128, 64, 8, 3)) == Tile(128, 64, 8, 2)
    assert smaller(Tile(16, 16, 4, 1)) is None


def test_the_shipped_tables_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table parses, says where its numbers come from, and serves every GPU that the kernels run on."""
    folder = Path(str(tiles.__file__)).parent / "tiles"
    monkeypatch.setattr(tiles, "_SHIPPED", folder)
    for path in folder.glob("*.json"):
        data = json.loads(path.read_text())
        assert data["provenance"]
        table = tiles.shipped(path.stem)
        for arch in ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"):
            assert table[nearest(arch, tuple(table))]
    assert tiles.kernels() == tuple(sorted(path.stem for path in folder.glob("*.json")))


DIRECTORY = (
    "from vllm_accel.kernels.triton import tiles; import sys; print(tiles.user_directory(), 'triton' in sys.modules)"
)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the directory is another one there")
def test_where_the_users_tables_are(tmp_path: Path) -> None:
    seen = []
    for variables in ({"XDG_CACHE_HOME": str(tmp_path / "xdg")}, {"XDG_CACHE_HOME": ""}):
        env = {**os.environ, "HOME": str(tmp_path), **variables}
        done = subprocess.run([sys.executable, "-c", DIRECTORY], env=env, capture_output=True, text=True, check=True)
        seen.append(done.stdout.strip())
    assert seen == [f"{tmp_path}/xdg/vllm_accel/tiles False", f"{tmp_path}/.cache/vllm_accel/tiles False"]
