"""Where and when something was measured: a number without its machine, versions, date and command is worth nothing."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_accel.dispatch.device import cpu_name

#: Load average per core above which another program is taking part in the measurement.
BUSY_LOAD = 0.6
_PACKAGES = (
    "vllm-accel",
    "transformers",
    "diffusers",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
)


def about(module: str, device: torch.device) -> dict[str, Any]:
    """Describe the machine, the versions, the date and the command of a run, as plain data for JSON.

    Args:
        module: what was started as ``python -m module``. device: what is measured.
    """
    return {
        "command": command(module),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": cores(),
        "gpu": gpu_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or torch.version.hip or ""),
        "packages": _versions(),
        "load": load(),
    }


def command(module: str) -> str:
    """Return what was started, as a reader would type it: a file by its name, because its folder is this machine's."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join([f"python -m {module}", *words])


def device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """Return a device of this machine that something was asked to run on.

    Raises:
        SystemExit: from the parser, if there is none.
    """
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        parser.error(f"{name} is no device here: {error}")
    return found


def describe(facts: dict[str, Any]) -> str:
    """Return the facts of `about` as lines for people."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    cuda = f" (CUDA or ROCm {facts['cuda']})" if facts["cuda"] else ""
    return "\n".join(
        [
            f"{facts['command']}",
            f"{facts['date']}   {facts['gpu'] or 'no GPU measured'}   {facts['cpu']}, {facts['cores']} cores, "
            f"{facts['threads']} threads, load {facts['load']:.1f}",
            f"Python {facts['python']}, torch {facts['torch']}{cuda}, {packages}",
        ]
    )


def busy(load_before: float, own: int) -> str | None:
    """Say that other programs use the machine, None if it is quiet.

    Args:
        load_before: load average when the run began. own: threads that the run itself keeps busy.
    """
    worst = max(load_before, load() - own)
    if worst <= BUSY_LOAD * cores():
        return None
    return f"load average {worst:.1f} on {cores()} cores: other programs take part, times are too high"


def load() -> float:
    """Return the load average of the last minute, 0.0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_name(device: torch.device) -> str:
    """Return the name of the GPU measured, empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
