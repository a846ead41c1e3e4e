"""Kernel files stay readable: short, with a header that says what comes in, how it lies and who chose the tiles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
FILES = sorted([*KERNELS.glob("triton/*.py"), *KERNELS.glob("gluon/*.py")])
#: Files with device code that is launched; the others hold what these share.
LAUNCHED = (
    "backward_bias", "backward_delta", "backward_dkv", "backward_dq", "combine", "forward", "forward_sm90",
    "grouped_gemm", "kv_write", "mla", "paged", "stream",
)  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 500


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_kernels_header(name: str) -> None:
    (path,) = (p for p in FILES if p.stem == name)
    header = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "Layouts:" in header and ("Tiles:" in header or "tiles" in header)
    sources = ("et al. 20", "Dao 20", "arXiv", "arxiv", "https://", "report")
    assert any(source in header for source in sources), "a paper or a page"
