"""Facts about this machine that several commands need: its devices, its torch build, what that build carries."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

import torch
from packaging.version import InvalidVersion
from packaging.version import Version as Parsed

from vllm_accel.dispatch import device as devices
from vllm_accel.dispatch.device import Device

Version = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides which binary packages fit. A value, so that a test can describe any machine.

    Attributes:
        torch: version of torch, without its build tag.
        cuda: CUDA version that torch was built with, None without. hip: likewise for ROCm.
        python: wheel tag, ``"cp311"`` style. platform: wheel tag, ``"linux_x86_64"`` style.
        cxx11_abi: whether torch uses the newer C++ string ABI.
        arch_list: GPU architectures that torch carries code for; empty if unknown.
    """

    torch: str
    cuda: Version | None
    hip: Version | None
    python: str
    platform: str
    cxx11_abi: bool
    arch_list: tuple[str, ...] = ()

    @property
    def torch_minor(self) -> str:
        """Return ``"2.13"`` of ``"2.13.0"``."""
        return ".".join(self.torch.split(".")[:2])


def this_machine() -> Machine:
    """Describe the machine and torch build that this process runs on; starts no CUDA context."""
    return Machine(
        torch=str(torch.__version__).split("+")[0],
        cuda=_two(torch.version.cuda),
        hip=_two(torch.version.hip),
        python=f"cp{sys.version_info.major}{sys.version_info.minor}",
        platform=_platform_tag(),
        cxx11_abi=bool(torch.compiled_with_cxx11_abi()),
        arch_list=arch_list(),
    )


def _two(text: str | None) -> Version | None:
    try:
        parsed = Parsed((text or "").split("-")[0])  # ROCm: "6.4.43484-123eb5128"
    except InvalidVersion:
        return None
    return parsed.major, parsed.minor


def _platform_tag() -> str:
    if sys.platform == "win32":
        return "win_amd64"
    return f"{'macosx' if sys.platform == 'darwin' else 'linux'}_{platform.machine()}"


def arch_list() -> tuple[str, ...]:
    """Return the architectures in this torch build; torch.cuda.get_arch_list is empty where there is no GPU."""
    flags = getattr(torch._C, "_cuda_getArchFlags", None)
    text = flags() if flags is not None else None
    return tuple(str(text).split()) if text else ()


def carries(archs: tuple[str, ...], capability: Version) -> bool | None:
    """Tell whether a list of architectures covers a compute capability; None if the list is unknown.

    Code for ``sm_XY`` runs on chips of the same major version with at least that minor one; ``compute_XY`` (PTX) is
    compiled by the driver for every later chip (CUDA C++ programming guide, "application compatibility").
    """
    if not archs:
        return None
    for arch in archs:
        kind, _, digits = arch.partition("_")
        digits = digits.rstrip("af")  # sm_90a: that chip only, which the exact comparison below covers
        if not digits.isdigit():
            continue
        have = (int(digits[:-1]), int(digits[-1]))
        if kind == "sm" and have[0] == capability[0] and have[1] <= capability[1]:
            return True
        if kind == "compute" and have <= capability:
            return True
    return False


def local_devices() -> list[Device]:
    """Describe every device of this machine, the one that is used by default first."""
    found: list[Device] = []
    if torch.cuda.is_available():
        current = torch.cuda.current_device()
        order = sorted(range(torch.cuda.device_count()), key=lambda i: (i != current, i))
        found += [devices.detect(torch.device("cuda", i)) for i in order]
    if torch.backends.mps.is_available():
        found.append(devices.detect(torch.device("mps")))
    return [*found, devices.detect(torch.device("cpu"))]


def named_device(name: str | None) -> Device:
    """Return the device that ``--device`` names: a preset, a torch device, or by default the best one here.

    Raises:
        ValueError: the name is unknown, or this machine has no such device.
    """
    if name is None:
        return local_devices()[0]
    try:
        where = torch.device(name)
    except RuntimeError:
        return devices.preset(name)
    if where.type not in ("cuda", "mps", "cpu"):
        return devices.preset(name)
    try:
        if where.type == "mps" and not torch.backends.mps.is_available():
            return devices.preset("mps")
        return devices.detect(where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not on this machine: {error}") from None


def version_text(version: Version | None) -> str:
    """Return ``"12.8"``, or ``"none"``."""
    return "none" if version is None else f"{version[0]}.{version[1]}"
