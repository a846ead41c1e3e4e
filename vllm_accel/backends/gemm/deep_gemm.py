"""DeepGEMM: e4m3 products by blocks of 128, dense and by groups, and bf16 groups, compiled by nvcc at their first call.

Conventions, read in DeepGEMM 2.8.0 (csrc/apis/gemm.hpp and layout.hpp, csrc/utils/layout.hpp, tests/generators.py):
products are A (M, K) by B (N, K), into a D that the caller gives; on sm_90 both are K-major. Factors are fp32,
(M, ceil(K / 128)) of A and (ceil(N / 128), ceil(K / 128)) of B, whose strides are looked at even where a dimension is
1; the library brings those of A into TMA's layout itself. Groups are rows that start at multiples of
``get_mk_alignment_for_contiguous_layout()`` (128), with one int32 a row: its group, -1 for filling. The fourth argument
was renamed from m_indices to grouped_layout, so the first four go by position. On sm_100 factors become powers of two.
"""

from __future__ import annotations

import os
import shutil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_accel.backends.gemm.align import copies, padded, row_major
from vllm_accel.backends.gemm.groups import add_group_bias, zero_past_end
from vllm_accel.backends.gemm.moe import bind_moe, with_moe
from vllm_accel.backends.library import Found, Function, Library, installed_version, look_up, require
from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.capability import Guard, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_capability import UNSCALED, GemmCapability
from vllm_accel.dispatch.gemm_spec import Form, GemmSizes, GemmSpec, Scaling
from vllm_accel.dispatch.offsets import group_of_rows
from vllm_accel.dispatch.spec import Feature
from vllm_accel.errors import Reason

_FP8, _FP8_GROUPS, _BF16_GROUPS, _ALIGNMENT = (
    "fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_bf16_gemm_nt_contiguous",
    "get_mk_alignment_for_contiguous_layout",
)  # fmt: skip
LIBRARY = Library(
    label="DeepGEMM",
    functions=tuple(Function("deep_gemm", name) for name in (_FP8, _FP8_GROUPS, _BF16_GROUPS, _ALIGNMENT)),
    versions=">=2.1,<3",
    version_modules=("deep_gemm",),
    distributions=("deep_gemm",),
    absent_hint="https://github.com/deepseek-ai/DeepGEMM says how to build it",
)
_E4M3 = torch.float8_e4m3fn
_BLOCKS = (Scaling.BLOCK_1x128, Scaling.BLOCK_128x128)
_STEP_K, _STEP_N = 128, 64  # what K and N are filled up to: a block along K, and the sizes that its tests have


def _kinds(spec: GemmSpec, device: Device) -> str | None:
    if spec.form is Form.MOE:
        return None  # asked of its products
    if spec.dtype is torch.bfloat16:
        return None if spec.form is Form.GROUPED_M else "multiplies bfloat16 by groups of rows alone"
    if spec.scaling_a is Scaling.NONE:
        return "takes e4m3 with factors alone"
    if device.compute_capability != (9, 0):
        return f"reads factors as powers of two on {device.arch}, so it would round them; e4m3 runs on sm_90"
    return None if spec.out_dtype is torch.bfloat16 else "gives bfloat16 for e4m3"


def _sizes(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    most = max(sizes.m + 128 * sizes.groups, sizes.n, sizes.k)
    return f"counts in 32 bits; this call has up to {most} rows or columns" if most >= 1 << 31 else None


def _costs(spec: GemmSpec, sizes: GemmSizes) -> str | None:
    if spec.form is Form.MOE:
        return None
    said = [text] if (text := copies(spec, sizes, a_rows=True, b_rows=False)) else []
    if sizes.k % _STEP_K or sizes.n % _STEP_N:
        said.append(f"pads K {sizes.k} to a multiple of {_STEP_K} and N {sizes.n} of {_STEP_N}, copying")
    if spec.form is Form.GROUPED_M:
        said.append("copies rows of a into groups that start at multiples of 128, and the result back")
    return "; ".join(said) or None


def _compiler() -> Reason | None:
    if not torch.cuda.is_available():
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if shutil.which("nvcc") or os.path.exists(os.path.join(home, "bin", "nvcc")):
        return None
    return Reason("no_compiler", "DeepGEMM compiles its kernels with nvcc, which is neither in PATH nor CUDA_HOME")


class DeepGemm:
    """The GEMM backend `deep_gemm`."""

    name = "deep_gemm"
    capability = with_moe(GemmCapability(
        platforms=frozenset({"cuda"}),
        compute_capabilities=frozenset({(9, 0), (10, 0)}),
        dtypes=frozenset({torch.bfloat16, _E4M3}),
        out_dtypes=frozenset({torch.bfloat16}),
        forms=frozenset({Form.DENSE, Form.GROUPED_M}),
        scalings=frozenset({UNSCALED, _BLOCKS}),
        features=Feature.BIAS,
        first_call_seconds=10.0,  # nvcc, once for each N and K; not timed here
        rules=(Rule("kinds", _kinds),),
        guards=(Guard("sizes", _sizes),),
        size_notes=(Guard("copies", _costs),),
    ))  # fmt: skip

    def version(self) -> str | None:
        """Return the version of DeepGEMM."""
        return installed_version(LIBRARY)

    def unavailable_reason(self) -> Reason | None:
        """Say why its functions cannot be called."""
        found = look_up(LIBRARY)
        return found if isinstance(found, Reason) else _compiler()

    def bind(self, spec: GemmSpec, device: Device) -> Any:
        """Return the products of a kind of call over the installed library."""
        if spec.form is Form.MOE:
            return bind_moe(self, spec, device)
        return DeepGemmKernel(require(self.name, look_up(LIBRARY)), spec)


class Room(NamedTuple):
    """Groups of rows laid out at multiples of an alignment, on the device.

    source: int64, the row of a that goes to each row. group: int32, the group of each row, -1 for filling.
    place: int64 (T,), where each row of a went, 0 for those of no group. ends: int32 (E,), in order within 0..T.
    """

    source: Tensor
    group: Tensor
    place: Tensor
    ends: Tensor


def laid_out(offs: Tensor, rows: int, alignment: int) -> Room:
    """Lay the groups of `rows` rows out; as many rows as they may take at most, whatever their sizes are."""
    groups = offs.shape[0]
    ends = offs.clamp(0, rows).cummax(0).values
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    stops = (counts + alignment - 1).div(alignment, rounding_mode="floor").mul(alignment).cumsum(0)
    starts, begins = stops - stops.diff(prepend=stops.new_zeros(1)), ends - counts
    at = torch.arange((rows // alignment + min(groups, rows)) * alignment, device=offs.device)
    of_room = torch.searchsorted(stops, at, right=True)
    own = of_room.clamp(max=groups - 1)
    inside = (of_room < groups) & (at - starts[own] < counts[own])
    source = torch.where(inside, begins[own] + at - starts[own], 0)
    of_row = group_of_rows(ends, rows)
    own_row = of_row.clamp(max=groups - 1)
    place = starts[own_row] + torch.arange(rows, device=offs.device) - begins[own_row]
    place = torch.where(of_row < groups, place, 0)
    return Room(source, torch.where(inside, own, -1).to(torch.int32), place, ends.to(torch.int32))


class DeepGemmKernel:
    """Products of one kind of call."""

    def __init__(self, library: Found, spec: GemmSpec) -> None:
        self._library, self._spec = library, spec

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return the product."""
        n = b.shape[-1]
        a, b = padded(a, 1, _STEP_K), padded(b, _STEP_K, _STEP_N).mT.contiguous()
        if self._spec.form is Form.DENSE:
            a = row_major(a)
            out = a.new_empty((a.shape[0], b.shape[0]), dtype=torch.bfloat16)
            self._library[_FP8]((a, args.scale_a), (b, _turned(args.scale_b)), out)
            out = out[:, :n].contiguous()
            return out if args.bias is None else out.add_(args.bias)
        return self._groups(a, b, n, args)

    def _groups(self, a: Tensor, b: Tensor, n: int, args: GemmArgs) -> Tensor:
        assert args.offs is not None
        room = laid_out(args.offs, a.shape[0], self._library[_ALIGNMENT]())
        rows = _chosen(a, room.source)
        out = a.new_empty((rows.shape[0], b.shape[1]), dtype=torch.bfloat16)
        if args.scale_a is None:
            self._library[_BF16_GROUPS](rows, b, out, room.group)
        else:
            of_rows = args.scale_a.index_select(0, room.source)
            self._library[_FP8_GROUPS]((rows, of_rows), (b, _turned(args.scale_b)), out, room.group)
        args = args._replace(offs=room.ends)
        return add_group_bias(zero_past_end(out[:, :n].index_select(0, room.place), args), args)


def _chosen(t: Tensor, index: Tensor) -> Tensor:
    """Return rows of a matrix, of FP8 ones as bytes: not every release selects those."""
    if t.element_size() > 1:
        return t.index_select(0, index)
    return t.view(torch.uint8).index_select(0, index).view(t.dtype)


def _turned(factors: Tensor | None) -> Tensor:
    """Return factors (..., K blocks, N blocks) as (..., N blocks, K blocks), copied if their strides are refused."""
    assert factors is not None
    turned = factors.mT
    (rows, columns), (down, across) = turned.shape[-2:], turned.stride()[-2:]
    dense = (across == 1 and down == columns) or (across == rows and down == 1)
    if dense and (turned.dim() == 2 or turned.stride(0) == rows * columns):
        return turned
    # Not contiguous(): that keeps odd strides of a dimension of 1.
    return torch.empty(turned.shape, dtype=turned.dtype, device=turned.device).copy_(turned)


BACKEND = DeepGemm()
