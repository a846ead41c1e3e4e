"""``with use_backend(...)``: a choice for a block of code, safe in threads and coroutines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from vllm_accel.dispatch import registry

Request = tuple[str, ...] | None

_overrides: dict[str, ContextVar[Request]] = {
    op: ContextVar(f"vllm_accel_{op}_backend", default=None) for op in registry.operations()
}


def variable(op: str) -> ContextVar[Request]:
    """Return the context variable that holds the innermost request for an operation."""
    return _overrides[op]


@contextmanager
def use_backend(
    *, attention: str | Sequence[str] | None = None, gemm: str | Sequence[str] | None = None
) -> Iterator[None]:
    """Use these backends inside the block, for this thread or task; the innermost block wins.

    Args:
        attention, gemm: a name, alias or family, or a sequence tried in order; None leaves that operation alone.

    Raises:
        ValueError: an unknown name, with the nearest valid one.
        TypeError: neither a name nor a sequence of names.
    """
    wanted = {"attention": attention, "gemm": gemm}
    tokens = [
        (_overrides[op], _overrides[op].set(registry.resolve(op, _as_request(names))))
        for op, names in wanted.items()
        if names is not None
    ]
    try:
        yield
    finally:
        for var, token in reversed(tokens):
            var.reset(token)


@contextmanager
def exactly(op: str, name: str) -> Iterator[None]:
    """Run one backend by its registry name inside the block: ``triton`` is a family to `use_backend`, not here."""
    token = _overrides[op].set((name,))
    try:
        yield
    finally:
        _overrides[op].reset(token)


def _as_request(names: str | Sequence[str]) -> object:
    return names if isinstance(names, str) else tuple(names)
