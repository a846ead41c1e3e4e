"""A grouped product bound to its compiled kernel, also where operands come through TMA descriptors.

`launch.Bound` passes addresses; a descriptor is encoded by the launcher from an object, at every launch, because it
holds the address.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

import triton
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_accel.kernels.triton.launch import Bound, Launch, _goes_direct, listening, run

#: Tensors of the kernel after its two descriptors: a, b, out, offs, bias, gather, a_scale, b_scale.
_TENSORS = 8
_new = tuple.__new__


class _Encoded(NamedTuple):
    """What the launcher reads of a descriptor; a `TensorDescriptor` checks itself at each construction."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    padding: str = "zero"


class BoundGemm:
    """A product whose sizes and strides stay; tensors of the same kind change from call to call.

    Args:
        plain: the launch without descriptors, which takes any address. described: the same with descriptors, or None
            where strides or the chip rule them out.
    """

    __slots__ = (
        "_compiled", "_described", "_direct", "_fixed", "_grid", "_index", "_plain", "_present", "_stream_of", "_tails",
    )  # fmt: skip

    def __init__(self, plain: Launch, described: Launch | None) -> None:
        self._plain = Bound(plain)
        self._described: Launch | None = None
        if described is None:
            return
        device = described.args[2].device
        integers = described.args[2 + _TENSORS :]
        self._present = [i for i in range(_TENSORS) if described.args[2 + i] is not None]
        self._tails = [(d.shape, d.strides, d.block_shape) for d in described.args[:2]]
        names = described.fn.arg_names[len(described.args) :]
        self._fixed = (*integers, *[described.constexprs[name] for name in names])
        self._direct, self._index = _goes_direct(described.fn, device), device.index or 0
        self._grid = described.grid
        if self._direct:
            self._stream_of = triton.runtime.driver.active.get_current_stream
        #: Which tensors are misaligned (bits) -> launcher, function, metadata.
        self._compiled: dict[int, tuple[Any, Any, Any]] = {}
        # Without its tensors: a plan must keep no caller's memory alive.
        self._described = described._replace(args=integers)

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Launch on a, b, out, offs, bias, gather, a_scale and b_scale, None in the same places as in the launch."""
        if self._described is None:
            self._plain((None, None, *tensors))
            return
        misaligned = 0
        addresses: list[int | None] = [None] * _TENSORS
        for i in self._present:
            address = tensors[i].data_ptr()  # type: ignore[union-attr]
            addresses[i] = address
            if address & 15:
                misaligned |= 1 << i
        if misaligned & 3:  # TMA reads a and b at multiples of 16 bytes
            self._plain((None, None, *tensors))
            return
        a, b = tensors[0], tensors[1]
        compiled = self._compiled.get(misaligned)
        if compiled is None or listening():
            self._first(tensors, misaligned)
            return
        launcher, function, metadata = compiled
        (a_shape, a_strides, _), (b_shape, b_strides, _) = self._tails
        launcher(
            *self._grid, self._stream_of(self._index), function, metadata, None, None, None,
            _new(_Encoded, (a, a_shape, a_strides, "zero")), _new(_Encoded, (b, b_shape, b_strides, "zero")),
            *addresses, *self._fixed,
        )  # fmt: skip

    def _first(self, tensors: tuple[Tensor | None, ...], misaligned: int) -> None:
        assert self._described is not None
        pair = [TensorDescriptor(t, *tail) for t, tail in zip(tensors[:2], self._tails, strict=True)]
        kernel = run(self._described._replace(args=(*pair, *tensors, *self._described.args)))
        if self._direct:
            self._compiled[misaligned] = (kernel.run, kernel.function, kernel.packed_metadata)
