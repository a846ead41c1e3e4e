"""Kernels run on the CPU by Triton's interpreter: indexing, masks and formulas, without a GPU.

tests/conftest.py gives these tests a process of their own, and tests/run.py starts it beside the other. Not shown here:
layouts, races, barriers, the precision of tensor cores. Keep cases small: a product of two tiles takes a millisecond or
more.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _corrected_interpreter() -> Iterator[None]:
    import caches
    import patches

    with patches.applied(), caches.applied():
        yield
