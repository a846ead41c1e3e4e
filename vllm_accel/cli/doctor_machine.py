"""What the doctor reads of the machine: devices, torch, the system, the tools that compile kernels."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from vllm_accel.cli import triton_cache
from vllm_accel.cli.doctor_backends import Problem
from vllm_accel.cli.machine import carries, local_devices, this_machine, version_text
from vllm_accel.dispatch.device import Device, cpu_name
from vllm_accel.kernels.triton import toolchain

GIB, KIB = 1024**3, 1024
SECONDS = 10  # a tool that takes longer to say its version hangs


def devices() -> list[Device]:
    """Return the devices of this machine, the default one first."""
    return local_devices()


def read(ask: Callable[[], Any]) -> str:
    """Return an answer as text; what goes wrong is the answer then."""
    try:
        return str(ask())
    except Exception as error:  # one unreadable flag must not take its section along
        return f"could not be read: {type(error).__name__}: {error}"


def device_rows(found: list[Device]) -> list[dict[str, str]]:
    """Return one row per device, with every field of `Device`."""
    mixed = len({d.arch for d in found if d.type == "cuda"}) > 1
    return [
        {
            "device": f"{d.type}:{d.index}" if d.type == "cuda" else d.type,
            "name": d.name,
            "platform": d.platform,
            "arch": d.arch,
            "compute capability": version_text(d.compute_capability) if d.compute_capability else "",
            "memory": f"{d.memory / GIB:.1f} GiB" if d.memory else "",
            "shared memory per block": f"{d.shared_memory_per_block // KIB} KiB" if d.shared_memory_per_block else "",
            "multiprocessors": str(d.sm_count or ""),
            "driver takes CUDA": version_text(d.driver_version) if d.driver_version else "",
            **({"note": "GPUs of different kinds: the choice is made for each"} if mixed else {}),
        }
        for d in found
    ]


def requirement_rows(device: Device | None) -> list[dict[str, str]]:
    """Hold the minimums of the documents (Ampere, CUDA 11.8 and 11.3) against this machine."""
    from vllm_accel.cli.advice import group_for
    from vllm_accel.cli.recommend import checks

    if device is None:
        return []
    return [
        {"requirement": c.name, "needs": c.needs, "found": c.found, "met": c.state}
        for c in checks(device, this_machine(), group_for(device))
    ]


def torch_rows(device: Device | None) -> list[dict[str, str]]:
    """Read the torch build, and the switches that change its numbers or its choice of kernel."""
    machine = this_machine()
    built = f"CUDA {torch.version.cuda}" if machine.cuda else f"ROCm {torch.version.hip}" if machine.hip else "no GPU"
    archs = " ".join(machine.arch_list) or "none"
    if device is not None and device.compute_capability is not None:
        covered = carries(machine.arch_list, device.compute_capability)
        archs += {True: f"; covers {device.arch}", False: f"; NO code for {device.arch}", None: ""}[covered]
    cuda, sdpa = torch.backends.cuda, "F.scaled_dot_product_attention may use "
    switches: dict[str, Callable[[], Any]] = {
        "version": lambda: torch.__version__,
        "built with": lambda: built,
        "architectures": lambda: archs,
        "C++11 ABI": lambda: machine.cxx11_abi,
        "cuDNN loaded": lambda: torch.backends.cudnn.version() or "none",
        f"{sdpa}flash": cuda.flash_sdp_enabled,
        f"{sdpa}memory-efficient": cuda.mem_efficient_sdp_enabled,
        f"{sdpa}cuDNN": cuda.cudnn_sdp_enabled,
        f"{sdpa}math": cuda.math_sdp_enabled,
        "float32 matmul precision": torch.get_float32_matmul_precision,
        "TF32 in matrix products": lambda: cuda.matmul.allow_tf32,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
        "threads on the CPU": torch.get_num_threads,
    }
    return [{"torch": name, "value": read(ask)} for name, ask in switches.items()]


def system_rows() -> list[dict[str, str]]:
    """Read the operating system, its C library and Python."""
    wsl = "microsoft" in platform.uname().release.lower()
    facts: dict[str, Callable[[], Any]] = {
        "platform": lambda: platform.platform() + (" (WSL)" if wsl else ""),
        "glibc": lambda: " ".join(platform.libc_ver()).strip() or "none",
        "Python": lambda: f"{platform.python_implementation()} {platform.python_version()}",
        "CPU": cpu_name,
        "CPU cores": os.cpu_count,
    }
    return [{"system": name, "value": read(ask)} for name, ask in facts.items()]


def toolchain_rows(device: Device | None = None) -> list[dict[str, str]]:
    """Find what compiles kernels at run time (Triton) or at installation (flash-attn), and Triton's cache."""
    arch = device.arch if device is not None and device.type == "cuda" else None
    header = toolchain.headers
    tools: dict[str, tuple[Callable[[], Any], str]] = {
        "C compiler": (
            lambda: toolchain.compiler() or "MISSING: apt-get install gcc, or set CC",
            "Triton, CPU kernels",
        ),
        "Python.h": (lambda: header() or "MISSING: apt-get install python3-dev, or set CPATH", "Triton, CPU kernels"),
        "triton": (_triton, "Triton kernels"),
        "ptxas": (lambda: _ptxas(arch), "Triton; TRITON_PTXAS_PATH chooses another"),
        "nvcc": (lambda: _nvcc(os.environ), "building flash-attn; FlashInfer"),
        "ninja": (lambda: shutil.which("ninja") or "not found", "building flash-attn; FlashInfer"),
        "Triton cache": (
            lambda: triton_cache.describe(toolchain.cache_dir()),
            "vllm-accel doctor --clear-triton-cache empties it",
        ),
    }
    rows = [{"tool": name, "found": read(ask), "for": use} for name, (ask, use) in tools.items()]
    for title, ask in (("Triton cannot compile", toolchain.problems), ("Triton: note", toolchain.notes)):
        rows += [{"tool": title, "found": problem.text, "for": problem.action} for problem in ask(arch)]
    return rows


def package_version(name: str) -> str | None:
    """Return the version of an installed distribution, None without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _triton() -> str:
    installed = toolchain.triton_version()
    if installed is None:
        return "not installed"
    try:
        asked = [r for r in map(Requirement, metadata.requires("torch") or []) if r.name == "triton" and _applies(r)]
    except metadata.PackageNotFoundError:
        asked = []
    differs = [str(r.specifier) for r in asked if not r.specifier.contains(installed, prereleases=True)]
    return installed + (f"; torch {torch.__version__} asks for {differs[0]}" if differs else "")


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _ptxas(arch: str | None) -> str:
    if toolchain.triton_version() is None:
        return "not found: it comes with triton"
    found = toolchain.ptxas(arch)
    if found is None:
        return "not found"
    lacks = any(problem.code == "ptxas" for problem in toolchain.problems(arch))
    knows = "" if arch is None or not arch.startswith("sm_") else f", {'does NOT know' if lacks else 'knows'} {arch}"
    return f"{found.release}{knows} ({found.path})"


def _nvcc(environ: Mapping[str, str]) -> str:
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    path = str(Path(home) / "bin/nvcc") if home else shutil.which("nvcc")
    if path is None or not Path(path).is_file():
        return f"not found{f' in CUDA_HOME={home}' if home else ''}"
    return f"{_release(path)} ({path})"


def _release(program: str) -> str:
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=SECONDS, check=False).stdout
    found = re.search(r"release ([\d.]+)", shown)
    return found.group(1) if found else "version unknown"


def problems(device: Device | None) -> list[Problem]:
    """Return what makes the torch build wrong for the device."""
    if device is None or device.compute_capability is None:
        return []
    if carries(this_machine().arch_list, device.compute_capability) is False:
        text = f"torch {torch.__version__} carries no code for {device.name} ({device.arch})"
        return [Problem(text, "install a torch build that does: `vllm-accel recommend`", 3)]
    return []
