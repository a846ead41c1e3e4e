"""What Triton's interpreter works out anew for every call and tensor, remembered; for tests only, and only for time.

The interpreter (runtime/interpreter.py in 3.6.0 and 3.7.1) looks through all of triton.language at every call of
a device function to put its own functions there, builds a table of types for every tensor, and describes every
shape again. That took half of the time of these tests.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

_LANGUAGES = {id(tl), id(tl.core)}


def _patched_once(original: Any) -> Any:
    """Wrap `_patch_lang`: a function that is called while its modules are patched leaves them so."""
    patched: set[int] = set()

    def patch_lang(fn: Any) -> Any:
        missing = {id(value) for value in _modules(fn)} - patched
        if not missing:
            return interpreter._LangPatchScope()
        scope = original(fn)
        restore = scope.restore

        def end() -> None:
            restore()
            patched.difference_update(missing)

        scope.restore = end
        patched.update(missing)
        return scope

    return patch_lang


_found: dict[int, tuple[Any, list[Any]]] = {}


def _modules(fn: Any) -> list[Any]:
    """Return which of the language's modules a function sees."""
    names = fn.__globals__
    if id(names) not in _found:  # with the names, so that no others take their place in memory
        _found[id(names)] = (names, [value for value in names.values() if id(value) in _LANGUAGES])
    return _found[id(names)][1]


def _described_once(original: Any) -> Any:
    """Wrap the constructor of a tensor: equal shapes share their description."""
    described: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def __init__(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        known = described.get(shape)
        if known is None:
            original(self, handle, type)
            described[shape] = (self.numel, self.shape)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = known

    return __init__


def _typed_once(original: Any) -> Any:
    """Wrap the constructor of a block's type likewise: `tuple` there is not Python's, and asks for each type."""
    described: dict[tuple[int, ...], tuple[Any, Any, str]] = {}

    def __init__(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
        known = described.get(key)
        if known is None:
            original(self, element_ty, shape)
            described[key] = (self.shape, self.numel, str(self.shape))
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = known
        self.name = f"<{text}, {element_ty}>"

    return __init__


def _looked_up_once(original: Any) -> Any:
    """Wrap `_get_np_dtype`, which asks of a block or a pointer only what it is made of."""
    known = functools.cache(original)

    def get_np_dtype(type: Any) -> Any:
        element = type.element_ty if isinstance(type, tl.block_type) else type
        return original(element) if isinstance(element, tl.pointer_type) else known(element)

    return get_np_dtype


def _nowhere(original: Any) -> Any:
    """Replace `_restore_args_dev`: tensors on the CPU were never copied, and copying 4 GiB onto itself takes long."""

    def restore(self: Any, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        assert all(t.device.type == "cpu" for t in (*args_dev, *kwargs.values()) if isinstance(t, torch.Tensor))

    return restore


@contextlib.contextmanager
def applied() -> Iterator[None]:
    """Remember, for a while."""
    places = (
        (interpreter, "_patch_lang", _patched_once),
        (interpreter, "_get_np_dtype", _looked_up_once),
        (tl.core.tensor, "__init__", _described_once),
        (tl.core.block_type, "__init__", _typed_once),
        (interpreter.GridExecutor, "_restore_args_dev", _nowhere),
    )
    originals = [getattr(where, name) for where, name, _ in places]
    for (where, name, make), original in zip(places, originals, strict=True):
        setattr(where, name, make(original))
    try:
        yield
    finally:
        for (where, name, _), original in zip(places, originals, strict=True):
            setattr(where, name, original)
