"""cuBLAS's workspace: the format, when it is too late, and what it has to do with deterministic products."""

from __future__ import annotations

import pytest
import torch

import vllm_accel
from vllm_accel import UnsupportedCallError, cublas, explain, gemm, grouped_gemm


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublas, "_frozen", [])
    monkeypatch.delenv(cublas.VARIABLE, raising=False)


@pytest.mark.parametrize("config", ["", "4096:8", ":4096", ":4096:8:", ":a:b", ":0:8", ":4096:0", ":4096:8 ", None, 8])
def test_malformed(config: object) -> None:
    with pytest.raises(ValueError, match="config must"):
        cublas.configure_workspace(config)  # type: ignore[arg-type]
    assert cublas.workspace().config is None


def test_set_before_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cuBLAS's default size" in str(cublas.workspace())
    found = vllm_accel.cublas.configure_workspace(":4096:2:16:8")
    assert (found.config, found.bytes, found.reproducible, found.fixed) == (":4096:2:16:8", 8519680, False, False)
    found = cublas.configure_workspace(":4096:8")
    assert found.bytes == 32 << 20 and found.reproducible and "takes effect when CUDA starts" in str(found)


def test_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="comes too late: CUDA has started in this process with it unset"):
        cublas.configure_workspace(":4096:8")
    monkeypatch.setenv(cublas.VARIABLE, ":4096:8")  # set behind its back: cuBLAS has read the old value
    assert cublas.workspace().config is None and not cublas.workspace().reproducible
    monkeypatch.setattr(cublas, "_frozen", [":16:8"])
    assert cublas.configure_workspace(":16:8").fixed


def test_deterministic_products_on_a_gpu_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.empty(8, 16, device="meta"), torch.empty(16, 8, device="meta")
    shown = explain(gemm, a, b, deterministic=True, device="h100")
    assert shown.chosen not in ("cublas", "reference")
    assert 'configure_workspace(":4096:8")' in shown["cublas"].why and "workspace" in shown["reference"].reasons[0].code
    cublas.configure_workspace(":4096:8")
    assert explain(gemm, a, b, deterministic=True, device="h100").chosen == "cublas"


def test_bits_are_proven_not_promised() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 64, generator=g), torch.randn(3, 64, 32, generator=g)
    ends = torch.tensor([10, 10, 50], dtype=torch.int32)
    whole = grouped_gemm(a, b, ends, batch_invariant=True)
    part = grouped_gemm(a[10:17], b, torch.tensor([0, 0, 7], dtype=torch.int32), batch_invariant=True)
    assert torch.equal(whole[10:17], part)
    with pytest.raises(UnsupportedCallError, match="batch_invariant=True"):
        grouped_gemm(a, b, ends, batch_invariant=True, backend="cpu")
    assert torch.equal(
        grouped_gemm(a, b, ends, deterministic=True), grouped_gemm(a, b, ends, deterministic=True, backend="cpu")
    )
