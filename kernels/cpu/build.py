"""How the extension is compiled: sources with their own flags. Used by setup.py, which cannot import the package."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]

#: Flags of the files that hold one instruction set each. Everything else is compiled for the oldest machine of the
#: architecture, so that one wheel runs on all of them: no -march=native.
INSTRUCTION_SETS = {
    "isa_portable.cpp": [],
    "isa_avx2.cpp": _AVX2,
    "isa_avx512.cpp": _AVX512,
    "isa_avx512_bf16.cpp": [*_AVX512, "-mavx512bf16"],
    "isa_amx_bf16.cpp": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
#: Files that an older compiler may not know the flags of, and the macro that tells the others that one is missing.
OPTIONAL = {"isa_amx_bf16.cpp": "WITHOUT_AMX"}
COMMON = ["machine.cpp", "drive.cpp", "drive_backward.cpp", "scratch.cpp", "tensor.cpp", "module.cpp"]

#: -ffp-contract=fast: products and sums of vectors become fused multiply-adds, which the tiles are made of. Nothing
#: else of -ffast-math: infinities and NaN mean something here. -g0: the same bytes wherever it is built.
FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
    "-Wno-psabi", "-Wno-maybe-uninitialized",
]  # fmt: skip
MACROS = [("Py_LIMITED_API", "0x030A0000"), ("NDEBUG", "1")]


def sources() -> dict[str, list[str]]:
    """Return the files to compile on this machine, each with the flags of its own."""
    isas = INSTRUCTION_SETS if platform.machine().lower() in ("x86_64", "amd64") else {"isa_portable.cpp": []}
    return {**isas, **{name: [] for name in COMMON}}


def fingerprint(folder: Path) -> str:
    """Return what tells these kernels from those of another day: measurements of the one say nothing of the other."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.h"), *folder.glob("*.hpp"), folder / "build.py"]):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:8]
