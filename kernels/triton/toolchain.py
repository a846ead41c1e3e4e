"""What has to be right before Triton compiles its first kernel, found without compiling anything.

Triton needs more than its package: a C compiler and Python's headers for its launcher, a ptxas that knows the GPU,
a directory for what it compiles. It looks for each at the first launch, and fails there, in the middle of a call.
Here the same rules are applied beforehand (runtime/build.py, runtime/cache.py and knobs.py of Triton 3.6.0 and
3.7.1). `problems` are reasons not to use Triton; `notes` do not stop it.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

#: 3.6.0 and 3.7.1 are what the kernels were compiled and tested with; older releases were not tried.
OLDEST, NEWEST = (3, 6), (3, 7)
#: A compiled attention kernel with its intermediate forms takes 0.5 to 1 MB of the cache (Triton 3.7.1, sm_90).
ENOUGH_SPACE = 64 * 1024**2
#: The release of ptxas that is not to be trusted with wgmma: see `assembling`.
MISCOMPILES_HOPPER = "12.8"
SECONDS = 10  # a ptxas that takes longer to say its version hangs

_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs",
    "pvfs2", "smb3", "smbfs",
}  # fmt: skip
_LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuse.overlayfs")

#: Everything of the environment that an answer depends on.
VARIABLES = (
    "CC", "CPATH", "C_INCLUDE_PATH", "HOME", "PATH", "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_INTERPRET",
    "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_PTXAS_PATH",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that stands in Triton's way.

    Attributes:
        code: ``"not_installed"``, ``"broken"``, ``"version"``, ``"interpreter"``, ``"c_compiler"``,
            ``"python_headers"``, ``"ptxas"`` or ``"cache"``.
        text: what was found. action: one thing to do about it.
    """

    code: str
    text: str
    action: str

    def __str__(self) -> str:
        return f"{self.text}; {self.action}"


@dataclass(frozen=True, slots=True)
class Assembler:
    """A ptxas: its path, CUDA release, and the architectures that it names, such as ``"sm_90a"``; none if unknown."""

    path: str
    release: str
    archs: frozenset[str]


def problems(device_arch: str | None) -> tuple[Problem, ...]:
    """Return why Triton cannot compile for a device here; nothing if it can.

    Looks once, and again when one of `VARIABLES` has changed.

    Args:
        device_arch: ``"sm_90"`` or ``"gfx942"`` style; None leaves out what depends on the GPU.
    """
    return _problems(device_arch, _settings())


def notes(device_arch: str | None) -> tuple[Problem, ...]:
    """Return what is worth knowing and does not stop Triton: a cache on a network, an untried release."""
    return _notes(device_arch, _settings())


def forget() -> None:
    """Look again at the next question, for what changed without a variable changing."""
    for found in (_problems, _notes, _hopper_ptxas, assembler):
        found.cache_clear()


def _settings() -> tuple[str | None, ...]:
    return tuple(map(os.environ.get, VARIABLES))


@functools.lru_cache(maxsize=64)
def _problems(device_arch: str | None, settings: tuple[str | None, ...]) -> tuple[Problem, ...]:
    missing = _package()
    if missing is not None:
        return (missing,)  # the other questions are about this package
    nvidia = device_arch is None or device_arch.startswith("sm_")
    found = [_interpreter(), _compiler(), _headers(), _assembler(device_arch) if nvidia else None, _cache()]
    return tuple(problem for problem in found if problem is not None)


@functools.lru_cache(maxsize=64)
def _notes(device_arch: str | None, settings: tuple[str | None, ...]) -> tuple[Problem, ...]:
    found = []
    version = triton_version()
    if version is not None and _release(version) > NEWEST:
        text = f"triton {version} is newer than what these kernels were tried with (3.6.0, 3.7.1)"
        found.append(Problem("version", text, "if a kernel fails to compile, install the release that torch asks for"))
    path = cache_dir()
    kind = file_system(path) if path is not None else ""
    if path is not None and is_network(kind):
        text = f"Triton's cache {path} is on a network file system ({kind}), where processes that share it can fail"
        found.append(Problem("cache", text, "set TRITON_CACHE_DIR to a directory on a local disk, one for each node"))
    asked = os.environ.get("TRITON_PTXAS_PATH")
    if asked and assembler(asked) is None:
        text = f"TRITON_PTXAS_PATH={asked} is no ptxas that runs, and Triton takes its own instead"
        found.append(Problem("ptxas", text, "correct the variable or unset it"))
    return tuple(found)


# --- the package ------------------------------------------------------------------------------------------------------


def triton_version() -> str | None:
    """Return the version of the triton that imports, None if none does."""
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception:  # a broken installation raises anything; `problems` has the text
        return None


def _package() -> Problem | None:
    try:
        version = str(importlib.import_module("triton").__version__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            return Problem("broken", f"triton does not import: {error}", "reinstall the release that torch asks for")
        return Problem("not_installed", f"triton is not installed ({error})", "pip install triton")
    except Exception as error:
        text = f"triton does not import: {type(error).__name__}: {error}"
        return Problem("broken", text, "reinstall the release that torch asks for")
    if _release(version) < OLDEST:
        text = f"triton {version} is installed; these kernels need 3.6 or newer"
        return Problem("version", text, "install a torch from 2.11 on, which brings a newer triton")
    return None


def _release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _interpreter() -> Problem | None:
    value = os.environ.get("TRITON_INTERPRET", "")
    if value.lower() not in ("1", "true", "on", "yes", "y"):
        return None
    text = f"TRITON_INTERPRET={value} makes Triton run kernels on the CPU, one number at a time"
    return Problem("interpreter", text, "unset it before Python starts")


# --- the C compiler ---------------------------------------------------------------------------------------------------


def compiler() -> str | None:
    """Return the path of the C compiler that Triton would take: CC as one program's name, else gcc, else clang."""
    asked = os.environ.get("CC")
    return shutil.which(asked) if asked is not None else shutil.which("gcc") or shutil.which("clang")


def _compiler() -> Problem | None:
    if compiler() is not None:
        return None
    asked = os.environ.get("CC")
    if asked is not None:
        return Problem("c_compiler", f"CC={asked!r} is not a program", "set CC to one program, without arguments")
    text = "no C compiler for Triton's launcher: CC is not set, and neither gcc nor clang is on PATH"
    return Problem("c_compiler", text, "apt-get install gcc, or set CC")


def headers() -> Path | None:
    """Return where the compiler would find Python.h, None if nowhere."""
    scheme = sysconfig.get_default_scheme()
    # As runtime/build.py has it: Debian's own scheme names a directory that its python3-dev does not fill.
    own = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    given = [part for name in ("CPATH", "C_INCLUDE_PATH") for part in os.environ.get(name, "").split(os.pathsep)]
    return next((Path(folder) for folder in (own, *filter(None, given)) if Path(folder, "Python.h").is_file()), None)


def _headers() -> Problem | None:
    if headers() is not None:
        return None
    place = sysconfig.get_paths()["include"]
    return Problem("python_headers", f"Python.h is not in {place}", "apt-get install python3-dev, or set CPATH")


# --- ptxas ------------------------------------------------------------------------------------------------------------


def ptxas(device_arch: str | None) -> Assembler | None:
    """Return the ptxas that Triton would take for an architecture, None if there is none that runs."""
    name = "ptxas-blackwell" if _number(device_arch) >= 100 else "ptxas"
    own = Path(str(importlib.import_module("triton").__file__)).parent / "backends" / "nvidia" / "bin" / name
    asked = os.environ.get(f"TRITON_{name.upper().replace('-', '_')}_PATH")
    return (assembler(asked) if asked is not None else None) or assembler(str(own))


def hopper_ptxas() -> Assembler | None:
    """Return the ptxas to take for sm_90 in place of the one that Triton would take; None if that one is sound.

    None too where there is no better one, which `problems` tells. Why: see `assembling`.
    """
    return _hopper_ptxas(_settings())


@functools.lru_cache(maxsize=16)
def _hopper_ptxas(settings: tuple[str | None, ...]) -> Assembler | None:
    found = ptxas("sm_90")
    if found is None or found.release != MISCOMPILES_HOPPER:
        return None
    other = ptxas("sm_100")
    return other if other and other.release != MISCOMPILES_HOPPER and "sm_90a" in other.archs else None


@functools.lru_cache(maxsize=16)
def assembler(path: str) -> Assembler | None:
    """Ask a ptxas for its release and architectures; None if it does not run."""
    try:
        version, usage = (
            subprocess.run([path, option], capture_output=True, text=True, timeout=SECONDS, check=True).stdout
            for option in ("--version", "--help")
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    release = re.search(r"release (\d+\.\d+)", version)
    return Assembler(path, release[1], frozenset(re.findall(r"'(sm_\d+[af]?)'", usage))) if release else None


def _assembler(device_arch: str | None) -> Problem | None:
    variable = "TRITON_PTXAS_BLACKWELL_PATH" if _number(device_arch) >= 100 else "TRITON_PTXAS_PATH"
    asked = os.environ.get(variable)
    if asked is not None and os.path.exists(asked) and not os.access(asked, os.X_OK):
        # Triton lets the PermissionError pass; for a file that is missing or fails it takes its own ptxas.
        return Problem("ptxas", f"{variable}={asked} cannot be executed", "correct the variable or unset it")
    found = ptxas(device_arch)
    if found is None:
        return Problem("ptxas", "Triton finds no ptxas that runs", f"reinstall triton, or set {variable}")
    number = _number(device_arch)
    target = f"sm_{number}{'a' if number >= 90 else ''}"  # sm_arch_from_capability in backends/nvidia/compiler.py
    if number == 90 and found.release == MISCOMPILES_HOPPER and hopper_ptxas() is None:
        text = f"ptxas {found.release} ({found.path}) makes wrong code of large kernels for sm_90"
        return Problem("ptxas", text, f"set {variable} to the ptxas of CUDA 12.9 or newer")
    if not number or not found.archs or target in found.archs:
        return None
    text = f"ptxas {found.release} ({found.path}) does not know {target}"
    return Problem("ptxas", text, f"set {variable} to the ptxas of a newer CUDA toolkit")


def _number(device_arch: str | None) -> int:
    found = re.fullmatch(r"sm_(\d+)[af]?", device_arch or "")
    return int(found[1]) if found else 0


# --- the cache --------------------------------------------------------------------------------------------------------


def cache_dir() -> Path | None:
    """Return Triton's cache directory, which need not exist; None if TRITON_CACHE_DIR is set to nothing."""
    given = os.environ.get("TRITON_CACHE_DIR")
    if given is not None:
        return Path(given) if given else None
    return Path(os.environ.get("TRITON_HOME", os.path.expanduser("~/"))) / ".triton" / "cache"


def _cache() -> Problem | None:
    path = cache_dir()
    action = "set TRITON_CACHE_DIR to a directory that can be written"
    if path is None:
        return Problem("cache", "TRITON_CACHE_DIR is set to nothing", action)
    place = existing(path)
    if not place.is_dir():
        return Problem("cache", f"Triton's cache cannot be {path}: {place} is not a directory", action)
    if not os.access(place, os.W_OK | os.X_OK):
        return Problem("cache", f"Triton's cache {path} cannot be written: {place} is read-only for this user", action)
    free = free_space(place)
    if free < ENOUGH_SPACE:
        text = f"Triton's cache {path} has {free // 1024**2} MiB of free space, and one model's kernels may take 64"
        return Problem("cache", text, "`vllm-accel doctor --clear-triton-cache`, or set TRITON_CACHE_DIR")
    return None


def existing(path: Path) -> Path:
    """Return the path itself or the nearest directory above it that exists."""
    full = Path(os.path.abspath(path))
    return next((place for place in (full, *full.parents) if os.path.lexists(place)), full)


def free_space(place: Path) -> int:
    """Return the bytes that this user may still write at an existing path; 0 where no file can be created."""
    if hasattr(os, "statvfs"):  # not on Windows
        found = os.statvfs(place)
        if found.f_files > 0 and found.f_favail == 0:  # some file systems count no files
            return 0
    return shutil.disk_usage(place).free


def file_system(path: Path, mounts: str = "/proc/self/mountinfo") -> str:
    """Return the type of the file system that holds a path, ``""`` where the system does not tell."""
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    real, best, kind = os.path.realpath(existing(path)), "", ""
    for line in lines:
        before, _, after = line.partition(" - ")  # proc(5): ... mount point ... - type source options
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of equals, the last mount hides the others
            best, kind = point, after.split()[0]
    return kind


def is_network(kind: str) -> bool:
    """Tell whether a type of file system is served from elsewhere; every FUSE but overlays counts."""
    return kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)
