"""The order in which backends are tried where nothing was measured, as one readable table.

After the document "Acceleration Libraries for vLLM": FlashAttention first on Ampere and newer (3 before 2 on Hopper,
4 on Blackwell), xFormers as its fallback and first on V100 and T4, then our Triton kernels, then PyTorch's own.
"""

from __future__ import annotations

from typing import Any

from vllm_accel.dispatch.device import Device

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

#: Queries a sequence up to which `gluon_hopper` goes behind `triton`: one query fills a 64th of its tile and nothing
#: shares out the keys. 2 to 4 times as slow on an H200 (bf16, 1 to 64 sequences of 8k and 32k keys, 2026-11-30).
_FEW_QUERIES = 8

#: `cublas` has no groups that leave the host alone. Our Triton kernel is before PyTorch's: it takes every form, scaling
#: and stride without a copy, and printed 0.98 to 1.31 times the speed of torch._grouped_mm on an H200
#: (docs/gemm_kernels.md).
_GEMM: tuple[str, ...] = (
    "cublas", "deep_gemm", "triton", "cutlass", "torch_grouped", "tensorrt_llm", "cpu", "reference",
)  # fmt: skip
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
    unit (`kernels.cpu.outrun`), and `gluon_hopper` behind `triton` for decodes (`_FEW_QUERIES`).
    """
    if op == "gemm":
        return _GEMM_CPU if device.type == "cpu" else _GEMM
    order = _ATTENTION[device_class(device)]
    if "gluon_hopper" in order and spec is not None and spec.seqlen_q <= _FEW_QUERIES:
        others = [name for name in order if name != "gluon_hopper"]
        at = others.index("triton") + 1
        order = (*others[:at], "gluon_hopper", *others[at:])
    if device.platform == "cpu" and spec is not None:
        from vllm_accel.kernels.cpu import outrun  # `import vllm_accel` loads no kernels

        if outrun(spec):
            return ("sdpa_cpu", *(name for name in order if name != "sdpa_cpu"))
    return order
