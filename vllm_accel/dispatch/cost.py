"""An analytic model of what a call takes: a fixed cost, operations, bytes, and the longest way on one multiprocessor.

The four are fitted to a backend's own measurements, so that the fixed cost holds what Python and a launch take, and
the rates how good the kernels are. Where there are too few of them, rounded rates of the device stand in (the roofline
of Williams, Waterman, Patterson 2009): only their ratios within an octave matter then.

Operations alone are not enough: 192 tiles of rows on 132 multiprocessors take as long as 264 (chunks of prompts on an
H200 took 1.6 times what a model without that expected, 2026-12-01). How much of a backend's time goes that way, and not
with the operations, its measurements say: kernels that share out the keys of a tile have little of it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

from vllm_accel.dispatch.gemm_spec import Form, GemmSpec
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation, bucket, bucket_up

#: Keys that a window is taken to show: the specs know that there is one, not its size. `tuning.grid` measures this one.
WINDOW = 1024
#: Rows of a tile, as most kernels for prefill have them.
TILE = 128
#: Queries of a sequence up to which kernels for decoding take over, whose tiles are lower.
SHORT = 8
#: With fewer measurements the coefficients say nothing.
LEAST_ROWS = 5
#: With so many of one head size, and there is a kernel for each size, those of other sizes are left out.
LEAST_OF_ONE_SIZE = 8


@dataclass(frozen=True, slots=True)
class Fit:
    """Seconds of a call: ``fixed + operations * per_operation + bytes * per_byte + longest * per_longest``.

    `longest` are the operations of the multiprocessor that has the most (`work_of`), of `places`; 0 where unknown.
    """

    fixed: float
    per_operation: float
    per_byte: float
    per_longest: float = 0.0
    places: int = 0

    def seconds(self, spec: Any) -> float:
        """Return what a call of exactly these lengths should take."""
        operations, moved, longest = work_of(spec, self.places)
        return self.fixed + operations * self.per_operation + moved * self.per_byte + longest * self.per_longest


#: A data-centre GPU, rounded: 500 TFLOP/s, 3 TB/s, 4 us; and two cores of a server.
GPU = Fit(4e-6, 2e-15, 3.3e-13)
CPU = Fit(1e-5, 1e-11, 1e-10)


def family_of(spec: Any) -> tuple[Any, ...]:
    """Return what calls must have in common to be expected to run at one rate of one backend."""
    if isinstance(spec, AttentionSpec):
        grad = Feature.GRAD in spec.features
        return (spec.dtype, spec.kv_dtype, grad, spec.seqlen_q == 1, bool(spec.block_size))
    if isinstance(spec, GemmSpec):
        return (spec.form, spec.dtype, spec.b_dtype, Feature.GRAD in spec.features)
    return (type(spec).__name__,)


def middle(spec: Any) -> Any:
    """Return a kind of attention call with lengths in the middle of those that it stands for.

    A kind is a quarter of an octave wide, and is named by its lower end; lengths over a paged cache by the upper one.
    """
    if not isinstance(spec, AttentionSpec):
        return spec
    between = _below if spec.block_size else _above
    return replace(
        spec, batch=_above(spec.batch), seqlen_q=between(spec.seqlen_q), seqlen_k=between(spec.seqlen_k)
    )  # fmt: skip


def _above(n: int) -> int:
    return round(math.sqrt(n * (bucket_up(n + 1) - 1)))


def _below(n: int) -> int:
    return round(math.sqrt((bucket(n - 1) + 1) * n)) if n > 1 else n


def work_of(spec: Any, places: int = 0) -> tuple[float, float, float]:
    """Return the operations and bytes of a call, and the operations of the multiprocessor that has the most.

    Args:
        spec: with the exact lengths. places: multiprocessors; the third is 0 where they are not known.

    Returns:
        Zeros where nothing is known of the kind.
    """
    if isinstance(spec, GemmSpec):
        return (*_gemm_work(spec), 0.0)
    return _attention_work(spec, places) if isinstance(spec, AttentionSpec) else (0.0, 0.0, 0.0)


def _gemm_work(spec: GemmSpec) -> tuple[float, float]:
    m, n, k, groups = spec.m, spec.n, spec.k, max(spec.groups, 1)
    batch = groups if spec.form is Form.BATCHED else 1
    elements_b = n * k * (1 if spec.form in (Form.DENSE, Form.GROUPED_K) else groups)
    rows, products = m, 1
    if spec.form is Form.MOE:  # gate and up, then down
        rows, products = m * max(spec.top_k, 1), 3
    operations = 2.0 * batch * rows * n * k * products * (3 if Feature.GRAD in spec.features else 1)
    outs = groups * m * n if spec.form in (Form.GROUPED_K, Form.BATCHED) else m * n
    moved = batch * m * k * spec.dtype.itemsize + products * elements_b * spec.b_dtype.itemsize
    return operations, float(moved + outs * spec.out_dtype.itemsize)


def _attention_work(spec: AttentionSpec, places: int) -> tuple[float, float, float]:
    batch, seen, share = max(spec.batch, 1), spec.seqlen_k, 1.0
    triangle = Feature.CAUSAL in spec.features and spec.relation is Relation.EQUAL
    if Feature.WINDOW_LEFT in spec.features:
        share = min(1.0, WINDOW / max(seen, 1))
        seen, triangle = min(seen, WINDOW + spec.seqlen_q), False
    elif triangle:
        share = 0.5
    pairs = spec.seqlen_q * spec.seqlen_k * share
    sizes = spec.head_dim + spec.head_dim_v
    passes = 3.5 if Feature.GRAD in spec.features else 1.0
    operations = 2.0 * batch * spec.num_heads * pairs * sizes * passes
    elements_q, elements_k = spec.num_heads * spec.seqlen_q, spec.num_kv_heads * seen
    moved = batch * sizes * (elements_q * spec.dtype.itemsize + elements_k * spec.kv_dtype.itemsize)
    if not places:
        return operations, float(moved), 0.0
    tiles = batch * spec.num_heads * -(-spec.seqlen_q // TILE)
    if spec.seqlen_q > SHORT:  # empty rows of a tile take their time: 192 queries as long as 256
        operations = 2.0 * tiles * TILE * spec.seqlen_k * share * sizes * passes
    waves = tiles / places
    # Tiles of a triangle fill each other's gaps, but none ends before the longest; equally long ones come in waves.
    waves = max(1.0, share * waves) if triangle else math.ceil(waves)
    return operations, float(moved), 2.0 * waves * TILE * seen * sizes * passes


def fitted(points: list[tuple[Any, float]], places: int = 0) -> Fit | None:
    """Fit the coefficients, none negative, to (call, seconds); None for too few points.

    Least squares of the relative error: every subset of the terms is solved, and the best one without a negative
    coefficient kept, which for so few terms is the exact solution (Lawson, Hanson 1974).
    """
    if len(points) < LEAST_ROWS:
        return None
    rows = [[term / seconds for term in (1.0, *work_of(spec, places))] for spec, seconds in points]
    count = 4 if places else 3
    best: tuple[float, list[float]] | None = None
    for size in range(count, 0, -1):
        for terms in itertools.combinations(range(count), size):
            found = _solved(rows, terms)
            if found is None or min(found) < 0:
                continue
            error = sum((sum(a * b for a, b in zip(row, found, strict=True)) - 1.0) ** 2 for row in rows)
            if best is None or error < best[0]:
                best = (error, found)
    if best is None or max(best[1]) <= 0:
        return None
    fixed, per_operation, per_byte, per_longest = best[1]
    return Fit(fixed, per_operation, per_byte, per_longest, places)


def _solved(rows: list[list[float]], terms: tuple[int, ...]) -> list[float] | None:
    """Solve the normal equations of some terms with target 1, by Cramer's rule on scaled columns; 0 for the others."""
    scales = [math.sqrt(sum(row[t] ** 2 for row in rows)) for t in terms]
    if not all(scales):
        return None
    columns = [[row[t] / scale for row in rows] for t, scale in zip(terms, scales, strict=True)]
    matrix = [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in columns] for x in columns]
    target = [math.fsum(column) for column in columns]
    whole = _determinant(matrix)
    if whole < 1e-9:
        return None
    found = [0.0] * 4
    for i, (term, scale) in enumerate(zip(terms, scales, strict=True)):
        replaced = [[target[r] if c == i else matrix[r][c] for c in range(len(terms))] for r in range(len(terms))]
        found[term] = _determinant(replaced) / whole / scale
    return found


def _determinant(m: list[list[float]]) -> float:
    if len(m) == 1:
        return m[0][0]
    minors = [_determinant([row[:c] + row[c + 1 :] for row in m[1:]]) for c in range(len(m))]
    return math.fsum((-1.0) ** c * m[0][c] * minor for c, minor in enumerate(minors))
