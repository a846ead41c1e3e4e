"""From measured rows to the time of a call that nobody measured: the cost model, corrected by measured neighbours.

How far a backend is from its model at a measured point says how far it is nearby.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_accel.dispatch.cost import Fit, middle
from vllm_accel.dispatch.gemm_spec import GemmSpec
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.dispatch.table_file import Row, Timing

#: A row speaks for a call within one octave in each length (SPEC 4.3).
NEAR_OCTAVES = 1.0
#: A gain below this is not worth leaving the shipped order for, however quiet the measurement was.
LEAST_GAIN = 0.03
#: A gain above this counts, however noisy the measurement was: backends took turns, so most noise was that of all.
CLEAR_GAIN = 0.15
#: Where a point of equal lengths and another spec (heads split otherwise) counts as being, in octaves.
_BESIDE = 0.1
#: Options that cost next to nothing, so that rows with and without them speak for each other.
_FREE = Feature.SCALE | Feature.LSE | Feature.FINITE_TAIL


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a call is expected to take.

    Attributes:
        seconds: by interpolation. noise: relative, of the rows it rests on. rows: how many; 0 if the model alone says
            it, far from every row, which is for people and not for the choice.
        exact: the very kind of call was measured; the time is moved to the middle of its lengths.
    """

    seconds: float
    noise: float
    rows: int
    exact: bool

    @property
    def rests_on(self) -> str:
        """Say what the seconds rest on."""
        if not self.rows:
            return "by the model"
        return "measured" if self.exact else f"interpolated from {self.rows} row{'s' * (self.rows > 1)}"

    def __str__(self) -> str:
        return f"{duration(self.seconds)} {self.rests_on}"


def duration(seconds: float) -> str:
    """Return seconds as people read them: ``412 us``, ``1.37 ms``."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def estimates(spec: Any, rows: Iterable[Row], fits: Mapping[str, Fit], otherwise: Fit) -> dict[str, Estimate]:
    """Return the expected time of every backend that was measured near a kind of call.

    Args:
        spec: the kind of call. rows: those that may be near.
        fits: models of backends. otherwise: the model of those that have none.
    """
    close = [(row, distance) for row in rows if (distance := distance_of(spec, row.spec)) is not None]
    names = dict.fromkeys(name for row, _ in close for name in row.times)
    return {
        name: _interpolate(
            spec, [(r.spec, r.times[name], d) for r, d in close if name in r.times], fits.get(name, otherwise)
        )
        for name in names
    }


def best_first(order: tuple[str, ...], known: Mapping[str, Estimate]) -> tuple[str, ...]:
    """Return `order` with the fastest first, as far as something was measured.

    Of the backends that are as fast as the fastest within the noise, the first of `order` leads. A backend without a
    measurement goes before the measured ones only if it stands before all of them in `order`: a library that was
    installed after the measurement keeps the place that it was given, and is measured by the next ``vllm-accel tune``.
    """
    measured = [name for name in order if name in known]
    if not measured:
        return order
    fastest = min((known[name] for name in measured), key=lambda e: e.seconds)
    leaders = [name for name in measured if as_fast(known[name], fastest)]
    followers = sorted((n for n in measured if n not in leaders), key=lambda name: known[name].seconds)
    before = order[: order.index(measured[0])]
    return (*before, *leaders, *followers, *(name for name in order if name not in known and name not in before))


def as_fast(one: Estimate, fastest: Estimate) -> bool:
    """Tell whether a time differs from the fastest by no more than their noise (at least 3 %, at most 15 %)."""
    return one.seconds <= fastest.seconds * (1 + min(max(LEAST_GAIN, one.noise + fastest.noise), CLEAR_GAIN))


def _interpolate(spec: Any, points: list[tuple[Any, Timing, float]], model: Fit) -> Estimate:
    """Weigh the ratio of measured to modelled time by the inverse square of the distance.

    What is estimated is the middle of the kind's lengths. Where the device and the host were timed apart they are
    interpolated apart, and the longer one counts: what Python and a launch take changes little with the lengths, so
    that it must not be scaled as the kernel is. A row of the very kind stands alone.
    """
    exact = [(point, timing, 1.0) for point, timing, _ in points if point == spec]
    points = exact or points
    total = device = host = noise = 0.0
    apart = all(timing.cold is not None and timing.host is not None for _, timing, _ in points)
    for point, timing, distance in points:
        weight = 1.0 / max(distance, _BESIDE) ** 2
        total += weight
        device += weight * math.log(device_seconds(timing) / model.seconds(place_of(point, timing)))
        host += weight * math.log(timing.host or 1.0)
        noise += weight * timing.noise
    seconds = model.seconds(middle(spec)) * math.exp(device / total)
    if apart:
        seconds = max(seconds, math.exp(host / total))
    return Estimate(seconds, noise / total, len(points), bool(exact))


def place_of(spec: Any, timing: Timing) -> Any:
    """Return the kind of call with the lengths that a time was taken at; in their middle where they are not known."""
    if timing.at is None or not isinstance(spec, AttentionSpec):
        return middle(spec)
    batch, seqlen_q, seqlen_k = timing.at
    return replace(spec, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)


def device_seconds(timing: Timing) -> float:
    """Return the device's part of a time, all of it where it was not measured apart."""
    return timing.seconds if timing.cold is None or timing.host is None else timing.cold


def distance_of(a: Any, b: Any) -> float | None:
    """Return how far two kinds of calls are in octaves, None where one says nothing about the other."""
    if type(a) is not type(b) or class_of(a) != class_of(b):
        return None
    steps = [abs(math.log2(max(x, 1) / max(y, 1))) for x, y in zip(_extents(a), _extents(b), strict=True)]
    if max(steps, default=0.0) > NEAR_OCTAVES + 1e-9:
        return None
    return math.sqrt(sum(step * step for step in steps))


def class_of(spec: Any) -> tuple[Any, ...]:
    """Return what has to be equal for one call to say something about another."""
    if isinstance(spec, AttentionSpec):
        # One query stands at the last key: a causal mask hides nothing from it.
        free = _FREE | Feature.CAUSAL if spec.seqlen_q == 1 else _FREE
        return (
            spec.dtype, spec.kv_dtype, spec.head_dim, spec.head_dim_v, spec.features & ~free, spec.relation,
            spec.block_size,
        )  # fmt: skip
    if isinstance(spec, GemmSpec):
        return (
            spec.form, spec.dtype, spec.b_dtype, spec.out_dtype, spec.features & ~_FREE, spec.scaling_a,
            spec.scaling_b, spec.layout_a, spec.layout_b, spec.activation, spec.top_k,
        )  # fmt: skip
    return (spec,)


def _extents(spec: Any) -> tuple[int, ...]:
    """Return the lengths: sequences times key heads share the processor, and a group of heads shares its keys."""
    if isinstance(spec, AttentionSpec):
        return (
            max(spec.batch, 1) * spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.seqlen_q, spec.seqlen_k,
        )  # fmt: skip
    return (spec.m, spec.n, spec.k, spec.groups) if isinstance(spec, GemmSpec) else ()
