"""An analytic model of what a call takes: a fixed cost, operations over a rate, bytes over a bandwidth.

The three are fitted to a backend's own measurements, so that the fixed cost holds what Python and a launch take, and
the rate how good the kernels are. Where there are too few of them, rounded rates of the device stand in (the roofline
of Williams, Waterman, Patterson 2009): only their ratios within an octave matter then.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from vllm_accel.dispatch.gemm_spec import Form, GemmSpec
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation

#: Keys that a window is taken to show: the specs know that there is one, not its size. `tuning.grid` measures this one.
WINDOW = 1024
#: With fewer measurements three coefficients say nothing.
LEAST_ROWS = 5


@dataclass(frozen=True, slots=True)
class Fit:
    """Seconds of a call as ``fixed + operations * per_operation + bytes * per_byte``."""

    fixed: float
    per_operation: float
    per_byte: float

    def seconds(self, spec: Any) -> float:
        """Return what a kind of call should take."""
        operations, moved = work_of(spec)
        return self.fixed + operations * self.per_operation + moved * self.per_byte


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


def work_of(spec: Any) -> tuple[float, float]:
    """Return the operations and the bytes of a kind of call; (0, 0) where nothing is known of the kind."""
    if isinstance(spec, GemmSpec):
        return _gemm_work(spec)
    return _attention_work(spec) if isinstance(spec, AttentionSpec) else (0.0, 0.0)


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


def _attention_work(spec: AttentionSpec) -> tuple[float, float]:
    batch, seen, share = max(spec.batch, 1), spec.seqlen_k, 1.0
    if Feature.WINDOW_LEFT in spec.features:
        share = min(1.0, WINDOW / max(seen, 1))
        seen = min(seen, WINDOW + spec.seqlen_q)
    elif Feature.CAUSAL in spec.features and spec.relation is Relation.EQUAL:
        share = 0.5
    pairs = spec.seqlen_q * spec.seqlen_k * share
    sizes = spec.head_dim + spec.head_dim_v
    operations = 2.0 * batch * spec.num_heads * pairs * sizes * (3.5 if Feature.GRAD in spec.features else 1.0)
    elements_q, elements_k = spec.num_heads * spec.seqlen_q, spec.num_kv_heads * seen
    moved = batch * sizes * (elements_q * spec.dtype.itemsize + elements_k * spec.kv_dtype.itemsize)
    return operations, float(moved)


def fitted(points: list[tuple[Any, float]]) -> Fit | None:
    """Fit the three coefficients, none negative, to (kind of call, seconds); None for too few points.

    Least squares of the relative error: every subset of the terms is solved, and the best one without a negative
    coefficient kept, which for three terms is the exact solution (Lawson, Hanson 1974).
    """
    if len(points) < LEAST_ROWS:
        return None
    rows = [[term / seconds for term in (1.0, *work_of(spec))] for spec, seconds in points]
    best: tuple[float, list[float]] | None = None
    for size in (3, 2, 1):
        for terms in itertools.combinations(range(3), size):
            found = _solved(rows, terms)
            if found is None or min(found) < 0:
                continue
            error = sum((sum(a * b for a, b in zip(row, found, strict=True)) - 1.0) ** 2 for row in rows)
            if best is None or error < best[0]:
                best = (error, found)
    return None if best is None or max(best[1]) <= 0 else Fit(*best[1])


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
    found = [0.0, 0.0, 0.0]
    for i, (term, scale) in enumerate(zip(terms, scales, strict=True)):
        replaced = [[target[r] if c == i else matrix[r][c] for c in range(len(terms))] for r in range(len(terms))]
        found[term] = _determinant(replaced) / whole / scale
    return found


def _determinant(m: list[list[float]]) -> float:
    if len(m) == 1:
        return m[0][0]
    minors = [_determinant([row[:c] + row[c + 1 :] for row in m[1:]]) for c in range(len(m))]
    return math.fsum((-1.0) ** c * m[0][c] * minor for c, minor in enumerate(minors))
