"""A device as a value: everything that a choice may depend on, so that a test can fake any GPU."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

KIB = 1024
GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Device:
    """Describe one processor.

    Attributes:
        type: torch's device type, ``"cuda"`` (NVIDIA and AMD), ``"cpu"``, ``"mps"``, ...
        index: torch's device index, 0 where there is only one.
        name: marketing name as the driver gives it.
        platform: ``"cuda"``, ``"rocm"``, or ``type`` for everything else.
        compute_capability: ``(major, minor)`` on NVIDIA, else None.
        arch: ``"sm_90"`` style on NVIDIA, ``"gfx942"`` style on AMD, else ``""``.
        memory: bytes of device memory, 0 if unknown.
        shared_memory_per_block: bytes that one block can opt in to, 0 if unknown.
        sm_count: multiprocessors (compute units on AMD), 0 if unknown.
        runtime_version: CUDA or ROCm version that torch was built with, ``(12, 8)`` style, None without.
        driver_version: newest CUDA version that the driver takes, None if unknown.
        torch_arch_list: architectures this torch build carries code for; empty if unknown.
    """

    type: str
    index: int = 0
    name: str = ""
    platform: str = ""
    compute_capability: tuple[int, int] | None = None
    arch: str = ""
    memory: int = 0
    shared_memory_per_block: int = 0
    sm_count: int = 0
    runtime_version: tuple[int, int] | None = None
    driver_version: tuple[int, int] | None = None
    torch_arch_list: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"{self.type}:{self.index}" if self.type == "cuda" else self.type
        detail = ", ".join(part for part in (self.name, self.arch) if part)
        return f"{where} ({detail})" if detail else where


def _nvidia(name: str, cc: tuple[int, int], memory_gib: int, shared_kib: int, sms: int) -> Device:
    return Device(
        type="cuda",
        name=name,
        platform="cuda",
        compute_capability=cc,
        arch=f"sm_{cc[0]}{cc[1]}",
        memory=memory_gib * GIB,
        shared_memory_per_block=shared_kib * KIB,
        sm_count=sms,
        runtime_version=(12, 8),
        driver_version=(13, 0),
    )


# Data-sheet values; the shared memory is the opt-in limit of the CUDA programming guide for the compute capability.
PRESETS: dict[str, Device] = {
    "v100": _nvidia("Tesla V100", (7, 0), 32, 96, 80),
    "t4": _nvidia("Tesla T4", (7, 5), 16, 64, 40),
    "a100": _nvidia("NVIDIA A100", (8, 0), 80, 163, 108),
    "rtx3080": _nvidia("NVIDIA GeForce RTX 3080", (8, 6), 10, 99, 68),
    "rtx3090": _nvidia("NVIDIA GeForce RTX 3090", (8, 6), 24, 99, 82),
    "rtx4080": _nvidia("NVIDIA GeForce RTX 4080", (8, 9), 16, 99, 76),
    "rtx4090": _nvidia("NVIDIA GeForce RTX 4090", (8, 9), 24, 99, 128),
    "h100": _nvidia("NVIDIA H100", (9, 0), 80, 227, 132),
    "h200": _nvidia("NVIDIA H200", (9, 0), 141, 227, 132),
    "b200": _nvidia("NVIDIA B200", (10, 0), 180, 227, 148),
    "mi300x": Device(
        type="cuda",
        name="AMD Instinct MI300X",
        platform="rocm",
        arch="gfx942",
        memory=192 * GIB,
        shared_memory_per_block=64 * KIB,
        sm_count=304,
        runtime_version=(7, 0),
    ),
    "mps": Device(type="mps", name="Apple GPU", platform="mps"),
    "cpu": Device(type="cpu", name="CPU", platform="cpu"),
}
_PRESET_ALIASES = {"apple": "mps", "3080": "rtx3080", "3090": "rtx3090", "4080": "rtx4080", "4090": "rtx4090"}


def preset(name: str) -> Device:
    """Return the described device for a short name such as ``"h100"``, ``"t4"``, ``"rtx4090"`` or ``"mi300x"``.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    key = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    key = _PRESET_ALIASES.get(key, key)
    if key not in PRESETS:
        raise ValueError(f"device {name!r} is not known; known: {', '.join(PRESETS)}")
    return PRESETS[key]


def _version(text: str | None) -> tuple[int, int] | None:
    if not text:
        return None
    major, _, rest = text.partition(".")
    minor = rest.split(".")[0].split("-")[0]
    return (int(major), int(minor or 0)) if major.isdigit() and (minor or "0").isdigit() else None


def _driver_version() -> tuple[int, int] | None:
    """Ask the driver itself which CUDA it takes; torch binds no call for it."""
    version = ctypes.c_int(0)
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return (version.value // 1000, version.value % 1000 // 10) if version.value else None


@functools.lru_cache(maxsize=64)
def detect(device: torch.device) -> Device:
    """Describe a torch device of this machine. Asks the driver once per device; ``meta`` counts as the CPU.

    Raises:
        RuntimeError: from torch, if the device does not exist.
    """
    if device.type == "meta":
        return detect(torch.device("cpu"))
    if device.type != "cuda":
        return Device(type=device.type, index=device.index or 0, platform=device.type, name=_host_name(device.type))
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip
    capability = None if hip else (properties.major, properties.minor)
    arch = str(properties.gcnArchName).split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    return Device(
        type="cuda",
        index=index,
        name=properties.name,
        platform="rocm" if hip else "cuda",
        compute_capability=capability,
        arch=arch,
        memory=properties.total_memory,
        shared_memory_per_block=getattr(properties, "shared_memory_per_block_optin", 0),
        sm_count=properties.multi_processor_count,
        runtime_version=_version(hip or torch.version.cuda),
        driver_version=None if hip else _driver_version(),
        torch_arch_list=tuple(torch.cuda.get_arch_list()),
    )


def _host_name(type_: str) -> str:
    if type_ != "cpu":
        return ""
    return str(torch.backends.cpu.get_cpu_capability()) if hasattr(torch.backends, "cpu") else ""


@functools.lru_cache(maxsize=1)
def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


@functools.lru_cache(maxsize=1)
def cpu_name() -> str:
    """Return `cpu_model` and the instructions that tell one of that name from another: torch's set, and AMX."""
    info = Path("/proc/cpuinfo")
    amx = info.exists() and " amx_bf16" in info.read_text(encoding="utf-8", errors="replace")
    return f"{cpu_model()} ({_host_name('cpu')}{', AMX' if amx else ''})"


def is_local(device: Device) -> bool:
    """Tell whether this machine has a device of that kind, so that what is installed here can be asked about it."""
    if device.type == "cpu":
        return True
    if device.type == "mps":
        return torch.backends.mps.is_available()
    if device.type != "cuda":
        return bool(getattr(getattr(torch, device.type, None), "is_available", lambda: False)())
    if not torch.cuda.is_available():
        return False
    return any(detect(torch.device("cuda", i)).arch == device.arch for i in range(torch.cuda.device_count()))
