"""TensorRT-LLM's own operators, ``torch.ops.trtllm``: dense e4m3 products by blocks of 128.

Conventions, read in TensorRT-LLM's sources of 2025 and 2026 (cpp/tensorrt_llm/thop/fp8BlockScalingGemm.cpp and
fp8Quantize.cpp, the kernels of fp8_blockscale_gemm, the tests of _torch/thop): A is (M, K) and B (N, K), both read from
their first element as dense rows of K whatever their strides are; the result is bf16. Factors are fp32, contiguous,
(ceil(N / 128), ceil(K / 128)) of B and (ceil(K / 128), M) of A. On sm_89 and sm_90 M is filled up to 4 there, and they
have one dimension: a dispatch to DeepGEMM takes any matrix of (M, K / 128) as that. sm_100 wants the matrix.

K has to be a multiple of 16 (sm_89: 128) and N of 16; their tests have no K off 128 and skip an N off 128 on sm_89, so
both are filled up to 128 here, and M to 4. sm_12x takes factors as packed powers of two, so it would round them.

Left out: the first schema, whose factors are optional (its kernels were not published), and
``fp8_block_scaling_moe_gemm``. Where the factors of a group start changed under one schema: older tests fill each group
up to 32 rows, newer ones start group e at (offset + 31 e) // 32 * 32; and on sm_12x it takes bf16 for A.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_accel.backends.gemm.align import BYTES, padded
from vllm_accel.backends.library import Library, installed_version
from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_spec import GemmSizes, GemmSpec, Scaling
from vllm_accel.dispatch.spec import Feature
from vllm_accel.errors import Reason

E4M3 = torch.float8_e4m3fn
BLOCKS = (Scaling.BLOCK_1x128, Scaling.BLOCK_128x128)
_PACKAGE = "tensorrt_llm"
#: The first that is registered is called. Newer releases put an autotuner of one tactic behind the second name.
_OPERATORS = ("fp8_block_scaling_gemm_impl", "fp8_block_scaling_gemm")
_SCHEMA = "(Tensor mat1, Tensor mat2, Tensor mat1Scale, Tensor mat2Scale) -> Tensor"
_DEVICES = frozenset({(8, 9), (9, 0), (10, 0), (10, 3)})
_BLOCK, _ROWS = 128, 4
_MOST = 2**31  # elements of a matrix: sm_89's kernel computes addresses in 32 bits

Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def operator() -> Operator | Reason:
    """Return the operator if this process has registered it with the schema that is known here. Imports nothing."""
    for name in _OPERATORS:
        overload = getattr(getattr(torch.ops.trtllm, name, None), "default", None)
        if overload is None:
            continue
        if str(overload._schema) == f"trtllm::{name}{_SCHEMA}":
            return overload  # type: ignore[no-any-return]
        text = f"torch.ops.trtllm has {overload._schema}; this adapter is written for {_SCHEMA}"
        return Reason("schema", text)
    missing = f"torch.ops.trtllm has no {_OPERATORS[-1]} in this process"
    if _PACKAGE in sys.modules:
        return Reason("missing_function", f"{missing}, although {_PACKAGE} is imported")
    if importlib.util.find_spec(_PACKAGE) is not None:
        return Reason("not_imported", f"{missing}; import {_PACKAGE} first (not done for you: it starts MPI)")
    return Reason("not_installed", f"{missing}: TensorRT-LLM is not installed")


def version() -> str | None:
    """Return the version of TensorRT-LLM, None if it is not installed."""
    return installed_version(Library(_PACKAGE, (), version_modules=(_PACKAGE,), distributions=(_PACKAGE,)))


def refuses(spec: GemmSpec, device: Device) -> str | None:
    """Say why no operator takes this kind of dense product, None if one does."""
    if spec.dtype is not E4M3 or (spec.scaling_a, spec.scaling_b) != BLOCKS:
        return "multiplies e4m3 with factors 1x128 x 128x128 alone"
    if spec.out_dtype is not torch.bfloat16:
        return "gives bfloat16 for e4m3"
    if spec.features & Feature.BIAS:
        return "adds no bias before it rounds"
    if spec.features & Feature.DETERMINISTIC:
        return "promises no fixed bits for e4m3"
    if device.compute_capability not in _DEVICES:
        return f"reads factors as powers of two on {device.arch}, so it would round them"
    return None


def too_large(sizes: GemmSizes) -> str | None:
    """Say why a product has too many elements, None if it has not."""
    most = max(sizes.m * sizes.k, sizes.n * sizes.k, sizes.m * sizes.n)
    return f"takes matrices under 2^31 elements; this call has one of {most}" if most >= _MOST else None


def costs(sizes: GemmSizes) -> str | None:
    """Say what a product copies on each call; None for nothing but the factors of a."""
    said = []
    rows, columns = sizes.b_shape
    b = ("b", (columns, rows), sizes.b_stride[::-1], "stored as (N, K)")
    for name, shape, stride, wanted in (("a", sizes.a_shape, sizes.a_stride, "of dense rows"), b):
        if not _is_dense(shape, stride):
            said.append(f"copies {name}, {shape[0] * shape[1] / 2**20:.3g} MiB a call: it wants one {wanted}")
    if sizes.k % _BLOCK or sizes.n % _BLOCK:
        said.append(f"pads K {sizes.k} and N {sizes.n} to multiples of {_BLOCK}, copying")
    if sizes.m % _ROWS:
        said.append(f"pads M {sizes.m} to a multiple of {_ROWS}, copying a")
    return "; ".join(said) or None


class TrtllmProduct:
    """Dense products of one kind of call over the registered operator."""

    def __init__(self, call: Operator, device: Device) -> None:
        self._call = call
        self._flat = (device.compute_capability or (0, 0)) < (10, 0)

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return the product."""
        assert args.scale_a is not None and args.scale_b is not None
        m, n = a.shape[0], b.shape[1]
        a, b = _dense(padded(a, _ROWS, _BLOCK)), _dense(padded(b.mT, _BLOCK, _BLOCK))
        factors = _factors(args.scale_a)
        out = self._call(a, b, factors.flatten() if self._flat else factors, _dense(args.scale_b.mT))
        return out[:m, :n].contiguous()


def _factors(scale: Tensor) -> Tensor:
    """Return factors (M, K / 128) as (K / 128, M filled up)."""
    return _dense(padded(scale.mT, 1, _ROWS))


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return (shape[1] == 1 or stride[1] == 1) and (shape[0] == 1 or stride[0] == shape[1])


def _dense(t: Tensor) -> Tensor:
    """Return the tensor contiguous, at a multiple of 16 bytes; copied only if it is not."""
    if t.is_contiguous() and t.data_ptr() % BYTES == 0:
        return t
    return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)
