"""Which backends exist: a lazy table of names, entry points of other packages, and run-time registrations."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import threading
from dataclasses import dataclass
from typing import Any

from vllm_accel.dispatch import plan
from vllm_accel.dispatch.backend import Backend
from vllm_accel.dispatch.capability import Capability
from vllm_accel.dispatch.device import Device
from vllm_accel.errors import Reason, UnsupportedCallError

ENTRY_POINT_GROUP = "vllm_accel.backends"

#: (operation, name) -> "module:attribute". Adding a backend to this library is one file and one line here.
BUILT_IN: dict[tuple[str, str], str] = {
    ("attention", "reference"): "vllm_accel.backends.reference:BACKEND",
    ("attention", "cpu"): "vllm_accel.backends.cpu:BACKEND",
    ("attention", "sdpa_cpu"): "vllm_accel.backends.sdpa_cpu:BACKEND",
    ("attention", "sdpa_flash"): "vllm_accel.backends.sdpa_flash:BACKEND",
    ("attention", "sdpa_efficient"): "vllm_accel.backends.sdpa_efficient:BACKEND",
    ("attention", "sdpa_cudnn"): "vllm_accel.backends.sdpa_cudnn:BACKEND",
    ("attention", "flash_attn_2"): "vllm_accel.backends.flash_attn_2:BACKEND",
    ("attention", "flash_attn_3"): "vllm_accel.backends.flash_attn_3:BACKEND",
    ("attention", "flash_attn_4"): "vllm_accel.backends.flash_attn_4:BACKEND",
    ("attention", "xformers"): "vllm_accel.backends.xformers:BACKEND",
    ("attention", "mslk"): "vllm_accel.backends.mslk:BACKEND",
    ("attention", "triton"): "vllm_accel.backends.triton:BACKEND",
    ("attention", "flashinfer"): "vllm_accel.backends.flashinfer:BACKEND",
    ("attention", "tensorrt_llm"): "vllm_accel.backends.tensorrt_llm:BACKEND",
    ("attention", "gluon_hopper"): "vllm_accel.backends.gluon_hopper:BACKEND",
    ("gemm", "reference"): "vllm_accel.backends.gemm.reference:BACKEND",
    ("gemm", "cublas"): "vllm_accel.backends.gemm.cublas:BACKEND",
    ("gemm", "torch_grouped"): "vllm_accel.backends.gemm.torch_grouped:BACKEND",
    ("gemm", "cpu"): "vllm_accel.backends.gemm.cpu:BACKEND",
    ("gemm", "cutlass"): "vllm_accel.backends.gemm.cutlass:BACKEND",
    ("gemm", "deep_gemm"): "vllm_accel.backends.gemm.deep_gemm:BACKEND",
    ("gemm", "tensorrt_llm"): "vllm_accel.backends.gemm.tensorrt_llm:BACKEND",
    ("gemm", "triton"): "vllm_accel.backends.gemm.triton:BACKEND",
}

ALIASES = {"naive": "reference"}

#: A family stands for its members, tried in this order.
FAMILIES: dict[tuple[str, str], tuple[str, ...]] = {
    ("attention", "flash_attn"): ("flash_attn_4", "flash_attn_3", "flash_attn_2"),
    ("attention", "sdpa"): ("sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_cpu"),
    ("attention", "triton"): ("gluon_hopper", "triton"),
}


@dataclass(frozen=True, slots=True)
class _Entry:
    source: str | Backend | importlib.metadata.EntryPoint
    before: str | None = None  # take it before this one in the shipped order


class Broken:
    """Stands in for a backend whose own module does not import, so that the failure is a reason and not a crash."""

    capability = Capability(dtypes=frozenset())

    def __init__(self, name: str, why: BaseException | Reason) -> None:
        self.name = name
        text = why if isinstance(why, Reason) else f"its module does not import: {type(why).__name__}: {why}"
        self._reason = text if isinstance(text, Reason) else Reason("broken", text)

    def version(self) -> str | None:
        return None

    def unavailable_reason(self) -> Reason | None:
        return self._reason

    def bind(self, spec: Any, device: Device) -> Any:
        raise UnsupportedCallError(self._reason.text)


_lock = threading.RLock()
_entries: dict[tuple[str, str], _Entry] = {key: _Entry(path) for key, path in BUILT_IN.items()}
_loaded: dict[tuple[str, str], Backend] = {}
_entry_points_read = False


def _read_entry_points() -> None:
    global _entry_points_read
    with _lock:
        if _entry_points_read:
            return
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            op, _, name = point.name.partition(".")
            _entries.setdefault((op, name), _Entry(point))
        _entry_points_read = True


def register_backend(op: str, backend: Backend, *, before: str | None = None) -> None:
    """Add a backend for an operation, for this process.

    Args:
        op: ``"attention"`` or ``"gemm"``.
        backend: implements `Backend`; its name must be free or already registered at run time.
        before: place it before that backend in the shipped order; default: just before ``reference``.

    Raises:
        ValueError: the operation does not exist, or the name belongs to a built-in backend, an alias or a family.
    """
    if op not in operations():
        raise ValueError(f"op={op!r} is not an operation; known: {', '.join(operations())}")
    key = (op, backend.name)
    if key in BUILT_IN or backend.name in ALIASES:
        raise ValueError(f"the name {backend.name!r} is taken by a built-in {op} backend")
    if before is not None:
        resolve(op, before)
    _read_entry_points()
    with _lock:
        _entries[key] = _Entry(backend, before)
        _loaded.pop(key, None)
    plan.invalidate()


def unregister_backend(op: str, name: str) -> None:
    """Remove a backend that `register_backend` added.

    Raises:
        ValueError: no such run-time registration.
    """
    with _lock:
        entry = _entries.get((op, name))
        if entry is None or (op, name) in BUILT_IN:
            raise ValueError(f"{name!r} was not registered at run time for {op!r}")
        del _entries[(op, name)]
        _loaded.pop((op, name), None)
    plan.invalidate()


def registered_at_run_time(op: str, name: str) -> bool:
    """Tell whether `register_backend` added a backend, so that another process does not know it."""
    entry = _entries.get((op, name))
    return entry is not None and not isinstance(entry.source, (str, importlib.metadata.EntryPoint))


def operations() -> tuple[str, ...]:
    """Name the operations that have backends."""
    return tuple(sorted({op for op, _ in BUILT_IN}))


def names(op: str) -> tuple[str, ...]:
    """Name the backends of an operation, built-in ones first, imports nothing."""
    _read_entry_points()
    return tuple(name for entry_op, name in _entries if entry_op == op)


def get(op: str, name: str) -> Backend:
    """Return a backend by its exact name; its adapter module is imported, its library is not."""
    key = (op, name)
    if key in _loaded:
        return _loaded[key]
    if key not in _entries:
        _read_entry_points()
    source = _entries[key].source
    backend: Backend
    try:
        if isinstance(source, str):
            module, _, attribute = source.partition(":")
            backend = getattr(importlib.import_module(module), attribute)
        elif isinstance(source, importlib.metadata.EntryPoint):
            backend = source.load()
        else:
            backend = source
    except (Exception, SystemExit) as error:  # somebody else's module may raise anything
        backend = Broken(name, error)
    with _lock:
        return _loaded.setdefault(key, backend)


def condemn(op: str, name: str, text: str) -> None:
    """Put a reason in the place of a backend for this process, so that nothing imports what would end or hang it."""
    with _lock:
        _loaded[(op, name)] = Broken(name, Reason("broken", text))
    plan.invalidate()


def ordered(op: str, shipped: tuple[str, ...]) -> tuple[str, ...]:
    """Merge the shipped order with registrations: each before the one it named, else just before ``reference``."""
    known = names(op)
    order = [name for name in shipped if name in known]
    for name in known:
        if name in order or name in shipped:
            continue
        if (op, name) in BUILT_IN:
            continue  # a built-in backend that the shipped order of this device does not list
        before = _entries[(op, name)].before or "reference"
        order.insert(order.index(before) if before in order else len(order), name)
    return tuple(order)


def resolve(op: str, request: object) -> tuple[str, ...]:
    """Turn a backend name, alias, family, or a sequence of them into registry names, in order, without repeats.

    Raises:
        TypeError: neither a string nor a sequence of strings.
        ValueError: a name is unknown; the message gives the nearest valid one. Or the sequence is empty.
    """
    parts = [request] if isinstance(request, str) else request
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"backend must be a name or a sequence of names, not {request!r}")
    if not parts:
        raise ValueError("backend is an empty sequence; name at least one backend, or leave it out")
    known = names(op)
    found: list[str] = []
    for part in parts:
        members = FAMILIES.get((op, part), (ALIASES.get(part, part),))
        present = [name for name in members if name in known]
        if not present:
            raise ValueError(f"unknown {op} backend {part!r}{suggestion(part, valid_names(op))}")
        found += [name for name in present if name not in found]
    return tuple(found)


def valid_names(op: str) -> tuple[str, ...]:
    """List every name that `resolve` takes for an operation."""
    known = names(op)
    families = [name for (f_op, name), m in FAMILIES.items() if f_op == op and set(m) & set(known)]
    # A family may share its name with a backend: "triton".
    return tuple(dict.fromkeys((*known, *(alias for alias, name in ALIASES.items() if name in known), *families)))


def suggestion(word: str, valid: tuple[str, ...]) -> str:
    """Return ``"; did you mean 'x'? Valid: ..."`` for an error message."""
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} Valid: {', '.join(valid)}"
