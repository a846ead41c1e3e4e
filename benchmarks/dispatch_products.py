"""The contest of matrix products in `python -m benchmarks.dispatch`: what the calls cost over what their plans hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Contest, Contestant
from benchmarks.dispatch_contests import N_TENSORS
from vllm_accel import gemm, grouped_gemm, quantize_fp8, scaled_gemm
from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.plan import Plan
from vllm_accel.ops.gemm_run import PLANS

#: Name of a contestant -> its call; "direct NAME" runs beside it.
CALLS = {
    "gemm": "gemm(a, b)",
    "gemm with bias": "gemm(a, b, bias)",
    "grouped_gemm": "grouped_gemm(a, weights, offs)",
    "scaled_gemm": "scaled_gemm(a8, b8, of_a, 'row', of_b, 'row')",
}
#: Microseconds that a call may cost over its kernel.
BOUNDS = {"gemm": 1.5, "gemm with bias": 2.5, "grouped_gemm": 4.0, "scaled_gemm": 5.0}


def _plan_of(call: Callable[[], Any]) -> Plan:
    PLANS.clear()
    call()
    (plan,) = PLANS.last.values()
    return plan


def products(device: torch.device) -> Contest:
    """Small products over the kernels that really run them; on a CPU a kernel for groups looks at their ends first."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    offs = torch.tensor([7, 7, 16], dtype=torch.int32, device=device)
    (a8, of_a), (b8, of_b) = (quantize_fp8(draw(16, 16), scaling="row") for _ in range(2))
    bias, weights = draw(16), draw(3, 16, 16)
    names: dict[str, Any] = {
        "rotation": [(draw(16, 16), draw(16, 16)) for _ in range(N_TENSORS)], "weights": weights, "offs": offs,
        "gemm": gemm, "grouped_gemm": grouped_gemm, "scaled_gemm": scaled_gemm, "bias": bias, "a8": a8, "b8": b8.t(),
        "of_a": of_a, "of_b": of_b,
    }  # fmt: skip
    operands = {"grouped_gemm": "a, weights", "scaled_gemm": "a8, b8"}
    args = {
        "gemm": GemmArgs(), "gemm with bias": GemmArgs(None, bias), "grouped_gemm": GemmArgs(offs),
        "scaled_gemm": GemmArgs(None, None, of_a, of_b),
    }  # fmt: skip
    contestants: dict[str, Contestant] = {}
    for i, (name, call) in enumerate(CALLS.items()):
        a, b = names["rotation"][0]
        with torch.no_grad():
            plan = _plan_of(lambda: eval(call, {**names, "a": a, "b": b}))  # noqa: B023
        names |= {f"forward{i}": plan.forward, f"args{i}": args[name]}
        direct = f"forward{i}({operands.get(name, 'a, b')}, args{i})"
        contestants |= {f"direct {name}": Contestant(direct, each="a, b"), name: Contestant(call, each="a, b")}
    return Contest(names, contestants)
