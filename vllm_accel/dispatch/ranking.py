"""In which order automatic choice tries backends: by measured time where there is one nearby, else as shipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_accel.dispatch import measured
from vllm_accel.dispatch.cost import CPU, GPU, Fit, middle
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.estimate import Estimate, best_first, distance_of, estimates
from vllm_accel.dispatch.spec import Feature
from vllm_accel.dispatch.table_file import Row, Timing, is_current


@dataclass(frozen=True, slots=True)
class Ranking:
    """Backends in the order in which they are tried.

    Attributes:
        order: names. estimates: seconds of those that were measured near this kind of call.
        failed: what happened to those that gave no time there. source: the tables, for people.
        modelled: what the model says of those without an estimate, for people.
    """

    order: tuple[str, ...]
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    modelled: Mapping[str, Estimate] = field(default_factory=dict)


def rank(
    op: str,
    spec: Any,
    device: Device,
    order: tuple[str, ...],
    *,
    takes: Callable[[str], bool],
    version_of: Callable[[str], str | None],
    first: frozenset[str] = frozenset(),
    everything: bool = False,
    sources: Sequence[measured.Source] | None = None,
) -> Ranking:
    """Rank the backends that were measured near a kind of call.

    Args:
        op, spec, device: the kind of call and where.
        order: what holds where nothing was measured.
        takes: tells whether automatic choice could take a backend. version_of: version of its library, the one that
            was measured where packages are taken as installed. Both are asked only of backends with rows nearby.
        first: names that stay before all others, however fast these are.
        everything: estimate those too that automatic choice does not take; the order is the same.
        sources: the tables that count; None for those of the device.
    """
    sources = measured.sources(device) if sources is None else sources
    order = (*(name for name in order if name in first), *(name for name in order if name not in first))
    # Bits that do not depend on lengths need a choice that does not (SPEC 4.10).
    if Feature.BATCH_INVARIANT in getattr(spec, "features", Feature(0)):
        return Ranking(order)
    close = [(source, row) for source in sources for row in source.of(op, spec) if _near(spec, row)]
    if not close:
        return Ranking(order)
    wanted = {name for _, row in close for name in (*row.times, *row.failed)}
    taken = {name for name in order if name in wanted and takes(name)}
    versions = {name: version_of(name) for name in order if name in (wanted if everything else taken)}
    times: dict[Any, dict[str, Timing]] = {}
    failed: dict[str, str] = {}
    here: set[str] = set()
    used: dict[str, None] = {}
    for source, row in close:  # the user's rows come last and win
        current = [name for name, version in versions.items() if is_current(source.table, op, name, version)]
        found = {name: row.times[name] for name in current if name in row.times}
        times.setdefault(row.spec, {}).update(found)
        failed.update({name: row.failed[name] for name in current if name in row.failed})
        if row.spec == spec:
            here = {name for name in (*here, *current) if name in row.failed or (name in here and name not in found)}
        if found:
            used[str(source)] = None
    models = {name: _fit(op, name, spec, sources, version, device) for name, version in versions.items()}
    fits = {name: fit for name, fit in models.items() if fit is not None}
    rows = [Row(op, row_spec, found) for row_spec, found in times.items()]
    known = estimates(spec, rows, fits, CPU if device.type == "cpu" else GPU)
    for name in here:  # a failure at this very kind of call outweighs times of its neighbours
        known.pop(name, None)
    failed = {name: text for name, text in failed.items() if name not in known}
    by_time = {name: estimate for name, estimate in known.items() if name in taken}
    sound = [name for name in order if name not in failed]
    ranked = [
        *best_first(tuple(name for name in sound if name in first), by_time),
        *best_first(tuple(name for name in sound if name not in first), by_time),
        *(name for name in order if name in failed),
    ]
    return Ranking(tuple(ranked), known, failed, " and ".join(used))


def modelled(
    op: str, spec: Any, device: Device, names: tuple[str, ...], version_of: Callable[[str], str | None]
) -> dict[str, Estimate]:
    """Return what the model alone expects of backends: for people, where no row is near."""
    if not (sources := measured.sources(device)):
        return {}
    fits = {name: _fit(op, name, spec, sources, version_of(name), device) for name in names}
    return {name: Estimate(fit.seconds(middle(spec)), 0.0, 0, False) for name, fit in fits.items() if fit is not None}


def _fit(
    op: str, name: str, spec: Any, sources: Sequence[measured.Source], version: str | None, device: Device
) -> Fit | None:  # fmt: skip
    """Return the model of a backend by the last table that has enough of it."""
    found = [s.fit(op, name, spec, device) for s in sources if is_current(s.table, op, name, version)]
    return next((fit for fit in reversed(found) if fit is not None), None)


def _near(spec: Any, row: Row) -> bool:
    return distance_of(spec, row.spec) is not None
