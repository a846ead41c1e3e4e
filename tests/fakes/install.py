"""Puts a stand-in in the place where a program would import the real library.

``install(monkeypatch, name)`` with a name of ``NAMES``; pytest's monkeypatch takes it away again. Distribution versions
as ``importlib.metadata.version`` reports them are patched too. Set ``COMPUTE_CAPABILITY`` on the module returned for
xformers and mslk, and ``ARCH`` on the one for flash_attn_4, to pretend that the call runs on another GPU.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import torch

from fakes import (
    aten,
    flash_attn_2,
    flash_attn_2_ops,
    flash_attn_3,
    flash_attn_4,
    flashinfer,
    xformers_attn_bias,
    xformers_fmha,
)

NAMES = ("aten", "flash_attn_2", "flash_attn_3", "flash_attn_3_old", "flash_attn_4", "flashinfer", "mslk", "xformers")

_DISTRIBUTIONS = {
    "flash_attn_2": {"flash-attn": "2.8.3"},
    "flash_attn_3": {"flash-attn-3": "3.0.0", "flash_attn_3": "3.0.0"},
    "flash_attn_3_old": {"flash-attn-3": "3.0.0", "flash_attn_3": "3.0.0"},
    "flash_attn_4": {"flash-attn-4": "4.0.0b36", "flash_attn_4": "4.0.0b36"},
    "flashinfer": {"flashinfer-python": "0.7.2.post1"},
    "xformers": {"xformers": "0.0.35"},
    "mslk": {"mslk": "1.1.0", "mslk-cuda": "1.1.0"},
}


def install(monkeypatch: Any, name: str) -> ModuleType:
    """Install the stand-in ``name`` and return the module whose attributes decide what it pretends to be."""
    if name == "aten":
        for op, function in aten.OPERATORS.items():
            monkeypatch.setattr(torch.ops.aten, op, aten.Op(op, function), raising=False)
        return aten
    modules, source = _modules(name)
    for path, attributes in modules.items():
        module = ModuleType(path)
        module.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, path, module)
        parent, _, child = path.rpartition(".")
        if parent in sys.modules:
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    _report_versions(monkeypatch, _DISTRIBUTIONS[name])
    return source


def _public(module: ModuleType, **changes: Any) -> dict[str, Any]:
    names = {key: value for key, value in vars(module).items() if not key.startswith("__")}
    version = {"__version__": module.__version__} if hasattr(module, "__version__") else {}
    return {**names, **version, **changes}


def _modules(name: str) -> tuple[dict[str, dict[str, Any]], ModuleType]:
    """Return the attributes of every module to create, parents first, and the module they come from."""
    if name == "flash_attn_2":
        interface = {**_public(flash_attn_2_ops), **_public(flash_attn_2)}
        return {"flash_attn": _public(flash_attn_2), "flash_attn.flash_attn_interface": interface}, flash_attn_2
    if name in ("flash_attn_3", "flash_attn_3_old"):
        interface = _public(flash_attn_3)
        if name == "flash_attn_3_old":
            interface["_flash_attn_forward"] = flash_attn_3.old_flash_attn_forward
            interface["_flash_attn_backward"] = flash_attn_3.old_flash_attn_backward
        package = {"flash_attn_3": {"__version__": flash_attn_3.__version__}}
        extension = {"flash_attn_3._C": {}, "flash_attn_3.flash_attn_interface": interface}
        return {"flash_attn_interface": interface, **package, **extension}, flash_attn_3
    if name == "flash_attn_4":
        interface = _public(flash_attn_4)
        public = {key: interface[key] for key in ("flash_attn_func", "flash_attn_varlen_func", "__version__")}
        # flash_attn itself is a namespace package there, without __init__ and without functions.
        parent = {} if "flash_attn" in sys.modules else {"flash_attn": {}}
        return {**parent, "flash_attn.cute": public, "flash_attn.cute.interface": interface}, flash_attn_4
    if name == "flashinfer":
        public = _public(flashinfer)
        parts = ("flashinfer.decode", "flashinfer.mla", "flashinfer.prefill")
        return {"flashinfer": public, **dict.fromkeys(parts, public)}, flashinfer
    fmha = _public(xformers_fmha)
    masks = _public(xformers_attn_bias)
    if name == "xformers":
        ops = {**fmha, "memory_efficient_attention": xformers_fmha.memory_efficient_attention}
        return {
            "xformers": {"__version__": "0.0.35"}, "xformers.ops": ops, "xformers.ops.fmha": fmha,
            "xformers.ops.fmha.attn_bias": masks,
        }, xformers_fmha  # fmt: skip
    if name == "mslk":
        fmha = {**fmha, "__version__": "1.1.0"}
        fmha["memory_efficient_attention_partial"] = xformers_fmha.mslk_memory_efficient_attention_partial
        return {
            "mslk": {"__version__": "1.1.0"}, "mslk.attention": {}, "mslk.attention.fmha": fmha,
            "mslk.attention.fmha.attn_bias": masks,
        }, xformers_fmha  # fmt: skip
    raise ValueError(f"no fake is called {name!r}; there are {', '.join(NAMES)}")


def _report_versions(monkeypatch: Any, versions: dict[str, str]) -> None:
    real = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return versions[distribution_name] if distribution_name in versions else real(distribution_name)

    monkeypatch.setattr(importlib.metadata, "version", version)
