"""Specs as plain data and back, for files: dtypes and enum members by name, everything checked when it is read."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from typing import Any

import torch

from vllm_accel.dispatch.gemm_spec import GemmSpec
from vllm_accel.dispatch.spec import AttentionSpec

#: The spec of each operation.
SPECS: dict[str, type[Any]] = {"attention": AttentionSpec, "gemm": GemmSpec}

_TYPES = {op: typing.get_type_hints(kind) for op, kind in SPECS.items()}
_MOST = 1 << 40


def spec_to_json(spec: Any) -> dict[str, Any]:
    """Return a spec as plain data."""
    return {f.name: _plain(getattr(spec, f.name)) for f in dataclasses.fields(spec)}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, enum.Flag):
        return [flag.name.lower() for flag in type(value) if flag in value and flag.name]
    return value.name.lower() if isinstance(value, enum.Enum) else value


def spec_from_json(op: str, data: Any) -> Any:
    """Build the spec of `spec_to_json`.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, unknown or of a wrong type or range.
    """
    kind = SPECS[op]
    known = _TYPES[op]
    if not isinstance(data, dict):
        raise ValueError("it has to be an object")
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"unknown fields {unknown}")
    spec = kind(**{name: _field(known[name], name, value) for name, value in data.items()})
    if isinstance(spec, AttentionSpec):
        heads, kv_heads, sizes = spec.num_heads, spec.num_kv_heads, (spec.head_dim, spec.head_dim_v)
        # `compile_kind` has no lengths, but heads and sizes there are always.
        if not min(heads, kv_heads, *sizes) or heads % kv_heads:
            raise ValueError(f"{heads} heads over {kv_heads} of {sizes[0]}/{sizes[1]} do not exist")
    return spec


def _field(kind: Any, name: str, value: Any) -> Any:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    choices = typing.get_args(kind) if union else (kind,)
    if value is None and type(None) in choices:
        return None
    kind = next(choice for choice in choices if choice is not type(None))
    if kind is torch.dtype:
        dtype = getattr(torch, value, None) if isinstance(value, str) else None
        if isinstance(dtype, torch.dtype):
            return dtype
    elif issubclass(kind, enum.Flag):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return functools.reduce(lambda flags, item: flags | kind[item.upper()], value, kind(0))
    elif issubclass(kind, enum.Enum):
        for member in kind:
            if member.name.lower() == value:
                return member
    elif kind in (bool, str):
        if type(value) is kind:
            return value
    elif kind is int and type(value) is int and 0 <= value <= _MOST:
        return value
    raise ValueError(f"{name} is {value!r}, which is no {kind.__name__}")
