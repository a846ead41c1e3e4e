"""The order in which backends are tried where nothing was measured, as one readable table.

After the document "Acceleration Libraries for vLLM": FlashAttention first on Ampere and newer (3 before 2 on Hopper,
4 on Blackwell), xFormers as its fallback and first on V100 and T4, then our Triton kernels, then PyTorch's own.
"""

from __future__ import annotations

from typing import Any

from vllm_accel.dispatch.cost import middle, work_of
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_spec import Form, Scaling
from vllm_accel.dispatch.spec import Feature

TRITON_BACKENDS = ("gluon_hopper", "triton")

_ATTENTION: dict[str, tuple[str, ...]] = {
    "blackwell": (
        "flash_attn_4", "flash_attn_3", "flash_attn_2", "xformers", "mslk", "flashinfer", "tensorrt_llm",
        *TRITON_BACKENDS, "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "reference",
    ),
    "hopper": (
        "flash_attn_3", "flash_attn_4", "flash_attn_2", "xformers", "mslk", "flashinfer", "tensorrt_llm",
        *TRITON_BACKENDS, "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "reference",
    ),
    "ampere": (
        "flash_attn_2", "flash_attn_3", "flash_attn_4", "xformers", "mslk", "flashinfer", "tensorrt_llm",
        *TRITON_BACKENDS, "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "reference",
    ),
    "older": (
        "xformers", "mslk", "sdpa_efficient", "sdpa_flash", "sdpa_cudnn", "flash_attn_2", "flash_attn_3",
        "flash_attn_4", "flashinfer", "tensorrt_llm", *TRITON_BACKENDS, "reference",
    ),
    "amd": (*TRITON_BACKENDS, "sdpa_flash", "sdpa_efficient", "reference"),
    "cpu": ("cpu", "sdpa_cpu", "reference"),
    "other": ("reference",),
}  # fmt: skip

#: Queries a sequence up to which `gluon_hopper` goes behind `triton`: one query fills a 64th of its tile, and nobody
#: shares out the keys. 1.5 to 3.9 times the device's time on an H200 (bf16, 1 to 64 sequences of 8k and 32k keys,
#: vllm_accel/data/tables/nvidia_h200.json, 2026-12-01). Packed ones were not timed beside each other since `triton`
#: shares out their keys too, which took a quarter of its time before (docs/triton.md).
_FEW_QUERIES = 8

#: Head sizes up to which a forward pass takes `triton` before `gluon_hopper`: 0.55 to 1.10 of its time in the 12 points
#: of head size 64, without a mask, of vllm_accel/data/tables/nvidia_h200.json (2026-12-01), the less the shorter the
#: call; and its first call is there sooner.
_NARROW = 64
#: What goes behind `triton` on Hopper for decodes. Over pages these took 1.05 to 1.5 times its time with 16 and 32
#: sequences, and 2.2 to 7 times with one (benchmarks/results/h200/attention.json, 2026-11-30).
_SLOWER_DECODES = ("tensorrt_llm", "flashinfer", "flash_attn_4")
#: On Hopper `flash_attn_4` goes behind `gluon_hopper` for packed calls: 1.2 to 1.5 times its time in that file.
#: Operations of a forward pass, and of one with gradients, up to which a call on Hopper is over before the host has
#: launched `flash_attn_4`, which takes 95 us and 1.0 ms of Python there; ours take 20 to 40 us and 0.5 to 0.8 ms
#: (vllm_accel/data/tables/nvidia_h200.json, 2026-12-01).
_SHORT_FORWARD, _SHORT_TRAINING = 6e10, 4.5e11
#: The same for `gluon_hopper` (35 us) and `triton` (20 us).
_BRIEF_FORWARD = 1e10

#: `cublas` has no groups that leave the host alone. Our Triton kernel is before PyTorch's: it takes every form, scaling
#: and stride without a copy, at 0.97 to 1.40 times the speed of torch._grouped_mm on an H200
#: (docs/gemm_kernels.md).
_GEMM: tuple[str, ...] = (
    "cublas", "deep_gemm", "triton", "cutlass", "torch_grouped", "tensorrt_llm", "cpu", "reference",
)  # fmt: skip
#: Rows of an average group up to which our Triton kernel multiplies FP8 by blocks faster than CUTLASS, where that is
#: built: 1.4 times with 8 rows, 0.6 to 0.8 times with 128 to 1024 (H200, DeepSeek-V3 and Mixtral, 2026-11-30).
_FEW_ROWS = 64
#: On a CPU a loop that widens 16-bit groups beats PyTorch's own loop, which does not.
_GEMM_CPU: tuple[str, ...] = ("cpu", "torch_grouped", "reference")


def device_class(device: Device) -> str:
    """Return the row of the table that a device reads."""
    if device.platform == "rocm":
        return "amd"
    if device.platform == "cpu":
        return "cpu"
    if device.platform != "cuda" or device.compute_capability is None:
        return "other"
    major = device.compute_capability[0]
    if major >= 10:
        return "blackwell"
    return {9: "hopper", 8: "ampere"}.get(major, "older")


def shipped_order(op: str, device: Device, spec: Any = None) -> tuple[str, ...]:
    """Return the backends to try for an operation on a device, first one first.

    With a spec the order is that of its kind of call: `cpu` goes behind PyTorch's kernel where that alone has a matrix
    unit (`kernels.cpu.outrun`), `gluon_hopper` behind `triton` for decodes (`_FEW_QUERIES`), small heads (`_NARROW`)
    and very short calls (`_BRIEF_FORWARD`), others on Hopper behind ours for decodes (`_SLOWER_DECODES`), packed and
    short calls (`_SHORT_FORWARD`), `cutlass` before `triton` for groups in FP8 by blocks (`_FEW_ROWS`). Not with
    batch_invariant: no choice may depend on lengths then.
    """
    if op == "gemm":
        order = _GEMM_CPU if device.type == "cpu" else _GEMM
    else:
        order = _ATTENTION[device_class(device)]
    if spec is None or Feature.BATCH_INVARIANT in spec.features:
        return order
    if op == "gemm":
        by_blocks = spec.scaling_a is Scaling.BLOCK_1x128 and spec.form is Form.GROUPED_M
        return _behind("triton", "cutlass", order) if by_blocks and spec.m > _FEW_ROWS * spec.groups else order
    if device.platform == "cpu":
        from vllm_accel.kernels.cpu import outrun  # `import vllm_accel` loads no kernels

        return _behind("cpu", "sdpa_cpu", order) if outrun(spec) else order
    packed, grad = Feature.VARLEN in spec.features, Feature.GRAD in spec.features
    decode = spec.seqlen_q <= _FEW_QUERIES
    narrow = max(spec.head_dim, spec.head_dim_v) <= _NARROW and not grad
    operations = work_of(middle(spec))[0]
    if device_class(device) == "hopper":
        if packed:
            order = _behind("flash_attn_4", "gluon_hopper", order)
        if operations <= (_SHORT_TRAINING if grad else _SHORT_FORWARD):
            order = _behind("flash_attn_4", "triton", order)
        if decode:
            for name in _SLOWER_DECODES:
                order = _behind(name, "triton", order)
    brief = operations <= _BRIEF_FORWARD and not grad
    return _behind("gluon_hopper", "triton", order) if decode or narrow or brief else order


def _behind(name: str, other: str, order: tuple[str, ...]) -> tuple[str, ...]:
    """Return an order with one backend moved to just behind another; as it is without either of them."""
    if name not in order or other not in order:
        return order
    rest = [each for each in order if each != name]
    at = rest.index(other) + 1
    return (*rest[:at], name, *rest[at:])
