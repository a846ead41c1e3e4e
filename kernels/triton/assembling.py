"""Which ptxas assembles a kernel: Triton's own, but on Hopper, for kernels that nobody looked at, not CUDA 12.8's.

That ptxas (12.8.61 and 12.8.93, which Triton 3.6 and 3.7 bring) forgets in some kernels that it has given a uniform
register to something else, and makes the descriptor of a later wgmma from it: the product then reads shared memory from
anywhere, and numbers are wrong or the access is illegal. The same PTX assembled by 12.4 to 12.6, 12.9 and 13 is right.
Triton carries a newer one beside it, for Blackwell; `toolchain.hopper_ptxas` finds it. docs/triton.md has the evidence.

Calls of the usual kind (`_usual`) keep Triton's own: those kernels are few, they were measured with it, the tests look
at the descriptors of each, and the 13.1 of Triton 3.7 spills more where a kernel takes all registers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from triton import knobs
from triton.backends.nvidia import compiler
from vllm_accel.kernels.triton import toolchain

#: Constexprs of the attention kernels that make them large.
_OPTIONS = ("LEFT", "SOFTCAP", "ALIBI", "BIAS")

#: The choice is a setting of the process: one thread at a time has it changed.
_changed = threading.RLock()


@contextlib.contextmanager
def assembling(constexprs: Mapping[str, Any], target: Any) -> Iterator[dict[str, int]]:
    """Let Triton take a sound ptxas meanwhile, where its own is not to be trusted.

    Args:
        constexprs: of the kernel. target: the GPUTarget that it is compiled for.

    Yields:
        further options of the compiler, which keep the kernel apart in Triton's caches from what another ptxas made.
    """
    if target.backend != "cuda" or target.arch != 90 or _usual(constexprs):
        yield {}
        return
    with contextlib.ExitStack() as stack:
        with _changed:  # another thread's change must not look like the person's own setting
            found = toolchain.hopper_ptxas()
            if found is not None:
                stack.enter_context(_taking(found.path))
        yield {} if found is None else {"ptx_version": compiler.ptx_get_version(found.release)}


def _usual(constexprs: Mapping[str, Any]) -> bool:
    """Tell whether a kernel is one of few: no attention, or not paged, without options, heads as wide as tiles."""
    if "BLOCK_D" not in constexprs:
        return True
    heads = [constexprs.get(a, constexprs.get(b)) for a, b in (("D", "HEAD_DIM"), ("DV", "HEAD_DIM_V"))]
    fills = heads == [constexprs["BLOCK_D"], constexprs["BLOCK_DV"]]
    return fills and "PAGE" not in constexprs and not any(map(constexprs.get, _OPTIONS))


@contextlib.contextmanager
def _taking(path: str) -> Iterator[None]:
    with _changed:
        # Asked first, because Triton remembers the answer, and it goes into the key of every other kernel too.
        compiler.get_ptxas_version(90)
        with knobs.nvidia.scope():
            knobs.nvidia.ptxas = path
            yield
