"""The matrix products of ``vllm-accel explain``, on the meta device."""

from __future__ import annotations

import argparse
from typing import Any

import torch

#: Products by the name that ``--op`` takes.
PRODUCTS = ("gemm", "grouped_gemm", "scaled_gemm", "fused_moe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that only products have."""
    add = parser.add_argument
    add("--mnk", metavar="M,N,K", help="sizes of a product (M: all rows); for fused_moe T,D,I: tokens, hidden, inner")
    add("--experts", type=int, metavar="E", help="groups of grouped_gemm and fused_moe (8), or of scaled_gemm (none)")
    add("--top-k", type=int, metavar="K", help="experts of a token, for fused_moe (2)")
    add("--scaling", metavar="A,B", help="of a and b for scaled_gemm: tensor, row, 1x128 or 128x128 (row,row)")


def call(given: argparse.Namespace, dtype: torch.dtype, mnk: list[int]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the function, its tensors and its keyword arguments.

    Raises:
        ValueError: an option that does not go with the product.
    """
    import vllm_accel

    m, n, k = mnk
    experts = 8 if given.experts is None and given.op in ("grouped_gemm", "fused_moe") else given.experts
    wrong = {
        "--experts": given.op == "gemm" and given.experts is not None,
        "--top-k": given.op != "fused_moe" and given.top_k is not None,
        "--scaling": given.op != "scaled_gemm" and given.scaling is not None,
    }
    for option, found in wrong.items():
        if found:
            raise ValueError(f"{option} does not go with --op {given.op}")
    if experts is not None and experts < 1:
        raise ValueError(f"--experts must be at least 1, not {experts}")
    kwargs: dict[str, Any] = {"deterministic": given.deterministic, "batch_invariant": given.batch_invariant}
    if given.op == "fused_moe":
        return vllm_accel.fused_moe, _layer(given, dtype, m, n, k, experts), kwargs
    if given.op == "scaled_gemm":
        return vllm_accel.scaled_gemm, *_scaled(given, dtype, m, n, k, experts, kwargs)
    a = _meta(m, k, dtype=dtype, grad=given.grad)
    if given.op == "gemm":
        kwargs["bias"] = _meta(n, dtype=dtype) if given.bias else None
        return vllm_accel.gemm, (a, _meta(k, n, dtype=dtype, grad=given.grad)), kwargs
    kwargs["bias"] = _meta(experts, n, dtype=dtype) if given.bias else None
    b = _meta(experts, n, k, dtype=dtype, grad=given.grad).mT
    return vllm_accel.grouped_gemm, (a, b, _meta(experts, dtype=torch.int32)), kwargs


def _layer(
    given: argparse.Namespace, dtype: torch.dtype, tokens: int, hidden: int, inner: int, experts: int
) -> tuple[Any, ...]:
    top_k = 2 if given.top_k is None else given.top_k
    if given.bias:
        raise ValueError("--bias does not go with --op fused_moe")
    x = _meta(tokens, hidden, dtype=dtype, grad=given.grad)
    w_gate_up = _meta(experts, 2 * inner, hidden, dtype=dtype, grad=given.grad).mT
    w_down = _meta(experts, hidden, inner, dtype=dtype, grad=given.grad).mT
    return x, w_gate_up, w_down, _meta(tokens, top_k, dtype=torch.float32), _meta(tokens, top_k, dtype=torch.int64)


def _scaled(
    given: argparse.Namespace, dtype: torch.dtype, m: int, n: int, k: int, experts: int | None, kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from vllm_accel.ops.gemm_arguments import factor_shape, scaling_of

    parts = (given.scaling or "row,row").split(",")
    if len(parts) != 2:
        raise ValueError(f"--scaling takes A,B, for example 1x128,128x128, not {given.scaling!r}")
    of_a, of_b = (scaling_of(part.strip(), "--scaling") for part in parts)
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
        dtype = torch.float8_e4m3fn
    lead = () if experts is None else (experts,)
    a, b = _meta(m, k, dtype=dtype), _meta(*lead, n, k, dtype=dtype).mT
    scale_a = _meta(*factor_shape((m, k), of_a, (), True), dtype=torch.float32)
    scale_b = _meta(*factor_shape((k, n), of_b, lead, False), dtype=torch.float32)
    if experts is not None:
        kwargs["offs"] = _meta(experts, dtype=torch.int32)
    if given.bias:
        kwargs["bias"] = _meta(*lead, n, dtype=torch.bfloat16)
    return (a, b, scale_a, of_a, scale_b, of_b), kwargs


def _meta(*shape: int, dtype: torch.dtype, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)
