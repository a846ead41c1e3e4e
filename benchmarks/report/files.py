"""Result files of the benchmarks, told apart by what is in them, and their attention timings in one form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vllm_accel.tuning.shape import Shape

#: What a file is, by a key that only such a file has. A file without a known one is listed, not drawn.
KINDS = ("lengths", "sections", "known_bad")
_SHAPE_FIELDS = {f.name for f in fields(Shape)}


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One result file. kind: of `KINDS` or what else `kind_of` tells apart; data: as written."""

    path: Path
    kind: str
    data: Any

    @property
    def about(self) -> dict[str, Any]:
        """Return the machine, the versions, the date and the command."""
        about = self.data.get("about", {}) if isinstance(self.data, dict) else {}
        return about if isinstance(about, dict) else {}

    @property
    def hardware(self) -> str:
        """Name what was measured: the GPU, else the processor."""
        device = str(self.about.get("device", ""))
        if device.startswith("cpu"):  # "cpu (AVX2)"
            return str(self.about.get("cpu") or device)
        if "(" in device:  # "cuda:0 (NVIDIA H200, sm_90)"
            device = device.partition("(")[2].split(",")[0].rstrip(")")
        return str(self.about.get("gpu") or device or self.about.get("cpu") or "unknown hardware")

    @property
    def on_cpu(self) -> bool:
        """Tell whether a processor was measured."""
        device = str(self.about.get("device", ""))
        return device.startswith("cpu") or not (device or self.about.get("gpu"))

    @property
    def checked(self) -> bool:
        """Tell whether it says which backends were right, as a conformance file and `benchmarks.gpu_gemm` do."""
        return self.kind == "conformance" or (isinstance(self.data, dict) and bool(self.data.get("checks")))

    def caption(self) -> str:
        """Say in one line where a number comes from."""
        about = self.about
        versions = [f"torch {about['torch']}"] if about.get("torch") else []
        packages = about.get("packages")
        if isinstance(packages, dict):
            versions += [f"{name} {version}" for name, version in packages.items() if name not in ("vllm-accel",)]
        on_cpu = not about.get("gpu") and about.get("threads") and about.get("cores")
        cores = f"{about['threads']} of {about['cores']} cores" if on_cpu else ""
        parts = [self.hardware, cores, ", ".join(versions), str(about.get("date", ""))[:10],
                 str(about.get("command", "")), str(about.get("remark", ""))]  # fmt: skip
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Point:
    """One backend on one shape.

    Attributes:
        shape, dtype. backend: contestant. seconds. peak: bytes beyond the inputs, None if unknown.
        matmul, copy: what the machine gave in the same turns, in operations and bytes a second; None if unknown.
    """

    source: Source
    shape: Shape
    dtype: torch.dtype
    backend: str
    seconds: float
    peak: int | None
    matmul: float | None
    copy: float | None


def read(paths: Iterable[Path]) -> tuple[list[Source], list[str]]:
    """Read files and what is below folders; return those that are results, and why the others are not."""
    sources, rejected = [], []
    for path in paths:
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                rejected.append(f"{file.name}: {type(error).__name__}: {error}")
            else:
                sources.append(Source(file, kind_of(data), data))
    return sources, rejected


def kind_of(data: Any) -> str:
    """Tell what a result file holds, by what its first row has: one of the kinds, or "other", listed and not drawn."""
    if not isinstance(data, dict):
        return "other"
    for kind in KINDS:
        if isinstance(data.get(kind), list):
            return kind
    cases = data.get("cases")
    if isinstance(cases, dict) and cases and all(isinstance(found, dict) for found in cases.values()):
        return "conformance"  # of products, from `benchmarks.gemm --check`
    if isinstance(data.get("rates"), dict) and "ratio" in data:
        return "generate"
    if isinstance(data.get("checks"), list) and isinstance(data.get("timed"), list):
        return "gemm"
    first: dict[str, Any] = next((_first(data[name]) for name in _LISTS if name in data), {})
    if "outcome" in first and ("case" in first or "seconds_in_all" in first):
        return "conformance"
    if "shape" in first:
        return "gemm" if isinstance(first.get("seconds"), dict) else "shapes"
    if "extra" in first or "train" in _first(first.get("value")):
        return "memory"
    return "selection" if "regret" in first else "cpu" if "of_machine" in first else "other"


_LISTS = ("results", "shapes", "rows", "calls", "measured")


def _first(rows: Any) -> dict[str, Any]:
    return rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}


def points(sources: Iterable[Source]) -> Iterator[Point]:
    """Yield every time of attention in the files, one form for all."""
    for source in sources:
        if source.kind != "shapes":
            continue
        dtype = getattr(torch, str(source.data.get("dtype", "bfloat16")), torch.bfloat16)
        for report in source.data.get("shapes") or source.data.get("results") or []:
            if not isinstance(report.get("shape"), dict):
                continue
            shape = shape_of(report["shape"])
            matmul, copy = report.get("matmul_tflops"), report.get("copy_gbs")
            for result in report.get("results", []):
                if result.get("seconds"):
                    yield Point(
                        source, shape, dtype, result["name"], result["seconds"], result.get("peak"),
                        matmul * 1e12 if matmul else None, copy * 1e9 if copy else None,
                    )  # fmt: skip


def growth(source: Source) -> dict[str, list[tuple[int, int]]]:
    """Return (tokens, bytes beyond the inputs) of each kind of call of a memory file; " + backward" marks training."""
    found: dict[str, list[tuple[int, int]]] = {}
    for row in source.data.get("measured", ()) if source.kind == "memory" else ():  # of `benchmarks.memory`
        if row["extra"] and not row["error"]:
            name = row["case"].replace("_backward", " + backward")
            found.setdefault(name, []).append((row["seqlen"], row["extra"]))
    for kernel in source.data.get("results", ()) if source.kind == "memory" else ():  # of `benchmarks.gpu_triton`
        for one in kernel.get("value") or ():
            for key, name in (("forward", kernel["name"]), ("train", f"{kernel['name']} + backward")):
                found.setdefault(name, []).append((one["seqlen"], one[key]))
    return {name: sorted(values) for name, values in found.items()}


def shape_of(data: dict[str, Any]) -> Shape:
    """Return the shape that a file describes; what this version does not know of it is left out."""
    known = {name: value for name, value in data.items() if name in _SHAPE_FIELDS}
    known["lengths"] = tuple(tuple(pair) for pair in data.get("lengths", ()))
    return Shape(**known)
