"""VLLM_USE_TRITON_FLASH_ATTN from end to end: the public call on tensors that are taken to be on an H200.

The kernels run in Triton's interpreter; everything else is what a user's call goes through.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import vllm_accel.dispatch.settings as settings_module
from vllm_accel import attention, explain, reload_settings
from vllm_accel.dispatch import device as devices
from vllm_accel.dispatch import registry
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.kernels.triton import forward_launch, toolchain
from vllm_accel.kernels.triton.tiles import Tile
from vllm_accel.testing.oracle import attention_oracle


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with an H200 and Triton; what remains beside `triton` there is the reference."""
    monkeypatch.setattr(devices, "detect", lambda device: PRESETS["h200"])
    monkeypatch.setattr(toolchain, "_interpreter", lambda: None)
    monkeypatch.setattr(forward_launch, "choose_tile", lambda *args, **kwargs: Tile(32, 32, 4, 1))
    others = sorted(set(registry.names("attention")) - {"triton", "reference"})
    monkeypatch.setenv("VLLM_ACCEL_DISABLED_BACKENDS", ",".join(others))
    toolchain.forget()
    yield
    monkeypatch.undo()
    toolchain.forget()
    settings_module._current = None


@pytest.mark.parametrize(
    ("value", "chosen", "launched"), [("1", "triton", True), ("0", "reference", False), ("true", "triton", True)]
)
def test_the_switch(value: str, chosen: str, launched: bool, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_TRITON_FLASH_ATTN", value)
    reload_settings()
    launches = []
    real = forward_launch.forward_launch
    monkeypatch.setattr(forward_launch, "forward_launch", lambda *a, **k: (launches.append(1), real(*a, **k))[1])
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, 16, generator=g) for heads in (4, 2, 2))
    assert explain(attention, q, k, v, causal=True).chosen == chosen
    out = attention(q, k, v, causal=True)
    want, _ = attention_oracle(q.double(), k.double(), v.double(), causal=True)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
    assert bool(launches) is launched


def test_a_name_wins(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_TRITON_FLASH_ATTN", "0")
    reload_settings()
    q = torch.randn(1, 20, 1, 16)
    want, _ = attention_oracle(q.double(), q.double(), q.double())
    torch.testing.assert_close(attention(q, q, q, backend="triton").double(), want, rtol=0, atol=1e-5)
