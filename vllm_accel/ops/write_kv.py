"""Put new keys and values where a paged cache keeps them: `write_kv`."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_accel.dispatch.settings import settings
from vllm_accel.ops.fused import Fused

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_EIGHT_BITS = (*_FP8, torch.int8)
_tracing = torch.compiler.is_compiling

_library = torch.library.Library("vllm_accel", "FRAGMENT")
_library.define(
    "write_kv(Tensor k, Tensor? v, Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor slot_mapping, Tensor? k_scale, "
    "Tensor? v_scale) -> ()"
)


def write_kv(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    *,
    slot_mapping: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write the keys and values of new tokens into a paged cache, in place and without a synchronisation.

    Args:
        k, v: (T, Hkv, D), (T, Hkv, Dv), of one floating-point dtype. For MLA k is (T, D) or (T, 1, D), and v is None.
        k_cache, v_cache: (num_blocks, block_size, Hkv, D / Dv), any strides, in the dtype of k, or FP8 or int8. For
            MLA k_cache is (num_blocks, block_size, D), and v_cache is None.
        slot_mapping: int32 or int64 (n,), n <= T: token i goes to block ``slot // block_size``, place
            ``slot % block_size``; a negative slot skips it. Two tokens in one slot leave either of them there.
        k_scale, v_scale: fp32 scalar or (Hkv,): the cache holds ``k / k_scale``, rounded to nearest and clamped to
            what its dtype holds; pass the same numbers as ``k_descale`` and ``v_descale`` to attention. Without one, 1.

    Raises:
        ValueError, TypeError: a wrong argument, by name. Slots past the cache are an error on the CPU, on a GPU with
            VLLM_ACCEL_CHECK=1; else such tokens are skipped.
    """
    _check(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    if _tracing():
        torch.ops.vllm_accel.write_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        return
    _write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


def _write(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    if not slot_mapping.shape[0]:
        return
    places = slot_mapping.long()
    slots = k_cache.shape[0] * k_cache.shape[1]
    if places.is_cpu or (settings().check and not torch.cuda.is_current_stream_capturing()):
        most = int(places.max())
        if most >= slots:
            raise ValueError(f"slot_mapping has {most}; the cache has {slots} slots")
    with torch.no_grad():
        if _fused(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale):
            return
        for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            if new is not None and cache is not None:
                rows = _quantised(new[: places.shape[0]].reshape(places.shape[0], *cache.shape[2:]), cache.dtype, scale)
                _place(rows, cache, places, slots)


_kernel = Fused("write_kv", "kv_write_launch")


def _fused(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> bool:  # fmt: skip
    """Write with the fused kernel where it runs, in the forms that it takes: heads everywhere, unit innermost strides.

    One launch instead of the twenty that torch's operators need on a GPU.
    """
    kind = (k.dtype, k_cache.dtype, k.shape[1:], k_cache.shape[1:])
    triton = _kernel.launcher((k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale), kind)
    if triton is None or k.dtype not in triton.DTYPES or k_cache.dtype not in triton.CACHE_DTYPES:
        return False
    new = [None if t is None else (t if t.dim() == 3 else t.unsqueeze(1)) for t in (k, v)]
    new = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in new]
    caches = [None if t is None else (t if t.dim() == 4 else t.unsqueeze(2)) for t in (k_cache, v_cache)]
    slots, *scales = (None if t is None else t.contiguous() for t in (slot_mapping, k_scale, v_scale))
    return _kernel.run(lambda: triton.write_kv(*new, *caches, slots, *scales), k.device, kind) is not None


def _quantised(rows: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Return rows / scale in the cache's dtype, saturated: a cast alone turns what FP8 cannot hold into NaN."""
    if scale is None and rows.dtype is dtype:
        return rows
    wide = rows.to(torch.float64 if rows.dtype is torch.float64 else torch.float32)
    if scale is not None:
        wide = wide / (scale.unsqueeze(-1) if scale.dim() else scale)
    if dtype in _EIGHT_BITS:
        most = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
        wide = wide.clamp(-most, most)
        wide = wide.round() if dtype is torch.int8 else wide
    return wide.to(dtype)


def _place(rows: Tensor, cache: Tensor, places: Tensor, slots: int) -> None:
    """Write rows to their slots; those without one must leave no trace, and nothing may be read on a GPU's host."""
    if rows.dtype.itemsize == 1:  # 8-bit floats have no indexing kernels on some devices
        rows, cache = rows.view(torch.uint8), cache.view(torch.uint8)
    valid = (places >= 0) & (places < slots)
    if not places.is_cpu:
        rows, places = without_skipped(rows, cache, places, valid)
    elif not bool(valid.all()):
        rows, places = rows[valid], places[valid]
    cache.index_put_((torch.div(places, cache.shape[1], rounding_mode="floor"), places % cache.shape[1]), rows)


def without_skipped(rows: Tensor, cache: Tensor, places: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Give skipped tokens something harmless to write, on the device, and return rows and places of all tokens.

    A skipped token repeats the first token that has a slot, or, where there is none, what the cache holds at its own
    clamped slot. Equal numbers written twice are written once.
    """
    first = valid.to(torch.uint8).argmax()
    spare = places[first].clamp(0, cache.shape[0] * cache.shape[1] - 1)
    held = cache[torch.div(spare, cache.shape[1], rounding_mode="floor"), spare % cache.shape[1]]
    kept = torch.where(valid[first], rows[first], held)
    rows = torch.where(valid.view(-1, *(1,) * (rows.dim() - 1)), rows, kept)
    return rows, torch.where(valid, places, spare)


def _check(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    if (v is None) is not (v_cache is None):
        raise ValueError("v and v_cache go together: both tensors, or both None (MLA, where values are a part of keys)")
    if not isinstance(slot_mapping, Tensor) or slot_mapping.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slot_mapping must be an int32 or int64 tensor, not {_kind(slot_mapping)}")
    pairs = [("k", k, k_cache, k_scale)]
    if v is not None and v_cache is not None:
        pairs.append(("v", v, v_cache, v_scale))
    if slot_mapping.dim() != 1 or slot_mapping.shape[0] > (k.shape[0] if k.dim() else 0):
        raise ValueError(f"slot_mapping must be (n,) with n <= T = {k.shape[0]}; got {tuple(slot_mapping.shape)}")
    for name, new, cache, scale in pairs:
        if not isinstance(new, Tensor) or not isinstance(cache, Tensor):
            raise TypeError(f"{name} and {name}_cache must be tensors, not {_kind(new)} and {_kind(cache)}")
        if cache.dim() not in (3, 4) or new.dim() not in (2, 3) or new.shape[-1] != cache.shape[-1]:
            raise ValueError(
                f"{name} must be (T, Hkv, D) and {name}_cache (num_blocks, block_size, Hkv, D), for MLA (T, D) and "
                f"(num_blocks, block_size, D); got {tuple(new.shape)} and {tuple(cache.shape)}"
            )
        heads = cache.shape[2] if cache.dim() == 4 else 1
        if (new.shape[1] if new.dim() == 3 else 1) != heads or new.shape[0] != k.shape[0]:
            raise ValueError(
                f"{name} {tuple(new.shape)} does not fit k {tuple(k.shape)} and {name}_cache {tuple(cache.shape)}"
            )
        if cache.shape[:2] != k_cache.shape[:2]:
            raise ValueError(f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(cache.shape)} have other blocks")
        if not new.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating-point; got {new.dtype}")
        if cache.dtype is not new.dtype and cache.dtype not in _EIGHT_BITS:
            raise TypeError(f"{name}_cache must have {name}'s dtype, {new.dtype}, or be FP8 or int8; got {cache.dtype}")
        _check_scale(f"{name}_scale", scale, cache, heads)
        for what, tensor in ((name, new), (f"{name}_cache", cache), (f"{name}_scale", scale)):
            if tensor is not None and tensor.device != slot_mapping.device:
                raise ValueError(f"{what} is on {tensor.device}, slot_mapping on {slot_mapping.device}")


def _check_scale(name: str, scale: Tensor | None, cache: Tensor, heads: int) -> None:
    if scale is None:
        return
    if not isinstance(scale, Tensor) or scale.dtype is not torch.float32:
        raise TypeError(f"{name} must be a float32 tensor, not {_kind(scale)}")
    if cache.dtype not in _EIGHT_BITS:
        raise ValueError(f"{name} is for FP8 and int8 caches; this one is {cache.dtype}")
    if tuple(scale.shape) not in ((), (heads,)):
        raise ValueError(f"{name} must have shape () or ({heads},); got {tuple(scale.shape)}")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _fake(*_: object) -> None:
    """Write nothing: the operator returns nothing and changes no shape."""


_library.impl("write_kv", _write, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_accel::write_kv", _fake, lib=_library)
