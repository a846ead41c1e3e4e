"""Hold any paged attention implementation against the oracle: right, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_accel.dispatch import device as devices
from vllm_accel.dispatch.backend import Backend
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.guard import tensor_guard
from vllm_accel.dispatch.plan import Plan
from vllm_accel.ops import paged_run, run
from vllm_accel.ops.paged_arguments import PagedOptions, PagedTensors, describe_paged
from vllm_accel.testing.cases_paged import PagedCase, PagedInputs
from vllm_accel.testing.oracle import attention_paged_oracle, plain_attention_paged
from vllm_accel.testing.outcome import Outcome, bound, outcome_of
from vllm_accel.testing.tolerance import assert_close, assert_lse_close

_NOT_MATHS = ("deterministic", "batch_invariant", "finite_tail", "max_seqlen_q", "max_seqlen_k")
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(PagedOptions._fields, False),
    "window_size": (-1, -1),
    "softmax_scale": None,
    "softcap": 0.0,
}


def check_paged_backend(
    backend: Backend,
    case: PagedCase,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device | None = None,
    where: torch.device | str = "cpu",
    seed: int = 0,
) -> Outcome:
    """Check one backend on one paged case, without going through automatic choice.

    Args: as `check_backend`; the case is from `PAGED_CASES`, or your own.

    Raises:
        AssertionError: a wrong number, shape or dtype, a NaN, or a cache that the call changed.
    """
    target = device or devices.detect(torch.device(where))
    call = paged_kernel_call(backend, target)
    return outcome_of(backend, case.name, lambda: check_paged_call(call, case, dtype=dtype, where=where, seed=seed))


def paged_kernel_call(backend: Backend, device: Device) -> Callable[..., Any]:
    """Return a callable ``(q, k_cache, v_cache, *, mla=False, **options)`` that runs one backend as the library would.

    Raises (when called):
        UnsupportedCallError: the backend refuses; carries its reasons.
    """

    def call(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, mla: bool = False, **kwargs: Any) -> Any:
        options = PagedOptions(**{**_DEFAULTS, **{n: v for n, v in kwargs.items() if n in _DEFAULTS}, "mla": mla})
        tensors = PagedTensors(**{name: kwargs.get(name) for name in PagedTensors._fields})  # type: ignore[arg-type]
        described = describe_paged(q, k_cache, v_cache, tensors, options)
        spec = run.FAMILY.make_spec(described.kind)
        kernel = bound(backend, spec, described.sizes, device)
        plan = Plan(
            check=tensor_guard(q), forward=kernel.forward, args=described.values, direct=False, grad=False,
            copies=q.stride(-1) != 1, kernel=kernel, backend=backend.name, spec=spec, device=device, explicit=True,
        )  # fmt: skip
        return paged_run.execute(plan, q, k_cache, v_cache, tensors, options)

    return call


def check_paged_call(
    call: Callable[..., Any],
    case: PagedCase,
    *,
    dtype: torch.dtype = torch.float32,
    where: torch.device | str = "cpu",
    seed: int = 0,
) -> None:
    """Compare ``call(q, k_cache, v_cache, *, mla, **options)`` with the oracle on one case.

    Checks the output alone and with its log-sum-exp; that what comes back is new, contiguous and of the right dtype,
    that the cache is left alone, and, for cases that ask for it, bits: of every sequence alone, or of a second run.

    Raises:
        AssertionError: naming what is wrong, by how much, and the bound.
    """
    inputs = case.make(dtype, where, seed)
    q, k_cache, v_cache = inputs.q, inputs.k_cache, inputs.v_cache
    maths = {name: value for name, value in inputs.options.items() if name not in _NOT_MATHS}
    want, want_lse = attention_paged_oracle(q, k_cache, v_cache, **maths)
    plain, _ = plain_attention_paged(q, k_cache, v_cache, **maths)
    before = [_bits(cache).clone() for cache in (k_cache, v_cache)]
    with torch.no_grad():
        out = call(q, k_cache, v_cache, mla=case.mla, **inputs.options)
        pair = call(q, k_cache, v_cache, mla=case.mla, return_lse=True, **inputs.options)
    _check_fresh(out, inputs)
    assert_close(out, want, plain, what=f"{case.name}: out")
    assert isinstance(pair, tuple) and len(pair) == 2, "return_lse must give (out, lse)"
    assert_close(pair[0], want, plain, what=f"{case.name}: out with lse")
    assert_lse_close(pair[1], want_lse, dtype=q.dtype, what=f"{case.name}: lse")
    for cache, bits in zip((k_cache, v_cache), before, strict=True):
        assert torch.equal(_bits(cache), bits), f"{case.name}: the call changed the cache"
    if case.options.get("deterministic"):
        with torch.no_grad():
            assert torch.equal(call(q, k_cache, v_cache, mla=case.mla, **inputs.options), out), "bits differ by run"
    if case.options.get("batch_invariant"):
        _check_invariant(call, inputs, out)


def _check_invariant(call: Callable[..., Any], inputs: PagedInputs, out: Tensor) -> None:
    """Run every sequence alone, from other blocks and with other maxima, and compare bits."""
    ends = inputs.options["cu_seqlens_q"].tolist()
    k_cache, v_cache = (cache.flip(0) for cache in (inputs.k_cache, inputs.v_cache))
    if inputs.case.mla:
        v_cache = k_cache[..., : inputs.case.head_dim_v]
    for b, (n_q, n_k) in enumerate(inputs.case.lengths):
        rows = slice(ends[b], ends[b + 1])
        width = max(1, -(-n_k // inputs.case.block_size))
        own = {
            **inputs.options,
            "cu_seqlens_q": torch.tensor([0, n_q], dtype=torch.int32, device=out.device),
            "block_table": k_cache.shape[0] - 1 - inputs.options["block_table"][b : b + 1, :width],
            "seqused_k": inputs.options["seqused_k"][b : b + 1],
            "max_seqlen_q": n_q,
            "max_seqlen_k": n_k,
        }
        with torch.no_grad():
            alone = call(inputs.q[rows], k_cache, v_cache, mla=inputs.case.mla, **own)
        assert torch.equal(alone, out[rows]), f"{inputs.case.name}: the bits of sequence {b} depend on the batch"


def _check_fresh(out: Tensor, inputs: PagedInputs) -> None:
    q = inputs.q
    expected = (*q.shape[:-1], inputs.case.head_dim_v)
    dtype = q.dtype if q.dtype.itemsize > 1 else torch.bfloat16
    assert tuple(out.shape) == expected, f"out has shape {tuple(out.shape)}, not {expected}"
    assert out.dtype is dtype, f"out has dtype {out.dtype}, not {dtype}"
    assert out.is_contiguous(), "out must be contiguous"
    own = {t.untyped_storage().data_ptr() for t in (q, inputs.k_cache, inputs.v_cache)}
    assert out.untyped_storage().data_ptr() not in own, "out must be new memory"


def _bits(cache: Tensor) -> Tensor:
    """Return the cache as integers, so that NaN compares equal to itself."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return cache.view(integers[cache.dtype.itemsize])
