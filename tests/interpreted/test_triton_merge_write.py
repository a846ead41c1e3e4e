"""Writing into a paged cache, and merging partial results, as the interpreter runs the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_accel.kernels.triton import kv_write_launch, launch, merge_launch
from vllm_accel.testing.oracle import merge_oracle
from vllm_accel.testing.tolerance import assert_close, assert_lse_close

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def bits(t: Tensor) -> Tensor:
    """Return the bits of a tensor: NaN compares equal to itself."""
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def expected(new: Tensor, cache: Tensor, slots: list[int], scale: Tensor | None) -> Tensor:
    """Write one token after the other, in torch."""
    made = cache.clone()
    for token, slot in enumerate(slots):
        if not 0 <= slot < cache.shape[0] * cache.shape[1]:
            continue
        row = new[token].float()
        if scale is not None:
            row = row / (scale[:, None] if scale.dim() else scale)
        if cache.dtype is torch.int8:
            row = row.clamp(-127, 127).round()
        elif cache.dtype in (E4M3, E5M2):
            row = row.clamp(-torch.finfo(cache.dtype).max, torch.finfo(cache.dtype).max)
        bits(made[slot // cache.shape[1], slot % cache.shape[1]])[:] = 0
        made.view(cache.dtype)[slot // cache.shape[1], slot % cache.shape[1]] = row.to(cache.dtype)
    return made


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 77).to(dtype)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, E4M3, E5M2])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_slot_gets_its_token_and_no_other_changes(cache_dtype: torch.dtype, scaled: bool) -> None:
    g = torch.Generator().manual_seed(0)
    k = (torch.randn((7, 3, 20), generator=g) * 30).bfloat16()
    v = (torch.randn((7, 3, 33), generator=g) * 30).bfloat16()
    k_cache, v_cache = filled((3, 5, 3, 20), cache_dtype), filled((3, 3, 5, 33), cache_dtype).transpose(1, 2)
    slots = [4, -1, 14, 15, 0, -(2**40), 7]  # 15 is past the cache
    k_scale, v_scale = (torch.tensor(0.37), torch.tensor([0.1, 3.0, 1.0])) if scaled else (None, None)
    wanted = expected(k, k_cache, slots, k_scale), expected(v, v_cache, slots, v_scale)
    kv_write_launch.write_kv(k, v, k_cache, v_cache, torch.tensor(slots), k_scale, v_scale)
    assert torch.equal(bits(k_cache), bits(wanted[0]))
    assert torch.equal(bits(v_cache), bits(wanted[1]))


def test_latent_rows_strides_and_int32_slots() -> None:
    wide = torch.randn((6, 2, 48), generator=torch.Generator().manual_seed(1)).half()
    k, cache = wide[:, :1, 8:40], filled((2, 4, 1, 32), torch.float16)
    slots = [3, -1, 6, 1]
    wanted = expected(k, cache, slots, None)
    kv_write_launch.write_kv(k, None, cache, None, torch.tensor(slots, dtype=torch.int32), None, None)
    assert torch.equal(cache, wanted)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fp8_is_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """Every value of the type, what lies half-way and beside, both infinities, zeros and NaN."""
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    values = values[values.isfinite()].sort().values
    middle = (values[1:] + values[:-1]) / 2
    tiny = torch.tensor([0.0, -0.0, 1e-12, -1e-12, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
    x = torch.cat([values, middle, middle * (1 + 2**-20), middle * (1 - 2**-20), values * (1 + 2**-23), tiny])
    k = x.view(1, 1, -1)
    cache = torch.zeros((1, 1, 1, len(x))).to(dtype)
    kv_write_launch.write_kv(k, None, cache, None, torch.tensor([0]), None, None)
    wanted = expected(k, torch.zeros_like(cache), [0], None)
    got, want = bits(cache).flatten(), bits(wanted).flatten()
    assert torch.equal(got[:-1], want[:-1])
    assert cache.flatten()[-1].float().isnan()


def parts_of(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(count)
    *batch, tokens, heads, _ = shape
    outs = [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]
    lses = [torch.randn((*batch, heads, tokens), generator=g) * 5 for _ in range(count)]
    return outs, lses


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("shape", [(2, 5, 3, 20), (7, 4, 64)])
def test_merge(count: int, shape: tuple[int, ...]) -> None:
    dtype = torch.float16
    outs, lses = parts_of(count, shape, dtype)
    lses[0][..., 0, 1] = float("-inf")
    outs[0].view(-1, *shape[-3:])[:, 1, 0] = float("nan")  # of a row without keys
    for lse in lses:
        lse[..., 1, 0] = float("-inf")
    for sinks in (None, torch.linspace(-2, 2, shape[-2])):
        out, lse = merge_launch.merge(outs, lses, sinks)
        clean = [o.double().nan_to_num() for o in outs]
        reference, expected_lse = merge_oracle(clean, [t.double() for t in lses], sinks)
        assert out.dtype is dtype
        assert_close(out, reference, reference.to(dtype), what="out")
        assert_lse_close(lse, expected_lse, dtype=torch.float32)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("head_dim", [20, 64])
def test_parts_of_one_tensor_are_joined(count: int, head_dim: int) -> None:
    dtype, shape = torch.bfloat16, (2, 37, 3, head_dim)
    outs, lses = parts_of(count, shape, torch.float32)
    outs[0][:, 1, 0] = float("nan")  # of a row without keys
    for i, log in enumerate(lses):
        log[..., 1, 0] = float("-inf")  # nor does any other part have one
        log[..., i % 3, 2 + i] = float("-inf")
    lses[0][..., 0, 1] = float("-inf")
    parts, part_lse = torch.stack(outs), torch.stack(lses)
    out, lse = torch.empty(shape, dtype=dtype), torch.empty_like(lses[0])
    launch.run(merge_launch.join_launch(parts, part_lse, out, lse))
    clean = [o.double().nan_to_num() for o in outs]
    reference, expected_lse = merge_oracle(clean, [t.double() for t in lses])
    assert_close(out, reference, reference.to(dtype), what="out")
    assert_lse_close(lse, expected_lse, dtype=torch.float32)


def test_merge_of_other_layouts_and_dtypes() -> None:
    outs, lses = parts_of(3, (2, 5, 3, 16), torch.float32)
    given: list[Any] = [outs[0].bfloat16(), outs[1].transpose(1, 2).contiguous().transpose(1, 2), outs[2]]
    logs = [lses[0], lses[1].transpose(1, 2).contiguous().transpose(1, 2), lses[2]]
    out, lse = merge_launch.merge(given, logs)
    reference, expected_lse = merge_oracle([o.double() for o in given], [t.double() for t in logs])
    assert_close(out, reference, reference.bfloat16(), what="out")
    assert_lse_close(lse, expected_lse, dtype=torch.float32)
