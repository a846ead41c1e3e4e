"""The environment variables, read once at the first call, checked, and reported by explain and doctor."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from vllm_accel.dispatch import plan, quarantine, registry

TRITON = "VLLM_USE_TRITON_FLASH_ATTN"
ATTENTION = "VLLM_ACCEL_ATTENTION_BACKEND"
GEMM = "VLLM_ACCEL_GEMM_BACKEND"
DISABLED = "VLLM_ACCEL_DISABLED_BACKENDS"
CHECK = "VLLM_ACCEL_CHECK"
LIFT = "VLLM_ACCEL_LIFT_KNOWN_BAD"
TABLES = "VLLM_ACCEL_TABLES"
NAMES = (TRITON, ATTENTION, GEMM, DISABLED, CHECK, LIFT, TABLES)
PREFIX = "VLLM_ACCEL_"

_TRUE, _FALSE = ("1", "true"), ("0", "false")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in force.

    Attributes:
        backend: operation -> names to try, from the environment; absent means automatic.
        use_triton: VLLM_USE_TRITON_FLASH_ATTN, None if unset.
        disabled: (operation, name) that are removed.
        check: look at the values inside device tensors too (costs a synchronisation).
        lifted: names of known-bad rows that the user lifts.
        tables: folder of the user's measured tables, empty for the usual one.
        raw: the variables as they were read.
    """

    backend: tuple[tuple[str, tuple[str, ...]], ...] = ()
    use_triton: bool | None = None
    disabled: frozenset[tuple[str, str]] = frozenset()
    check: bool = False
    lifted: frozenset[str] = frozenset()
    tables: str = ""
    raw: tuple[tuple[str, str], ...] = ()

    def request(self, op: str) -> tuple[str, ...] | None:
        """Return the backends that the environment asks for, None for automatic choice."""
        return dict(self.backend).get(op)


_current: Settings | None = None
_on_reload: list[Callable[[], None]] = []


def settings() -> Settings:
    """Return the settings, reading the environment at the first call.

    Raises:
        ValueError: an unknown ``VLLM_ACCEL_*`` name, a misspelt backend or a malformed value.
    """
    global _current
    if _current is None:
        _current = _read()
    return _current


def reload_settings() -> Settings:
    """Read the environment again and drop every plan made under the old settings.

    Raises:
        ValueError: as `settings`.
    """
    global _current
    _current = None
    for callback in _on_reload:
        callback()
    plan.invalidate()
    return settings()


def on_reload(callback: Callable[[], None]) -> None:
    """Call `callback` whenever the settings are read again on request."""
    _on_reload.append(callback)


def environment() -> tuple[tuple[str, str], ...]:
    """Return the variables of this library as they stand in the environment now."""
    found = {name: value for name, value in os.environ.items() if name.startswith(PREFIX) or name in NAMES}
    return tuple(sorted(found.items()))


def changed_since_read() -> tuple[str, ...]:
    """Name the variables that differ from what is in force; they count after `reload_settings`."""
    then, now = dict(settings().raw), dict(environment())
    return tuple(sorted(name for name in {*then, *now} if then.get(name) != now.get(name)))


def _read() -> Settings:
    raw = environment()
    values = dict(raw)
    for name in values:
        if name not in NAMES:
            raise ValueError(f"{name} is not a setting of vllm_accel{registry.suggestion(name, NAMES)}")
    backend = []
    for op, name in (("attention", ATTENTION), ("gemm", GEMM)):
        if wanted := _list(values.get(name, "")):
            backend.append((op, _named(name, op, wanted)))
    disabled = set()
    for item in _list(values.get(DISABLED, "")):
        op, _, short = item.rpartition(":")
        op = op or "attention"
        if op not in registry.operations():
            raise ValueError(f"{DISABLED}={item}: {op!r} is not one of {', '.join(registry.operations())}")
        disabled |= {(op, found) for found in _named(DISABLED, op, (short,))}
    return Settings(
        backend=tuple(backend),
        use_triton=_switch(TRITON, values.get(TRITON)),
        disabled=frozenset(disabled),
        check=bool(_switch(CHECK, values.get(CHECK))),
        lifted=_lifted(values.get(LIFT, "")),
        tables=values.get(TABLES, ""),
        raw=raw,
    )


def _lifted(text: str) -> frozenset[str]:
    rows = tuple(row.name for row in quarantine.known_bad_rows())
    for name in _list(text):
        if name not in rows:
            raise ValueError(f"{LIFT}: no known-bad row {name!r}{registry.suggestion(name, rows)}")
    return frozenset(_list(text))


def _list(text: str) -> tuple[str, ...]:
    return tuple(part for part in (piece.strip() for piece in text.split(",")) if part)


def _named(variable: str, op: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return registry.resolve(op, wanted)
    except ValueError as error:
        raise ValueError(f"{variable}: {error}") from None


def _switch(name: str, value: str | None) -> bool | None:
    if value is None or value == "":
        return None
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise ValueError(f"{name}={value!r} is not a switch; use 1, 0, true or false")
