"""What a backend declares that it can do, and the sentences that say why it cannot. Closed world: silence is a no."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import PROMISES, AttentionSpec, Feature, feature_names
from vllm_accel.errors import Reason


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit on a combination. ``check(spec, device)`` returns the sentence that refuses, or None."""

    name: str
    check: Callable[[Any, Device], str | None]


@dataclass(frozen=True, slots=True)
class Guard:
    """A limit on exact sizes, evaluated per call. ``check(spec, sizes)`` returns the sentence that refuses, or None."""

    name: str
    check: Callable[[Any, Any], str | None]


@dataclass(frozen=True, slots=True)
class Note:
    """What a user should know about calls with these features that the backend does run; `explain` shows it."""

    features: Feature
    text: str


_NOTHING = Feature(0)


@dataclass(frozen=True, slots=True)
class Capability:
    """Declare a backend.

    Attributes:
        platforms: values of `Device.platform` it runs on; empty means every device.
        dtypes: of q, k, v (of a, for a matrix product).
        features: flags it handles. FINITE_TAIL is a need: it runs paged calls that promise it alone.
        kv_dtypes: of a paged cache, where they differ from q's.
        compute_capabilities: NVIDIA chips, an exact list; None where the platform has none or all are fine.
        archs: AMD chips, an exact list; None likewise.
        max_head_dim: largest head size of q/k and v after padding, 0 for no limit.
        min_cuda: oldest CUDA that torch may be built with.
        linear_memory: extra memory is O(Sq + Sk); automatic choice never takes a backend where it is not.
        capture_safe: may run while a CUDA graph is captured.
        first_call_seconds: what a compile at the first call of a kind costs; over two seconds means "after warmup". A
            function of the spec where kinds differ (see `compile_seconds`).
        per_shape_cost: builds something for every exact shape, so it is not for work whose lengths change.
        rules, guards: limits on combinations, and on exact sizes.
        notes: remarks on calls that it runs, for example that it copies. size_notes: the same, of exact sizes.
        device_notes: the same, of a kind of call on a device.
        synchronises: kinds of calls in which it reads device values on the host; automatic choice passes those over,
            and they are refused while a CUDA graph is captured.
    """

    dtypes: frozenset[torch.dtype]
    features: Feature = _NOTHING
    kv_dtypes: frozenset[torch.dtype] = frozenset()
    platforms: frozenset[str] = frozenset()
    compute_capabilities: frozenset[tuple[int, int]] | None = None
    archs: frozenset[str] | None = None
    max_head_dim: int = 0
    min_cuda: tuple[int, int] | None = None
    linear_memory: bool = True
    capture_safe: bool = True
    first_call_seconds: float | Callable[[Any], float] = 0.0
    per_shape_cost: bool = False
    rules: tuple[Rule, ...] = ()
    guards: tuple[Guard, ...] = field(default=())
    notes: tuple[Note, ...] = ()
    size_notes: tuple[Guard, ...] = ()
    device_notes: tuple[Rule, ...] = ()
    synchronises: tuple[Rule, ...] = ()

    def compile_seconds(self, spec: Any) -> float:
        """Return what the first call of a kind costs where nothing has compiled it yet, 0 where nothing compiles."""
        seconds = self.first_call_seconds
        return seconds(spec) if callable(seconds) else seconds

    def unsupported_reasons(self, spec: Any, device: Device) -> tuple[Reason, ...]:
        """Say why this backend cannot run `spec` on `device`; empty means that it can."""
        return (*self._device_reasons(device), *self._spec_reasons(spec), *self._rule_reasons(spec, device))

    def guard_reasons(self, spec: Any, sizes: Any) -> tuple[Reason, ...]:
        """Say which exact-size guards refuse this very call."""
        return refusals(self.guards, spec, sizes)

    def remarks(self, spec: Any) -> tuple[str, ...]:
        """Return what a user should know of calls like this on this backend."""
        features = getattr(spec, "features", _NOTHING)
        return tuple(note.text for note in self.notes if not note.features & ~features)

    def exact_remarks(self, spec: Any, sizes: Any, device: Device) -> tuple[str, ...]:
        """Return what a user should know of a call of exactly these sizes on this device."""
        found = (note.check(spec, device) for note in self.device_notes)
        sized = (reason.text for reason in refusals(self.size_notes, spec, sizes))
        return (*(text for text in found if text), *sized)

    def waits_for_device(self, spec: Any, device: Device) -> Reason | None:
        """Say why calls of this kind wait for the device, None where they do not."""
        if device.type == "cpu":
            return None
        found = ((rule.name, rule.check(spec, device)) for rule in self.synchronises)
        return next((Reason(name, text) for name, text in found if text), None)

    def device_reasons(self, device: Device) -> tuple[Reason, ...]:
        """Say why no call at all can run on `device`; empty means that some may."""
        return tuple(self._device_reasons(device))

    def _device_reasons(self, device: Device) -> Iterator[Reason]:
        if self.platforms and device.platform not in self.platforms:
            yield Reason("platform", f"runs on {_words(self.platforms)}, not on {device.platform}")
            return
        cc, allowed = device.compute_capability, self.compute_capabilities
        if device.platform == "cuda" and allowed is not None and cc not in allowed:
            text = ", ".join(f"sm_{a}{b}" for a, b in sorted(allowed))
            yield Reason("compute_capability", f"runs on {text}; {device.name or 'this GPU'} is {device.arch}")
        if device.platform == "rocm" and self.archs is not None and device.arch not in self.archs:
            yield Reason("arch", f"runs on {_words(self.archs)}; {device.name or 'this GPU'} is {device.arch}")
        built = device.runtime_version
        if device.platform == "cuda" and self.min_cuda and built and built < self.min_cuda:
            need, have = (".".join(map(str, version)) for version in (self.min_cuda, built))
            yield Reason("cuda_version", f"needs CUDA {need} or newer; torch is built with CUDA {have}")

    def _dtype_reasons(self, spec: Any) -> Iterator[Reason]:
        if spec.dtype not in self.dtypes:
            known = _words(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            yield Reason("dtype", f"takes {known}, not {str(spec.dtype).removeprefix('torch.')}")

    def _spec_reasons(self, spec: Any) -> Iterator[Reason]:
        yield from self._dtype_reasons(spec)
        if not isinstance(spec, AttentionSpec):
            yield Reason("operation", f"declares no {type(spec).__name__}: a GemmCapability does")
            return
        if spec.kv_dtype is not spec.dtype and spec.kv_dtype not in self.kv_dtypes:
            yield Reason("kv_dtype", f"does not take a {str(spec.kv_dtype).removeprefix('torch.')} cache")
        if missing := spec.features & ~self.features & ~PROMISES:
            for name in feature_names(missing):
                yield Reason(f"feature:{name}", f"does not do {FEATURE_TEXT.get(name, name)}")
        if Feature.PAGED in spec.features and (unmet := self.features & PROMISES & ~spec.features):
            for name in feature_names(unmet):
                yield Reason(name, f"needs {NEED_TEXT.get(name, name)}")
        largest = max(spec.head_dim, spec.head_dim_v)
        if self.max_head_dim and largest > self.max_head_dim:
            yield Reason("head_dim", f"head sizes up to {self.max_head_dim}; this call has {largest}")

    def _rule_reasons(self, spec: Any, device: Device) -> Iterator[Reason]:
        for rule in self.rules:
            if text := rule.check(spec, device):
                yield Reason(rule.name, text)


def refusals(guards: tuple[Guard, ...], spec: Any, sizes: Any) -> tuple[Reason, ...]:
    """Return what the guards say against exact sizes; nothing if the sizes are not known."""
    if sizes is None:
        return ()
    found = ((guard.name, guard.check(spec, sizes)) for guard in guards)
    return tuple(Reason(name, text) for name, text in found if text)


#: How a refusal names a feature to people.
FEATURE_TEXT = {
    "varlen": "packed sequences (varlen)",
    "paged": "a paged KV cache",
    "grad": "gradients",
    "lse": "return_lse",
    "lse_grad": "a gradient through the log-sum-exp",
    "window_left": "a left window",
    "window_right": "a right window",
    "alibi": "ALiBi slopes",
    "bias": "an additive attn_bias",
    "mask": "a boolean attn_bias",
    "bias_grad": "a gradient for attn_bias",
    "sinks": "attention sinks",
    "sinks_grad": "a gradient for the sinks",
    "q_descale": "q_descale",
    "k_descale": "k_descale",
    "v_descale": "v_descale",
    "deterministic": "deterministic=True",
    "batch_invariant": "batch_invariant=True",
    "gqa": "fewer key heads than query heads (GQA)",
    "value_dim": "a value head size that differs from the query's",
    "mla": "values that are a part of the keys (MLA)",
}

#: How a refusal names a promise that the call does not make.
NEED_TEXT = {
    "finite_tail": "finite numbers past each sequence's end in the cache: finite_tail=True says so, and a PagedKVCache "
    "keeps them",
}


def _words(items: Any) -> str:
    return ", ".join(sorted(items))
