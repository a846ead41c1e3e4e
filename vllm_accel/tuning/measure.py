"""What is timed of an attention call: a forward without gradients, or a forward with its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_accel.tuning.shape import Inputs, Shape

Attend = Callable[[Inputs], Tensor]


def step(attend: Attend, shape: Shape, inputs: Inputs) -> Callable[[], list[Tensor]]:
    """Return what is timed and checked of one contestant; it gives [out], or [out, dq, dk, dv] for training."""
    if shape.kind != "train":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [attend(inputs)]

        return forward

    def train() -> list[Tensor]:
        out = attend(inputs)
        return [out, *torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)]

    return train
