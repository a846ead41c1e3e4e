"""The workspace of cuBLAS, which decides whether its results repeat bit by bit. It is not about speed.

``CUBLAS_WORKSPACE_CONFIG`` gives cuBLAS buffers of fixed sizes for each handle and stream. With ``:4096:8`` (about 24
MiB more) or ``:16:8`` (slower at times) it picks the same algorithm for the same call whatever else runs on the GPU. It
does not turn on Tensor Cores, it does not choose faster kernels, and it is read once, when the first handle is made.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
#: What NVIDIA documents as reproducible (cuBLAS, "Results Reproducibility").
REPRODUCIBLE = (":4096:8", ":16:8")

_PAIR = re.compile(r":(\d+):(\d+)")
#: What the variable held when CUDA was first seen running by this module; None before.
_frozen: list[str | None] = []


@dataclass(frozen=True, slots=True)
class Workspace:
    """What is in force.

    Attributes:
        config: value of the variable that cuBLAS has read or will read, None where it is unset.
        bytes: that it reserves for each handle and stream, None where cuBLAS uses its own default.
        fixed: CUDA has started, so that a new value comes too late. reproducible: a documented reproducible setting.
    """

    config: str | None
    bytes: int | None
    fixed: bool
    reproducible: bool

    def __str__(self) -> str:
        size = "cuBLAS's default size" if self.bytes is None else f"{self.bytes / 2**20:g} MiB a handle and stream"
        state = "in force: CUDA has started" if self.fixed else "takes effect when CUDA starts"
        kind = "reproducible" if self.reproducible else "not one of the reproducible settings"
        return f"{VARIABLE}={self.config or 'unset'}: {size}, {kind}, {state}"


def configure_workspace(config: str) -> Workspace:
    """Set cuBLAS's workspace for this process, before the first CUDA call.

    Args:
        config: pairs ``:SIZE:COUNT``, SIZE in KiB, for example ``":4096:8"`` or ``":4096:2:16:8"``.

    Returns:
        What is in force. Setting again what is already in force is fine at any time.

    Raises:
        ValueError: not of that form, or a size or count of 0.
        RuntimeError: CUDA has started with another setting, which cuBLAS has read or may have read.
    """
    size_of(config)
    now = workspace()
    if now.fixed and now.config != config:
        raise RuntimeError(
            f"{VARIABLE}={config} comes too late: CUDA has started in this process with {now.config or 'it unset'}. "
            "Call configure_workspace before the first CUDA tensor, or set the variable in the shell"
        )
    os.environ[VARIABLE] = config
    return workspace()


def workspace() -> Workspace:
    """Return what is in force, or will be once CUDA starts; starts nothing."""
    config = os.environ.get(VARIABLE) or None
    fixed = torch.cuda.is_initialized()
    if fixed and not _frozen:
        _frozen.append(config)
    if fixed:
        config = _frozen[0]
    try:
        size = None if config is None else size_of(config)
    except ValueError:
        size = None
    return Workspace(config, size, fixed, config in REPRODUCIBLE)


def size_of(config: str) -> int:
    """Return the bytes that a setting reserves.

    Raises:
        ValueError: not pairs ``:SIZE:COUNT`` of positive numbers.
    """
    pairs = _PAIR.findall(config) if isinstance(config, str) else []
    if not pairs or "".join(f":{size}:{count}" for size, count in pairs) != config:
        raise ValueError(f'config must be pairs :SIZE:COUNT with SIZE in KiB, for example ":4096:8"; got {config!r}')
    if any(int(size) < 1 or int(count) < 1 for size, count in pairs):
        raise ValueError(f"config must have sizes and counts of at least 1; got {config!r}")
    return sum(int(size) * int(count) for size, count in pairs) * 1024
