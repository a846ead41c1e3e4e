"""Matrix products through the same registry, selector and explain as attention."""

from __future__ import annotations

import pytest
import torch

from vllm_accel import State, backends, explain, gemm, use_backend
from vllm_accel.dispatch.gemm_spec import GemmSpec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients(dtype: torch.dtype, bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in ((5, 7), (7, 3), (3,)))
    out = gemm(a, b, c if bias else None)
    want = a.double() @ b.double() + (c.double() if bias else 0)
    assert out.dtype is dtype
    bound = 8 * torch.finfo(dtype).eps * want.abs().max()
    assert (out - want).abs().max() <= bound
    leaves = [a, b, *([c] if bias else [])]
    for got, ref in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert (got - ref).abs().max() <= 8 * torch.finfo(dtype).eps * ref.abs().max()


def test_explain_speaks_of_products() -> None:
    selection = explain(gemm, torch.empty(1000, 64), torch.empty(64, 32), device="h100")
    assert selection.op == "gemm" and isinstance(selection.spec, GemmSpec)
    assert selection.chosen == "cublas" and {"cublas", "torch_grouped", "cpu", "reference"} <= set(backends("gemm"))
    assert "M ~896" in str(selection) and selection["reference"].state is State.ABLE
    assert explain(gemm, torch.empty(1000, 64), torch.empty(64, 32)).chosen == "cpu"


def test_requests_and_errors() -> None:
    a, b = torch.randn(4, 6), torch.randn(6, 2)
    with use_backend(gemm="reference"):
        assert explain(gemm, a, b).decided_by == "use_backend: reference"
        assert torch.equal(gemm(a, b), a @ b)
    with pytest.raises(ValueError, match="unknown gemm backend 'cublass'"):
        gemm(a, b, backend="cublass")
    with pytest.raises(ValueError, match=r"a must be \(M, K\)"):
        gemm(a, b.t())
    with pytest.raises(TypeError, match="one dtype"):
        gemm(a, b.half())
    with pytest.raises(ValueError, match="bias must have shape"):
        gemm(a, b, torch.zeros(3))
    with pytest.raises(RuntimeError, match="takes bfloat16"):
        gemm(a.int(), b.int())
    with pytest.raises(ValueError, match="is not an operation"):
        backends("conv")
