"""A stand-in for ``torch.ops.trtllm`` on CPU tensors: e4m3 products by blocks, with what the real ones check.

Read in TensorRT-LLM: cpp/tensorrt_llm/thop/fp8BlockScalingGemm.cpp (the checks of each architecture, and that only
addresses go to the kernels, with K as leading dimension), fp8Quantize.cpp (factors of A: columns of M filled up to 4
before sm_100, a matrix (K / 128, M) there), kernels/cutlass_kernels/fp8_blockscale_gemm (TMA: addresses at multiples of
16 bytes), and an older sm_100 path, which checks the shape of factors and N and K by 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fakes.kernel import check, round_up

SCHEMA = "(Tensor mat1, Tensor mat2, Tensor mat1Scale, Tensor mat2Scale) -> Tensor"
ARCH = 90
#: The dispatch of newer releases to DeepGEMM on sm_90, which looks at the shape of A's factors.
DEEP_GEMM = False


@contextmanager
def registered(name: str = "fp8_block_scaling_gemm", schema: str = SCHEMA) -> Iterator[None]:
    """Register the operator while the block runs."""
    library = torch.library.Library("trtllm", "FRAGMENT")
    try:
        library.define(name + schema)
        library.impl(name, fp8_block_scaling_gemm, "CPU")
        yield
    finally:
        library._destroy()


def fp8_block_scaling_gemm(mat1: Tensor, mat2: Tensor, mat1Scale: Tensor, mat2Scale: Tensor) -> Tensor:
    """Return mat1 (M, K) @ mat2 (N, K)^T in bf16."""
    check(ARCH in (89, 90, 100, 103), "Unsupported SM version for FP8 block scaling GEMM")
    for matrix, factors in ((mat1, mat1Scale), (mat2, mat2Scale)):
        check(matrix.dtype is torch.float8_e4m3fn and matrix.dim() == 2, f"matrix {matrix.dtype} {matrix.shape}")
        check(factors.dtype is torch.float32 and factors.is_contiguous(), "factors: CHECK_INPUT")
    (m, k), n = mat1.shape, mat2.shape[0]
    check(mat2.shape[1] == k, "mat1 and mat2 shapes cannot be multiplied")
    step_k, step_n = {89: (128, 16), 90: (16, 16)}.get(ARCH, (128, 128))
    check(k % step_k == 0 and n % step_n == 0, f"K {k} or N {n}")
    blocks_k, blocks_n = -(-k // 128), -(-n // 128)
    if ARCH >= 100:
        check(tuple(mat1Scale.shape) == (blocks_k, m), "mat1Scale must have size K/128 x M")
        check(tuple(mat2Scale.shape) == (blocks_n, blocks_k), "mat2Scale must have size N/128 x K/128")
    of_b = _memory(mat2Scale, blocks_n, blocks_k).repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    of_a = _factors_of_rows(mat1Scale, m, blocks_k).repeat_interleave(128, 1)[:, :k]
    a, b = _memory(mat1, m, k).float() * of_a, _memory(mat2, n, k).float() * of_b
    return (a @ b.t()).bfloat16()


def _factors_of_rows(factors: Tensor, m: int, blocks: int) -> Tensor:
    """Return (M, K / 128)."""
    if DEEP_GEMM and ARCH == 90 and tuple(factors.shape) == (m, blocks):
        return factors
    return _memory(factors, blocks, m if ARCH >= 100 else round_up(m, 4))[:, :m].t()


def _memory(t: Tensor, rows: int, columns: int) -> Tensor:
    """Return what lies at an address, read as dense rows."""
    check(t.data_ptr() % 16 == 0, "TMA: an address off 16 bytes")
    room = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    check(rows * columns <= room, "CUDA error: an illegal memory access was encountered")
    return t.as_strided((rows, columns), (columns, 1))
