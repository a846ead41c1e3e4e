"""`warmup`: build now what a call would otherwise compile at its first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_accel.dispatch import override, plan, registry, warm
from vllm_accel.dispatch.selection import Candidate, Selection, State
from vllm_accel.ops.explain import explain


def warmup(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, ...]:
    """Run ``fn(*args, **kwargs)`` once on the chosen backend, if it compiles, and on those held back until they have.

    A backend whose kernels come from a compiler of its own (`cutlass`: nvcc) builds the one for this call first.
    Afterwards automatic choice may take those backends for calls of this kind at any length, in this process. A
    backend that fails to build is left out and logged by the call that needed it.

    Args:
        fn: a call that `explain` takes, such as `attention`, `attention_paged` or `grouped_gemm`.
        args, kwargs: of a typical call, with real tensors on their device.

    Returns:
        The names of the backends that were built.

    Raises:
        As `explain`; a backend that cannot be built raises its own error.
    """
    selection = explain(fn, *args, **kwargs)
    if built := _build(selection):
        selection = explain(fn, *args, **kwargs)
    held = [c.name for c in selection.candidates if _compiles(c, selection)]
    for name in held:
        with override.exactly(selection.op, name):
            out = fn(*args, **{**kwargs, "backend": None})
        first = out[0] if isinstance(out, tuple) else out
        if first.requires_grad:
            first.backward(torch.zeros_like(first))
        warm.mark_warm(selection.op, registry.get(selection.op, name).name, selection.spec, selection.device)
    return (*built, *held)


def _compiles(candidate: Candidate, selection: Selection) -> bool:
    """Tell whether automatic choice would compile a backend at this call, or waits for that."""
    if candidate.state is State.HELD_BACK:
        return any(reason.code == "first_call" for reason in candidate.reasons)
    seconds = registry.get(selection.op, candidate.name).capability.compile_seconds(selection.spec)
    where = (selection.op, candidate.name, selection.spec, selection.device)
    return candidate.state is State.CHOSEN and seconds > 0 and not warm.is_warm(*where)


def _build(selection: Selection) -> tuple[str, ...]:
    """Build what backends with a compiler of their own would need for this call; return their names."""
    built = []
    for candidate in selection.candidates:
        if candidate.reasons and all(reason.code == "not_built" for reason in candidate.reasons):
            backend: Any = registry.get(selection.op, candidate.name)
            backend.build(selection.spec, selection.device)
            built.append(candidate.name)
    if built:
        plan.invalidate()
    return tuple(built)
