"""Build one shared library per variant with nvcc, into a cache keyed by sources, headers, compiler and architecture.

C++ from the headers of CUTLASS rather than its Python DSL: the compiler is the one that FlashInfer and vLLM already ask
for, the kernels exist in CUTLASS for sm_80 as for sm_90, and a build can be checked on a machine without a GPU. Nothing
here runs inside a call: `build` is for `warmup` and for scripts, `path_of` only looks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

#: CUTLASS 4.2.0 is what the sources were compiled with; 3.9 lacks the factors that run along K first.
OLDEST = (4, 2)
#: The first CUDA with the instructions that CUTLASS 4.2 uses on sm_90.
OLDEST_CUDA = (12, 3)
SECONDS = 1800  # of one nvcc, which takes 25 (sm_80) to 100 (sm_90) CPU seconds on an EPYC of 2026

_HERE = Path(__file__).parent
_FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "--expt-relaxed-constexpr",
    "-DNDEBUG",
)
_HEADERS = "pip install --no-deps nvidia-cutlass, or set CUTLASS_PATH to a checkout of CUTLASS"


class Variant(NamedTuple):
    """One kernel.

    Attributes:
        source: file in this directory. arch: as nvcc takes it.
        element: "bf16", "fp16" or "e4m3" (with factors by blocks). along_k: b is contiguous along K.
        tile_m, tile_n: of a block. pingpong: two tiles in turn on one multiprocessor, instead of one by two warpgroups.
    """

    source: str
    arch: str
    element: str
    along_k: bool
    tile_m: int
    tile_n: int
    pingpong: bool = False

    def __str__(self) -> str:
        order = "k" if self.along_k else "n"
        return f"{self.arch}_{self.element}_{order}_{self.tile_m}x{self.tile_n}{'_pingpong' if self.pingpong else ''}"


_ELEMENTS = {"bf16": "cutlass::bfloat16_t", "fp16": "cutlass::half_t", "e4m3": "cutlass::float_e4m3_t"}


def variant(arch: str, element: str, along_k: bool, few: bool) -> Variant:
    """Return the kernel for a kind of product.

    Args:
        arch: "sm_80", "sm_86", "sm_87", "sm_89" or "sm_90". few: groups have up to 64 rows on average.
    """
    if arch != "sm_90":
        return Variant("grouped_sm80.cu", arch, element, along_k, 128, 128)
    if element == "e4m3":
        return Variant("grouped_sm90.cu", "sm_90a", element, along_k, 128, 128)
    if few:
        return Variant("grouped_sm90.cu", "sm_90a", element, along_k, 64, 128, pingpong=True)
    return Variant("grouped_sm90.cu", "sm_90a", element, along_k, 128, 256)


def variants(arch: str) -> tuple[Variant, ...]:
    """Return every kernel for an architecture."""
    kinds = [
        (element, along_k, few) for element in ("bf16", "fp16") for along_k in (True, False) for few in (False, True)
    ]
    found = [variant(arch, *kind) for kind in kinds]
    if arch == "sm_90":
        found.append(variant(arch, "e4m3", True, False))
    return tuple(dict.fromkeys(found))


# --- what a build needs -----------------------------------------------------------------------------------------------


def problems() -> tuple[str, ...]:
    """Return why nothing can be built here; nothing if it can."""
    found = []
    compiler = nvcc()
    release = _release(compiler) if compiler else None
    if compiler is None:
        found.append("nvcc is not found; install the CUDA toolkit, or set CUDA_HOME")
    elif release is None:
        found.append(f"{compiler} does not run")
    elif release < OLDEST_CUDA:
        found.append(f"nvcc is {_dotted(release)}; {_dotted(OLDEST_CUDA)} or newer is needed")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        found.append("no C++ compiler is found; apt-get install g++")
    place = headers()
    version = _version(place) if place else None
    if place is None:
        found.append(f"the headers of CUTLASS are not found; {_HEADERS}")
    elif version is None or version < OLDEST:
        have = _dotted(version) if version else "of no known version"
        found.append(f"CUTLASS in {place} is {have}; {_dotted(OLDEST)} or newer is needed; {_HEADERS}")
    return tuple(found)


def nvcc() -> str | None:
    """Return the compiler: of CUDA_HOME or CUDA_PATH, else of PATH, else where CUDA installs itself."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    given = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    for found in (*given, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if found and os.access(found, os.X_OK):
            return found
    return None


def headers() -> Path | None:
    """Return the include directory of CUTLASS: of CUTLASS_PATH, of the package nvidia-cutlass, or inside FlashInfer."""
    asked = os.environ.get("CUTLASS_PATH")
    places = [Path(asked, "include")] if asked else []
    for package, inside in (("cutlass_library", "source/include"), ("flashinfer", "data/cutlass/include")):
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(package)
            places += [Path(root, inside) for root in (spec.submodule_search_locations or ()) if spec] if spec else []
    return next((place for place in places if (place / "cutlass" / "version.h").is_file()), None)


@functools.lru_cache(maxsize=8)
def _release(compiler: str) -> tuple[int, ...] | None:
    try:
        text = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def version_of(include: Path) -> str | None:
    """Return the version of the headers in an include directory."""
    version = _version(include)
    return _dotted(version) if version else None


@functools.lru_cache(maxsize=8)
def _version(include: Path) -> tuple[int, ...] | None:
    text = (include / "cutlass" / "version.h").read_text(encoding="utf-8", errors="replace")
    numbers = [re.search(rf"#define CUTLASS_{name} (\d+)", text) for name in ("MAJOR", "MINOR", "PATCH")]
    return tuple(int(number[1]) for number in numbers if number) or None


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


# --- the cache --------------------------------------------------------------------------------------------------------


def cache_directory() -> Path:
    """Return where libraries are kept: beside a user's tables of tiles."""
    from vllm_accel.kernels.triton.tiles import user_directory

    return user_directory().parent / "cutlass"


def path_of(wanted: Variant) -> Path:
    """Return where the library of a variant is, or will be, for the toolchain that is here."""
    return cache_directory() / f"{wanted}-{_key(wanted, nvcc(), headers())}.so"


@functools.lru_cache(maxsize=64)
def _key(wanted: Variant, compiler: str | None, include: Path | None) -> str:
    digest = hashlib.sha256()
    for name in (wanted.source, "setup.cuh"):
        digest.update((_HERE / name).read_bytes())
    release, version = _release(compiler) if compiler else None, _version(include) if include else None
    digest.update(repr((wanted, release, version, _FLAGS)).encode())
    return digest.hexdigest()[:16]


def command(wanted: Variant, target: Path) -> list[str]:
    """Return the command that builds a variant into a file.

    Raises:
        RuntimeError: the toolchain is not here; the message says what is missing.
    """
    if missing := problems():
        raise RuntimeError("CUTLASS kernels cannot be built: " + "; ".join(missing))
    include, compiler = headers(), nvcc()
    assert include is not None and compiler is not None
    macros = {
        "ELEMENT": _ELEMENTS[wanted.element], "B_ALONG_K": int(wanted.along_k), "TILE_M": wanted.tile_m,
        "TILE_N": wanted.tile_n, "PINGPONG": int(wanted.pingpong), "BLOCKS": int(wanted.element == "e4m3"),
    }  # fmt: skip
    # packed_stride.hpp and its like lie beside the headers in a checkout and in the package, in tools/util.
    includes = [f"-I{place}" for place in (include, include.parent / "tools" / "util" / "include") if place.is_dir()]
    defines = [f"-D{name}={value}" for name, value in macros.items()]
    return [
        compiler,
        *_FLAGS,
        f"-arch={wanted.arch}",
        *includes,
        *defines,
        str(_HERE / wanted.source),
        "-o",
        str(target),
    ]


def build(wanted: Sequence[Variant], jobs: int | None = None) -> dict[Variant, str]:
    """Build what the cache lacks, side by side; return what failed, with the compiler's last lines.

    Raises:
        RuntimeError: the toolchain is not here. OSError: the cache cannot be written.
    """
    missing = [one for one in wanted if not path_of(one).is_file()]
    if not missing:
        return {}
    cache_directory().mkdir(parents=True, exist_ok=True)
    # An nvcc of these sources takes about 3 GB (cicc, measured).
    jobs = jobs or max(1, min(len(missing), os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        return {one: error for one, error in zip(missing, pool.map(_build, missing), strict=True) if error}


def _build(wanted: Variant) -> str:
    target = path_of(wanted)
    with _temporary(target.parent) as made:
        try:
            done = subprocess.run(command(wanted, made), capture_output=True, text=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)
        if done.returncode:
            return (done.stderr or done.stdout)[-2000:] or f"nvcc ended with {done.returncode}"
        os.replace(made, target)  # at once: another process sees the whole library or none
    return ""


@contextlib.contextmanager
def _temporary(directory: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(suffix=".so", dir=directory)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
