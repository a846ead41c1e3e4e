"""What the doctor reads of the environment: our settings and what they do, others' variables, installed packages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec

import torch

from vllm_accel.cli.doctor_backends import Problem
from vllm_accel.cli.doctor_machine import package_version
from vllm_accel.dispatch import registry
from vllm_accel.dispatch import settings as names

UNSET = "not set"

#: What a setting does when it is set, and when it is not.
EFFECTS: dict[str, tuple[str, str]] = {
    names.ATTENTION: ("attention without backend= runs one of these or raises", "attention is chosen automatically"),
    names.GEMM: ("products without backend= run one of these or raise", "products are chosen automatically"),
    names.DISABLED: ("these never run, not even by name", "every backend may run"),
    names.TRITON: (
        "1: automatic choice of attention takes our Triton kernels where they can run on a GPU; 0: it never does",
        "Triton kernels compete with the others",
    ),
    names.CHECK: (
        "1: values inside GPU tensors (cu_seqlens) are checked too, at the price of a synchronisation",
        "values inside tensors are checked on the CPU only",
    ),
    names.LIFT: ("these rows of the known-bad list refuse nothing", "every row of the known-bad list applies"),
    names.TABLES: ("your measured tables are in this folder", "your measured tables are in the user's cache folder"),
}

#: Variables of other projects that people expect something from.
FOREIGN: dict[str, str] = {
    "VLLM_ATTENTION_BACKEND": "not read here: VLLM_ACCEL_ATTENTION_BACKEND is. vLLM from 0.26 on is reported not to "
    "read it either (https://github.com/vllm-project/vllm/issues/50292)",
    "VLLM_FLASH_ATTN_VERSION": "vLLM's own; not read here: name flash_attn_2, _3 or _4 in VLLM_ACCEL_ATTENTION_BACKEND",
    "DIFFUSERS_ATTN_BACKEND": "diffusers' own; not read here",
    "NVTE_FLASH_ATTN": "Transformer Engine's own; not read here",
    "NVTE_FUSED_ATTN": "Transformer Engine's own; not read here",
    "CUBLAS_WORKSPACE_CONFIG": "reproducible cuBLAS products, and the memory their workspace takes; it does not turn "
    "Tensor Cores on. It has to be set before CUDA starts",
    "NVIDIA_TF32_OVERRIDE": "0 switches TF32 off in NVIDIA's libraries, whatever torch says",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "torch starts with TF32 allowed; fp32 attention follows torch's flag",
    "TORCH_CUDA_ARCH_LIST": "architectures for extensions built from source; does not change what this torch carries",
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "1: PyTorch's flash kernels on AMD GPUs where they are experimental",
    "TRITON_PTXAS_PATH": "Triton assembles with this program instead of its own",
    "TRITON_CACHE_DIR": "where Triton keeps compiled kernels",
    "TRITON_HOME": "Triton's cache is in .triton/cache under it",
    "TRITON_INTERPRET": "1: Triton kernels run in Python on the CPU, very slowly; vllm_accel never sets it",
    "CC": "the C compiler that Triton calls",
    "CUDA_HOME": "where builds look for nvcc; torch brings its own CUDA libraries and does not need it",
    "CUDA_PATH": "as CUDA_HOME",
    "CUDA_VISIBLE_DEVICES": "the GPUs that this process sees",
    "HIP_VISIBLE_DEVICES": "the AMD GPUs that this process sees",
    "CUDA_LAUNCH_BLOCKING": "1: every launch waits for its kernel; for finding errors, slow",
    "PYTORCH_CUDA_ALLOC_CONF": "torch's memory allocator; no influence on the choice",
    "PYTORCH_ALLOC_CONF": "torch's memory allocator; no influence on the choice",
    "MAX_JOBS": "parallel compilations when flash-attn is built",
    "OMP_NUM_THREADS": "threads of CPU kernels",
}
FOREIGN_PREFIXES = {
    "XFORMERS_": "xFormers' own; not read here",
    "FLASH_ATTENTION_": "read by flash-attn, mostly when it is built; not read here",
    "FLASHINFER_": "FlashInfer's own; not read here",
}

PACKAGES = (
    "torch", "triton", "pytorch-triton-rocm", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers", "mslk",
    "mslk-cuda", "flashinfer-python", "flashinfer-cubin", "flashinfer-jit-cache", "nvidia-cutlass",
    "nvidia-cutlass-dsl", "tensorrt-llm", "sageattention", "kernels", "transformer-engine", "torchao", "transformers",
    "diffusers", "vllm", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cublas-cu12", "numpy",
)  # fmt: skip


def setting_rows(environ: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """Return every setting with its value, its effect, and whether it changed since it was read."""
    changed = _changed()
    rows = []
    for name in names.NAMES:
        value = environ.get(name)
        when_set, when_unset = EFFECTS.get(name, ("", ""))
        effect = when_unset if value is None else when_set
        if value is not None and name == names.TRITON and not _has_gpu():
            effect = "no effect: there is no GPU here"
        rows.append({"setting": name, "value": UNSET if value is None else value, "effect": effect})
    rows += [
        {"setting": name, "value": environ[name], "effect": f"not a setting{registry.suggestion(name, names.NAMES)}"}
        for name in _unknown(environ)
    ]
    for row in rows:
        if row["setting"] in changed:
            row["effect"] += "; changed since it was read, reload_settings() takes it over"
    return rows


def _unknown(environ: Mapping[str, str]) -> list[str]:
    return sorted(name for name in environ if name.startswith(names.PREFIX) and name not in names.NAMES)


def settings_error() -> str | None:
    """Return what reading the settings raises, None if they are well-formed."""
    try:
        names.settings()
    except ValueError as error:
        return str(error)
    return None


def _changed() -> tuple[str, ...]:
    try:
        return names.changed_since_read()
    except ValueError:  # a wrong value; the verdict says which
        return ()


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def problems(environ: Mapping[str, str] = os.environ) -> list[Problem]:
    """Return the settings that make every call raise, and those that do not do what their owner expects."""
    found = [
        Problem(
            f"{name} is not a setting{registry.suggestion(name, names.NAMES)}. Every call raises until it is gone",
            f"rename or unset {name}",
            2,
        )
        for name in _unknown(environ)
    ]
    if not found and (error := settings_error()):
        found.append(Problem(f"every call raises: {error}", "correct or unset that variable", 2))
    if environ.get(names.TRITON) is not None and not _has_gpu():
        text = f"{names.TRITON} is set and has no effect: there is no GPU here"
        found.append(Problem(text, f"unset {names.TRITON}", 1))
    for name in _changed():
        text = f"{name} has changed since it was read and does not count yet"
        found.append(Problem(text, "call vllm_accel.reload_settings()", 1))
    return found


def foreign_rows(environ: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """Return the variables of other projects that are set, with what they do here."""
    rows = []
    for name in sorted(environ):
        prefix = next((p for p in FOREIGN_PREFIXES if name.startswith(p)), None)
        effect = FOREIGN.get(name) or (FOREIGN_PREFIXES[prefix] if prefix else None)
        if effect is None:
            continue
        if name == "CUBLAS_WORKSPACE_CONFIG":
            effect += f"; in this process CUDA has {'' if torch.cuda.is_initialized() else 'not '}started"
        rows.append({"variable": name, "value": environ[name], "effect": effect})
    return rows


def package_rows() -> list[dict[str, str]]:
    """Return the versions of the packages that matter here, those that are not installed in one row."""
    versions = {name: package_version(name) for name in PACKAGES}
    notes = {"flash-attn-3": "an empty placeholder: nothing to run" if versions["flash-attn-3"] == "0.0.0" else ""}
    rows = [{"package": n, "version": v, "note": notes.get(n, "")} for n, v in versions.items() if v is not None]
    if find_spec("flash_attn_interface") is not None:
        rows.append({"package": "flash_attn_interface", "version": "", "note": "FlashAttention 3's module is there"})
    absent = ", ".join(name for name, version in versions.items() if version is None)
    return [*rows, {"package": "not installed", "version": "", "note": absent}]
