"""What to install for which GPU, as data: the groups of "Acceleration Libraries for vLLM", and what it leaves out.

Facts about packages were read from their files or tried in November 2026; each one that could not be tried says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_accel.dispatch.device import Device


@dataclass(frozen=True, slots=True)
class Package:
    """One thing to install.

    Attributes:
        command: for a shell; ``{wheel_url}`` is the prebuilt flash-attn wheel for this torch.
        why: what it brings. notes: what to know before.
        backends: the backends of this library that use it, as "operation:name".
    """

    command: str
    why: str
    backends: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """A set-up for a kind of GPU. packages: to install; production, optional: keys of `PACKAGES` as well."""

    name: str
    source: str
    why: str
    packages: tuple[str, ...] = ()
    production: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


TORCH_VOLTA = 'pip install "torch<2.15"  # the cu126 build: https://pytorch.org/get-started/previous-versions'

PACKAGES: dict[str, Package] = {
    "torch-volta": Package(
        TORCH_VOLTA,
        "a torch build that still carries sm_70: CUDA 13 dropped it, the CUDA 12.6 builds keep it until torch 2.14",
        ("attention:sdpa_efficient", "attention:reference"),
        (
            "torch 2.14 is announced as the last release with CUDA 12 builds; from 2.15 on sm_70 means building torch "
            "from source (https://github.com/pytorch/pytorch/issues/190385).",
            "`vllm-accel doctor` shows which architectures the installed build carries.",
        ),
    ),
    "flash-attn-wheel": Package(
        "pip install {wheel_url}",
        "FlashAttention 2, prebuilt: seconds instead of hours",
        ("attention:flash_attn_2",),
        (
            "A 404 means that the project has no wheel for this torch, CUDA and Python: "
            "https://github.com/Dao-AILab/flash-attention/releases lists what it has. The name must fit exactly.",
        ),
    ),
    "flash-attn": Package(
        "pip install flash-attn --no-build-isolation",
        "FlashAttention 2: the fastest attention on Ampere and newer, before xFormers and PyTorch's kernels",
        ("attention:flash_attn_2",),
        (
            "Only if the wheel above does not exist. The package index has sources only: this asks the releases page "
            "for a wheel of its own version and, without one, compiles: hours on few cores, and several GB of memory "
            "per job (MAX_JOBS=4 limits them).",
            "It needs nvcc, ninja and an installed CUDA build of torch; with a CPU build of torch it fails.",
        ),
    ),
    "flash-attn-3": Package(
        "python setup.py install  # in hopper/ of https://github.com/Dao-AILab/flash-attention",
        "FlashAttention 3, for Hopper only; taken before FlashAttention 2 there",
        ("attention:flash_attn_3",),
        (
            "flash-attn-3 0.0.0 on the package index is an empty placeholder: pip install flash-attn-3 brings nothing. "
            "Users report wheels for CUDA 12 on PyTorch's own wheel index "
            "(https://github.com/KellerJordan/modded-nanogpt/issues/258); not tried by us.",
        ),
    ),
    "flash-attn-4": Package(
        'pip install "flash-attn-4>=4.0.0b36" nvidia-cutlass-dsl triton',
        "FlashAttention 4: compiled on the machine at first use, no build, no wheel to match",
        ("attention:flash_attn_4",),
        (
            "flash-attn-4 is a pre-release. It needs nvidia-cutlass-dsl, and triton without declaring it.",
            "With flash-attn-4 and no flash-attn, `import xformers.ops` fails: install flash-attn too, or no xFormers.",
        ),
    ),
    "xformers": Package(
        "pip install xformers",
        "memory-efficient attention back to V100, masks and biases; the fallback for FlashAttention",
        ("attention:xformers", "attention:mslk"),
        (
            "xformers 0.0.35 needs torch 2.10 or newer: with an older torch pip replaces your torch.",
            "Its wheel is built for CUDA 12.8 and carries sm_75, sm_80 with PTX, and sm_90a. With a CUDA 13 torch it "
            "does not load and refuses every call; with nvidia-cuda-runtime-cu12 on LD_LIBRARY_PATH it ran (torch "
            "2.11.0+cu130 on an H200, 2026-11-23).",
        ),
    ),
    "triton": Package(
        "pip install triton",
        "the compiler of Triton kernels; sm_80 and newer, and AMD",
        ("attention:triton", "attention:gluon_hopper", "gemm:triton"),
        (
            "A CUDA build of torch has already installed the one release that fits it; do not upgrade it. "
            "A C compiler and Python.h are needed at run time: `vllm-accel doctor` looks for both.",
        ),
    ),
    "nvidia-cutlass": Package(
        "pip install nvidia-cutlass",
        "CUTLASS: C++ headers for grouped and quantised matrix products (mixture of experts)",
        ("gemm:cutlass",),
        ("These are headers (4.2 carries them); compiling with them needs nvcc.",),
    ),
    "deep-gemm": Package(
        "./install.sh  # in a recursive clone of https://github.com/deepseek-ai/DeepGEMM",
        "DeepGEMM: e4m3 products by blocks of 128, dense and by expert, for Hopper",
        ("gemm:deep_gemm",),
        ("It needs nvcc 12.9 at run time too: kernels are compiled at their first call. Not tried by us.",),
    ),
    "tensorrt-llm": Package(
        "docker run --gpus all <the TensorRT-LLM release image of the NVIDIA NGC catalogue>",
        "TensorRT-LLM, NVIDIA's engine: the document's choice for maximum performance on H100",
        ("attention:tensorrt_llm", "gemm:tensorrt_llm"),
        (
            "tensorrt-llm on the package index is a stub that fetches the real wheel from NVIDIA's own index. "
            "See https://github.com/NVIDIA/TensorRT-LLM for the tag and the NGC account.",
            "It is a whole inference engine; flashinfer-python carries its attention kernels alone.",
        ),
    ),
    "torch-rocm": Package(
        "pip install torch  # the ROCm build: https://pytorch.org/get-started/locally",
        "the ROCm build of torch brings Triton and PyTorch's own attention kernels for this GPU",
        ("attention:sdpa_flash", "attention:triton"),
        ("Not tried by us: no AMD GPU was available.",),
    ),
}

_DOCUMENT = '"Acceleration Libraries for vLLM", Recommended Setup: '
_FLASH = ("flash-attn-wheel", "flash-attn")

GROUPS: dict[str, Group] = {
    "datacenter": Group(
        "A100 / H100 (best performance)",
        _DOCUMENT + "For A100/H100",
        "FlashAttention runs here (Ampere and newer); Triton and CUTLASS add kernels that pay on these GPUs.",
        (*_FLASH, "triton", "nvidia-cutlass"),
    ),
    "hopper": Group(
        "H100 / H200 (best performance, production)",
        _DOCUMENT + "For A100/H100, and For Production",
        "FlashAttention runs here (Ampere and newer), 3 before 2 on Hopper; Triton and CUTLASS add kernels that pay.",
        (*_FLASH, "triton", "nvidia-cutlass"),
        ("tensorrt-llm",),
        ("flash-attn-3", "flash-attn-4", "deep-gemm"),
    ),
    "consumer": Group(
        "RTX 3080 / 3090 / 4080 / 4090 (consumer GPU)",
        _DOCUMENT + "For RTX 3090/4090",
        "FlashAttention 2 runs on Ampere and Ada; xFormers is its fallback, for masks and biases too.",
        (*_FLASH, "xformers"),
    ),
    "turing": Group(
        "T4 (older GPU)",
        _DOCUMENT + "For V100/T4",
        "FlashAttention needs Ampere or newer, Triton kernels sm_80; xFormers runs on Turing.",
        ("xformers",),
        notes=("Prefer fp16: this GPU has no tensor cores for bf16.",),
    ),
    "volta": Group(
        "V100 (older GPU)",
        _DOCUMENT + "For V100/T4",
        "FlashAttention needs Ampere or newer, Triton kernels sm_80; xFormers is the choice left.",
        ("torch-volta", "xformers"),
        notes=(
            "The xformers 0.0.35 wheel has no sm_70 code of its own: on V100 it can only call the memory-efficient "
            "kernels of a torch that carries sm_70. Nothing in this list was tried on a V100.",
            "Prefer fp16: this GPU has no tensor cores for bf16.",
        ),
    ),
    "blackwell": Group(
        "B200 (newer than the document)",
        "not in the document: the library's own order for Blackwell, FlashAttention 4 first",
        "FlashAttention 4 is written for this GPU; Triton and CUTLASS add kernels; FlashAttention 3 cannot run here.",
        ("flash-attn-4", *_FLASH, "triton", "nvidia-cutlass"),
        ("tensorrt-llm",),
        notes=("Nothing in this list was tried on a B200.",),
    ),
    "newer": Group(
        "an NVIDIA GPU newer than the lists of the libraries",
        "not in the document",
        "Nothing to install: PyTorch's own kernels run on what torch was built for. A library that does not list this "
        "GPU is refused with the reason, because some end the process on it.",
        notes=("`vllm-accel explain --q 1,4096,32,128 --causal` shows what each backend says about this GPU.",),
    ),
    "ancient": Group(
        "an NVIDIA GPU before Volta",
        "not in the document",
        "No attention library here supports it; the reference runs wherever torch does.",
        notes=("The CUDA 12.6 builds of torch, up to 2.14, are the last with code for Maxwell and Pascal.",),
    ),
    "amd": Group(
        "AMD Instinct",
        "not in the document",
        "The NVIDIA packages do not run here; PyTorch's ROCm build carries what does.",
        ("torch-rocm",),
    ),
    "apple": Group(
        "Apple GPU",
        "not in the document",
        "Nothing to install: no attention library here supports Apple GPUs; the reference runs there through PyTorch.",
    ),
    "cpu": Group(
        "no GPU",
        "not in the document",
        "Nothing to install: PyTorch's flash kernel for CPUs is in every torch.",
    ),
}


_EXACT = {
    (7, 0): "volta", (7, 2): "volta", (7, 5): "turing", (8, 0): "datacenter", (9, 0): "hopper", (10, 0): "blackwell",
}  # fmt: skip


def group_for(device: Device) -> Group:
    """Return the set-up for a device, by what it is and not by its name."""
    capability = device.compute_capability
    if capability is None:
        return GROUPS[{"rocm": "amd", "mps": "apple"}.get(device.platform, "cpu")]
    if capability in _EXACT:
        return GROUPS[_EXACT[capability]]
    if capability[0] == 8:
        return GROUPS["consumer"]
    return GROUPS["ancient" if capability < (7, 0) else "newer"]
