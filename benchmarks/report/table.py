"""The document's table (speed, memory, GPU compatibility, ease of use) with columns that were measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.report.choice_plots import regrets, seed_of, summary
from benchmarks.report.files import Source, points

#: The document's rows: label, the backends that are the library here, what the document says of its speed, memory,
#: compatibility and ease, and what using it takes.
LIBRARIES: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("Flash Attention", ("flash_attn_4", "flash_attn_3", "flash_attn_2"), "⚡⚡⚡⚡, ✅✅✅✅, Ampere+, ⭐⭐⭐⭐",
     "4: a wheel, compiles at the first call of a kind; 2: source or a wheel that fits torch exactly; 3: source"),
    ("xFormers", ("xformers", "mslk"), "⚡⚡⚡, ✅✅✅, most GPUs, ⭐⭐⭐⭐⭐",
     "a wheel, built for one CUDA major version"),
    ("Triton", ("triton", "gluon_hopper"), "⚡⚡⚡⚡, ✅✅✅, modern GPUs, ⭐⭐⭐",
     "comes with torch; our kernels compile at the first call of a kind, which takes a C compiler"),
    ("CUTLASS", ("gemm:cutlass",), "⚡⚡⚡⚡, ✅✅✅, NVIDIA, ⭐⭐⭐", "headers; built by nvcc in warmup"),
    ("TensorRT-LLM", ("tensorrt_llm", "flashinfer"), "⚡⚡⚡⚡⚡, ✅✅✅✅, NVIDIA, ⭐⭐",
     "through FlashInfer, which compiles or downloads at the first call of a kind"),
    ("cuBLAS (not in its table)", ("gemm:cublas",), "", "inside torch"),
    ("PyTorch (not in its table)", ("sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_cpu"), "",
     "inside torch"),
    ("our C++ CPU kernels (not in its table)", ("cpu",), "", "in the wheel, or a C++ compiler at installation"),
    ("reference (not in its table)", ("reference",), "", "inside this library"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One library on one hardware; every cell is text, "" where nothing was measured."""

    hardware: str
    library: str
    document: str
    time: str
    memory: str
    longest: str
    ran: str
    declared: str
    ease: str

    HEAD = ("library", "the document says", "time over the fastest", "peak memory over the least", "longest context",
            "conformance: ran / refused / wrong", "GPUs declared, of 11", "to use it")  # fmt: skip

    def cells(self) -> tuple[str, ...]:
        """Return the cells in the order of the head."""
        return (self.library, self.document, self.time, self.memory, self.longest, self.ran, self.declared, self.ease)


def table(sources: Sequence[Source]) -> dict[str, list[Row]]:
    """Return the table of each hardware that has attention timings."""
    made = {}
    for hardware in dict.fromkeys(source.hardware for source in sources if source.kind in ("shapes", "lengths")):
        own = [source for source in sources if source.hardware == hardware]
        made[hardware] = _rows(hardware, own)
    return made


def _rows(hardware: str, sources: Sequence[Source]) -> list[Row]:
    # Over a cache some backends gather first: another comparison than that of kernels.
    dense = [p for p in points(sources) if not p.shape.block_size]
    times = _over_best((p.shape.name, p.backend, p.seconds) for p in dense)
    peaks = _over_best((p.shape.name, p.backend, float(p.peak)) for p in dense if p.peak)
    on_gpu = any(source.about.get("gpu") for source in sources)
    rows = []
    for label, members, document, ease in LIBRARIES:
        row = Row(
            hardware, label, document, _each(members, times), _each(members, peaks), _longest(members, sources),
            _conformance(members, sources), _declared(members), ease,
        )  # fmt: skip
        if any((row.time, row.memory, row.longest, row.ran)) or (document and on_gpu):
            rows.append(row)
    return rows


def _over_best(found: Iterable[tuple[str, str, float]]) -> dict[str, tuple[float, int]]:
    """Return, for each backend, the geometric mean over shapes of its value over the best one, and of how many."""
    by_shape: dict[str, dict[str, float]] = defaultdict(dict)
    for shape, backend, value in found:
        if not backend.startswith(("attention()", "torch sdpa")):
            by_shape[shape][backend] = min(value, by_shape[shape].get(backend, math.inf))
    logs: dict[str, list[float]] = defaultdict(list)
    for row in by_shape.values():
        best = min(row.values())
        for backend, value in row.items():
            logs[backend].append(math.log(value / best))
    return {backend: (math.exp(sum(values) / len(values)), len(values)) for backend, values in logs.items()}


def _each(members: Sequence[str], found: dict[str, tuple[float, int]]) -> str:
    return "; ".join(f"{name} {found[name][0]:.2f}x ({found[name][1]} shapes)" for name in members if name in found)


def _longest(members: Sequence[str], sources: Sequence[Source]) -> str:
    """Return the longest length that ran, and what the device's memory holds by the bytes a token that were seen."""
    texts = []
    for source in [source for source in sources if source.kind == "lengths"][-1:]:
        sizes, memory = source.data.get("sizes", {}), source.data.get("memory", 0)
        for name in members:
            own = [one for one in source.data["lengths"] if one["backend"] == name and one.get("seconds")]
            if not own:
                continue
            last = max(own, key=lambda one: one["seqlen"])
            text = f"{name} ran {last['seqlen'] // 1024}k"
            if last.get("peak") and memory:
                inputs = 2 * (sizes["heads"] + 2 * sizes["kv_heads"]) * sizes["head_dim"]
                fits = memory / (last["peak"] / last["seqlen"] + inputs)
                text += f", {fits / 2**20:.1f}M tokens fit by its bytes a token"
            texts.append(text)
    return "; ".join(texts)


def _conformance(members: Sequence[str], sources: Sequence[Source]) -> str:
    counts: dict[str, dict[str, int]] = {}
    for source in sources:
        if source.checked:
            for backend, outcome in outcomes(source):
                if backend in members and outcome in ("ran", "refused", "failed", "wrong"):
                    count = counts.setdefault(backend, {"ran": 0, "refused": 0, "wrong": 0})
                    count["wrong" if outcome == "failed" else outcome] += 1
    did = {name: c for name, c in counts.items() if c["ran"] or c["wrong"]}
    return "; ".join(f"{name} {c['ran']} / {c['refused']} / {c['wrong']}" for name, c in did.items())


def outcomes(source: Source) -> list[tuple[str, str]]:
    """Return (backend, outcome) of each case of a conformance file; "gemm:x" for a backend of products."""
    if cases := source.data.get("cases"):  # of `benchmarks.gemm --check`
        texts = [(f"gemm:{backend}", text) for backend, found in cases.items() for text in found.values()]
        words = {"right": "ran", "refused": "refused", "FAILED": "failed", "not": "unavailable"}
        return [(backend, words[text.split(" ")[0].rstrip(":")]) for backend, text in texts]
    if checks := source.data.get("checks"):  # of `benchmarks.gpu_gemm`: "triton without TMA" is triton
        return [(f"gemm:{row['engine'].split(' ')[0]}", "ran" if row["ok"] else "failed") for row in checks]
    rows = source.data["results"]
    return [(str(row.get("backend") or str(row.get("name", "")).split(" ")[0]), str(row["outcome"])) for row in rows]


def _declared(members: Sequence[str]) -> str:
    """Return on how many of the described GPUs a backend takes a plain causal prefill in fp16."""
    from vllm_accel.dispatch import registry
    from vllm_accel.dispatch.device import PRESETS

    gpus = [device for device in PRESETS.values() if device.type == "cuda"]
    texts = []
    for name in members:
        op, _, short = name.rpartition(":")
        if (op or "attention", short) in registry.BUILT_IN:
            capability = registry.get(op or "attention", short).capability
            texts.append(f"{short} {sum(not capability.device_reasons(gpu) for gpu in gpus)}")
    return "; ".join(texts)


def regret_line(sources: Sequence[Source]) -> str:
    """Say in one line what automatic choice costs on one machine, empty without a selection file."""
    texts = []
    for source in sources:
        rows = regrets(source) if source.kind == "selection" else []
        if rows:
            ours, fixed = (summary([getattr(row, name) for row in rows]) for name in ("ours", "fixed"))
            texts.append(f"{len(rows)} unseen calls{seed_of(source)}, {ours}; the shipped order: {fixed}")
    return "; ".join(texts)
