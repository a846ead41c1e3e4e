"""Print what to install for a GPU, why, and what speaks against it on this machine; installs nothing."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.version import Version

from vllm_accel.cli import console
from vllm_accel.cli.advice import PACKAGES, Group, group_for
from vllm_accel.cli.machine import Machine, carries, named_device, this_machine, version_text
from vllm_accel.cli.recommend_products import products
from vllm_accel.dispatch import registry
from vllm_accel.dispatch.device import Device, is_local

#: The newest release when this was written; its set-up script names the wheel that it looks for.
FLASH_ATTN = "2.8.3.post2"
#: The release whose wheels are on the project's page for CUDA 12.
FLASH_ATTN_CUDA_12 = "2.8.3"
RELEASES = "https://github.com/Dao-AILab/flash-attention/releases"

#: The first torch without an official wheel of 2.8.3, by the threads that `_wheel_notes` names.
NO_WHEEL_SINCE = Version("2.10")

TORCH_CODE = "torch for this GPU"

#: The minimums of the document: library, oldest compute capability, oldest CUDA.
MINIMUMS = (("FlashAttention", (8, 0), (11, 8)), ("xFormers", (7, 0), (11, 3)), ("Triton", (8, 0), None))


@dataclass(frozen=True, slots=True)
class Check:
    """One requirement: what is needed, what is there, and whether that is enough (None: cannot be told here)."""

    name: str
    needs: str
    found: str
    ok: bool | None

    @property
    def state(self) -> str:
        """Return the verdict as a word."""
        return {True: "yes", False: "no", None: "cannot be told here"}[self.ok]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vllm-accel recommend``."""
    parser.add_argument("--device", metavar="NAME", help="a GPU: t4, v100, a100, h100, rtx4090, ...; default: this one")
    parser.add_argument("--json", action="store_true", help="print data instead of text")


def run(given: argparse.Namespace) -> int:
    """Print the recommendation. Exit code 0, 2 for an unknown device or a wrong setting."""
    try:
        advice = recommend(named_device(given.device), this_machine())
    except ValueError as error:
        return console.wrong_use("recommend", error)
    if given.json:
        console.print_json(advice)
    else:
        show(advice)
    return 0


def wheel_name(machine: Machine, cuda_major: int) -> str:
    """Return the file name of the official flash-attn wheel for a torch with that CUDA major version.

    The pattern is that of get_wheel_url in flash-attn's setup.py (2.8.3.post2).
    """
    version = FLASH_ATTN_CUDA_12 if cuda_major < 13 else FLASH_ATTN
    build = f"cu{cuda_major}torch{machine.torch_minor}cxx11abi{str(machine.cxx11_abi).upper()}"
    return f"flash_attn-{version}+{build}-{machine.python}-{machine.python}-{machine.platform}.whl"


def wheel_url(name: str) -> str:
    """Return where a wheel of that name would be; ``+`` is escaped, as pip needs it."""
    tag = name.removeprefix("flash_attn-").split("+")[0]
    return f"{RELEASES}/download/v{tag}/{name.replace('+', '%2B')}"


def recommend(device: Device, machine: Machine) -> dict[str, Any]:
    """Return the recommendation for a device as data, checked against a machine."""
    group = group_for(device)
    local = is_local(device)
    return {
        "device": str(device),
        "on_this_machine": local,
        "group": group.name,
        "source": group.source,
        "why": group.why,
        "commands": [_command(key, machine) for key in group.packages],
        "production": [_command(key, machine) for key in group.production],
        "optional": [_command(key, machine) for key in group.optional],
        "checks": [
            {"name": c.name, "needs": c.needs, "found": c.found, "met": c.ok}
            for c in (checks(device, machine, group) if device.platform == "cuda" else ())
        ],
        "products": products(device),
        "notes": [*group.notes, *_torch_notes(device, machine, group)],
    }


def _command(key: str, machine: Machine) -> dict[str, Any]:
    package = PACKAGES[key]
    notes = list(package.notes)
    command = package.command
    if key == "flash-attn-wheel":
        name = wheel_name(machine, 12 if machine.cuda is None else machine.cuda[0])
        command = command.format(wheel_url=wheel_url(name))
        notes = [f"The wheel for this torch and Python: {name}", *_wheel_notes(machine), *notes]
    known = {f"{op}:{name}" for op in registry.operations() for name in registry.names(op)}
    used_by = [name for name in package.backends if name in known]
    if not used_by:
        notes.append("No backend of this version of vllm_accel uses it yet.")
    return {"package": key, "command": command, "why": package.why, "used_by": used_by, "notes": notes}


def _wheel_notes(machine: Machine) -> list[str]:
    notes = []
    if machine.cuda is None:  # a torch without CUDA does not say which of its CUDA builds will be used
        other = wheel_name(machine, 13)
        notes.append(f"torch here has no CUDA: that is the name for its CUDA 12 build; for CUDA 13 it is {other}")
    if Version(machine.torch) >= NO_WHEEL_SINCE:
        notes.append(
            f"Expect none for torch {machine.torch_minor}: for 2.8.3 users report no official wheel from torch "
            f"{NO_WHEEL_SINCE} on (https://github.com/Dao-AILab/flash-attention/issues/2299, 2425 and 2442, 2026). "
            "Then: a torch that has one, a wheel from somebody you trust, the build below, or no flash-attn: "
            "PyTorch's own flash kernel runs on the same GPUs."
        )
    if not machine.platform.startswith("linux"):
        notes.append(f"The project publishes wheels for Linux; this machine is {machine.platform}.")
    return notes


def checks(device: Device, machine: Machine, group: Group) -> list[Check]:
    """Hold the document's minimums against a device and the torch build of a machine."""
    capability = device.compute_capability
    found = [Check(TORCH_CODE, f"code for {device.arch}", *_torch_code(capability, machine))] if capability else []
    for library, oldest, cuda in MINIMUMS:
        gpu = "Ampere (sm_80) or newer" if oldest == (8, 0) else f"sm_{oldest[0]}{oldest[1]} or newer"
        enough = capability >= oldest if capability else library == "Triton" and device.platform == "rocm"
        is_there = f"{device.name} is {device.arch}" if device.arch else f"{device.type}, no NVIDIA GPU"
        found.append(Check(f"{library}: GPU", gpu, is_there, enough))
        if cuda is not None:
            built = machine.cuda
            text = "torch is built without CUDA" if built is None else f"torch is built with CUDA {version_text(built)}"
            # On a machine without a GPU, its CPU build of torch says nothing about the machine asked about.
            new_enough = built >= cuda if built is not None else None if capability else False
            found.append(Check(f"{library}: CUDA", f"{version_text(cuda)} or newer", text, new_enough))
    if "xformers" in group.packages:
        found.append(
            Check("xFormers 0.0.35: torch", "2.10 or newer", machine.torch, Version(machine.torch) >= Version("2.10"))
        )
    return found


def _torch_code(capability: tuple[int, int], machine: Machine) -> tuple[str, bool | None]:
    if machine.cuda is None:
        return f"torch {machine.torch} is built without CUDA", None
    if machine.arch_list:
        return " ".join(machine.arch_list), carries(machine.arch_list, capability)
    if machine.cuda >= (13, 0) and capability < (7, 5):
        return f"CUDA {version_text(machine.cuda)} dropped everything before sm_75", False
    return f"the architectures of torch {machine.torch} are not known", None


def _torch_notes(device: Device, machine: Machine, group: Group) -> list[str]:
    notes = []
    if group.packages and device.platform == "cuda" and machine.cuda is None:
        notes.append(
            f"torch {machine.torch} on this machine is built without CUDA. On the GPU machine install a CUDA build "
            "first and run this command there: names and checks follow the torch that is installed."
        )
    code = next((c for c in checks(device, machine, group) if c.name == TORCH_CODE), None)
    if code is not None and code.ok is False:
        notes.append(f"This torch carries no code for {device.arch}: nothing runs on this GPU until torch is replaced.")
    if _installed("flash-attn-3") == "0.0.0":
        notes.append("flash-attn-3 0.0.0 is installed, an empty placeholder: pip uninstall flash-attn-3")
    return notes


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def show(advice: dict[str, Any]) -> None:
    """Print a recommendation for people."""
    out = console.console()
    out.print(console.plain(f"{advice['group']}: {advice['device']}", "bold"))
    out.print(console.plain(advice["why"]))
    out.print(console.plain(f"Source: {advice['source']}", "dim"))
    for title, key in (("", "commands"), ("For production, as well:", "production"), ("Optional:", "optional")):
        if advice[key] and title:
            out.print(console.plain(f"\n{title}", "bold"))
        for entry in advice[key]:
            # soft_wrap: a command that is broken over two lines cannot be copied.
            out.print()
            out.print(console.plain(f"  {entry['command']}", "bold cyan"), soft_wrap=True)
            used = f" (used by {', '.join(entry['used_by'])})" if entry["used_by"] else ""
            for text in (f"{entry['why']}{used}", *entry["notes"]):
                out.print(console.indented(text, 4))
    if advice["checks"]:
        rows = [(c["name"], c["needs"], c["found"], Check("", "", "", c["met"]).state) for c in advice["checks"]]
        out.print()
        out.print(console.table(("requirement", "needs", "found", "met"), rows))
    products = [(row["product"], row["runs"], row["about"]) for row in advice["products"]]
    out.print()
    out.print(console.table(("matrix product", "runs on", "what to know"), products))
    for note in advice["notes"]:
        out.print(console.plain(f"! {note}"))
