"""Which ptxas assembles a kernel: Triton's own, but for Hopper not the one of CUDA 12.8.

That ptxas (12.8.61 and 12.8.93, which Triton 3.6 and 3.7 bring) forgets in large kernels that it has given a uniform
register to something else, and makes the descriptor of a later wgmma from it: the product then reads shared memory from
anywhere, and numbers are wrong or the access is illegal. The same PTX assembled by 12.4 to 12.6, 12.9 and 13 is right.
Triton carries 12.9 beside it, for Blackwell; `toolchain.hopper_ptxas` finds it. docs/triton.md has the evidence.

Kernels in Gluon keep Triton's own: they are few, the tests look at the descriptors of each, and 12.9 spills more there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from triton import knobs
from triton.backends.nvidia import compiler
from vllm_accel.kernels.triton import toolchain

#: The choice is a setting of the process: one thread at a time has it changed.
_changed = threading.RLock()


@contextlib.contextmanager
def assembling(fn: Any, target: Any) -> Iterator[dict[str, int]]:
    """Let Triton take a sound ptxas meanwhile.

    Args:
        fn: the kernel, a JITFunction. target: the GPUTarget that it is compiled for.

    Yields:
        further options of the compiler, which keep the kernel apart in Triton's caches from what another ptxas made.
    """
    if target.backend != "cuda" or target.arch != 90 or fn.is_gluon():
        yield {}
        return
    with contextlib.ExitStack() as stack:
        with _changed:  # another thread's change must not look like the person's own setting
            found = toolchain.hopper_ptxas()
            if found is not None:
                stack.enter_context(_taking(found.path))
        yield {} if found is None else {"ptx_version": compiler.ptx_get_version(found.release)}


@contextlib.contextmanager
def _taking(path: str) -> Iterator[None]:
    with _changed:
        # Asked first, because Triton remembers the answer, and it goes into the key of every other kernel too.
        compiler.get_ptxas_version(90)
        with knobs.nvidia.scope():
            knobs.nvidia.ptxas = path
            yield
