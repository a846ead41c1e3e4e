"""Load a built variant and launch it. No header of torch: addresses and sizes through one C struct."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

_POINTERS = ("a", "b", "out", "a_scale", "b_scale", "offs", "workspace", "stream")
_WIDE = ("a_stride", "b_group", "b_stride", "out_stride", "rows", "workspace_bytes")
_INTS = ("groups", "n", "k", "sms")
#: What a launch returns from here on is this and a cudaError_t; below, a cutlass::Status (include/cutlass/cutlass.h).
_CUDA_ERRORS = 1000


class _Call(ctypes.Structure):
    """`VllmAccelGroupedGemm` of setup.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _WIDE),
        *((name, ctypes.c_int32) for name in _INTS),
    ]


class GroupedGemm:
    """A loaded variant.

    Raises:
        OSError: it does not load, for example for lack of a CUDA driver.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._launch, self._workspace = library.vllm_accel_grouped_gemm, library.vllm_accel_workspace
        self._launch.argtypes, self._launch.restype = [ctypes.POINTER(_Call)], ctypes.c_int32
        self._workspace.argtypes, self._workspace.restype = [ctypes.c_int32, ctypes.c_int32], ctypes.c_int64

    @functools.lru_cache(maxsize=256)  # noqa: B019 - libraries live as long as the process
    def workspace_bytes(self, groups: int, sms: int) -> int:
        """Return the bytes of workspace for a number of groups."""
        return int(self._workspace(groups, sms))

    def __call__(
        self, a: Tensor, b: Tensor, out: Tensor, offs: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, sms: int
    ) -> None:
        """Launch on the current stream of a's device, which must be current.

        Args:
            a: (T, K), rows contiguous. b: (E, K, N) contiguous along K or N as the variant says. out: (T, N), rows
                contiguous; K, N and all strides are multiples of 16 bytes, as all addresses are. offs: int32 (E,).
            a_scale: (T, K / 128), b_scale: (E, N / 128, K / 128), fp32, contiguous, for e4m3.
            sms: multiprocessors to use.

        Raises:
            RuntimeError: the launch failed; the message has CUTLASS's or CUDA's number.
        """
        call = describe(a, b, out, offs, a_scale, b_scale, sms)
        size = self.workspace_bytes(call.groups, sms)
        workspace = torch.empty(size, dtype=torch.uint8, device=a.device)
        call.workspace, call.workspace_bytes = workspace.data_ptr(), size
        call.stream = torch.cuda.current_stream(a.device).cuda_stream
        if status := self._launch(ctypes.byref(call)):
            who = f"CUDA error {status - _CUDA_ERRORS}" if status >= _CUDA_ERRORS else f"CUTLASS status {status}"
            raise RuntimeError(f"the grouped product on CUTLASS did not launch: {who}")


def describe(
    a: Tensor, b: Tensor, out: Tensor, offs: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, sms: int
) -> _Call:
    """Return the struct of a call, without workspace and stream."""
    groups, k, n = b.shape
    return _Call(
        a=a.data_ptr(), b=b.data_ptr(), out=out.data_ptr(), offs=offs.data_ptr(),
        a_scale=None if a_scale is None else a_scale.data_ptr(),
        b_scale=None if b_scale is None else b_scale.data_ptr(),
        a_stride=a.stride(0), b_group=b.stride(0), b_stride=b.stride(2) if b.stride(1) == 1 else b.stride(1),
        out_stride=out.stride(0), rows=a.shape[0], groups=groups, n=n, k=k, sms=sms,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def load(path: Path) -> GroupedGemm:
    """Return a loaded variant, once per process."""
    return GroupedGemm(path)
