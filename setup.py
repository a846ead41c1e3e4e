"""Build vllm_accel: metadata is in pyproject.toml, here is only how the C++ kernels for CPUs are compiled.

They are optional. Without a compiler, or where compiling fails, the install goes on and the backend `cpu` says why it
is unavailable. ``BUILD_CPU_KERNELS=0`` leaves them out on purpose; ``CPU_KERNELS_FLAGS`` adds flags (sanitizers).
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Through the link: a source archive has files there, and no folder kernels/.
FOLDER = Path("vllm_accel/kernels/cpu")


class BuildKernels(build_ext):
    """Compile each source with the flags of its instruction set, several at a time; a failure is a warning."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._compile_and_link(ext)
        except Exception as error:  # whatever a compiler, a linker or a missing Python.h makes of it
            warnings.warn(f"the CPU kernels were not built, PyTorch's will be used: {error}", stacklevel=1)

    def _compile_and_link(self, ext: Extension) -> None:
        rules = runpy.run_path(str(FOLDER / "build.py"))
        flags, folders = rules["sources"](), [*self.include_dirs, *ext.include_dirs]
        macros = [*rules["MACROS"], ("SOURCES", f'"{rules["fingerprint"](FOLDER)}"')]

        def compiled(source: str) -> list[str]:
            own = [*rules["FLAGS"], *flags[Path(source).name], *os.environ.get("CPU_KERNELS_FLAGS", "").split()]
            found: list[str] = self.compiler.compile(
                [source], self.build_temp, macros, folders, extra_postargs=own, depends=ext.depends
            )
            return found

        sources, objects = list(ext.sources), []
        for source in [source for source in sources if Path(source).name in rules["OPTIONAL"]]:
            sources.remove(source)
            try:
                objects += compiled(source)
            except Exception as error:  # a compiler older than the instructions
                warnings.warn(f"{Path(source).stem} was left out of the CPU kernels: {error}", stacklevel=1)
                macros.append((rules["OPTIONAL"][Path(source).name], "1"))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects += [name for names in pool.map(compiled, sources) for name in names]
        path = self.get_ext_fullpath(ext.name)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        extra = os.environ.get("CPU_KERNELS_FLAGS", "").split()
        self.compiler.link_shared_object(objects, path, target_lang="c++", extra_postargs=["-s", *extra])


def extensions() -> list[Extension]:
    """Return the extension, or nothing where it is switched off or the platform has no such compiler."""
    if os.environ.get("BUILD_CPU_KERNELS", "1") == "0" or sys.platform == "win32":
        return []
    rules: dict[str, Any] = runpy.run_path(str(FOLDER / "build.py"))
    sources = [str(FOLDER / name) for name in rules["sources"]()]
    headers = [str(path) for path in sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.hpp")])]
    # Optional: an editable install looks for the file afterwards, and may miss it.
    return [Extension("vllm_accel.kernels.cpu._cpu", sources, depends=headers, py_limited_api=True, optional=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    # The extension uses the limited API, so one wheel serves every Python from 3.10 on.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions() else {},
)
