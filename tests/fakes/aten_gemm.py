"""Stand-ins on CPU tensors for the products of PyTorch that only a GPU has, with what they refuse there.

Read in pytorch's aten/src/ATen/native/cuda/ScaledBlas.cpp (`_scaled_mm`, `_scaled_mm_v2`: strides, sizes, layout of
factors), GroupedMMUtils.h and cuda/GroupedBlas.cpp (`_grouped_mm`, `_scaled_grouped_mm`: strides, padded results, rows
left unwritten), cuda/GroupMMCommon.cuh (asserts on the device), cuda/Blas.cpp (`_int_mm`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

from fakes.kernel import check

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_real_mm, _real_bmm = torch.mm, torch.bmm


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """torch.mm, with the result's dtype that only CUDA takes."""
    if out_dtype is None:
        return _real_mm(a, b) if out is None else _real_mm(a, b, out=out)
    check(a.dtype in (torch.float16, torch.bfloat16) and out_dtype is torch.float32, "out_dtype must be float32")
    return _real_mm(a.float(), b.float())


def bmm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """torch.bmm likewise."""
    return _real_bmm(a, b) if out_dtype is None else _real_bmm(a.float(), b.float())


def _major(a: Tensor, b: Tensor) -> None:
    check(a.stride(0) > a.stride(1) and a.stride(1) == 1, f"self must be row_major, got stride {a.stride()}")
    check(b.stride(0) == 1 and b.stride(1) > 1, f"mat2 must be col_major, got stride {b.stride()}")
    check(a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0 and b.shape[1] % 16 == 0, f"sizes off 16: {a.shape} {b.shape}")
    check(a.dtype in _FP8 and b.dtype in _FP8, "Expected Float8")
    check(not (a.dtype is b.dtype is torch.float8_e5m2), "Multiplication of two Float8_e5m2 matrices is not supported")
    check(a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0, "addresses off 16 bytes")
    check(a.stride(0) % 16 == 0 and b.stride(1) % 16 == 0, "leading dimensions off 16 bytes")


def _scaled_mm(a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
    """Factors of one number each, or (M, 1) with (1, N)."""
    _major(a, b)
    by_row = not (scale_a.numel() == 1 and scale_b.numel() == 1)
    if by_row:
        check(tuple(scale_a.shape) == (a.shape[0], 1) and tuple(scale_b.shape) == (1, b.shape[1]), "factor shapes")
        check(scale_a.is_contiguous() and scale_b.is_contiguous(), "factors must be contiguous for rowwise scaling")
        check(out_dtype is torch.bfloat16, "Only bf16 high precision output types are supported for row-wise scaling")
    check(scale_a.dtype is scale_b.dtype is torch.float32, "factors must be fp32")
    if bias is not None:
        check(out_dtype is not torch.float32, "Bias is not supported when out_dtype is set to Float32")
        check(bias.dtype is out_dtype and bias.numel() == b.shape[1], "Bias must be of the result's dtype and size N")
    out = (a.double() * scale_a.double()) @ (b.double() * scale_b.double())
    return (out if bias is None else out + bias.double()).to(out_dtype)


def scaled_mm(
    a, b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a=None, swizzle_b=None, bias=None,
    output_dtype=torch.bfloat16, contraction_dim=(), use_fast_accum=False,
):  # fmt: skip
    """Factors by blocks: 1x128 (rows, K blocks) with rows contiguous; 128x128 (K blocks up to 4, row blocks)."""
    _major(a, b)
    m, n, blocks = a.shape[0], b.shape[1], -(-a.shape[1] // 128)
    check(m % 4 == 0, "columns of factors off 16 bytes")

    def spread(scale: Tensor, recipe: ScalingType, rows: int) -> Tensor:
        if recipe is ScalingType.BlockWise1x128:
            check(tuple(scale.shape) == (rows, blocks), f"1x128 factors must be {(rows, blocks)}, got {scale.shape}")
            check(scale.stride(0) == 1 and (blocks == 1 or scale.stride(1) == rows), f"strides {scale.stride()}")
            return scale.double().repeat_interleave(128, 1)[:, : a.shape[1]]
        padded, row_blocks = -(-blocks // 4) * 4, -(-rows // 128)
        check(tuple(scale.shape) == (padded, row_blocks), f"factors must be {(padded, row_blocks)}, got {scale.shape}")
        check(scale.stride(0) == 1 and (row_blocks == 1 or scale.stride(1) == padded), f"strides {scale.stride()}")
        wide = scale.t()[:, :blocks].double().repeat_interleave(128, 0)[:rows]
        return wide.repeat_interleave(128, 1)[:, : a.shape[1]]

    check(ScalingType.BlockWise1x128 in (scale_recipe_a, scale_recipe_b), "No gemm implementation was found")
    x = a.double() * spread(scale_a, scale_recipe_a, m)
    y = b.double().t() * spread(scale_b, scale_recipe_b, n)
    return (x @ y.t()).to(output_dtype)


def _strided(t: Tensor, name: str) -> bool:
    """Check strides as the kernels do; return whether the tensor is column-major."""
    step = 16 // t.element_size()
    check(t.data_ptr() % 16 == 0, "expected data_ptr to be aligned to 16 bytes")
    if t.stride(-2) == 1 and t.stride(-1) >= max(1, t.shape[-2]):
        check(t.stride(-1) % step == 0, f"{name}: strides should be multiple of 16 bytes")
        return True
    check(t.stride(-1) == 1 and t.stride(-2) >= max(1, t.shape[-1]), f"{name}: Invalid strides/sizes {t.stride()}")
    check(t.stride(-2) % step == 0, f"{name}: strides should be multiple of 16 bytes")
    return False


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    columns_a, columns_b = _strided(a, "mat_a"), _strided(b, "mat_b")
    rows, n = a.shape[-2], b.shape[-1]
    wide = -(-n * out_dtype.itemsize // 16) * 16 // out_dtype.itemsize  # rows of the result are padded
    if offs is not None:
        check(offs.dtype is torch.int32 and offs.dim() == 1, "Offsets have to be int32")
        ends = offs.tolist()
        limit = a.shape[0] if b.dim() == 3 else a.shape[1]
        check(all(0 <= s <= t <= limit for s, t in zip([0, *ends], ends)), "device-side assert: delta >= 0")  # noqa: B905
        step = 16 // a.element_size()
        along_a, along_b = (columns_a, False) if b.dim() == 3 else (not columns_a, columns_b)
        aligned = all(end % step == 0 for end in ends[:-1])
        check(aligned or not (along_a or along_b), "device-side assert: group starts off 16 bytes")
    lead = () if b.dim() == 3 and a.dim() == 2 else (b.shape[0] if offs is None else offs.shape[0],)
    out = torch.full((*lead, rows, wide), float("nan"), dtype=out_dtype)[..., :n]  # what is unwritten may be anything
    if offs is None:
        return out.copy_(a.double() @ b.double())
    start = 0
    for group, end in enumerate(ends):
        if b.dim() == 3:
            out[start:end] = a[start:end].double() @ b[group].double()
        elif end > start:
            out[group] = a[:, start:end].double() @ b[start:end].double()
        start = end
    return out


def _grouped_mm(a, b, offs=None, bias=None, out_dtype=None):
    check(bias is None, "Bias not supported yet")
    return _grouped(a, b, offs, a.dtype if out_dtype is None else out_dtype)


def _scaled_grouped_mm(
    a, b, scale_a, scale_b, offs=None, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False
):
    check(a.dtype is b.dtype is torch.float8_e4m3fn, "Expected mat_a and mat_b to be Float8_e4m3")
    check(not _strided(a, "mat_a") and _strided(b, "mat_b"), "Expected mat1 to not be transposed and mat2 to be")
    check(a.shape[-1] % 16 == 0 and b.shape[-2] % 16 == 0 and b.shape[-1] % 16 == 0, "sizes off 16")
    check(out_dtype is torch.bfloat16, "Only bf16 high precision output types are supported for grouped gemm")
    if a.dim() == 2:
        check(scale_a.dim() == 1 and scale_a.is_contiguous() and len(scale_a) == len(a), "scale_a")
    else:
        check(tuple(scale_a.shape) == tuple(a.shape[:2]) and scale_a.stride(-1) == 1, "scale_a")
    check(tuple(scale_b.shape) == (b.shape[0], b.shape[2]) and scale_b.stride(-1) == 1, "scale_b")
    x = (a.double() * scale_a.double().unsqueeze(-1)).contiguous()
    y = (b.double() * scale_b.double().unsqueeze(-2)).mT.contiguous().mT
    # A factor of 2 keeps strides multiples of 16 bytes in float64 wherever they are in FP8.
    return _grouped(x, y, offs, torch.bfloat16)


def _int_mm(a, b):
    check(a.dtype is b.dtype is torch.int8, "Expected int8")
    check(a.shape[0] > 16, f"self.size(0) needs to be greater than 16, but got {a.shape[0]}")
    check(a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0, f"K and N need to be multiples of 8: {a.shape} {b.shape}")
    return (a.double() @ b.double()).to(torch.int32)
