"""Measured tables for tests: rows of made-up times in the user's folder, and toy backends to choose between."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_accel import Device, explain
from vllm_accel.dispatch import measured
from vllm_accel.dispatch.capability import Capability
from vllm_accel.dispatch.device import detect
from vllm_accel.dispatch.selection import Selection
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.dispatch.table_file import Row, Table, Timing, save
from vllm_accel.ops.attention import attention

CPU = torch.device("cpu")


class Toy:
    """A backend that does plain attention on a CPU, sleeps, and counts its runs; `wrong` shifts its result."""

    def __init__(
        self, name: str, *, sleep: float = 0.0, wrong: float = 0.0, raises: str = "", **capability: Any
    ) -> None:
        self.name, self.sleep, self.wrong, self.raises, self.runs = name, sleep, wrong, raises, 0
        self.release = "1.0"
        wanted = {"dtypes": frozenset({torch.float32}), "features": ~Feature(0) & ~Feature.PAGED & ~Feature.FINITE_TAIL}
        self.capability = Capability(**{**wanted, **capability})

    def version(self) -> str:
        return self.release

    def unavailable_reason(self) -> None:
        return None

    def bind(self, spec: Any, device: Device) -> Toy:
        return self

    def forward(self, q: Any, k: Any, v: Any, args: Any) -> Any:
        self.runs += 1
        if self.raises:
            raise RuntimeError(self.raises)
        time.sleep(self.sleep)
        group = q.shape[2] // k.shape[2]
        q4, k4, v4 = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
        scores = q4 @ k4.transpose(-1, -2) * args.softmax_scale
        if args.causal:
            n_q, n_k = scores.shape[-2:]
            scores = scores.masked_fill(~torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q), -torch.inf)
        out = (torch.softmax(scores, -1) @ v4).transpose(1, 2).contiguous()
        return out + self.wrong, scores.logsumexp(-1), None


def asked(
    seqlen_q: int = 64, seqlen_k: int = 0, batch: int = 1, heads: int = 4, kv_heads: int = 4, **options: Any
) -> Any:
    """Return the arguments of `explain` for a dense call on the meta device."""
    q = torch.empty(batch, seqlen_q, heads, 16, device="meta")
    k = torch.empty(batch, seqlen_k or seqlen_q, kv_heads, 16, device="meta")
    return (attention, q, k, k), {"device": detect(CPU), **options}


def choice(seqlen_q: int = 64, seqlen_k: int = 0, **options: Any) -> Selection:
    """Explain a dense call on this CPU."""
    args, kwargs = asked(seqlen_q, seqlen_k, **options)
    return explain(*args, **kwargs)


def spec_of(seqlen_q: int = 64, seqlen_k: int = 0, **options: Any) -> AttentionSpec:
    """Return the spec of a dense call."""
    spec = choice(seqlen_q, seqlen_k, **options).spec
    assert isinstance(spec, AttentionSpec)
    return spec


def row(spec: Any, noise: float = 0.01, failed: dict[str, str] | None = None, **seconds: float) -> Row:
    """Return a row with these times."""
    return Row("attention", spec, {name: Timing(value, noise) for name, value in seconds.items()}, failed or {})


def table(*rows: Row, release: str = "1.0", **changed: Any) -> Table:
    """Return a table of this CPU; every backend but torch's own has version `release`."""
    torchs = str(torch.__version__)
    names = {name for r in rows for name in (*r.times, *r.failed)}
    own = {"reference", "sdpa_cpu"}
    versions = {f"attention:{name}": torchs if name in own else release for name in names}
    return replace(Table(measured.table_name(detect(CPU)), torchs, versions, rows=rows), **changed)


def write(made: Table, path: Path | None = None) -> Path:
    """Save a table as the user's, and let selection read it."""
    path = path or measured.user_file(detect(CPU))
    save(made, path)
    measured.forget()
    return path
