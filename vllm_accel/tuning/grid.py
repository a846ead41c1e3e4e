"""The grid that `vllm-accel tune` measures: kinds of work with their lengths, most important first.

Points are two octaves apart in sequences times key heads, in query and in key length, because a measured point speaks
for calls within one octave (SPEC 4.3): what lies between two points is near both. Point i of every kind comes before
point i + 1 of any, so that a short budget has something of everything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from vllm_accel.dispatch.device import GIB, Device
from vllm_accel.tuning.attention import AttentionProblem, label
from vllm_accel.tuning.shape import Kind, Shape

#: Operations that one call may have: 60 ms at a tenth of a data-centre GPU's rate; a second of two CPU cores.
_MOST_WORK = {"cuda": 4e13, "cpu": 2e10}
#: Bytes that the tensors of one call may have, as a share of the device's memory, and where that is unknown.
_MOST_MEMORY, _UNKNOWN_MEMORY = 1 / 16, GIB // 2


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of work: everything of a call but its lengths.

    Attributes:
        kind, heads, kv_heads, head_dim, head_dim_v, causal, window, block_size, padded: as in `Shape`.
        packed: sequences of several lengths, packed. dtypes: to measure, in this order.
        points: (sequences, query length, key length), most telling first.
        regrouped: points with other (heads, kv_heads): what a kernel reads once for each query head and what once for
            each key head are in one ratio everywhere else, and a model cannot tell them apart.
    """

    kind: Kind
    heads: int
    kv_heads: int
    head_dim: int
    dtypes: tuple[torch.dtype, ...]
    points: tuple[tuple[int, int, int], ...]
    head_dim_v: int = 0
    causal: bool = True
    window: int = 0
    block_size: int = 0
    packed: bool = False
    padded: bool = False
    regrouped: tuple[tuple[tuple[int, int], tuple[int, int, int]], ...] = ()

    def grid(self, dtypes: Iterable[torch.dtype]) -> list[AttentionProblem]:
        """Return the calls to measure."""
        usual = [(self, point) for point in self.points]
        apart = [(replace(self, heads=h, kv_heads=h_kv), point) for (h, h_kv), point in self.regrouped]
        calls = (*usual[: len(apart)], *apart, *usual[len(apart) :])
        return [work.problem(point, dtype) for dtype in dtypes for work, point in calls]

    def problem(self, point: tuple[int, int, int], dtype: torch.dtype, lengths_seed: int = 0) -> AttentionProblem:
        """Return one call of this kind."""
        batch, n_q, n_k = point
        packed = self.packed or bool(self.block_size)
        sizes = (
            {"lengths": ragged(batch, n_q, n_k, lengths_seed)}
            if packed
            else {"batch": batch, "seqlen_q": n_q, "seqlen_k": n_k}
        )
        shape = Shape(
            name="-", kind=self.kind, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            head_dim_v=self.head_dim_v, causal=self.causal, window=self.window, block_size=self.block_size,
            padded=self.padded, **sizes,
        )  # fmt: skip
        named = {f: getattr(shape, f) for f in shape.__dataclass_fields__}
        return AttentionProblem(Shape(**{**named, "name": label(shape, dtype)}), dtype)


def ragged(batch: int, n_q: int, n_k: int, seed: int = 0) -> tuple[tuple[int, int], ...]:
    """Return lengths of packed sequences: the longest first, the others from a quarter of it up, shuffled evenly."""
    lengths = []
    for i in range(batch):
        share = 1.0 if i == 0 else 0.25 + 0.75 * ((i * 0.6180339887 + seed * 0.7548776662) % 1.0)
        keys = max(1, round(n_k * share))
        lengths.append((n_q if n_q == 1 else max(1, round(n_q * share)), keys))
    return tuple((min(a, b), b) for a, b in lengths)


def attention_grid(device: Device) -> tuple[AttentionProblem, ...]:
    """Return the dense and packed calls to measure on a device."""
    return _fitting(_CPU_ATTENTION if device.type == "cpu" else gpu_attention(), device)


def paged_grid(device: Device) -> tuple[AttentionProblem, ...]:
    """Return the calls over a paged cache to measure on a device."""
    return _fitting(_CPU_PAGED if device.type == "cpu" else gpu_paged(), device)


def works(device: Device) -> tuple[Work, ...]:
    """Return the kinds of work of both grids."""
    return (*_CPU_ATTENTION, *_CPU_PAGED) if device.type == "cpu" else (*gpu_attention(), *gpu_paged())


def fits(problem: AttentionProblem, device: Device) -> bool:
    """Tell whether a call is small enough to be measured on a device."""
    memory = device.memory * _MOST_MEMORY if device.memory else _UNKNOWN_MEMORY
    return problem.work <= _MOST_WORK.get(device.type, _MOST_WORK["cpu"]) and problem.size <= memory


def _fitting(kinds: Iterable[Work], device: Device) -> tuple[AttentionProblem, ...]:
    found = dict.fromkeys(problem for problem in _by_turns(kinds) if fits(problem, device))
    return tuple(found)


def _by_turns(kinds: Iterable[Work]) -> Iterator[AttentionProblem]:
    kinds = list(kinds)
    yield from _flat([work.grid(work.dtypes[:1]) for work in kinds])
    yield from _flat([work.grid(work.dtypes[1:]) for work in kinds])


def _flat(lists: list[list[AttentionProblem]]) -> Iterator[AttentionProblem]:
    for column in itertools.zip_longest(*lists):
        yield from (problem for problem in column if problem is not None)


def _lattice(batches: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """Return square calls, those in the middle first."""
    return _middle_first([(b, n, n) for b in batches for n in lengths])


def _caches(
    batches: tuple[int, ...], queries: tuple[int, ...], keys: tuple[int, ...]
) -> tuple[tuple[int, int, int], ...]:
    """Return calls with fewer queries than keys, those in the middle first."""
    return _middle_first([(b, q, k) for b in batches for q in queries for k in keys if q < k])


def _middle_first(points: list[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    middle = tuple(sorted(column)[len(column) // 2] for column in zip(*points, strict=True))

    def distance(point: tuple[int, int, int]) -> float:
        return math.fsum(max(a, b) / min(a, b) for a, b in zip(point, middle, strict=True))

    return tuple(sorted(points, key=distance))


def gpu_attention() -> tuple[Work, ...]:
    """Return the kinds of dense and packed work on a GPU, most important first."""
    both, bf16 = (torch.bfloat16, torch.float16), (torch.bfloat16,)
    square = _lattice((1, 4, 16), (256, 1024, 4096, 16384))
    wide = _lattice((1, 4, 16), (256, 1024, 4096))
    decode = _caches((1, 4, 16, 64), (1,), (512, 2048, 8192, 32768))
    # 256 too: kernels take 128 rows a tile, so that 129 tokens are two tiles, which 128 tell nothing of.
    chunk = _caches((1, 4), (128, 256, 512, 2048), (2048, 8192, 32768))
    train = _lattice((1, 4), (512, 2048, 8192))
    eight = tuple(((64, 8), point) for point in ((16, 1, 2048), (4, 1, 8192), (16, 1, 512), (64, 1, 2048)))
    # Where one sequence of few heads has about as many tiles as there are multiprocessors the fastest changes.
    narrow = tuple(((12, 4), (1, n, n)) for n in (2048, 1024, 4096))
    # Large models have 64 heads, which are twice as many tiles.
    regrouped = (*narrow, *(((64, 8), (1, n, n)) for n in (1024, 256, 4096)))
    chunks = ((12, 4), (1, 256, 4096)), ((64, 8), (1, 256, 8192)), ((12, 4), (4, 256, 8192)), ((12, 4), (1, 512, 16384))
    denser = (*wide, (1, 2048, 2048), (4, 2048, 2048), (1, 512, 512))
    return (
        Work("prefill", 32, 8, 128, both, square, regrouped=regrouped),
        Work("decode", 32, 8, 128, both, decode, regrouped=eight),
        Work("prefill", 32, 8, 128, both, denser, packed=True, regrouped=regrouped),
        Work("prefill", 32, 8, 128, both, chunk, regrouped=chunks),
        Work("train", 32, 8, 128, both, train),
        Work("prefill", 16, 16, 64, both, denser, causal=False),
        Work("prefill", 16, 16, 128, bf16, wide, causal=False),
        Work("train", 16, 16, 64, bf16, train),
        Work("prefill", 32, 8, 64, bf16, wide),
        Work("decode", 32, 8, 64, bf16, decode),
        Work("prefill", 16, 16, 128, bf16, wide),
        Work("prefill", 16, 8, 256, bf16, wide),
        Work("prefill", 32, 32, 192, bf16, wide, head_dim_v=128),
        Work("decode", 32, 8, 128, bf16, decode, packed=True),
        Work("train", 32, 8, 128, bf16, train, packed=True),
        Work("prefill", 32, 8, 128, bf16, _lattice((1, 4), (2048, 8192)), window=1023),
        Work("prefill", 16, 16, 64, (torch.float32,), _lattice((1, 4), (512, 2048)), causal=False),
    )


def gpu_paged() -> tuple[Work, ...]:
    """Return the kinds of work over a paged cache on a GPU, most important first."""
    both, bf16 = (torch.bfloat16, torch.float16), (torch.bfloat16,)
    decode = _caches((4, 16, 64), (1,), (512, 2048, 8192, 32768))
    few = _caches((4, 32), (1,), (2048, 8192))
    chunk = _caches((1, 4, 16), (128, 512), (1024, 4096, 16384))
    return (
        Work("decode", 32, 8, 128, both, decode, block_size=16),
        Work("prefill", 32, 8, 128, both, chunk, block_size=16),
        Work("decode", 32, 8, 64, bf16, few, block_size=16),
        Work("decode", 32, 8, 128, bf16, few, block_size=64),
        Work("decode", 32, 8, 128, bf16, _caches((4, 32), (4,), (2048, 8192)), block_size=16),
        Work("decode", 32, 8, 128, bf16, few, block_size=256),
    )


_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: No multiples of a block, as the lengths of prompts are none: PyTorch's kernel makes blocks of 32 rows, and is at its
#: best at 32 tokens and at its worst at 33.
_CPU_LENGTHS, _CPU_KEYS = (44, 176, 700, 2050), (140, 600, 2300, 8200)
_CPU_SQUARE = _lattice((1, 4), _CPU_LENGTHS)
#: Sentences, as models like MiniLM take them.
_CPU_SHORT = _lattice((1, 4, 16), (24, 96))
_CPU_DECODE = _caches((1, 4), (1,), _CPU_KEYS)
_CPU_ATTENTION: tuple[Work, ...] = (
    Work("prefill", 8, 2, 64, _CPU_DTYPES, _CPU_SQUARE),
    Work("decode", 8, 2, 64, _CPU_DTYPES, _CPU_DECODE),
    Work("prefill", 8, 8, 64, _CPU_DTYPES, _CPU_SQUARE, causal=False),
    Work("prefill", 8, 2, 64, _CPU_DTYPES, _caches((1, 4), _CPU_LENGTHS[:2], _CPU_KEYS[1:3])),
    Work("prefill", 8, 2, 64, _CPU_DTYPES, _lattice((4,), _CPU_LENGTHS[:3]), packed=True),
    Work("train", 8, 8, 64, _CPU_DTYPES[:2], _lattice((1, 4), (60, 250, 1000))),
    Work("prefill", 8, 2, 128, _CPU_DTYPES[:2], _CPU_SQUARE),
    Work("decode", 8, 2, 128, _CPU_DTYPES[:2], _CPU_DECODE),
    Work("prefill", 12, 12, 32, _CPU_DTYPES[:1], _lattice((1, 4), _CPU_LENGTHS[:3]), causal=False),
    Work("prefill", 12, 12, 32, _CPU_DTYPES[:1], _CPU_SHORT, causal=False, padded=True),
    Work("prefill", 12, 12, 64, _CPU_DTYPES, _CPU_SHORT, causal=False),
)
_CPU_PAGED: tuple[Work, ...] = (
    Work("decode", 8, 2, 64, _CPU_DTYPES[:2], _caches((1, 4, 16), (1,), _CPU_KEYS[:3]), block_size=16),
    Work("prefill", 8, 2, 64, _CPU_DTYPES[:2], _caches((1, 4), _CPU_LENGTHS[:2], _CPU_KEYS[1:3]), block_size=16),
)
