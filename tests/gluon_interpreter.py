"""Run a Gluon kernel's own source on the CPU, partition by partition, in a random order, and watch its synchronisation.

Triton's interpreter has no Gluon. This one has what ``kernels/gluon`` uses of it, in NumPy: mbarriers with phases,
arrivals and bytes, TMA copies that land when they please, asynchronous products, named barriers, one thread of control
for each warp-specialised partition. It raises `Deadlock`, and AssertionError for

* a tile that changes while an asynchronous product reads it (operands are read at the issue and again at the wait);
* an accumulator that is read before it was waited for;
* an arrival that a barrier does not expect, bytes that do not add up, a copy that is still under way at the end;
* a load or store outside its tensor.

A copy fills its tile with NaN until it lands, so reading too early shows in the result. What it does not see: races
between the warps of one partition, layouts, rounding (all is fp32).
"""

from __future__ import annotations

import random
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

KERNELS = Path(__file__).parent.parent / "kernels/gluon"
IMPORT = r"^from vllm_accel\.kernels\.gluon\.(\w+) import ([^(\n]+|\([^)]*\))"
NUMPY = {"i32": np.int64, "f32": np.float32}


class Deadlock(AssertionError):
    """Nobody can go on."""


class Array(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype):
        return self


def array(values):
    return np.asarray(values).view(Array)


class Pointer:
    """An address: a flat view of a tensor and one offset or many."""

    def __init__(self, flat, offset=0):
        self.flat, self.offset, self.dtype = flat, offset, SimpleNamespace(element_ty="t")

    def __add__(self, more):
        return Pointer(self.flat, self.offset + more)


class Shared:
    """A tile, or an array of tiles, in shared memory."""

    def __init__(self, values, dtype="t"):
        self.values, self.dtype = values, dtype
        self.shape = values.shape

    def index(self, i):
        assert 0 <= i < self.shape[0], f"slot {i} of {self.shape[0]}"
        return Shared(self.values[int(i)], self.dtype)  # an array as an index would copy

    def reshape(self, shape):
        return Shared(self.values.reshape(shape), self.dtype)

    def permute(self, order):
        return Shared(self.values.transpose(order), self.dtype)

    def slice(self, start, length, dim=0):
        return Shared(self.values.swapaxes(0, dim)[start : start + length].swapaxes(0, dim), self.dtype)

    def load(self, layout):
        return array(self.values.copy())

    def store(self, values):
        self.values[...] = values


class MBarrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes are in."""

    def __init__(self):
        self.count, self.left, self.bytes, self.phases = 0, 0, 0, 0

    def init(self, count):
        self.count = self.left = count

    def arrive(self, count, more_bytes=0):
        assert self.left >= count, "an arrival too many"
        self.left -= count
        self.bytes += more_bytes
        self._turn()

    def land(self, size):
        self.bytes -= size
        self._turn()

    def _turn(self):
        assert self.bytes >= 0 or self.left, "more bytes than expected"
        if self.left == 0 and self.bytes == 0:
            self.left = self.count
            self.phases += 1

    def passed(self, parity):
        return self.phases & 1 != parity


class Barriers(list):
    def index(self, i):
        assert 0 <= i < len(self), f"barrier {i} of {len(self)}"
        return self[i]


class Product:
    """An asynchronous product: its operands may not change until somebody has waited for it."""

    def __init__(self, a, b, acc, use_acc):
        self.operands = (a, b)
        self.before = self._read()
        self.acc, self.use_acc, self.result = acc, use_acc, None

    def _read(self):
        return [(x.values if isinstance(x, Shared) else x).copy() for x in self.operands]

    def finish(self):
        for old, new in zip(self.before, self._read(), strict=True):
            assert np.array_equal(old, new, equal_nan=True), "a tile changed under a product that was reading it"
        a, b = self.before
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        self.result = array(a @ b + (acc if self.use_acc else 0))


class Descriptor:
    """A TMA descriptor over (B, heads, S, D); zeros outside."""

    def __init__(self, tensor, block):
        self.tensor, self.block, self.dtype, self.layout = tensor, block, "t", None
        self.block_type = SimpleNamespace(nbytes=int(np.prod(block)), shape=block)

    def read(self, start):
        tile = np.zeros(self.block, np.float32)
        inside = tuple(
            slice(s, max(s, min(s + b, n))) for s, b, n in zip(start, self.block, self.tensor.shape, strict=True)
        )
        part = self.tensor[inside]
        tile[tuple(slice(0, n) for n in part.shape)] = part
        return tile

    def add(self, start, tile):
        """Add a tile; what is outside is left out."""
        inside = tuple(slice(s, max(s, s + b)) for s, b in zip(start, self.block, strict=True))
        part = self.tensor[inside]
        part += tile[tuple(slice(0, n) for n in part.shape)]


class Machine:
    """One block of threads at a time, its partitions in an order drawn from `seed`."""

    def __init__(self, source: Path, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.program, self.programs = 0, 1
        self.copies, self.named = [], {}
        self.local = threading.local()
        self.abort = False
        self.names = self._names()
        self.namespace = self._define(source)

    def _define(self, source):
        """Return what a kernel's file defines, with what it imports from its neighbours."""
        text, namespace = source.read_text(), dict(self.names)
        for module, names in re.findall(IMPORT, text, re.MULTILINE):
            own = source.with_name(f"{module}.py")
            defined = self._define(own if own.exists() else KERNELS / own.name)
            namespace |= {name: defined[name] for name in re.findall(r"\w+", names)}
        text = re.sub(r"^from [^\n(]+(\([^)]*\))?\n", "\n", text, flags=re.MULTILINE)
        exec(compile(text.replace(".to(gl.int64)", ""), str(source), "exec"), namespace)
        # These are inline assembly; there is no grid before or after.
        namespace.update(
            named_sync=self.named_sync, named_arrive=self.named_arrive, let_next_grid_start=lambda: None,
            wait_for_grid_before=lambda: None,
        )  # fmt: skip
        return namespace

    def launch(self, name, grid, args, constexprs):
        """Run every block of the grid, one after the other."""
        self.programs = grid
        with np.errstate(all="ignore"):
            for self.program in range(grid):
                self.copies, self.named = [], {}
                self.local.products = []
                self.namespace[name](*args, **constexprs)
                assert not self.copies, "a copy is still under way at the end"

    # Synchronisation.

    def pause(self, ready=None, what=""):
        """Let others run; go on only when `ready` says so."""
        me = getattr(self.local, "me", None)
        if me is None:
            assert ready is None or ready(), f"one thread of control waits for {what}"
            return
        me.ready, me.what = ready, what
        me.stopped.release()
        me.go.acquire()
        if self.abort:
            raise SystemExit

    def specialize(self, partitions, warps, registers):
        threads = [
            SimpleNamespace(
                go=threading.Semaphore(0), stopped=threading.Semaphore(0), ready=None, what="", error=None, done=False
            )
            for _ in partitions
        ]

        def body(me, function, args):
            me.go.acquire()
            self.local.me, self.local.products = me, []
            try:
                if not self.abort:
                    with np.errstate(all="ignore"):
                        function(*args)
                    assert not self.local.products, "a product is still under way at the end of a partition"
            except SystemExit:
                pass
            except BaseException as error:
                me.error = error
            me.done = True
            me.stopped.release()

        workers = [
            threading.Thread(target=body, args=(me, *part), daemon=True)
            for me, part in zip(threads, partitions, strict=True)
        ]
        for worker in workers:
            worker.start()
        try:
            while not all(me.done for me in threads):
                able = [me for me in threads if not me.done and (me.ready is None or me.ready())]
                steps = [*able, *[None] * bool(self.copies)]
                if not steps:
                    raise Deadlock("; ".join(f"{i}: {'done' if me.done else me.what}" for i, me in enumerate(threads)))
                me = self.random.choice(steps)
                if me is None:
                    self.copies.pop(self.random.randrange(len(self.copies)))()
                    continue
                me.go.release()
                me.stopped.acquire()
                if me.error:
                    raise me.error
        finally:
            self.abort = True
            for me in threads:
                me.go.release()
            for worker in workers:
                worker.join(10)
            self.abort = False
        while self.copies:
            self.copies.pop()()

    def wait(self, barrier, phase, pred=True):
        if pred:
            self.pause(lambda: barrier.passed(phase), f"parity {phase} after {barrier.phases} phases")

    def copy(self, descriptor, start, barrier, target):
        self.pause()
        tile = descriptor.read(start)
        target.values[...] = np.nan

        def land():
            target.values[...] = tile
            barrier.land(descriptor.block_type.nbytes)

        self.copies.append(land)

    def arrive(self, barrier, count=1, more_bytes=0):
        self.pause()
        barrier.arrive(count, more_bytes)

    def named_arrive(self, number, threads=256):
        self.pause()
        state = self.named.setdefault(number, SimpleNamespace(arrived=set(), turns=0))
        assert self.local.me.go not in state.arrived, "a partition arrives twice at one named barrier"
        state.arrived.add(self.local.me.go)
        if len(state.arrived) == threads // 128:
            state.arrived, state.turns = set(), state.turns + 1
        return state

    def named_sync(self, number, threads=256):
        before = self.named[number].turns if number in self.named else 0
        state = self.named_arrive(number, threads)
        self.pause(lambda: state.turns > before, f"named barrier {number}")

    def product(self, a, b, acc, use_acc=True, is_async=False):
        self.pause()
        made = Product(a, b, acc, use_acc)
        self.local.products.append(made)
        return made

    def product_wait(self, outstanding, deps):
        self.pause()
        products = self.local.products
        while len(products) > outstanding:
            products.pop(0).finish()
        values = []
        for dep in deps:
            if isinstance(dep, Product):
                assert dep.result is not None, "an accumulator is read before it was waited for"
                dep = dep.result
            values.append(dep)
        return values[0] if len(values) == 1 else tuple(values)

    # The language.

    def _names(self):
        def store(pointer, values, mask=True):
            offset, values, mask = np.broadcast_arrays(pointer.offset, values, mask)
            offset = offset[mask]
            assert offset.size == 0 or (offset.min() >= 0 and offset.max() < pointer.flat.size), "a store outside"
            pointer.flat[offset] = values[mask]

        def load(pointer, mask=True, other=0):
            if np.ndim(pointer.offset) == 0:
                assert 0 <= pointer.offset < pointer.flat.size, "a load outside"
                return int(pointer.flat[pointer.offset])
            inside = np.broadcast_to(mask, pointer.offset.shape)
            offset = pointer.offset[inside]
            assert offset.size == 0 or (offset.min() >= 0 and offset.max() < pointer.flat.size), "a load outside"
            values = np.full(inside.shape, other, pointer.flat.dtype)
            values[inside] = pointer.flat[offset]
            return array(values)

        def where(condition, yes, no):
            if isinstance(condition, (bool, np.bool_)):
                return yes if condition else no
            return array(np.where(condition, yes, no))

        def either(of_ints, of_arrays):
            return lambda a, b: of_ints(a, b) if isinstance(a, int) and isinstance(b, int) else array(of_arrays(a, b))

        def allocate(dtype, shape, layout):
            return (
                Barriers(MBarrier() for _ in range(shape[0]))
                if dtype == "i64"
                else Shared(np.full(shape, np.nan, np.float32), dtype)
            )

        layout = lambda *args, **kwargs: None  # noqa: E731
        float32 = lambda values: array(np.asarray(values, np.float32))  # noqa: E731
        gl = SimpleNamespace(
            constexpr=lambda value: value, static_range=range, static_assert=self._assert, int32="i32", int64="i64",
            float32="f32", NVMMADistributedLayout=layout, DotOperandLayout=layout, SliceLayout=layout,
            BlockedLayout=layout, SwizzledSharedLayout=layout, NVMMASharedLayout=layout,
            program_id=lambda axis: self.program, num_programs=lambda axis: self.programs,
            load=load, store=store, where=where, minimum=either(min, np.minimum), maximum=either(max, np.maximum),
            arange=lambda start, end, layout=None: array(np.arange(start, end)),
            full=lambda shape, value, dtype, layout=None: array(np.full(shape, value, NUMPY[dtype])),
            zeros=lambda shape, dtype, layout=None: array(np.zeros(shape, np.float32)),
            zeros_like=lambda values: array(np.zeros_like(values)), exp2=lambda x: float32(np.exp2(x)),
            log2=lambda x: float32(np.log2(x)), max=lambda x, axis: array(x.max(axis)),
            sum=lambda x, axis: array(x.sum(axis)), convert_layout=lambda x, layout, assert_trivial=False: x,
            allocate_shared_memory=allocate, warp_specialize=self.specialize, thread_barrier=lambda: self.pause(),
        )  # fmt: skip
        return {
            "gluon": SimpleNamespace(jit=lambda fn=None, **options: fn if fn else lambda fn: fn),
            "gl": gl,
            "mbarrier": SimpleNamespace(
                MBarrierLayout=layout, init=lambda bar, count: bar.init(count), wait=self.wait, arrive=self.arrive,
                expect=lambda bar, size: self.arrive(bar, 1, size),
            ),
            "tma": SimpleNamespace(async_copy_global_to_shared=self.copy),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.product_wait,
        }  # fmt: skip

    @staticmethod
    def _assert(condition):
        assert condition


#: What each kernel writes.
RESULTS = {
    "attention_forward": ("out", "lse"),
    "attention_dkv": ("dk", "dv"),
    "attention_dq": ("dq",),
    "attention_fused": ("dk", "dv"),
}


def interpret(launch, seed=0):
    """Do what a launch would do on a GPU, in fp32, on tensors of the CPU; what it writes starts as NaN."""
    name = launch.fn.__name__
    args, written = [], []
    for parameter, arg in zip(launch.fn.arg_names, launch.args, strict=False):
        if hasattr(arg, "block_shape"):
            view = torch.as_strided(arg.base, arg.shape, arg.strides, arg.base.storage_offset())
            arg = Descriptor(view.float().numpy(), tuple(arg.block_shape))
        elif parameter in RESULTS[name]:
            assert arg.is_contiguous(), parameter
            result = np.full(arg.numel(), np.nan, np.float32)
            written.append((arg, result))
            arg = Pointer(result)
        elif isinstance(arg, torch.Tensor):
            assert arg.is_contiguous(), parameter
            arg = Pointer(arg.reshape(-1).numpy())
        args.append(arg)
    source = Path(sys.modules[launch.fn.__module__].__file__)
    Machine(source, seed).launch(name, launch.grid[0], args, launch.constexprs)
    for tensor, result in written:
        tensor.copy_(torch.from_numpy(result).view(tensor.shape))
