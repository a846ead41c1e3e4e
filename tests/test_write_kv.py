"""`write_kv`: every token in its slot, nothing else touched, 8-bit caches rounded and saturated."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_accel import write_kv
from vllm_accel.ops.fused import Fused
from vllm_accel.ops.write_kv import without_skipped

module = importlib.import_module("vllm_accel.ops.write_kv")  # the package has the function under this name

BLOCKS, BLOCK, HKV, D, DV = 5, 4, 2, 8, 6
SLOTS = [7, -1, 0, 19, -5, 8]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def _kv(dtype: torch.dtype = torch.float32, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple((torch.randn(len(SLOTS), HKV, n, generator=g) * factor).to(dtype) for n in (D, DV))  # type: ignore[return-value]


def _caches(dtype: torch.dtype, head_major: bool = False) -> list[torch.Tensor]:
    caches = []
    for size in (D, DV):
        full = torch.full((BLOCKS, HKV, BLOCK, size) if head_major else (BLOCKS, BLOCK, HKV, size), 3.0).to(dtype)
        caches.append(full.transpose(1, 2) if head_major else full)
    return caches


def _want(new: torch.Tensor, dtype: torch.dtype, scale: Any, slots: list[int] = SLOTS) -> torch.Tensor:
    """Say number by number what a cache of 3s holds afterwards."""
    want = torch.full((BLOCKS * BLOCK, *new.shape[1:]), 3.0).to(dtype)
    wide = want.float()
    for row, slot in zip(new, slots, strict=True):
        if slot < 0:
            continue
        value = row.float() if scale is None else row.float() / torch.as_tensor(scale).reshape(-1, 1)
        if dtype is torch.int8:
            value = value.round().clamp(-127, 127)
        elif dtype.itemsize == 1:
            value = value.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        wide[slot] = value.to(dtype).float()
    return wide.view(BLOCKS, BLOCK, *new.shape[1:])


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_token_in_its_slot(dtype: torch.dtype, head_major: bool, index: torch.dtype) -> None:
    k, v = _kv(dtype if dtype.itemsize > 1 else torch.bfloat16)
    k_cache, v_cache = _caches(dtype, head_major)
    write_kv(k, v, k_cache, v_cache, slot_mapping=torch.tensor(SLOTS, dtype=index))
    assert torch.equal(k_cache.float(), _want(k, dtype, None))
    assert torch.equal(v_cache.float(), _want(v, dtype, None))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize == 1], ids=str)
@pytest.mark.parametrize("scale", [0.02, [0.5, 0.001]], ids=["scalar", "heads"])
def test_scales_and_saturation(dtype: torch.dtype, scale: Any) -> None:
    k, v = _kv(torch.float32, 100.0)
    k_cache, v_cache = _caches(dtype)
    factor = torch.tensor(scale)
    write_kv(k, v, k_cache, v_cache, slot_mapping=torch.tensor(SLOTS), k_scale=factor, v_scale=factor * 2)
    want = _want(k, dtype, factor)
    assert torch.equal(k_cache.float(), want) and torch.isfinite(want).all()
    assert torch.equal(v_cache.float(), _want(v, dtype, factor * 2))
    largest = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
    assert want.abs().max() == largest or dtype is torch.float8_e5m2  # the draw saturates all but the widest


def test_fewer_slots_than_tokens() -> None:
    k, v = _kv()
    k_cache, v_cache = _caches(torch.float32)
    write_kv(k, v, k_cache, v_cache, slot_mapping=torch.tensor(SLOTS[:3]))
    assert torch.equal(k_cache, _want(k[:3], torch.float32, None, SLOTS[:3]))


def test_mla_takes_one_cache_with_and_without_a_head() -> None:
    k, _ = _kv()
    for new in (k[:, 0], k[:, :1]):
        cache = torch.full((BLOCKS, BLOCK, D), 3.0)
        write_kv(new, None, cache, None, slot_mapping=torch.tensor(SLOTS))
        assert torch.equal(cache, _want(k[:, 0], torch.float32, None))


@pytest.mark.parametrize("slots", [SLOTS, [-1, -1, -1, -1, -1, -1], [-1, 0, -1, 3, 4, 5], [0, 1, 2, 3, 4, 5]], ids=str)
def test_what_a_gpu_writes_for_skipped_tokens(slots: list[int]) -> None:
    k, _ = _kv()
    cache = _caches(torch.float32)[0]
    places = torch.tensor(slots)
    rows, where = without_skipped(k, cache, places, places >= 0)
    assert bool((where >= 0).all())
    for order in (slice(None), torch.arange(5, -1, -1)):  # duplicates are equal, so any order gives the same
        written = cache.flatten(0, 1).clone()
        written[where[order]] = rows[order]
        assert torch.equal(written.view_as(cache), _want(k, torch.float32, None, slots))


def launched(write: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Fused:
    """Return what stands for our kernel, as if the CPU were a GPU that it runs on."""
    kernel = Fused("write_kv", "kv_write_launch")
    module = SimpleNamespace(write_kv=write, DTYPES=set(DTYPES), CACHE_DTYPES=set(DTYPES))
    monkeypatch.setattr(kernel, "launcher", lambda tensors, kind: None if kernel.failed else module)
    return kernel


@pytest.mark.parametrize("mla", [False, True])
def test_a_fused_kernel_gets_the_forms_that_it_takes(mla: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fused(k, v, k_cache, v_cache, slots, k_scale, v_scale) -> None:
        seen.append((k, v, k_cache, v_cache, slots, k_scale, v_scale))
        for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            if new is not None:
                assert new.dim() == 3 and cache.dim() == 4 and new.stride(-1) == 1 and slots.is_contiguous()
                cache.copy_(_want(new, cache.dtype, scale).to(cache.dtype))

    monkeypatch.setattr(module, "_kernel", launched(fused, monkeypatch))
    k, v = (t.mT.contiguous().mT for t in _kv())
    k_cache, v_cache = _caches(torch.float8_e4m3fn, head_major=True)
    slots = torch.tensor(SLOTS).repeat_interleave(2)[::2]
    scale = torch.tensor([0.5, 9.0, 0.25, 9.0])[::2]
    if mla:
        k, v, k_cache, v_cache, scale = k[:, 0], None, k_cache[:, :, 0], None, scale[0]
    write_kv(k, v, k_cache, v_cache, slot_mapping=slots, k_scale=scale, v_scale=None if mla else scale)
    assert len(seen) == 1
    want = _want(k[:, None] if mla else k, torch.float8_e4m3fn, scale)
    assert torch.equal(k_cache.float(), want[:, :, 0] if mla else want)
    assert mla or torch.equal(v_cache.float(), _want(v, torch.float8_e4m3fn, scale))


def test_a_fused_kernel_that_fails_is_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fused(*tensors: Any) -> None:
        raise RuntimeError("no image")

    monkeypatch.setattr(module, "_kernel", launched(fused, monkeypatch))
    k, v = _kv()
    for _ in range(2):
        k_cache, v_cache = _caches(torch.float32)
        write_kv(k, v, k_cache, v_cache, slot_mapping=torch.tensor(SLOTS))
        assert torch.equal(k_cache, _want(k, torch.float32, None))
    assert caplog.text.count("no image") == 1


def test_gradients_are_left_outside() -> None:
    k, v = (t.requires_grad_() for t in _kv())
    k_cache, v_cache = _caches(torch.float32)
    write_kv(k, v, k_cache, v_cache, slot_mapping=torch.tensor(SLOTS))
    assert not k_cache.requires_grad and torch.equal(k_cache, _want(k.detach(), torch.float32, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_compiled_in_one_graph(dtype: torch.dtype) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    k, v = _kv()
    scale = torch.tensor(0.5) if dtype.itemsize == 1 else None

    def step(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        write_kv(k * 2, v, k_cache, v_cache, slot_mapping=torch.tensor(SLOTS), k_scale=scale, v_scale=scale)
        return k_cache.float().sum()

    k_cache, v_cache = _caches(dtype)
    total = torch.compile(step, backend=counter, fullgraph=True)(k, v, k_cache, v_cache)
    want = _want(k * 2, dtype, scale)
    assert counter.frame_count == 1
    assert torch.equal(k_cache.float(), want) and torch.allclose(total, want.sum())
    assert torch.equal(v_cache.float(), _want(v, dtype, scale))


K, V = _kv()
KC, VC = _caches(torch.float32)
S = torch.tensor(SLOTS)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "slots past the cache": ((K, V, KC, VC), {"slot_mapping": S + 13}, ValueError, "has 32; the cache has 20"),
    "slots not integers": ((K, V, KC, VC), {"slot_mapping": S.float()}, TypeError, "slot_mapping must be an int32"),
    "too many slots": ((K[:2], V[:2], KC, VC), {}, ValueError, "n <= T = 2"),
    "values without a cache": ((K, V, KC, None), {}, ValueError, "go together"),
    "head size": ((K[..., :4], V, KC, VC), {}, ValueError, r"k must be \(T, Hkv, D\)"),
    "heads": ((K[:, :1], V, KC, VC), {}, ValueError, "does not fit"),
    "tokens": ((K, V[:3], KC, VC), {}, ValueError, r"v \(3, 2, 6\) does not fit k \(6, 2, 8\)"),
    "blocks": ((K, V, KC, VC[:3]), {}, ValueError, "have other blocks"),
    "dtype": ((K, V, KC.half(), VC), {}, TypeError, "k_cache must have k's dtype, torch.float32"),
    "integers": ((K.int(), V, KC, VC), {}, TypeError, "k must be floating-point"),
    "a scale of a wide cache": ((K, V, KC, VC), {"k_scale": torch.ones(())}, ValueError, "k_scale is for FP8"),
    "scale shape": ((K, V, KC.char(), VC), {"k_scale": torch.ones(3)}, ValueError, r"shape \(\) or \(2,\)"),
    "scale dtype": ((K, V, KC.char(), VC), {"k_scale": 0.5}, TypeError, "k_scale must be a float32 tensor, not float"),
    "device": ((K.to("meta"), V, KC, VC), {}, ValueError, "k is on meta"),
    "not a tensor": ((K, V, [1], VC), {}, TypeError, "k_cache must be tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    tensors, options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        write_kv(*tensors, **{"slot_mapping": S, **options})
