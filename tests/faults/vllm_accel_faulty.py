"""Backends with one fault each, as a third party's package may have them; `install` gives them entry points.

Everything but the fault is PyTorch's CPU kernel.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_accel.backends.sdpa_cpu import BACKEND as GOOD
from vllm_accel.errors import Reason

VERSION = "1.2.3"


class Faulty:
    """A backend that does what its fault says, at the moment that its fault says."""

    def __init__(self, fault: str) -> None:
        self.name = f"faulty_{fault}"
        self.fault = fault
        self.capability = replace(GOOD.capability, platforms=frozenset({"cpu"}))

    def version(self) -> str | None:
        return VERSION

    def unavailable_reason(self) -> Reason | None:
        match self.fault:
            case "check_raises":
                raise OSError("GLIBC_2.32 not found")
            case "check_exits":
                sys.exit("this GPU is not supported")
            case "check_hangs":
                time.sleep(3600)
            case "check_kills":
                os.abort()
        return None

    def bind(self, spec: Any, device: Any) -> Any:
        if self.fault == "bind_raises":
            raise RuntimeError("no kernel for this spec")
        return Kernel(self.fault, GOOD.bind(spec, device))


class Kernel:
    def __init__(self, fault: str, good: Any) -> None:
        self.fault, self.good = fault, good

    def forward(self, q: Any, k: Any, v: Any, args: Any) -> Any:
        out, lse, rng = self.good.forward(q, k, v, args)
        match self.fault:
            case "launch_raises":
                raise RuntimeError("invalid configuration argument")
            case "launch_kills":
                os.abort()
            case "launch_hangs":
                time.sleep(3600)
            case "nan":
                out = torch.full_like(out, float("nan"))
            case "shape":
                out = out[..., :-1].contiguous()
        return out, lse, rng

    def backward(self, *given: Any) -> Any:
        grads = self.good.backward(*given)
        return grads._replace(dq=grads.dq * 1.5) if self.fault == "gradient" else grads


FAULTS = (
    "check_raises", "check_exits", "check_hangs", "check_kills", "bind_raises", "launch_raises", "launch_kills",
    "launch_hangs", "nan", "shape", "gradient", "none",
)  # fmt: skip
for _fault in FAULTS:
    globals()[_fault] = Faulty(_fault)


def install(folder: Path, *faults: str) -> str:
    """Make a folder look like an installed package with these backends; return a PYTHONPATH that has it."""
    info = folder / f"vllm_accel_faulty-{VERSION}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-accel-faulty\nVersion: {VERSION}\n")
    lines = [f"attention.faulty_{fault} = vllm_accel_faulty:{fault}" for fault in faults]
    lines.append("attention.faulty_import = vllm_accel_no_such_module:BACKEND")
    (info / "entry_points.txt").write_text("\n".join(["[vllm_accel.backends]", *lines, ""]))
    own = Path(__file__).parent
    return os.pathsep.join([str(folder), str(own), str(own.parent.parent), os.environ.get("PYTHONPATH", "")])
