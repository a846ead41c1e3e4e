"""What the matrix products of a model run on, for ``vllm-accel recommend``: `explain` is asked, on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vllm_accel.dispatch.device import Device

_T, _K, _N, _E = 4096, 4096, 4096, 8


def products(device: Device) -> list[dict[str, str]]:
    """Return, for the products of a layer, what runs them on a device and what to know about it.

    Packages count as installed where the device is not on this machine.

    Raises:
        ValueError: a wrong setting in the environment.
    """
    import vllm_accel

    rows = []
    for name, fn, args, kwargs in _calls(device):
        selection = vllm_accel.explain(fn, *args, **kwargs, device=device)
        chosen = selection.chosen
        about = "" if chosen is None else "; ".join(selection[chosen].notes)
        rows.append({"product": name, "runs": chosen or "nothing", "about": about})
    return rows


def _calls(device: Device) -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    import vllm_accel

    old = device.compute_capability is not None and device.compute_capability < (8, 0)
    dtype, name = (torch.float16, "fp16") if old else (torch.bfloat16, "bf16")
    a, b, offs = _meta(_T, _K, dtype=dtype), _meta(_E, _N, _K, dtype=dtype).mT, _meta(_E, dtype=torch.int32)
    yield f"dense, {name}", vllm_accel.gemm, (a, b[0]), {}
    yield f"tokens by expert, {name}", vllm_accel.grouped_gemm, (a, b, offs), {}
    e4m3 = torch.float8_e4m3fn
    scaled = (
        _meta(_T, _K, dtype=e4m3), _meta(_E, _N, _K, dtype=e4m3).mT, _meta(_T, _K // 128), "1x128",
        _meta(_E, _N // 128, _K // 128).mT, "128x128",
    )  # fmt: skip
    yield "tokens by expert, FP8 by blocks of 128", vllm_accel.scaled_gemm, scaled, {"offs": offs}
    layer = (a, _meta(_E, 2 * _N, _K, dtype=dtype).mT, _meta(_E, _K, _N, dtype=dtype).mT, _meta(_T, 2))
    yield f"a layer of experts, {name}", vllm_accel.fused_moe, (*layer, _meta(_T, 2, dtype=torch.int64)), {}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
