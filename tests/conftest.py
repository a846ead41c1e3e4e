"""What every test relies on; imports nothing heavy, so that collecting one file stays quick."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# The settings of the person who runs the tests must not decide what the tests see.
for _name in [name for name in os.environ if name.startswith("VLLM_")]:
    del os.environ[_name]

# Small tensors on two cores: threads cost more than they bring, ten times more on a busy machine. Read by torch at
# import; tests that need threads start them, and benchmarks do not come here.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test never waits for the network, and needs no display.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# A GPU machine may lack hypothesis; the tests without it still run there.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    # The same examples on every run, so that a red test is red for everyone. No deadline: the first call of a
    # kernel compiles or loads it, which takes a hundred times as long as the second.
    settings.register_profile("vllm_accel", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("vllm_accel")

INTERPRETED = Path(__file__).resolve().parent / "interpreted"
_INTERPRET = "TRITON_INTERPRET"


def _is_interpreted(path: Path) -> bool:
    return INTERPRETED in (path, *path.parents)


def _group(path: Path) -> str:
    """Return which of the groups of tests/run.py a test is in."""
    if _is_interpreted(path):
        return "interpreted"
    return "compiled" if path.match("test_*_compile.py") else "others"


def _belongs_here(path: Path) -> bool:
    """Tell whether a test is for this process: tests/interpreted where Triton interprets, all others elsewhere.

    Where TEST_GROUP names a group, as tests/run.py does, only that group.
    """
    interprets = os.environ.get(_INTERPRET, "").lower() in ("1", "true", "yes", "on", "y")
    group = _group(path)
    return (group == "interpreted") == interprets and os.environ.get("TEST_GROUP", group) == group


def pytest_configure(config: pytest.Config) -> None:
    """Interpret kernels where nothing else was named: ``pytest tests/interpreted/test_x.py``."""
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    if named and all(map(_is_interpreted, named)):
        os.environ.setdefault(_INTERPRET, "1")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave what belongs to another process unread."""
    if collection_path in (INTERPRETED, *INTERPRETED.parents) or collection_path.is_dir():
        return None
    return None if collection_path.suffix != ".py" or _belongs_here(collection_path) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was named on the command line and yet belongs to another process."""
    others = [item for item in items if not _belongs_here(item.path)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _belongs_here(item.path)]


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's compiled kernels, tile tables and measured tables out of the tests, and the tests out of those.

    The shipped measured tables too: what a test expects of a GPU that is not here is the shipped order.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        tables = tmp_path_factory.mktemp("tiles")
        patch.setattr("vllm_accel.kernels.triton.tiles.user_directory", lambda: tables)
        patch.setenv("VLLM_ACCEL_TABLES", str(tmp_path_factory.mktemp("tables")))
        patch.setattr("vllm_accel.dispatch.measured._SHIPPED", tmp_path_factory.mktemp("shipped"))
        yield
