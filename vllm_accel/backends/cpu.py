"""The backend `cpu`: our C++ kernels, built when the package is installed on a machine with a compiler."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import vllm_accel
from vllm_accel.backends.convert import sinks_grad, unit_inner, window
from vllm_accel.backends.cpu_paged import KV_DTYPES, CpuPagedKernel, bind_paged, out_dtype
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads
from vllm_accel.dispatch.capability import Capability, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import PROMISES, AttentionSpec, Feature
from vllm_accel.errors import Reason
from vllm_accel.kernels.cpu import load, outrun, type_code

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _no_fp8_gradients(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.GRAD in spec.features and spec.dtype in _FP8:
        return "has no gradients for FP8 inputs"
    return None


def _instructions() -> str | None:
    found = load()
    return None if found.reason else f"instruction set {found.module.instruction_sets()[0]}"


class CpuBackend:
    """The backend `cpu`."""

    name = "cpu"
    capability = Capability(
        platforms=frozenset({"cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, *_FP8}),
        features=functools.reduce(lambda a, b: a | b, Feature) & ~(PROMISES | Feature.DROPOUT),
        kv_dtypes=KV_DTYPES,
        rules=(Rule("fp8_grad", _no_fp8_gradients),),
        device_notes=(
            Rule("instructions", lambda spec, _: _instructions()),
            Rule("matrix_unit", lambda spec, _: outrun(spec)),
        ),
    )

    def version(self) -> str | None:
        """Return the version, the instruction set and what tells the kernels' sources: measurements hang on all."""
        found = load()
        if found.reason is not None:
            return None
        return f"{vllm_accel.__version__}+{found.module.instruction_sets()[0]}.{found.module.sources()}"

    def unavailable_reason(self) -> Reason | None:
        """Say why the extension cannot be used: not built, or no OpenMP runtime of torch."""
        reason = load().reason
        return None if reason is None else Reason("not_built", reason)

    def bind(self, spec: AttentionSpec, device: Device) -> CpuKernel | CpuPagedKernel:
        """Return the kernel of these dtypes."""
        if Feature.PAGED in spec.features:
            return bind_paged(spec)
        return CpuKernel(spec.dtype, bias_grad=Feature.BIAS_GRAD in spec.features)


class CpuKernel:
    """One call of the extension. `isa` counts the machine's instruction sets, best first."""

    def __init__(self, dtype: torch.dtype, *, isa: int = 0, bias_grad: bool = False) -> None:
        self._module = load().module
        self._forward = self._module.forward
        self._dtypes = (dtype, dtype, out_dtype(dtype))
        self._out_dtype = self._dtypes[2]
        self._types = type_code(*self._dtypes, None, None)
        self._isa = isa
        self._bias_grad = bias_grad

    def forward(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor | None, None]:
        """Return out and lse (None unless needed)."""
        (
            cu_q, cu_k, slopes, bias, sinks, q_descale, k_descale, v_descale, _, _, scale, causal, (left, right),
            softcap, _, need_lse, _, _,
        ) = args  # fmt: skip
        out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=self._out_dtype)
        lse = None
        if need_lse:
            *batch, tokens, heads, _ = q.shape
            lse = q.new_empty((*batch, heads, tokens), dtype=torch.float32)
        types = self._types
        if bias is not None or sinks is not None:
            types = type_code(*self._dtypes, bias, sinks)
        self._forward(
            q, k, v, out, lse, cu_q, cu_k, None, None, slopes, bias, sinks, q_descale, k_descale, v_descale,
            types, scale, softcap, left, 0 if causal else right, torch.get_num_threads(), self._isa,
        )  # fmt: skip
        return out, lse, None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        args: AttentionArgs,
        out: Tensor,
        lse: Tensor,
        rng: Tensor | None,
        dout: Tensor,
        dlse: Tensor | None,
    ) -> AttentionGrads:
        """Return the gradients. Those of the sinks need out and lse alone."""
        left, right = window(args)
        dlse = None if dlse is None else dlse.float()
        bias, dbias = args.attn_bias, None
        if bias is not None and self._bias_grad:
            dbias = torch.zeros(bias.shape, dtype=torch.float32)
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
        self._module.backward(
            q, k, v, out, lse, args.cu_seqlens_q, args.cu_seqlens_k, None, None, args.alibi_slopes, bias, args.sinks,
            args.q_descale, args.k_descale, args.v_descale,
            type_code(*self._dtypes, bias, args.sinks), args.softmax_scale, args.softcap,
            left, right, torch.get_num_threads(), self._isa, unit_inner(dout), dlse, dq, dk, dv, dbias,
        )  # fmt: skip
        if dbias is not None and bias is not None:
            dbias = dbias.to(bias.dtype)
        return AttentionGrads(dq, dk, dv, dbias, sinks_grad(args.sinks, out, lse, dout, dlse))


BACKEND = CpuBackend()
