"""What this process has built or proven: kernels compiled by warmup, and bitwise self-tests of batch invariance."""

from __future__ import annotations

from typing import Any

from vllm_accel.dispatch import plan
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_spec import GemmSpec
from vllm_accel.dispatch.spec import Feature

_warm: set[tuple[str, str, Any, Device]] = set()
_ran: set[tuple[str, str, Any, Device]] = set()
_verdicts: dict[tuple[str, str, Device], bool] = {}


def is_warm(op: str, backend: str, spec: Any, device: Device) -> bool:
    """Tell whether the kernels for this kind of call, at any length, have been built: here, or on disk by the tuner."""
    from vllm_accel.dispatch import built  # reads files of the tuner: no part of `import vllm_accel`

    return (op, backend, spec.compile_kind(), device) in _warm or built.is_built(op, backend, spec, device)


def mark_warm(op: str, backend: str, spec: Any, device: Device) -> None:
    """Record that the kernels for this kind of call exist, so that automatic choice may take the backend."""
    _warm.add((op, backend, spec.compile_kind(), device))
    plan.invalidate()


def has_run(op: str, backend: str, spec: Any, device: Device) -> bool:
    """Tell whether this process has run calls of this kind and of about these sizes on a backend."""
    return (op, backend, spec, device) in _ran


def note_run(op: str, backend: str, spec: Any, device: Device) -> None:
    """Record that calls of this kind run on a backend that compiles; counts only while a CUDA graph is captured."""
    _ran.add((op, backend, spec, device))


def needs_proof(op: str, spec: Any) -> bool:
    """Tell whether a kind of call is only for backends that passed a bitwise self-test on the device."""
    proven = Feature.BATCH_INVARIANT | Feature.DETERMINISTIC if op == "gemm" else Feature.BATCH_INVARIANT
    return bool(getattr(spec, "features", Feature(0)) & proven)


def tested_as(op: str, spec: Any) -> str:
    """Name the self-test that covers a kind of call: paged kernels are others than dense ones, and MLA's again."""
    features = getattr(spec, "features", Feature(0))
    if isinstance(spec, GemmSpec):  # each form is another kernel
        scaling = f"{spec.scaling_a.value}_{spec.scaling_b.value}"
        kinds = (spec.form.name, spec.dtype, spec.b_dtype, spec.out_dtype, scaling, Feature.BATCH_INVARIANT in features)
        return f"{op}_{'_'.join(map(str, kinds))}"
    return f"{op}_mla" if Feature.MLA in features else f"{op}_paged" if Feature.PAGED in features else op


def self_test_verdict(op: str, backend: str, device: Device) -> bool | None:
    """Return the outcome of the batch-invariance self-test, None if it has not run."""
    return _verdicts.get((op, backend, device))


def record_self_test(op: str, backend: str, device: Device, passed: bool) -> bool:
    """Store and return the outcome of a self-test."""
    _verdicts[(op, backend, device)] = passed
    return passed
