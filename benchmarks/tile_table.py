"""The user's own tile tables: read, changed by one entry and replaced at once, with where each entry comes from."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import torch

from vllm_accel.kernels.triton import tiles
from vllm_accel.kernels.triton.tiles import Tile


def is_done(kernel: str, key: str, arch: str, about: dict[str, Any]) -> bool:
    """Tell whether the table has this entry, found with the same GPU, torch and Triton."""
    data = _load(kernel)
    noted = data["provenance"].get(f"{arch} {key}", {})
    return key in data.get(arch, {}) and noted.get("with") == _with(about)


def write(kernel: str, key: str, tile: Tile, arch: str, about: dict[str, Any], seconds: float) -> None:
    """Put an entry into the table.

    Args:
        about: of `machine.about`. seconds: the time that made it the choice.
    """
    data = _load(kernel)
    data["provenance"][f"{arch} {key}"] = {
        "with": _with(about), "date": about["date"], "command": about["command"], "us": round(seconds * 1e6, 2),
    }  # fmt: skip
    data.setdefault(arch, {})[key] = list(tile if tile.maxnreg else tile[:4])
    text = json.dumps(data, indent=1)
    tiles.parse(text)
    folder = tiles.user_directory()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, folder / f"{kernel}.json")


def _load(kernel: str) -> dict[str, Any]:
    """Return the table; an empty one if there is none, or if it is broken and so ignored everywhere."""
    path = tiles.user_directory() / f"{kernel}.json"
    try:
        text = path.read_text(encoding="utf-8")
        tiles.parse(text)
    except (OSError, ValueError):
        return {"provenance": {}}
    data: dict[str, Any] = json.loads(text)
    return data


def _with(about: dict[str, Any]) -> str:
    built = torch.version.cuda or torch.version.hip
    return f"{about['gpu']}, triton {about['packages'].get('triton')}, torch {about['torch']}, CUDA or ROCm {built}"
