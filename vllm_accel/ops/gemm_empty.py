"""The answer where there is nothing to multiply: zeros, and the bias of rows that belong to a group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import GemmArgs
from vllm_accel.dispatch.gemm_spec import Form, GemmSpec
from vllm_accel.dispatch.offsets import group_of_rows


class EmptyGemm(NamedTuple):
    """Zeros in the shape of a product, with its bias: what a sum over nothing gives."""

    form: Form = Form.DENSE
    out_dtype: torch.dtype = torch.float32

    def at(self, spec: GemmSpec) -> EmptyGemm:
        """Return the same for a kind of call."""
        return EmptyGemm(spec.form, spec.out_dtype)

    def forward(self, a: Tensor, b: Tensor, args: GemmArgs) -> Tensor:
        """Return zeros, plus the bias where there is one."""
        m, n = a.shape[-2], b.shape[-1]
        groups = b.shape[0] if b.dim() == 3 else 0 if args.offs is None else args.offs.shape[0]
        lead = (groups,) if self.form in (Form.GROUPED_K, Form.BATCHED) else ()
        out = a.new_zeros((*lead, m, n), dtype=self.out_dtype)
        if args.bias is None or not groups * out.numel():
            return out if args.bias is None else out + (args.bias if self.form is Form.DENSE else 0)
        if args.offs is None:
            return out + args.bias.unsqueeze(1)
        row = group_of_rows(args.offs, m)
        return torch.where((row < groups).unsqueeze(1), args.bias[row.clamp(max=groups - 1)], out)


EMPTY = EmptyGemm()
