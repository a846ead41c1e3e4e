"""Plans and their cache: after the first call of a kind, nothing of the selection runs again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from vllm_accel.dispatch.capability import Guard
from vllm_accel.dispatch.guard import Kin, TensorGuard

#: Plans for exact shapes kept per operation; a decode of 500 steps over 4 kinds of layers fits.
MAX_PLANS = 4096
#: Plans that differ only in what the guard sees (dtype, gradients, device) under one key.
MAX_PER_KEY = 8

_caches: weakref.WeakSet[PlanCache[Any]] = weakref.WeakSet()
_on_invalidate: list[Callable[[], None]] = []


class Plan:
    """A bound call: what the hot path touches and nothing else.

    Attributes:
        check: true for tensors of the kind this plan was made for.
        forward: the kernel's forward.
        args: everything of the call but the main tensors, where no optional tensor is given.
        direct: what forward(q, k, v, args) returns is the answer (no gradient, nothing to check or to copy first).
        grad: an input requires a gradient. copies: an innermost stride is not 1, which kernels do not take.
        kernel, backend, spec, device: what the plan was made of.
        explicit: the backend was asked for by name, so a failure is never papered over.
        kin: knows tensors that differ in lengths at most; None where the plan is for its lengths alone.
        bucket: what the choice knows of the lengths. guards: exact-size limits of the backend.
    """

    __slots__ = (
        "args", "backend", "bucket", "check", "copies", "device", "direct", "explicit", "forward", "grad", "guards",
        "kernel", "kin", "spec",
    )  # fmt: skip

    def __init__(
        self,
        *,
        check: TensorGuard,
        forward: Callable[..., Any],
        args: Any,
        direct: bool,
        grad: bool,
        copies: bool,
        kernel: Any,
        backend: str,
        spec: Any,
        device: Any,
        explicit: bool,
        kin: Kin | None = None,
        bucket: Any = None,
        guards: tuple[Guard, ...] = (),
    ) -> None:
        self.check = check
        self.forward = forward
        self.args = args
        self.direct = direct
        self.grad = grad
        self.copies = copies
        self.kernel = kernel
        self.backend = backend
        self.spec = spec
        self.device = device
        self.explicit = explicit
        self.kin = kin
        self.bucket = bucket
        self.guards = guards

    def at_other_lengths(self, check: TensorGuard, args: Any) -> Plan:
        """Return the same plan for other lengths of its bucket."""
        other = Plan.__new__(Plan)
        other.check, other.args = check, args
        # Written out: a loop over the slots costs twice as much, on a path that runs once a decode step.
        other.forward, other.direct, other.grad, other.copies = self.forward, self.direct, self.grad, self.copies
        other.kernel, other.backend, other.spec, other.device = self.kernel, self.backend, self.spec, self.device
        other.explicit, other.kin, other.bucket, other.guards = self.explicit, self.kin, self.bucket, self.guards
        return other


P = TypeVar("P", bound=Plan)


class PlanCache(Generic[P]):
    """Two levels: the last plan under each set of options, then every plan by options and lengths.

    Reads and writes are single dictionary operations, so threads need no lock; a lost update costs one more miss.
    """

    def __init__(self) -> None:
        self.last: dict[Any, P] = {}
        self._exact: dict[Any, tuple[P, ...]] = {}
        _caches.add(self)

    def find(self, options: Any, shapes: Any, tensors: tuple[Any, ...]) -> P | None:
        """Return the plan whose guard accepts the tensors, and remember it as the last one of these options."""
        for plan in self._exact.get((options, shapes), ()):
            if plan.check(*tensors):
                self.last[options] = plan
                return plan
        return None

    def add(self, options: Any, shapes: Any, plan: P) -> None:
        """Store a plan; the oldest key goes when the cache is full."""
        while len(self._exact) >= MAX_PLANS:
            self._exact.pop(next(iter(self._exact)), None)
        if len(self.last) >= MAX_PLANS:
            self.last.clear()
        key = (options, shapes)
        plans = self._exact.setdefault(key, (plan,))
        if plans[0] is not plan:
            self._exact[key] = (plan, *plans[: MAX_PER_KEY - 1])
        self.last[options] = plan

    def clear(self) -> None:
        """Forget every plan."""
        self.last.clear()
        self._exact.clear()

    def __len__(self) -> int:
        return sum(len(plans) for plans in self._exact.values())


def invalidate() -> None:
    """Forget every plan and choice of every operation: settings, backends or quarantine have changed."""
    for cache in tuple(_caches):
        cache.clear()
    for callback in _on_invalidate:
        callback()


def on_invalidate(callback: Callable[[], None]) -> None:
    """Call `callback` whenever plans are invalidated."""
    _on_invalidate.append(callback)
