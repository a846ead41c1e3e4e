"""What Triton's interpreter computes wrongly, put right; for tests only. test_patches.py shows that each is needed.

The interpreter (triton/runtime/interpreter.py in 3.6.0 and 3.7.1) runs a kernel on the CPU with NumPy, which has no
bfloat16 and no float8: it holds them as their bits, in unsigned integers, and forgets that in most operations. Its
own conversions truncate, or lose the carry of a rounded mantissa. Here such values are widened to float32 before each
operation and rounded to nearest even after it, as a GPU does; torch converts.

Left as they are, because they raise: atomics on bfloat16, inline assembly, dot_scaled, descriptor.atomic_add.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_BITS = {2: (torch.int16, np.uint16), 1: (torch.uint8, np.uint8)}

Handle = interpreter.TensorHandle


def _in_bits(handle: Any) -> bool:
    return handle.dtype.scalar in _TORCH


def _wide(handle: Any) -> Any:
    """Return a handle of float32 for one that holds bits, any other as it is."""
    if not _in_bits(handle):
        return handle
    dtype = _TORCH[handle.dtype.scalar]
    bits = np.ascontiguousarray(handle.data).view(np.int16 if dtype.itemsize == 2 else np.uint8)
    return Handle(torch.from_numpy(bits.copy()).view(dtype).float().numpy(), tl.float32)


def _narrow(values: np.ndarray[Any, Any], dtype: Any) -> Any:
    """Return the bits of `values`, rounded to nearest even; float8 saturates, as ``cvt.rn.satfinite`` does."""
    made = torch.from_numpy(np.array(values, dtype=np.float32))
    if _TORCH[dtype].itemsize == 1:
        largest = torch.finfo(_TORCH[dtype]).max
        made = made.clamp(-largest, largest)
    as_bits, unsigned = _BITS[_TORCH[dtype].itemsize]
    return Handle(made.to(_TORCH[dtype]).view(as_bits).numpy().view(unsigned), dtype)


def _binary(original: Any) -> Any:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (_in_bits(lhs) or _in_bits(rhs)):
            return original(self, lhs, rhs, op)
        output = op(_wide(lhs).data, _wide(rhs).data)
        if output.dtype == np.bool_:  # a comparison
            return Handle(output, tl.int1)
        return _narrow(output, (lhs if _in_bits(lhs) else rhs).dtype.scalar)

    return binary_op


def _fma(original: Any) -> Any:
    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _in_bits(z):
            return original(self, x, y, z)
        return _narrow(_wide(x).data * _wide(y).data + _wide(z).data, z.dtype.scalar)

    return create_fma


def _dot(original: Any) -> Any:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original(self, _wide(a), _wide(b), d, *rest)

    return create_dot


def _cast(original: Any) -> Any:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar in _TORCH:
            return _narrow(_wide(src).data, dst_type.scalar)
        return original(self, _wide(src), dst_type)

    return cast_impl


def _fp_to_fp(original: Any) -> Any:
    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        towards_zero = rounding is not None and rounding != interpreter._ir.ROUNDING_MODE.RTNE
        both = {src.dtype.scalar, dst_type.scalar}
        if towards_zero or not both & _TORCH.keys() or tl.float8e4b15 in both:
            return original(self, src, dst_type, rounding)
        return self.cast_impl(src, dst_type)

    return create_fp_to_fp


def _reduce(original: Any) -> Any:
    """Wrap the application of a reduction or scan to tensors. It accumulates in float32 and rounds once."""

    def apply(self: Any, given: Any) -> Any:
        tensors = given if isinstance(given, tuple) else (given,)
        narrow = {i: t.dtype for i, t in enumerate(tensors) if _in_bits(t.handle)}
        if not narrow:
            return original(self, given)
        wide = tuple(
            self.to_tensor(_wide(t.handle).data, tl.float32) if i in narrow else t for i, t in enumerate(tensors)
        )
        made = original(self, wide)
        made = tuple(
            self.to_tensor(_narrow(t.handle.data, narrow[i]).data.reshape(t.shape), narrow[i]) if i in narrow else t
            for i, t in enumerate(made)
        )
        return made if isinstance(given, tuple) else made[0]

    return apply


def _get_bf16(original: object) -> Any:
    return lambda self, value: _narrow(np.array([value]), tl.bfloat16)


def _index(original: Any) -> Any:
    """Wrap _patch_lang_tensor. NumPy 2.4 refuses int() of an array of one dimension; 3.6.0 asks for it in range(n)."""

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_lang_tensor


_BUILDER = interpreter.InterpreterBuilder
#: name -> (where, attribute, what makes the replacement out of the original).
PATCHES: dict[str, tuple[Any, str, Any]] = {
    "dot": (_BUILDER, "create_dot", _dot),
    "binary": (_BUILDER, "binary_op", _binary),
    "fma": (_BUILDER, "create_fma", _fma),
    "cast": (_BUILDER, "cast_impl", _cast),
    "fp_to_fp": (_BUILDER, "create_fp_to_fp", _fp_to_fp),
    "reduce": (interpreter.ReduceScanOpInterface, "apply", _reduce),
    "constant": (_BUILDER, "get_bf16", _get_bf16),
}
if triton.__version__.startswith("3.6."):
    PATCHES["index"] = (interpreter, "_patch_lang_tensor", _index)

_MISSING = object()
_ORIGINALS = {name: getattr(where, attribute, _MISSING) for name, (where, attribute, _) in PATCHES.items()}


@contextlib.contextmanager
def applied() -> Iterator[None]:
    """Apply every patch, and take them back."""
    for name, (where, attribute, make) in PATCHES.items():
        setattr(where, attribute, make(_ORIGINALS[name]))
    try:
        yield
    finally:
        for name in PATCHES:
            _restore(name)


@contextlib.contextmanager
def lifted(name: str) -> Iterator[None]:
    """Take one patch back for a while."""
    where, attribute, make = PATCHES[name]
    _restore(name)
    try:
        yield
    finally:
        setattr(where, attribute, make(_ORIGINALS[name]))


def _restore(name: str) -> None:
    where, attribute, _ = PATCHES[name]
    if _ORIGINALS[name] is _MISSING:
        delattr(where, attribute)
    else:
        setattr(where, attribute, _ORIGINALS[name])
