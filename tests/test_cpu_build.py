"""How the CPU kernels are built: on any x86-64 machine, optional, and with nothing that a linker could mix up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels" / "cpu"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def run(*command: str | Path, cwd: Path = ROOT, timeout: int = 600, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip


def build(to: Path, **env: str) -> subprocess.CompletedProcess[str]:
    done = run(sys.executable, "setup.py", "build_ext", "--build-lib", to / "lib", "--build-temp", to / "temp", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_compiler_that_fails_does_not_fail_the_install(tmp_path: Path) -> None:
    done = build(tmp_path, CC="false", CXX="false")
    assert "the CPU kernels were not built" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_left_out_on_purpose(tmp_path: Path) -> None:
    build(tmp_path, BUILD_CPU_KERNELS="0")
    assert not list(tmp_path.rglob("*.so"))


OLD_COMPILER = """#!/bin/sh
echo "$@" >> {log}
case "$*" in *-mamx-tile*) echo "unrecognized option -mamx-tile" >&2; exit 1;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="instruction sets of x86-64")
def test_a_compiler_older_than_amx_builds_the_rest(tmp_path: Path) -> None:
    compiler, log = tmp_path / "old-g++", tmp_path / "log"
    compiler.write_text(OLD_COMPILER.format(log=log))
    compiler.chmod(0o755)
    done = build(tmp_path, CC=str(compiler), CXX=str(compiler))
    assert "isa_amx_bf16 was left out" in done.stderr
    commands = log.read_text().splitlines()
    (machine,) = [command for command in commands if "machine.cpp" in command]
    assert "-DWITHOUT_AMX=1" in machine
    link = commands[-1]
    assert "isa_avx512_bf16.o" in link and "isa_amx" not in link and list(tmp_path.rglob("_cpu.abi3.so"))


WITHOUT = """
import sys
sys.modules["vllm_accel.kernels.cpu._cpu"] = None
import torch
from vllm_accel import BackendUnavailableError, attention, explain
q = torch.randn(1, 40, 2, 16)
shown = explain(attention, q, q, q)
assert shown.chosen == "sdpa_cpu", shown
assert "not built or does not load" in str(shown["cpu"].reasons[0]), shown["cpu"]
attention(q, q, q)
try:
    attention(q, q, q, backend="cpu")
except BackendUnavailableError as error:
    print(error)
"""


def test_without_the_extension_pytorch_serves_and_the_reason_is_told() -> None:
    done = run(sys.executable, "-c", WITHOUT)
    assert done.returncode == 0, done.stderr
    assert "not built or does not load" in done.stdout


def test_every_source_is_built_and_short() -> None:
    import runpy

    built = runpy.run_path(str(SOURCES / "build.py"))["sources"]()
    if os.uname().machine == "x86_64":
        assert set(built) == {path.name for path in SOURCES.glob("*.cpp")}
    for path in [*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h*")]:
        assert len(path.read_text().splitlines()) < 500, path


# Wide registers, or an encoding that the oldest x86-64 does not decode.
MODERN = re.compile(r"%[yz]mm|\bv(add|sub|mul|div|mov|fm|cvt|xor|bro|max|min)[a-z0-9]*\s")


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="instruction sets of x86-64")
def test_runs_on_any_machine_and_needs_no_library_of_torch(tmp_path: Path) -> None:
    """Build from nothing. Only files of one instruction set may hold its instructions, and share no symbol."""
    build(tmp_path)
    (library,) = tmp_path.rglob("_cpu.abi3.so")
    needed = re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", library).stdout)
    assert not [name for name in needed if re.search("torch|omp|python|c10", name)], needed
    objects = {path.stem: path for path in tmp_path.rglob("*.o")}
    assert {"drive", "module", "isa_portable", "isa_avx512_bf16"} <= set(objects)
    for name, path in objects.items():
        if not name.startswith("isa_") or name == "isa_portable":
            assert not MODERN.search(run("objdump", "-d", "--no-show-raw-insn", path).stdout), name
        if name.startswith("isa_"):
            # A weak symbol is one that the linker takes from any file, whatever that file was compiled for.
            weak = re.findall(r" [WVu] (.*)", run("nm", "-C", path).stdout)
            own = f"vacpu::{name.removeprefix('isa_')}::"
            assert not [symbol for symbol in weak if own not in symbol], weak


SANITIZED = """
import dataclasses, torch
from vllm_accel.backends.cpu import CpuKernel
from vllm_accel.backends.cpu_paged import CpuPagedKernel
from vllm_accel.dispatch import device
from vllm_accel.kernels.cpu import load
from vllm_accel.testing import CASES, PAGED_CASES
from vllm_accel.testing.conformance import kernel_call
from vllm_accel.testing.conformance_paged import paged_kernel_call
from vllm_accel.backends.cpu import BACKEND
from vllm_accel.dispatch.spec import Feature

@dataclasses.dataclass
class With:
    isa: int
    name: str = "cpu"
    capability = BACKEND.capability
    def bind(self, spec, where):
        if Feature.PAGED in spec.features:
            return CpuPagedKernel(spec.dtype, spec.kv_dtype, isa=self.isa)
        return CpuKernel(spec.dtype, isa=self.isa, bias_grad=Feature.BIAS_GRAD in spec.features)

assert load().reason is None, load().reason
where = device.detect(torch.device("cpu"))
for isa in range(len(load().module.instruction_sets())):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for case in CASES:
            inputs = case.make(dtype)
            leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
            out = kernel_call(With(isa), where)(*leaves, **inputs.options)
            torch.autograd.grad(out.float().sum(), leaves)
        for case in PAGED_CASES:
            inputs = case.make(dtype)
            paged_kernel_call(With(isa), where)(
                inputs.q, inputs.k_cache, inputs.v_cache, mla=case.mla, **inputs.options)
print("clean")
"""


@pytest.mark.slow
@needs_compiler
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Every case on every instruction set under the address and undefined behaviour sanitizers."""
    for folder in ("vllm_accel", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("*.so"))
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-sanitize=alignment -O1"
    build(tmp_path / "build", CPU_KERNELS_FLAGS=flags)
    (library,) = (tmp_path / "build").rglob("_cpu.abi3.so")
    shutil.copy(library, tmp_path / "kernels" / "cpu")
    runtimes = [run("g++", f"-print-file-name={name}").stdout.strip() for name in ("libasan.so", "libubsan.so")]
    done = run(
        sys.executable, "-c", SANITIZED, cwd=tmp_path, LD_PRELOAD=" ".join(runtimes), PYTHONPATH=str(tmp_path),
        ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="2",
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stdout[-2000:] + done.stderr[-4000:]
