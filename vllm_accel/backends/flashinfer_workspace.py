"""Scratch memory for FlashInfer's kernels: one buffer for each device and stream, and one for captured graphs.

Its functions want a buffer from the caller, zeroed before the first use. Two launches that may overlap must not share
one, so it belongs to a stream. A graph is captured on a stream of its own, where memory cannot be set up any more, so
the first eager call prepares that buffer too; graphs that are replayed at the same time would share it.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch
from torch import Tensor

#: Partial results of a split launch: two blocks per multiprocessor, each (64 rows, 256 channels) in fp32 at most, are
#: 17 MiB on an H200; the first 8 MiB are semaphores of XQA. FlashInfer's examples reserve 128 MiB.
BYTES = 64 << 20

_lock = threading.Lock()
_buffers: dict[tuple[torch.device, Hashable], Tensor] = {}
GRAPH = "graph"


def place(device: torch.device) -> Hashable:
    """Name what may share memory: the current stream, or everything that is captured."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return GRAPH
    return torch.cuda.current_stream(device).cuda_stream


def workspace(device: torch.device) -> Tensor:
    """Return the buffer of the current place. Raises ValueError in a capture that nothing prepared."""
    return workspace_of(device, place(device))


def workspace_of(device: torch.device, where: Hashable) -> Tensor:
    """Return the buffer of a place, made at its first use outside of a capture."""
    found = _buffers.get((device, where))
    if found is not None:
        return found
    refuse_capture(where)
    with _lock:
        for each in (where, GRAPH) if device.type == "cuda" else (where,):
            if (device, each) not in _buffers:
                _buffers[device, each] = torch.zeros(BYTES, dtype=torch.uint8, device=device)
        return _buffers[device, where]


def refuse_capture(where: Hashable) -> None:
    """Say what has to happen before a graph is captured, where it has not."""
    if where == GRAPH:
        raise ValueError(
            "FlashInfer plans and compiles outside of CUDA graphs: run this call once, with this number of query "
            "tokens and these maximum lengths, before capturing it"
        )
