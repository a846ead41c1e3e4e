"""A grouped product bound to its compiled kernel: what a launcher is given, without a GPU and without a compiler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from vllm_accel.kernels.triton import grouped_gemm_bound as bound_module
from vllm_accel.kernels.triton.grouped_gemm_bound import BoundGemm
from vllm_accel.kernels.triton.grouped_gemm_launch import gemm_launches
from vllm_accel.kernels.triton.launch import Launch


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Record ordinary launches, direct ones, and those by pointers; nothing runs."""
    seen: dict[str, list[Any]] = {"run": [], "direct": [], "plain": []}

    def run(launch: Launch) -> Any:
        seen["run"].append(launch)
        return SimpleNamespace(run=lambda *args: seen["direct"].append(args), function="f", packed_metadata="m")

    class Plain:
        def __init__(self, launch: Launch) -> None:
            self._launch = launch

        def __call__(self, tensors: Any) -> None:
            seen["plain"].append(tensors)

    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: f"stream {index}"))
    monkeypatch.setattr(bound_module, "run", run)
    monkeypatch.setattr(bound_module, "Bound", Plain)
    monkeypatch.setattr(bound_module, "_goes_direct", lambda fn, device: True)
    monkeypatch.setattr(bound_module, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    return seen


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, out = (torch.zeros(s, dtype=torch.bfloat16) for s in ((24, 64), (3, 64, 32), (24, 32)))
    return a, b, out, torch.tensor([3, 3, 21], dtype=torch.int32), torch.zeros(3, 32, dtype=torch.bfloat16)


def bind(a: Tensor, b: Tensor, out: Tensor, offs: Tensor, bias: Tensor) -> tuple[BoundGemm, Launch]:
    plain, described = gemm_launches(
        a, b, out, arch="sm_90", sm_count=132, rows=8, native_fp8=True, offs=offs, bias=bias
    )
    assert described is not None
    return BoundGemm(plain, described), described


def test_the_second_call_goes_to_the_launcher_with_new_addresses(launched: dict[str, list[Any]]) -> None:
    given = tensors()
    bound, described = bind(*given)
    bound((*given, None, None, None))
    assert len(launched["run"]) == 1 and launched["run"][0].args[2] is given[0] and not launched["direct"]
    other = tensors()
    bound((*other, None, None, None))
    ((*grid, stream, function, metadata, _, enter, leave, of_a, of_b), rest) = (
        launched["direct"][0][:11], launched["direct"][0][11:],
    )  # fmt: skip
    assert tuple(grid) == described.grid and (stream, function, metadata) == ("stream 0", "f", "m")
    assert enter is leave is None
    for encoded, tensor, descriptor in zip((of_a, of_b), other, described.args[:2], strict=False):
        assert encoded.base is tensor and encoded.padding == "zero"
        assert (encoded.shape, encoded.strides) == (descriptor.shape, descriptor.strides)
    assert rest[:8] == (*(t.data_ptr() for t in other), None, None, None)
    names = described.fn.arg_names[len(described.args) :]
    assert rest[8:] == (*described.args[10:], *(described.constexprs[name] for name in names))


def test_operands_off_16_bytes_are_loaded_by_pointers(launched: dict[str, list[Any]]) -> None:
    a, b, out, offs, bias = tensors()
    bound, _ = bind(a, b, out, offs, bias)
    off = torch.zeros(a.numel() + 1, dtype=a.dtype)[1:].view(a.shape)
    bound((off, b, out, offs, bias, None, None, None))
    assert launched["plain"] == [(None, None, off, b, out, offs, bias, None, None, None)] and not launched["run"]


def test_another_alignment_is_another_kernel(launched: dict[str, list[Any]]) -> None:
    a, b, out, offs, bias = tensors()
    bound, _ = bind(a, b, out, offs, bias)
    shifted = torch.zeros(bias.numel() + 1, dtype=bias.dtype)[1:].view(bias.shape)
    for given in (bias, shifted, bias, shifted):
        bound((a, b, out, offs, given, None, None, None))
    assert [len(launched[way]) for way in ("run", "direct", "plain")] == [2, 2, 0]
