"""The operations that can be tuned, and the file of shapes that a user can name instead of the grid."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_accel.dispatch.device import Device
from vllm_accel.tuning import attention, gemm, grid
from vllm_accel.tuning.problem import Problem, Tuned

TUNED: dict[str, Tuned] = {
    "attention": Tuned("attention", grid.attention_grid, attention.parse),
    "paged": Tuned("attention", grid.paged_grid, attention.parse),
    "gemm": Tuned("gemm", gemm.gemm_grid, gemm.parse),
}


def problems(names: tuple[str, ...], device: Device) -> tuple[tuple[str, Problem], ...]:
    """Return what to measure on a device, with the operation of each problem, the grids by turns."""
    lists = [[(TUNED[name].op, problem) for problem in TUNED[name].grid(device)] for name in names]
    # Each grid is spread over the whole, so that a budget that ends early has taken the same share of each.
    ranked = [((i + 0.5) / len(found), n, pair) for n, found in enumerate(lists) for i, pair in enumerate(found)]
    return tuple(pair for _, _, pair in sorted(ranked, key=lambda item: item[:2]))


def parsed(data: object) -> tuple[str, Problem]:
    """Build a problem from plain data, with its operation.

    Raises:
        ValueError: it is not a problem; the message says why.
    """
    if not isinstance(data, dict) or data.get("op", "attention") not in TUNED:
        raise ValueError(f"a shape is an object with op one of {', '.join(TUNED)}, not {data!r:.80}")
    family = TUNED[data.get("op", "attention")]
    try:
        return family.op, family.parse(data)
    except (TypeError, KeyError) as error:
        raise ValueError(str(error)) from None


def read(path: Path) -> tuple[tuple[str, Problem], ...]:
    """Read a file of shapes: a JSON list of objects such as ``{"kind": "decode", "dtype": "bf16", "batch": 4, ...}``.

    Raises:
        ValueError: not such a list; the message names the entry. OSError: the file cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, list) or not data:
        raise ValueError(f"{path} has to be a list of shapes")
    found = []
    for index, entry in enumerate(data):
        try:
            found.append(parsed(entry))
        except ValueError as error:
            raise ValueError(f"{path}, shape {index}: {error}") from None
    return tuple(found)
