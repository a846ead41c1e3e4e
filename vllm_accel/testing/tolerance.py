"""How close is close enough: the tolerance rule that every backend must meet, as assertions.

The error allowed is measured, not guessed: twice the error of plain PyTorch in the same dtype (three times
for gradients), plus two roundings of the largest value. The FlashAttention tests made the first half common.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "FORWARD_FACTOR",
    "GRADIENT_FACTOR",
    "assert_close",
    "assert_grad_close",
    "assert_lse_close",
    "tolerance",
]

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


#: Roundings of the largest value that are always allowed, where not the factor. float64: the oracle rounds too.
#: float32: kernels compute exp by a fast exp2 (2 ulp) and sum in blocks; on small tensors plain PyTorch is closer than
#: that by luck (torch's CUDA memory-efficient kernel: 4 roundings in `decode`, H200, torch 2.11, 2026-11-23). TF32
#: would be off by thousands.
ROUNDINGS = {torch.float64: 64, torch.float32: 8}


def tolerance(
    reference: Tensor, plain: Tensor, dtype: torch.dtype, factor: float = FORWARD_FACTOR, scale: float = 0.0
) -> float:
    """Return the error allowed: ``factor * max|plain - reference| + roundings * eps(dtype) * max(|reference|, scale)``.

    ``roundings`` is the factor, and more for float32 and float64 (``ROUNDINGS``).

    ``scale`` is the size of the numbers that the result was computed from. It matters where the reference is exactly
    zero by cancellation (the gradient of a query that sees one key): no kernel gets an exact zero there.

    Raises AssertionError where ``plain`` is not finite but ``reference`` is: no bound follows from it.
    """
    reference, plain = reference.detach().double(), plain.detach().to(reference.device).double()
    finite = torch.isfinite(reference)
    if not bool(finite.any()):
        return 0.0
    if not bool(torch.isfinite(plain[finite]).all()):
        raise AssertionError("the plain result is not finite where the reference is: it sets no tolerance")
    error = (plain - reference)[finite].abs().max()
    roundings = ROUNDINGS.get(dtype, factor)
    largest = max(scale, float(reference[finite].abs().max()))
    return float(factor * error + roundings * torch.finfo(dtype).eps * largest)


def assert_close(
    actual: Tensor,
    reference: Tensor,
    plain: Tensor,
    *,
    what: str,
    factor: float = FORWARD_FACTOR,
    scale: float = 0.0,
) -> None:
    """Assert that ``actual`` is as near to the float64 ``reference`` as its dtype and ``plain`` allow.

    Where the reference is not finite, ``actual`` must be the same infinity or NaN. Raises AssertionError
    naming the worst element, both values and the bound.
    """
    _check_shape(actual, reference, what)
    _check_shape(plain, reference, f"{what} (plain)")
    bound = tolerance(reference, plain, actual.dtype, factor, scale)
    roundings = ROUNDINGS.get(actual.dtype, factor)
    rule = f"{factor:g} * max|plain - reference| + {roundings:g} * eps({_name(actual.dtype)}) * max|reference|"
    _check(actual, reference, bound, what, rule)


def assert_grad_close(actual: Tensor, reference: Tensor, plain: Tensor, *, what: str, scale: float = 0.0) -> None:
    """Assert :func:`assert_close` with the factor that gradients are allowed."""
    assert_close(actual, reference, plain, what=what, factor=GRADIENT_FACTOR, scale=scale)


def assert_lse_close(actual: Tensor, reference: Tensor, *, dtype: torch.dtype, what: str = "lse") -> None:
    """Assert that a log-sum-exp is right for inputs of ``dtype``, and -inf exactly where the reference is.

    Allowed: 1e-3 absolute for inputs of 16 bits or fewer; for float32 1e-5 and for float64 1e-12, relative to
    the largest finite value, or to 1 where that is larger. Raises AssertionError, also for an lse that is not
    float32 (float64 for float64 inputs).
    """
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    if actual.dtype != expected:
        got = _name(actual.dtype)
        raise AssertionError(f"{what}: dtype {got}, but {_name(dtype)} inputs give {_name(expected)}")
    _check_shape(actual, reference, what)
    relative = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype)
    if relative is None:
        _check(actual, reference, 1e-3, what, f"1e-3 absolute for {_name(dtype)} inputs")
        return
    finite = reference.detach()[torch.isfinite(reference)].double().abs()
    largest = max(1.0, float(finite.max()) if finite.numel() else 0.0)
    rule = f"{relative:g} * {largest:.6g} for {_name(dtype)} inputs"
    _check(actual, reference, relative * largest, what, rule)


def _check(actual: Tensor, reference: Tensor, bound: float, what: str, rule: str) -> None:
    """Raise AssertionError naming the worst element if ``actual`` is further than ``bound`` away."""
    if actual.numel() == 0:
        return
    got, want = actual.detach().double(), reference.detach().to(actual.device).double()
    same = (got == want) | (got.isnan() & want.isnan())
    # Not finite on one side only, or two different infinities: worse than any finite error.
    error = torch.where(torch.isfinite(got) & torch.isfinite(want), (got - want).abs(), float("inf"))
    error = torch.where(same, 0.0, error)
    worst = int(error.argmax())
    largest = float(error.flatten()[worst])
    if largest <= bound:
        return
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
    raise AssertionError(
        f"{what}: element {index} of shape {tuple(actual.shape)} is {float(got[index]):.9g}, the reference "
        f"{float(want[index]):.9g}; the error {largest:.3g} is above {bound:.3g} = {rule}; "
        f"{int((error > bound).sum())} of {actual.numel()} elements are too far"
    )


def _check_shape(actual: Tensor, reference: Tensor, what: str) -> None:
    if actual.shape != reference.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, but reference {tuple(reference.shape)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
