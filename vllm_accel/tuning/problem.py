"""What the tuner knows of an operation: calls that can be made, checked and timed, and the grid of those to measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.selection import Selection, State

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}

#: A backend in one of these states runs when it is asked for by name.
_RUNS = (State.CHOSEN, State.ABLE, State.HELD_BACK)


class Problem(Protocol):
    """One call to check and to time, without its tensors. Frozen, and plain data by `to_json`."""

    @property
    def name(self) -> str:
        """Name it to people; unique in a grid."""
        ...

    @property
    def work(self) -> float:
        """Return its operations."""
        ...

    @property
    def size(self) -> float:
        """Return the bytes of its tensors."""
        ...

    @property
    def grad(self) -> bool:
        """Tell whether a call is a forward with its backward."""
        ...

    @property
    def varies(self) -> bool:
        """Tell whether lengths keep changing in this kind of work, so that the cost of a new one counts."""
        ...

    @property
    def at(self) -> tuple[int, int, int] | None:
        """Return sequences, longest query and longest key length of an attention call; None for others."""
        ...

    def make(self, device: torch.device) -> Any:
        """Draw the tensors; on the meta device they hold nothing."""
        ...

    def explain(self, inputs: Any, device: Device | None = None) -> Selection:
        """Say who could run the call; launches nothing."""
        ...

    def step(self, inputs: Any, backend: str | None) -> Callable[[], list[Tensor]]:
        """Return what is timed and checked of one backend, None for automatic choice."""
        ...

    def warm_up(self, inputs: Any) -> tuple[str, ...]:
        """Build what automatic choice holds back until it is built, as a user does; return the backends."""
        ...

    def truth(self, inputs: Any) -> Any:
        """Compute what the result has to be, in float64, of as much as that is affordable for."""
        ...

    def verify(self, found: list[Tensor], truth: Any) -> None:
        """Compare a result with the truth. Raises AssertionError where it is wrong."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        ...


@dataclass(frozen=True, slots=True)
class Tuned:
    """An operation that can be tuned.

    Attributes:
        op: in the registry. grid: what to measure on a device, most important first. parse: the inverse of `to_json`.
    """

    op: str
    grid: Callable[[Device], tuple[Problem, ...]]
    parse: Callable[[Mapping[str, Any]], Problem]


def contestants(selection: Selection) -> tuple[str, ...]:
    """Name the backends that are worth timing for a call: all that run but those with quadratic memory."""
    return tuple(
        c.name for c in selection.candidates if c.state in _RUNS and all(r.code != "memory" for r in c.reasons)
    )


def plain(problem: Any, op: str) -> dict[str, Any]:
    """Return a problem made of a shape (a frozen dataclass) and a dtype as data: the fields that are set."""
    defaults = {f.name: f.default for f in fields(problem.shape)}  # the name has none, and stays
    sizes = {name: value for name, value in asdict(problem.shape).items() if value != defaults[name]}
    dtype = next(name for name, dtype in DTYPES.items() if dtype is problem.dtype)
    return {"op": op, "dtype": dtype, **sizes}


def dtype_of(data: Mapping[str, Any]) -> torch.dtype:
    """Read the dtype of a problem.

    Raises:
        ValueError: it is none of `DTYPES`.
    """
    if data.get("dtype") not in DTYPES:
        raise ValueError(f"dtype {data.get('dtype')!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[data["dtype"]]
