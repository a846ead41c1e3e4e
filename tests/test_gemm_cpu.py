"""The routes of products on a CPU: PyTorch's loop, ours, transposed products, widened operands; each is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_accel import grouped_gemm
from vllm_accel.backends.gemm import cpu
from vllm_accel.backends.gemm.groups import cut
from vllm_accel.dispatch import plan
from vllm_accel.dispatch.choose import _choices
from vllm_accel.testing import GEMM_CASES, check_gemm_call
from vllm_accel.testing.conformance_gemm import public_call


@pytest.fixture(autouse=True)
def _no_plans() -> Any:
    plan.invalidate()
    _choices.clear()
    yield
    plan.invalidate()
    _choices.clear()


def _counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """Count calls of a function that stays what it is."""
    real, calls = getattr(module, name), [0]

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, counting)
    return calls


ROUTES: dict[str, dict[str, Any]] = {
    "turned": {"_LARGE": 1, "multiplies_halves": lambda dtype: True},
    "our loop": {"has_cpu_kernel": lambda: False, "multiplies_halves": lambda dtype: True},
    "widened": {"multiplies_halves": lambda dtype: False},
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_right(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ROUTES[route].items():
        monkeypatch.setattr(cpu, name, value)
    turned, theirs = _counted(monkeypatch, cpu, "turned"), _counted(monkeypatch, torch, "_grouped_mm")
    wide = _counted(monkeypatch, cpu.WideProducts, "forward")
    for case in GEMM_CASES:
        if case.scaling is None and "batch_invariant" not in case.options:
            check_gemm_call(public_call(case, backend="cpu"), case, dtype=torch.bfloat16)
    assert (turned[0] > 0) is (route == "turned") and (wide[0] > 30) is (route == "widened")
    assert (theirs[0] > 0) is (route == "turned")


def test_groups_go_to_pytorchs_loop_where_it_takes_the_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = _counted(monkeypatch, torch, "_grouped_mm")
    a, b, offs = torch.randn(20, 16), torch.randn(3, 8, 16).mT, torch.tensor([5, 5, 17], dtype=torch.int32)
    want = torch.cat([a[:5] @ b[0], a[5:17] @ b[2], torch.zeros(3, 8)])
    for given, count in (
        ((a, b), 1),
        ((a.t().contiguous().t(), b), 2),
        ((torch.randn(20, 17)[:, 1:].copy_(a), b), 2),  # a stride of 68 bytes
        ((torch.randn(321)[1:].view(20, 16).copy_(a), b), 2),  # an address off 16 bytes
        ((a, b.contiguous()[..., :7]), 3),  # a result with rows off 16 bytes
        ((a, torch.randn(3, 16, 16)[..., ::2].copy_(b)), 3),
    ):
        out = grouped_gemm(*given, offs, backend="cpu")
        torch.testing.assert_close(out, want[:, : out.shape[1]])
        assert theirs[0] == count and out.is_contiguous()
    torch.testing.assert_close(grouped_gemm(a.double(), b.double(), offs, backend="cpu").float(), want)
    torch.testing.assert_close(grouped_gemm(a, b, offs, torch.ones(3, 8), backend="cpu")[:17], want[:17] + 1)
    assert theirs[0] == 3


def test_ends_are_cut_into_groups_with_rows() -> None:
    assert cut(torch.tensor([0, 3, 3, 8]), 10) == ([1, 3], [3, 5, 2])
    assert cut(torch.tensor([4, 2, -7, 99]), 10) == ([0, 3], [4, 6, 0])
    assert cut(torch.tensor([], dtype=torch.int32), 2) == ([], [2])


@pytest.mark.parametrize(("flag", "dtype"), [("avx512_fp16", torch.float16), ("amx_bf16", torch.bfloat16)])
def test_what_the_processor_multiplies(flag: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True}, raising=False)
    assert cpu.multiplies_halves(dtype)
    assert not cpu.multiplies_halves(torch.float16 if dtype is torch.bfloat16 else torch.bfloat16)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    older = "_is_avx512_fp16_supported" if dtype is torch.float16 else "_is_amx_tile_supported"
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not cpu.multiplies_halves(dtype)
    monkeypatch.setattr(torch.cpu, older, lambda: True, raising=False)
    assert cpu.multiplies_halves(dtype)
