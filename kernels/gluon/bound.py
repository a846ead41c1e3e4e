"""A short way to launch a Gluon kernel again: nothing of a call changes but tensors and floats."""

from __future__ import annotations

from typing import Any

import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vllm_accel.kernels.triton.launch import Encoded, Launch, listening, run

#: Releases whose launcher was read (backends/nvidia/driver.py): it encodes descriptors by attributes, from any object.
_DIRECT = triton.__version__.startswith("3.6.")


#: Kernel, constexprs, whether it starts early, dtype, device -> launcher, function, metadata. No integer of these
#: kernels is specialised.
_compiled: dict[Any, tuple[Any, Any, Any]] = {}


class Bound:
    """A launch whose sizes and strides stay; tensors of the same kind and floats change from call to call.

    Tensors must be on the current device; its current stream is used. Those that are described must have addresses
    that are multiples of 16 bytes, and the strides of the launch.

    Args:
        launch: its arguments are descriptors, then tensors or None, then floats, then integers. May be of meta
            tensors; none of its tensors is kept. index: of the device.
    """

    __slots__ = ("_described", "_fixed", "_grid", "_index", "_key", "_launch", "_shapes", "_strides")

    def __init__(self, launch: Launch, index: int) -> None:
        descriptors = [arg for arg in launch.args if isinstance(arg, TensorDescriptor)]
        integers = tuple(arg for arg in launch.args if type(arg) is int)
        # Without its tensors: a plan must keep no caller's memory alive.
        self._launch, self._grid, self._index = launch._replace(args=integers), launch.grid, index
        self._described = [(d.shape, d.strides, d.block_shape, d.layout) for d in descriptors]
        self._shapes, self._strides = [d.shape for d in descriptors], [d.strides for d in descriptors]
        constants = tuple(launch.constexprs.values())
        self._fixed = (*integers, *constants)
        self._key = (id(launch.fn), constants, launch.early, descriptors[0].base.dtype, index)

    def __call__(self, *args: Any) -> None:
        """Launch on these tensors (in place of each descriptor its tensor) and floats."""
        compiled = _compiled.get(self._key)
        if compiled is None or listening():
            self._first(*args)
            return
        launcher, function, metadata = compiled
        launcher(
            *self._grid, triton.runtime.driver.active.get_current_stream(self._index), function, metadata, None, None,
            None, *map(Encoded, args, self._shapes, self._strides), *args[len(self._shapes) :], *self._fixed,
        )  # fmt: skip

    def _first(self, *args: Any) -> None:
        described = [TensorDescriptor(t, *how) for t, how in zip(args, self._described, strict=False)]
        kernel = run(self._launch._replace(args=(*described, *args[len(described) :], *self._launch.args)))
        if _DIRECT:
            _compiled[self._key] = (kernel.run, kernel.function, kernel.packed_metadata)
