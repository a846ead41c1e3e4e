"""What the doctor reads of the directories that hold compiled kernels, measured tables and verdicts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vllm_accel.cli.doctor_backends import Problem
from vllm_accel.cli.doctor_machine import read
from vllm_accel.cli.doctor_settings import settings_error
from vllm_accel.dispatch import measured, probed
from vllm_accel.dispatch.device import Device
from vllm_accel.kernels.triton import tiles, toolchain

_MIB = 1024**2


def cache_rows() -> list[dict[str, str]]:
    """Return one row per directory: where it is, on which file system, whether it can be written, what is free."""
    places: dict[str, tuple[Callable[[], Path | None], str]] = {
        "Triton": (toolchain.cache_dir, "compiled Triton kernels; TRITON_CACHE_DIR"),
        "torch.compile": (_inductor, "compiled graphs; TORCHINDUCTOR_CACHE_DIR"),
        "torch extensions": (_extensions, "what torch builds; TORCH_EXTENSIONS_DIR"),
        "FlashInfer": (_flashinfer, "kernels that FlashInfer compiles; FLASHINFER_WORKSPACE_BASE"),
        "measured tables": (measured.user_directory, "what `vllm-accel tune` writes; VLLM_ACCEL_TABLES"),
        "tile tables": (tiles.user_directory, "what `benchmarks.tile_search` writes"),
        "verdicts": (lambda: probed.user_file().parent, "what `vllm-accel doctor --probe` writes; VLLM_ACCEL_TABLES"),
    }
    return [{"cache": name, **_row(find), "for": use} for name, (find, use) in places.items()]


def problems(device: Device | None) -> list[Problem]:
    """Return the files of measurements and verdicts that do not count: choice goes on without them."""
    if settings_error() is not None:
        return []  # where the files are is a setting
    texts = [*(measured.ignored(device) if device is not None else ()), *filter(None, [probed.ignored()])]
    found = []
    for text in texts:
        what, _, action = text.rpartition(". ")
        found.append(Problem(what or text, action if what else f"measure again: {measured.COMMAND}", 1))
    return found


def _row(find: Callable[[], Path | None]) -> dict[str, str]:
    try:
        path = find()
    except Exception as error:  # a setting that is wrong, say: the settings' own check reports it
        return {"path": f"could not be read: {type(error).__name__}: {error}"}
    if path is None:
        return {"path": "set to nothing"}
    place = toolchain.existing(path)
    return {
        "path": str(path),
        "entries": read(lambda: sum(1 for _ in path.iterdir())) if path.is_dir() else "not there yet",
        "file system": read(lambda: _kind(path)),
        "free": read(lambda: f"{toolchain.free_space(place) // _MIB} MiB"),
        "writable": "yes" if os.access(place, os.W_OK | os.X_OK) else "NO",
    }


def _kind(path: Path) -> str:
    kind = toolchain.file_system(path) or "unknown"
    return f"{kind} (network: processes that share it can fail)" if toolchain.is_network(kind) else kind


def _inductor() -> Path:
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(given)
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # an older torch: then the row says so

    return Path(default_cache_dir())


def _extensions() -> Path:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path(os.path.expanduser("~")) / ".cache" / "torch_extensions"


def _flashinfer() -> Path:
    base = os.environ.get("FLASHINFER_WORKSPACE_BASE") or os.path.expanduser("~")
    return Path(base) / ".cache" / "flashinfer"
