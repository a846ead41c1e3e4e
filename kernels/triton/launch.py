"""A kernel launch as data, and the two ways to run it: the ordinary one, and bound to a compiled kernel.

Triton's ``fn[grid](...)`` costs 20 to 40 us of Python for a kernel with thirty arguments: it derives types, alignments
and a cache key from every argument, on every call. A plan knows that nothing of this changes but addresses and a few
floats, so `Bound` looks the compiled kernel up once and then calls its launcher.

The order of a kernel's parameters here, which makes this possible: descriptors for TMA, tensors (or None), then floats,
then integers fixed by the shapes, then constexprs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
from triton import knobs
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_accel.kernels.triton.assembling import assembling
from vllm_accel.kernels.triton.tiles import Tile, smaller

#: Releases whose ``CompiledKernel.run(grid..., stream, function, packed_metadata, launch_metadata, hooks..., *args)``
#: was read (runtime/jit.py, compiler/compiler.py and the launchers of both back ends); another one takes the ordinary
#: way.
_READ = ("3.6.", "3.7.")
_DIRECT = triton.__version__.startswith(_READ)
_new = tuple.__new__


#: Of a descriptor: shape, strides (the last is 1) and the shape of a tile.
Described = tuple[list[int], list[int], list[int]]


class Encoded(NamedTuple):
    """What the launcher reads of a descriptor; a `TensorDescriptor` checks itself for 3 us."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    padding: str = "zero"
    round_f32_to_tf32: bool = False  # read from Triton 3.7 on


class Launch(NamedTuple):
    """One launch of one kernel: plain data, that may be made of meta tensors and compiled without a GPU.

    Attributes:
        fn: the function under ``@triton.jit``.
        grid: programs along each axis.
        args: tensors or None, then floats, then ints, in the order of the kernel's parameters.
        constexprs: the remaining parameters, by name.
        num_warps, num_stages: of the compiler. maxnreg: registers per thread at most, 0 for the compiler's choice.
        described: how the first of args are described for TMA. The kernel has a parameter for each before those of
            args; None where it gets no descriptor.
        early: start while the launch before it on the stream still runs, as soon as all its blocks have allowed that or
            ended (programmatic dependent launch). The kernel itself must wait before it needs what that one writes,
            and must not end before it.
    """

    fn: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int = 0
    described: tuple[Described | None, ...] = ()
    early: bool = False


def arguments(launch: Launch) -> tuple[Any, ...]:
    """Return what the kernel gets before its constexprs: descriptors, then args."""
    pairs = zip(launch.args, launch.described, strict=False)
    return (*[None if how is None else TensorDescriptor(t, *how) for t, how in pairs], *launch.args)


def compile_options(launch: Launch) -> dict[str, int]:
    """Return the keyword arguments that the compiler takes; AMD's knows only those that every launch has."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.maxnreg:
        options["maxnreg"] = launch.maxnreg
    if launch.early:
        options["launch_pdl"] = True
    return options


def run(launch: Launch) -> Any:
    """Launch the ordinary way, compiling if need be; return the compiled kernel (None under the interpreter)."""
    options = {**launch.constexprs, **compile_options(launch)}
    if not isinstance(launch.fn, triton.runtime.JITFunction):
        return launch.fn[launch.grid](*arguments(launch), **options)
    with assembling(launch.constexprs, triton.runtime.driver.active.get_current_target()) as more:
        return launch.fn[launch.grid](*arguments(launch), **options, **more)


#: What a launch needs of a compiled kernel: its launcher, function handle and packed metadata.
_Compiled = tuple[Any, Any, Any]
#: Kind of launch -> which pointers are misaligned (bits) -> compiled kernel. Plans that differ in lengths share it.
_compiled: dict[Any, dict[int, _Compiled]] = {}
#: Kinds of launches whose tile did not fit the device: the next smaller one is taken at once.
_too_large: set[Any] = set()


class Bound:
    """A launch whose integers, constexprs and grid stay; tensors of the same kind and floats change from call to call.

    The first call of a kind goes through `run`. Tensors must be on the device of those in the launch and that device
    must be current; the current stream is used. Tensors that are described must have addresses that are multiples of 16
    bytes; a launch has all its descriptors or none. While a profiler listens to launches, under the interpreter, and
    with a release of Triton that nobody has read, every call goes through `run`.

    Args:
        launch: the launch; may be left out with made_of, a tile and what makes the launch of it. Where the device has
            less shared memory than the tile takes, the next smaller one takes its place. The tables fit what they were
            compiled for; blocks of a cache, options and GPUs that nobody compiled for may need this.
    """

    __slots__ = (
        "_by_alignment", "_direct", "_encoded", "_fixed", "_grid", "_index", "_kind", "_launch", "_made_of", "_nothing",
        "_present", "_stream_of",
    )  # fmt: skip

    def __init__(
        self, launch: Launch | None = None, made_of: tuple[Tile, Callable[[Tile], Launch]] | None = None
    ) -> None:
        if launch is None:
            assert made_of is not None, "a launch, or what it is made of"
            launch = made_of[1](made_of[0])
        self._made_of = made_of
        self._describe(launch)
        while made_of is not None and self._kind in _too_large and (tile := smaller(made_of[0])) is not None:
            self._made_of = made_of = (tile, made_of[1])
            self._describe(made_of[1](tile))

    def _describe(self, launch: Launch) -> None:
        """Take a launch apart into what stays and what changes."""
        args = launch.args
        tensors = 0
        while tensors < len(args) and (args[tensors] is None or isinstance(args[tensors], Tensor)):
            tensors += 1
        values = tensors
        while values < len(args) and type(args[values]) is float:
            values += 1
        device = next(t for t in args if t is not None).device
        # Without its tensors and floats: a plan must keep no caller's memory alive.
        self._launch, self._grid = launch._replace(args=args[values:]), launch.grid
        self._index = device.index or 0
        self._present = [i for i in range(tensors) if args[i] is not None]
        constants = launch.constexprs
        names = launch.fn.arg_names[len(launch.described) + len(args) :]
        self._fixed = (*args[values:], *[constants[name] for name in names])
        self._encoded = [how[:2] for how in launch.described if how is not None]
        self._nothing = (None,) * (len(launch.described) - len(self._encoded))
        self._direct = _goes_direct(launch.fn, device)
        if self._direct:
            self._stream_of = triton.runtime.driver.active.get_current_stream
        kind = (
            id(launch.fn), self._index, launch.num_warps, launch.num_stages, launch.maxnreg, launch.early,
            tuple([None if t is None else t.dtype for t in args[:tensors]]),
            # Triton compiles for integers that are 1 or multiples of 16, and for those that need 64 bits.
            tuple([n if n == 1 else (n & 15 == 0, n >> 31 == 0) for n in args[values:]]),
            tuple(constants.values()),
        )  # fmt: skip
        self._kind = kind
        self._by_alignment = _compiled.setdefault(kind, {})

    def __call__(self, tensors: Sequence[Any], values: tuple[float, ...] = ()) -> None:
        """Launch on these tensors (as many as the launch has, None in the same places) and floats."""
        addresses: list[int | None] = [None] * len(tensors)
        misaligned = 0
        for i in self._present:
            address = tensors[i].data_ptr()
            addresses[i] = address
            if address & 15:
                misaligned |= 1 << i
        compiled = self._by_alignment.get(misaligned)
        if compiled is None or listening():
            self._first(tensors, values, misaligned)
            return
        launcher, function, metadata = compiled
        lead: Any = self._nothing
        if self._encoded:
            lead = [_new(Encoded, (t, *how, "zero", False)) for t, how in zip(tensors, self._encoded, strict=False)]
        launcher(
            *self._grid, self._stream_of(self._index), function, metadata, None, None, None,
            *lead, *addresses, *values, *self._fixed,
        )  # fmt: skip

    def _first(self, tensors: Sequence[Tensor | None], values: tuple[float, ...], misaligned: int) -> None:
        launch = self._launch
        try:
            kernel = run(launch._replace(args=(*tensors, *values, *launch.args)))
        except OutOfResources as error:
            tile = smaller(self._made_of[0]) if self._made_of else None
            if self._made_of is None or tile is None:
                raise
            text = "%s: the tile %s does not fit this device (%s); %s is taken"
            logging.getLogger("vllm_accel").info(text, launch.fn.__name__, tuple(self._made_of[0]), error, tuple(tile))
            _too_large.add(self._kind)
            self.__init__(made_of=(tile, self._made_of[1]))  # type: ignore[misc]
            self(tensors, values)
            return
        self._made_of = None  # what makes a launch holds the tensors of the call that it was made for
        if self._direct:
            self._by_alignment[misaligned] = (kernel.run, kernel.function, kernel.packed_metadata)


def _goes_direct(fn: Any, device: torch.device) -> bool:
    """Tell whether a kernel has a compiled form whose launcher is known."""
    return _DIRECT and device.type == "cuda" and isinstance(fn, triton.runtime.JITFunction)


def listening() -> bool:
    """Tell whether somebody (Proton, a test) wants to hear of each launch; other chains of hooks are empty."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
