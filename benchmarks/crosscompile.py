"""Compile a Triton or Gluon launch for a GPU that is not here, and read what the compiler made of it.

Needs no GPU and no driver: Triton's own rules turn the launch's arguments into a signature, its compiler makes the
binary, and the disassembler in its wheel shows the instructions. What runs on the GPU is this binary, so registers,
spills and shared memory are exact; speed is not known. Works with Triton 3.6 and 3.7.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.sass_flow import bad_descriptors, overwritten_inputs

if TYPE_CHECKING:
    from vllm_accel.kernels.triton.launch import Launch

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")

#: Bytes that one block may take: opt-in maximum of the CUDA C++ programming guide's table of compute capabilities (what
#: Triton compares with at a launch); LDS per work-group of AMD's CDNA 2 and 3 instruction set references.
SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024,
    "sm_120": 99 * 1024, "gfx90a": 64 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip
TENSOR_MEMORY_COLUMNS = 512  # sm_100; Triton's own limit in compiler/compiler.py

#: Any of these is a matrix product on tensor cores (matrix cores).
TENSOR_CORES = ("HMMA", "HGMMA", "QGMMA", "QMMA", "UTCHMMA", "UTCQMMA", "v_mfma")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch.

    Attributes:
        arch: the architecture it was compiled for.
        registers: per thread (VGPRs on AMD). Of a warp-specialised kernel, what a launch allots: partitions differ.
        spills: instructions that store to or load from local memory (STL, LDL); spilled VGPRs on AMD.
        stack: bytes of local memory per thread. shared: bytes of shared memory per block. threads: of a block, those
            of every partition of a warp-specialised kernel.
        tensor_memory: columns of sm_100's tensor memory, 0 elsewhere.
        instructions: opcode -> count. An opcode counts under each of its prefixes: ``HMMA.16816.F32`` also as ``HMMA``
            and ``HMMA.16816``; ``v_mfma_f32_32x32x8_f16`` also as ``v_mfma``.
        sass: the disassembly (AMD: assembly) they were counted in. ptx: the PTX, "" on AMD.
        ttgir: Triton's GPU dialect, for what the instructions no longer show.
    """

    arch: str
    registers: int
    spills: int
    stack: int
    shared: int
    threads: int
    tensor_memory: int
    instructions: Counter[str]
    sass: str
    ptx: str
    ttgir: str

    def __str__(self) -> str:
        matrix = ", ".join(f"{self.instructions[op]} {op}" for op in TENSOR_CORES if self.instructions[op])
        return (
            f"{self.arch}: {self.registers} registers, {self.spills} spills, {self.stack} B stack, {self.shared} B "
            f"shared, {matrix or 'no tensor cores'}"
        )


def compile_launch(launch: Launch, arch: str, **options: Any) -> Compiled:
    """Compile what `launch` would compile on a GPU of `arch`.

    Args:
        launch: arguments may be on ``meta``: a tensor counts as aligned to 16 bytes, as torch's allocations are.
        arch: one of `ARCHS`.
        options: further options of Triton's compiler, such as ``max_num_imprecise_acc_default``.

    Raises:
        triton.CompilationError: the source is wrong for this architecture.
        TypeError: the kernel was decorated under TRITON_INTERPRET=1, which leaves nothing to compile.
        ValueError: `arch` is not known.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.compiler import compile as triton_compile
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from vllm_accel.kernels.triton.assembling import assembling
    from vllm_accel.kernels.triton.launch import arguments, compile_options

    if arch not in SHARED_LIMIT:
        raise ValueError(f"{arch!r} is not one of {', '.join(ARCHS)}")
    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    fn, backend = launch.fn, make_backend(target)
    if not isinstance(fn, JITFunction):
        raise TypeError(f"{fn} is a {type(fn).__name__}: only what triton.jit or gluon.jit returned can be compiled")
    given: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **options}
    if target.backend == "cuda":
        given |= compile_options(launch) | options
    with assembling(launch.constexprs, target) as more:
        # The steps of JITFunction.run between its look at the device and its launch.
        bind = create_function_from_signature(fn.signature, fn.params, backend)
        bound, specialization, rest = bind(*arguments(launch), **launch.constexprs, **given, **more, debug=False)
        parsed, signature, constexprs, attrs = fn._pack_args(backend, rest, bound, specialization, rest)
        source = (GluonASTSource if fn.is_gluon() else ASTSource)(fn, signature, constexprs, attrs)
        kernel = triton_compile(source, target=target, options=parsed.__dict__)
    read = _read_nvidia if target.backend == "cuda" else _read_amd
    return read(kernel, arch, target)


def assert_fits(
    compiled: Compiled, arch: str, *, tensor_cores: bool = True, max_spills: int = 0, blocks: int = 1
) -> None:
    """Assert that a kernel can run well on `arch`: shared and tensor memory, spills, the matrix unit, descriptors.

    Args:
        compiled: of `compile_launch`.
        arch: the architecture it was compiled for.
        tensor_cores: whether the kernel's products have to be on the matrix unit.
        max_spills: how many spill instructions are accepted.
        blocks: how many blocks are to fit on one NVIDIA multiprocessor, by registers per thread times threads and
            shared memory; 1 needs no check beyond the block's own limits.
    """
    assert compiled.arch == arch, f"compiled for {compiled.arch}, asked about {arch}"
    assert compiled.shared <= SHARED_LIMIT[arch], f"{compiled} > {SHARED_LIMIT[arch]} B shared memory"
    assert compiled.tensor_memory <= TENSOR_MEMORY_COLUMNS, (
        f"{compiled}, {compiled.tensor_memory} tensor memory columns"
    )
    assert compiled.spills <= max_spills, f"{compiled}; at most {max_spills} spills are accepted"
    if arch == "sm_90":
        bad = bad_descriptors(compiled.sass)
        assert not bad, f"{compiled}: products read shared memory at random: {bad}"
        bad = overwritten_inputs(compiled.sass)
        assert not bad, f"{compiled}: inputs of products are overwritten: {bad}"
    if tensor_cores:
        assert any(compiled.instructions[op] for op in TENSOR_CORES), f"{compiled}"
    if blocks > 1:
        # A multiprocessor has 1 KiB more than one block may take and keeps 1 KiB for each block; registers are allotted
        # to a warp in units of 256 (CUDA C++ programming guide, and the occupancy calculator's tables).
        assert blocks * (compiled.shared + 1024) <= SHARED_LIMIT[arch] + 1024, f"{compiled}: {blocks} blocks do not fit"
        registers = blocks * compiled.threads * -(-compiled.registers // 8) * 8
        assert registers <= 65536, f"{compiled}: {blocks} blocks of {compiled.threads} threads do not fit"


def assemble(ptx: str, arch: str, ptxas: str) -> str:
    """Return the disassembly of what another ptxas (a path) makes of a kernel's PTX."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        _tool(ptxas, f"--gpu-name={arch}{'a' if int(arch[3:]) >= 90 else ''}", str(source), "-o", str(binary))
        return _disassemble(binary.read_bytes())[2]


def _read_nvidia(kernel: Any, arch: str, target: Any) -> Compiled:
    registers, stack, sass = _disassemble(kernel.asm["cubin"])
    instructions = _count(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE), ".")
    return Compiled(
        arch=arch,
        registers=registers,
        spills=instructions["STL"] + instructions["LDL"],
        stack=stack,
        shared=int(kernel.metadata.shared),
        threads=int(kernel.metadata.num_warps) * target.warp_size,
        tensor_memory=int(getattr(kernel.metadata, "tmem_size", None) or 0),
        instructions=instructions,
        sass=sass,
        ptx=kernel.asm["ptx"],
        ttgir=kernel.asm["ttgir"],
    )


@functools.lru_cache(maxsize=256)
def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Return registers, bytes of stack and the disassembly."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        sass = _tool(knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage[:500]
    return int(found[1]), int(found[2]), sass


def _tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def _read_amd(kernel: Any, arch: str, target: Any) -> Compiled:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", text, re.MULTILINE)
        assert found, f"{name} is not in the assembly's metadata"
        return int(found[1])

    return Compiled(
        arch=arch,
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count"),
        stack=number("private_segment_fixed_size"),
        shared=int(kernel.metadata.shared),
        threads=int(kernel.metadata.num_warps) * target.warp_size,
        tensor_memory=0,
        instructions=_count(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE), "_"),
        sass=text,
        ptx="",
        ttgir=kernel.asm["ttgir"],
    )


def _count(opcodes: list[str], separator: str) -> Counter[str]:
    """Count each opcode under every prefix that ends at a separator."""
    made: Counter[str] = Counter()
    for opcode, times in Counter(opcodes).items():
        parts = opcode.split(separator)
        for i in range(1, len(parts) + 1):
            made[separator.join(parts[:i])] += times
    return made
