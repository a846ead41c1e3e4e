"""Attention for the tuner: dense, packed and paged calls as problems, and reading them from data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vllm_accel.dispatch import override
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.selection import Selection
from vllm_accel.ops.attention import attention, attention_varlen
from vllm_accel.ops.explain import explain
from vllm_accel.ops.paged import attention_paged
from vllm_accel.ops.warmup import warmup
from vllm_accel.tuning import check
from vllm_accel.tuning.measure import Attend, step
from vllm_accel.tuning.problem import dtype_of, plain
from vllm_accel.tuning.shape import Inputs, Shape


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """A shape in a dtype."""

    shape: Shape
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Return the shape's name."""
        return self.shape.name

    @property
    def work(self) -> float:
        """Return the operations of one call."""
        return self.shape.flops()

    @property
    def size(self) -> float:
        """Return the bytes of the tensors, gradients included."""
        return self.shape.bytes(self.dtype) * (3 if self.grad else 1)

    @property
    def grad(self) -> bool:
        """Tell whether a call is a forward with its backward."""
        return self.shape.kind == "train"

    @property
    def varies(self) -> bool:
        """Tell whether lengths keep changing: in everything but dense training."""
        return not self.grad or self.shape.packed

    @property
    def at(self) -> tuple[int, int, int]:
        """Return sequences, longest query and longest key length."""
        longest_q, longest_k = (max(column) for column in zip(*self.shape.sequences, strict=True))
        return len(self.shape.sequences), longest_q, longest_k

    def make(self, device: torch.device) -> Inputs:
        """Draw the tensors."""
        return self.shape.make(self.dtype, device)

    def explain(self, inputs: Inputs, device: Device | None = None) -> Selection:
        """Say who could run the call."""
        return explain(call_of(self.shape), inputs.q, inputs.k, inputs.v, device=device, **inputs.options)

    def step(self, inputs: Inputs, backend: str | None) -> Callable[[], list[Tensor]]:
        """Return a forward, or a forward with its backward."""
        return step(attend(self.shape, backend), self.shape, inputs)

    def warm_up(self, inputs: Inputs) -> tuple[str, ...]:
        """Build what is held back until it is built."""
        return warmup(call_of(self.shape), inputs.q, inputs.k, inputs.v, **inputs.options)

    def truth(self, inputs: Inputs) -> list[check.Part]:
        """Compute two groups of heads by the oracle."""
        return check.parts(self.shape, inputs)

    def verify(self, found: list[Tensor], truth: list[check.Part]) -> None:
        """Compare a result with the oracle's."""
        check.verify(found, truth)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return plain(self, "paged" if self.shape.block_size else "attention")


def call_of(shape: Shape) -> Callable[..., Any]:
    """Return the public call that a shape is for."""
    if shape.block_size:
        return attention_paged
    return attention_varlen if shape.lengths else attention


def attend(shape: Shape, backend: str | None) -> Attend:
    """Return the public call on one backend by its registry name (``triton`` is not its family), None for any."""
    fn = call_of(shape)
    if backend is None:
        return lambda i: fn(i.q, i.k, i.v, **i.options)
    variable, wanted = override.variable("attention"), (backend,)

    def call(i: Inputs) -> Tensor:
        token = variable.set(wanted)
        try:
            out: Tensor = fn(i.q, i.k, i.v, **i.options)
            return out
        finally:
            variable.reset(token)

    return call


def parse(data: Mapping[str, Any]) -> AttentionProblem:
    """Build a problem from the fields of a `Shape`, a dtype, and optionally a name.

    Raises:
        ValueError, TypeError: a field is unknown or of a wrong type, or the sizes make no call.
    """
    given = {name: value for name, value in data.items() if name not in ("op", "dtype")}
    known = {f.name: f for f in fields(Shape)}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(known)}")
    given["lengths"] = tuple((int(a), int(b)) for a, b in given.get("lengths", ()))
    for name, value in given.items():
        wanted: type = {"name": str, "kind": str, "causal": bool, "padded": bool, "lengths": tuple}.get(name, int)
        if type(value) is not wanted:
            raise ValueError(f"{name} has to be {wanted.__name__}, not {value!r}")
    if data.get("op") == "paged" and not given.get("block_size"):
        raise ValueError("a paged call needs block_size")
    dtype = dtype_of(data)
    given.setdefault("name", "")
    shape = Shape(**given)
    return AttentionProblem(shape if shape.name else Shape(**{**given, "name": label(shape, dtype)}), dtype)


def label(shape: Shape, dtype: torch.dtype) -> str:
    """Name a shape by what it is: ``prefill bf16 4x2048 8:2x64 causal``."""
    kind = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
    parts = [shape.kind, kind[str(dtype).removeprefix("torch.")]]
    batch, longest_q, longest_k = AttentionProblem(shape, dtype).at
    lengths = f"{longest_q}" if longest_q == longest_k else f"{longest_q}/{longest_k}"
    parts.append(f"{batch}x{lengths}")
    sizes = f"{shape.head_dim}" if shape.dim_v == shape.head_dim else f"{shape.head_dim}/{shape.dim_v}"
    parts.append(f"{shape.heads}:{shape.kv_heads}x{sizes}")
    if shape.block_size:
        parts.append(f"paged {shape.block_size}")
    elif shape.lengths:
        parts.append("packed")
    parts += ["causal"] if shape.causal else []
    parts += ["padded"] if shape.padded else []
    parts += [f"window {shape.window}"] if shape.window else []
    return " ".join(parts)
