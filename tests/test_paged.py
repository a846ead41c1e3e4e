"""`attention_paged`: every case on every backend of this machine's CPU, and the call around them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torch_adapters import ADAPTERS
from vllm_accel import (
    BackendUnavailableError,
    Device,
    UnsupportedCallError,
    attention_mla,
    attention_paged,
    explain,
    register_backend,
    reload_settings,
    use_backend,
)
from vllm_accel.backends import gather, reference_paged
from vllm_accel.backends.reference_paged import ReferencePagedKernel
from vllm_accel.dispatch import guard, quarantine, registry, warm
from vllm_accel.dispatch.backend import PagedArgs
from vllm_accel.dispatch.capability import Capability
from vllm_accel.dispatch.selection import State
from vllm_accel.dispatch.spec import Feature, bucket, bucket_up
from vllm_accel.ops.paged_run import PLANS
from vllm_accel.testing import PAGED_CASES, PagedCase, attention_paged_oracle, check_paged_backend, check_paged_call

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BY_NAME = {case.name: case for case in PAGED_CASES}

#: What PyTorch's CPU kernel cannot do over a copy either; anything else that it refuses is a regression.
REFUSED_BY_SDPA_CPU = {
    "softcap", "fp8_queries", "q_descale", "batch_invariant", "everything", "mla_window", "mla_invariant",
}  # fmt: skip
_SOFTCAP = {"softcap", "everything", "mla_window"}
REFUSED_BY_FAKES = {
    "flash": _SOFTCAP | {"alibi", "alibi_batch", "batch_invariant", "q_descale", "fp8_queries"}
    | {name for name, case in BY_NAME.items() if case.descale or (case.mla and case.head_dim > 256)},
    "efficient": _SOFTCAP | {"alibi", "alibi_batch", "q_descale", "fp8_queries", "window", "window_decode",
                             "window_zero", "mla_window"},
}  # fmt: skip


def _usable(name: str) -> bool:
    return name in registry.names("attention") and registry.get("attention", name).unavailable_reason() is None


def call(backend: str | None = None) -> Any:
    """Return the public call of a case, for one backend."""

    def run(q, k_cache, v_cache, *, mla: bool = False, **options):
        if not mla:
            return attention_paged(q, k_cache, v_cache, backend=backend, **options)
        factor = options.pop("k_descale", None)
        options.pop("v_descale", None)
        return attention_mla(
            q, k_cache.squeeze(2), head_dim_v=v_cache.shape[-1], kv_descale=factor, backend=backend, **options
        )

    return run


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name)
def test_reference_runs_everything(case: PagedCase, dtype: str) -> None:
    check_paged_call(call("reference"), case, dtype=DTYPES[dtype])


@pytest.mark.parametrize("backend", ["reference", "sdpa_cpu"])
@pytest.mark.parametrize("dtype", ["fp16", "fp64"])
@pytest.mark.parametrize("name", ["mixed", "fp8_heads", "int8_batch", "sinks_tail", "mla_small"])
def test_other_dtypes(name: str, dtype: str, backend: str) -> None:
    check_paged_call(call(backend), BY_NAME[name], dtype=DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name)
def test_sdpa_cpu_is_right_or_says_why_not(case: PagedCase, dtype: str) -> None:
    if case.name not in REFUSED_BY_SDPA_CPU:
        check_paged_call(call("sdpa_cpu"), case, dtype=DTYPES[dtype])
        return
    inputs = case.make(DTYPES[dtype])
    with pytest.raises(UnsupportedCallError) as refusal:
        call("sdpa_cpu")(inputs.q, inputs.k_cache, inputs.v_cache, mla=case.mla, **inputs.options)
    outcome = check_paged_backend(registry.get("attention", "sdpa_cpu"), case, dtype=DTYPES[dtype])
    assert not outcome.ran and outcome.reasons == refusal.value.reasons["sdpa_cpu"]
    assert all(reason.text in str(refusal.value) for reason in outcome.reasons)


@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name)
def test_automatic_choice(case: PagedCase) -> None:
    check_paged_call(call(), case, dtype=torch.bfloat16, seed=3)


@pytest.mark.parametrize("key", ["flash", "efficient"])
@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name)
def test_gpu_kernels_over_copies(case: PagedCase, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[key]
    with adapter.installed(monkeypatch):
        outcome = check_paged_backend(adapter.backend, case, dtype=adapter.dtype, device=adapter.device)
    assert outcome.ran == (case.name not in REFUSED_BY_FAKES[key]), outcome.reasons


# --- what runs on a GPU, where no length is read ---------------------------------------------------------------------


def _args(options: dict[str, Any], head_dim: int) -> PagedArgs:
    tensors = [options.get(name) for name in PagedArgs._fields[:8]]
    return PagedArgs(
        *tensors, bucket_up(options["max_seqlen_q"]), bucket_up(options["max_seqlen_k"]),
        options.get("softmax_scale") or head_dim**-0.5, options.get("causal", False),
        options.get("window_size", (-1, -1)), options.get("softcap", 0.0), True, False, False,
    )  # fmt: skip


@pytest.mark.parametrize("budget", [1, 1 << 24])
@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"batch_invariant", "mla_invariant"}))
def test_reference_in_padded_groups(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_paged, "MAX_GATHERED", budget)
    monkeypatch.setattr(ReferencePagedKernel, "on_host", ReferencePagedKernel.on_device)

    def run(q, k_cache, v_cache, *, return_lse=False, mla=False, **options):
        out, lse = ReferencePagedKernel().forward(q, k_cache, v_cache, _args(options, q.shape[-1]))
        return (out, lse) if return_lse else out

    check_paged_call(run, BY_NAME[name], dtype=torch.float32)


@pytest.mark.parametrize("name", ["mixed", "no_keys", "block_24", "fp8_batch", "int8_heads", "head_major"])
def test_pages_found_on_the_device_are_those_found_on_the_host(name: str) -> None:
    inputs = BY_NAME[name].make(torch.float32)
    args = _args(inputs.options, inputs.q.shape[-1])
    host, device = gather.pages_on_host(args, inputs.k_cache), gather.pages_on_device(args, inputs.k_cache)
    n = int(host.cu_seqlens_k[-1])
    assert torch.equal(host.cu_seqlens_k, device.cu_seqlens_k)
    for cache, factor in ((inputs.k_cache, args.k_descale), (inputs.v_cache, args.v_descale)):
        found = device.take(cache, factor, torch.float32)
        assert torch.equal(found[:n], host.take(cache, factor, torch.float32)) and n <= found.shape[0]
        assert found[:n].isfinite().all()


# --- wrong arguments -------------------------------------------------------------------------------------------------


def _call(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given: dict[str, Any] = {
        "q": torch.randn(5, 4, 16), "k_cache": torch.randn(6, 4, 2, 16), "v_cache": torch.randn(6, 4, 2, 16),
        "cu_seqlens_q": torch.tensor([0, 1, 5], dtype=torch.int32), "max_seqlen_q": 4,
        "block_table": torch.tensor([[3, 0, -1], [5, 1, 2]], dtype=torch.int32),
        "seqused_k": torch.tensor([6, 11], dtype=torch.int32), "max_seqlen_k": 11,
    }  # fmt: skip
    given |= changes
    return (given.pop("q"), given.pop("k_cache"), given.pop("v_cache")), given


INT = torch.int32
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank of q": ({"q": torch.randn(1, 5, 4, 16)}, ValueError, r"q must be \(tokens, heads, head_dim\)"),
    "rank of a cache": ({"k_cache": torch.randn(6, 4, 16)}, ValueError, "caches \\(num_blocks, block_size"),
    "head size": ({"q": torch.randn(5, 4, 8)}, ValueError, "must agree in blocks, key heads and head size"),
    "blocks": ({"v_cache": torch.randn(5, 4, 2, 16)}, ValueError, "must agree in blocks"),
    "heads": ({"q": torch.randn(5, 3, 16)}, ValueError, "H=3 must be a positive multiple of Hkv=2"),
    "cache dtype": ({"k_cache": torch.zeros(6, 4, 2, 16).half(), "v_cache": torch.zeros(6, 4, 2, 16).half()}, TypeError,
                    "k_cache must have q's dtype, torch.float32, or be FP8 or int8"),
    "cache dtypes": ({"v_cache": torch.zeros(6, 4, 2, 16).half()}, TypeError, "k_cache and v_cache must have one"),
    "integers": ({"q": torch.ones(5, 4, 16).int()}, TypeError, "q has dtype torch.int32"),
    "cache stride": ({"k_cache": torch.randn(6, 4, 16, 2).mT}, ValueError, "k_cache must have an innermost"),
    "cache device": ({"k_cache": torch.randn(6, 4, 2, 16, device="meta")}, ValueError, "k_cache is on meta, q on cpu"),
    "table dtype": ({"block_table": torch.zeros(2, 3)}, ValueError, "block_table must be int32 of shape"),
    "table rank": ({"block_table": torch.zeros(6, dtype=INT)}, ValueError, "block_table must be int32 of shape"),
    "table device": ({"block_table": torch.zeros(2, 3, dtype=INT, device="meta")}, ValueError, "table is on meta"),
    "table batch": ({"block_table": torch.zeros(3, 3, dtype=INT)}, ValueError, r"must be \(batch \+ 1,\)"),
    "table stride": ({"block_table": torch.zeros(3, 2, dtype=INT).t()}, ValueError, "table must have an innermost"),
    "not a tensor": ({"seqused_k": [6, 11]}, TypeError, "seqused_k must be an int32 tensor"),
    "q not a tensor": ({"q": [1.0]}, TypeError, "q must be a tensor, not list"),
    "seqused dtype": ({"seqused_k": torch.tensor([6, 11])}, ValueError, "seqused_k must be int32"),
    "maximum": ({"max_seqlen_k": 11.5}, TypeError, "max_seqlen_k must be a Python int"),
    "negative maximum": ({"max_seqlen_q": -1}, TypeError, "max_seqlen_q must be a Python int"),
    "finite_tail": ({"finite_tail": 1}, TypeError, "finite_tail must be True or False"),
    "causal": ({"causal": 1}, TypeError, "causal must be True or False"),
    "window": ({"window_size": (-3, 0)}, ValueError, "each side is -1"),
    "scale": ({"softmax_scale": -1.0}, ValueError, "positive finite"),
    "slopes": ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes must have shape \(4,\) or \(2, 4\)"),
    "descale": ({"k_descale": torch.ones(4)}, ValueError, r"k_descale must have shape \(\) or \(2,\) or \(2, 2\)"),
    "gradient of q": ({"q": torch.randn(5, 4, 16, requires_grad=True)}, ValueError, "q requires a gradient.*no_grad"),
    "gradient of sinks": ({"sinks": torch.zeros(4, requires_grad=True)}, ValueError, "sinks requires a gradient"),
    "first end": ({"cu_seqlens_q": torch.tensor([1, 1, 5], dtype=INT)}, ValueError, r"cu_seqlens_q\[0\] must be 0"),
    "decreasing ends": ({"cu_seqlens_q": torch.tensor([0, 4, 3], dtype=INT)}, ValueError, "must not decrease; entry 2"),
    "ends past q": ({"cu_seqlens_q": torch.tensor([0, 3, 6], dtype=INT)}, ValueError, "past the 5 tokens"),
    "more queries than said": ({"max_seqlen_q": 3}, ValueError, "sequence 1 has 4 tokens, more than max_seqlen_q 3"),
    "more keys than said": ({"max_seqlen_k": 10}, ValueError, r"seqused_k\[1\] is 11; it must be from 0 to max"),
    "more keys than blocks": ({"seqused_k": torch.tensor([6, 13], dtype=INT), "max_seqlen_k": 20}, ValueError,
                              "at most the 12 tokens of its row"),
    "negative keys": ({"seqused_k": torch.tensor([-1, 11], dtype=INT)}, ValueError, r"seqused_k\[0\] is -1"),
    "block past the cache": ({"block_table": torch.tensor([[3, 0, 9], [5, 6, 2]], dtype=INT)}, ValueError,
                             r"block_table\[1, 1\] is 6; the caches have blocks 0 to 5"),
    "negative block": ({"block_table": torch.tensor([[-1, 0, 9], [5, 1, 2]], dtype=INT)}, ValueError,
                       r"block_table\[0, 0\] is -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    changes, error, message = WRONG[name]
    tensors, options = _call(**changes)
    with pytest.raises(error, match=message):
        attention_paged(*tensors, **options)


def test_values_are_checked_on_every_call() -> None:
    tensors, options = _call()
    attention_paged(*tensors, **options)
    options["seqused_k"][0] = 9  # its third block is -1
    with pytest.raises(ValueError, match=r"block_table\[0, 2\] is -1"):
        attention_paged(*tensors, **options)


def test_gradients_are_no_matter_where_none_are_recorded() -> None:
    (q, k, v), options = _call(sinks=torch.zeros(4, requires_grad=True))
    with torch.no_grad():
        out = attention_paged(q.requires_grad_(), k, v, **options)
    assert not out.requires_grad
    with pytest.raises(ValueError, match="q requires a gradient"):
        attention_paged(q, k, v, **options)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("what", ["no queries", "no sequences", "no keys", "no blocks"])
def test_nothing_to_compute(what: str, with_sinks: bool) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    (q, k, v), options = _call(sinks=sinks, v_cache=torch.randn(6, 4, 2, 8))
    inside = 4
    options["cu_seqlens_q"] = torch.tensor([0, 1, 4], dtype=INT)
    if what == "no queries":
        q, inside = q[:0], 0
        options |= {"cu_seqlens_q": torch.zeros(3, dtype=INT), "max_seqlen_q": 0}
    if what == "no sequences":
        inside = 0
        options |= {name: options[name][:0] for name in ("block_table", "seqused_k")}
        options["cu_seqlens_q"] = torch.zeros(1, dtype=INT)
    if what in ("no keys", "no blocks"):
        options |= {"seqused_k": torch.zeros(2, dtype=INT), "max_seqlen_k": 0}
    if what == "no blocks":
        k, v = k[:0], v[:0]
    out, lse = attention_paged(q, k, v, return_lse=True, **options)
    assert out.shape == (q.shape[0], 4, 8) and not out.any()
    want = torch.full((4, q.shape[0]), -math.inf)
    if sinks is not None:
        want[:, :inside] = sinks[:, None]
    assert torch.equal(lse, want)
    assert attention_paged(q, k, v, **options).shape == out.shape


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_growing_decode_keeps_its_plan() -> None:
    registry.plan.invalidate()
    k_cache, v_cache = torch.randn(80, 4, 2, 16), torch.randn(80, 4, 2, 16)
    g = torch.Generator().manual_seed(0)
    for n in range(129, 161):  # one quarter octave of 32 lengths, eight widths of the table
        blocks = torch.randperm(80, generator=g)[: 2 * -(-n // 4)].view(2, -1).to(INT)
        q = torch.randn(2, 4, 16, generator=g)
        options = {"cu_seqlens_q": torch.tensor([0, 1, 2], dtype=INT), "block_table": blocks,
                   "seqused_k": torch.tensor([n, n - 100], dtype=INT)}  # fmt: skip
        out = attention_paged(q, k_cache, v_cache, max_seqlen_q=1, max_seqlen_k=n, **options)
        want, _ = attention_paged_oracle(q, k_cache, v_cache, **options)
        assert (out - want).abs().max() < 1e-5
    assert len(PLANS) == 1


def test_other_numbers_of_tokens_share_a_plan_and_other_kinds_do_not() -> None:
    registry.plan.invalidate()
    (q, k, v), options = _call()
    attention_paged(q, k, v, **options)
    attention_paged(torch.cat([q, q]), k, v, **options)
    attention_paged(q, k, v, **{**options, "max_seqlen_k": 12})
    assert len(PLANS) == 1
    different: list[dict[str, Any]] = [
        {"causal": True}, {"return_lse": True}, {"max_seqlen_k": 40}, {"max_seqlen_q": 5}, {"sinks": torch.zeros(4)},
        {"finite_tail": True}, {"backend": "reference"},
    ]  # fmt: skip
    for n, changes in enumerate(different):
        attention_paged(q, k, v, **{**options, **changes})
        assert len(PLANS) == 2 + n, changes
    attention_paged(q.double(), k.double(), v.double(), **options)
    with torch.no_grad():
        attention_paged(q, k, v, **options)
    assert len(PLANS) == len(different) + 3


@pytest.mark.parametrize("full_first", [False, True])
def test_an_empty_call_and_a_full_one_have_plans_of_their_own(toy: Any, full_first: bool) -> None:
    backend = toy("toy_full", 7.0)
    (q, k, v), options = _call()
    none = {**options, "cu_seqlens_q": torch.zeros(3, dtype=INT)}
    for full in (full_first, not full_first, full_first, not full_first):
        before = backend.runs
        out = attention_paged(q, k, v, **options) if full else attention_paged(q[:0], k, v, **none)
        assert out.shape == (5 if full else 0, 4, 16) and backend.runs == before + full


@pytest.mark.parametrize("python", [False, True])
def test_a_guard_looks_at_everything_but_the_free_sizes(python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if python:
        monkeypatch.setattr(guard, "tensor_guard", guard.python_guard)
    a, b = torch.zeros(3, 4, 8), torch.zeros(2, 5, dtype=INT)
    check = guard.guard_but((frozenset({0}), frozenset({1})), a, b)
    assert check(a, b) and check(torch.zeros(7, 4, 8), b) and check(a, torch.zeros(2, 9, dtype=INT))
    assert check(torch.zeros(7, 4, 16)[..., :8], b)  # any strides but the innermost
    others = [
        (torch.zeros(3, 5, 8), b), (a.half(), b), (a, torch.zeros(3, 5, dtype=INT)), (a, b.long()), (a.mT, b),
        (a.clone().requires_grad_(), b), (a.to("meta"), b), (torch.zeros(3, 8, 4).mT, b), (a[0], b),
    ]  # fmt: skip
    assert not any(check(*other) for other in others)
    with torch.autocast("cpu", torch.bfloat16):
        assert not check(a, b)


def test_buckets_round_up_and_stay_buckets() -> None:
    for n in range(1, 5000):
        up = bucket_up(n)
        assert up >= n and bucket(up) == up and (up == n or bucket(n) < n) and up <= n * 1.25
    assert [bucket_up(n) for n in (0, 8, 9, 11, 17, 4097)] == [0, 8, 10, 12, 20, 5120]


def test_every_option_changes_the_spec() -> None:
    import inspect

    tensors, options = _call()
    plain = explain(attention_paged, *tensors, **options).spec
    flipped: dict[str, Any] = {
        "causal": True, "window_size": (3, -1), "softmax_scale": 0.3, "softcap": 2.0, "alibi_slopes": torch.rand(4),
        "sinks": torch.rand(4), "q_descale": torch.ones(()), "k_descale": torch.ones(2), "v_descale": torch.ones(2, 2),
        "return_lse": True, "deterministic": True, "batch_invariant": True, "finite_tail": True,
    }  # fmt: skip
    names = set(inspect.signature(attention_paged).parameters) - {"q", "k_cache", "v_cache", "backend", *options}
    assert names == set(flipped), "every option of the call is flipped here"
    specs = {
        name: explain(attention_paged, *tensors, **{**options, name: value}).spec for name, value in flipped.items()
    }
    assert all(spec != plain for spec in specs.values())
    assert len({spec.features for spec in specs.values()}) == len(specs)
    assert explain(attention_paged, *tensors, **{**options, "max_seqlen_k": 90}).spec.seqlen_k == 96
    (q, k, v), _ = _call(k_cache=torch.randn(6, 8, 2, 16), v_cache=torch.randn(6, 8, 2, 16))
    wider = explain(attention_paged, q, k, v, **options).spec
    assert (plain.block_size, wider.block_size) == (4, 8) and wider.compile_kind().block_size == 8


HOST_BACKENDS = [name for name in ("reference", "sdpa_cpu", "cpu") if _usable(name)]
#: What a copy for PyTorch's CPU kernel cannot do; the two others do everything.
HOST_REFUSES = {"sdpa_cpu": {"softcap", "q_descale", "batch_invariant"}}


@pytest.mark.parametrize("name", HOST_BACKENDS)
def test_every_option_changes_the_output_or_is_refused(name: str) -> None:
    tensors, options = _call()
    plain = attention_paged(*tensors, backend=name, **options)
    flipped: dict[str, Any] = {
        "causal": True, "window_size": (3, -1), "softmax_scale": 0.9, "softcap": 0.5, "alibi_slopes": torch.rand(4) + 1,
        "sinks": torch.rand(4) + 2, "q_descale": torch.full((), 2.0), "k_descale": torch.full((2,), 2.0),
        "v_descale": torch.full((2, 2), 2.0),
    }  # fmt: skip
    assert _changed(lambda **more: attention_paged(*tensors, backend=name, **options, **more), plain, flipped) == (
        HOST_REFUSES.get(name, set())
    )


@pytest.mark.parametrize("name", HOST_BACKENDS)
def test_every_option_of_mla_changes_the_output_or_is_refused(name: str) -> None:
    (q, k, _), options = _call()
    options |= {"head_dim_v": 12, "softmax_scale": 0.2, "backend": name}
    kv_cache = k[:, :, 0].contiguous()
    plain = attention_mla(q, kv_cache, **options)
    flipped: dict[str, Any] = {
        "causal": True, "window_size": (3, -1), "softmax_scale": 0.9, "softcap": 0.5, "sinks": torch.rand(4) + 2,
        "q_descale": torch.full((), 2.0), "kv_descale": torch.full((), 2.0), "head_dim_v": 9,
    }  # fmt: skip

    def call(**more: Any) -> Any:
        out = attention_mla(q, kv_cache, **{**options, **more})
        return torch.nn.functional.pad(out, (0, 12 - out.shape[-1]))

    assert _changed(call, plain, flipped) == HOST_REFUSES.get(name, set())


def _changed(call: Any, plain: torch.Tensor, flipped: dict[str, Any]) -> set[str]:
    """Check that each option changes the numbers and no constraint does; return those that are refused."""
    refused = set()
    for option, value in (flipped | dict.fromkeys(("deterministic", "batch_invariant", "finite_tail"), True)).items():
        try:
            out = call(**{option: value})
        except UnsupportedCallError:
            refused.add(option)
        else:
            assert ((out - plain).abs().max() > 1e-3) == (option in flipped), option
    return refused


# --- choice ----------------------------------------------------------------------------------------------------------


class Toy:
    """A paged backend that fills its output with a number."""

    def __init__(self, name: str, value: float, **changes: Any) -> None:
        self.name, self.value, self.runs = name, value, 0
        everything = ~Feature(0) & ~Feature.FINITE_TAIL
        self.capability = Capability(**{"dtypes": frozenset({torch.float32}), "features": everything, **changes})

    def version(self) -> str:
        return "1"

    def unavailable_reason(self) -> None:
        return None

    def bind(self, spec: Any, device: Device) -> Any:
        return self

    def forward(self, q: Any, k_cache: Any, v_cache: Any, args: PagedArgs) -> Any:
        self.runs += 1
        if math.isnan(self.value):
            raise RuntimeError("toy failed")
        # The bits of a batch of one differ: such a backend must not pass as batch invariant.
        return q.new_full((*q.shape[:-1], v_cache.shape[-1]), self.value + args.seqused_k.shape[0] * 1e-3), None


@pytest.fixture
def toy() -> Any:
    made: list[str] = []

    def make(name: str, value: float, **changes: Any) -> Toy:
        backend = Toy(name, value, **changes)
        register_backend("attention", backend, before="cpu" if "cpu" in registry.names("attention") else "sdpa_cpu")
        made.append(name)
        return backend

    yield make
    for name in made:
        registry.unregister_backend("attention", name)
    quarantine.release()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    def change(**variables: str) -> None:
        monkeypatch.undo()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        reload_settings()

    yield change
    monkeypatch.undo()
    reload_settings()


def test_the_ways_to_choose_are_those_of_attention(toy: Any, environment: Any) -> None:
    toy("toy_paged", 7.0)
    tensors, options = _call()

    def chosen(**more: Any) -> float:
        return round(float(attention_paged(*tensors, **options, **more)[0, 0, 0]))

    assert explain(attention_paged, *tensors, **options).chosen == "toy_paged" and chosen() == 7
    assert chosen(backend=["sdpa_cpu"]) != 7
    with use_backend(attention="reference"):
        assert chosen() != 7 and explain(attention_paged, *tensors, **options).decided_by == "use_backend: reference"
    assert chosen() == 7
    environment(VLLM_ACCEL_DISABLED_BACKENDS="toy_paged")
    assert chosen() != 7
    with pytest.raises(BackendUnavailableError, match="named in VLLM_ACCEL_DISABLED_BACKENDS"):
        chosen(backend="toy_paged")
    environment(VLLM_ACCEL_ATTENTION_BACKEND="reference")
    assert explain(attention_paged, *tensors, **options).chosen == "reference"


def test_a_backend_that_fails_is_quarantined_for_this_kind(toy: Any) -> None:
    backend = toy("toy_fails", math.nan)
    tensors, options = _call()
    want = attention_paged(*tensors, **options, backend="reference")
    assert (attention_paged(*tensors, **options) - want).abs().max() < 1e-5 and backend.runs == 1
    attention_paged(*tensors, **options)
    assert backend.runs == 1
    assert explain(attention_paged, *tensors, **options)["toy_fails"].state is State.QUARANTINED
    with pytest.raises(RuntimeError, match="toy failed"):
        attention_paged(*tensors, **options, backend="toy_fails")


def test_a_backend_that_needs_finite_tails_runs_only_where_they_are_promised(toy: Any) -> None:
    toy("toy_finite", 7.0, features=~Feature(0))
    tensors, options = _call()
    shown = explain(attention_paged, *tensors, **options)
    assert shown.chosen != "toy_finite"
    assert [reason.code for reason in shown["toy_finite"].reasons] == ["finite_tail"]
    with pytest.raises(UnsupportedCallError, match="finite_tail=True says so"):
        attention_paged(*tensors, **options, backend="toy_finite")
    assert explain(attention_paged, *tensors, **options, finite_tail=True).chosen == "toy_finite"
    promised = explain(attention_paged, *tensors, **options, finite_tail=True)
    assert promised["reference"].state is State.ABLE  # a promise asks nothing of the others


def test_a_cache_in_another_dtype_has_to_be_declared(toy: Any) -> None:
    toy("toy_wide", 7.0)
    toy("toy_narrow", 8.0, kv_dtypes=frozenset({torch.float8_e4m3fn}))
    (q, k, v), options = _call()
    shown = explain(attention_paged, q, k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn), **options)
    assert shown.chosen == "toy_narrow"
    assert [r.text for r in shown["toy_wide"].reasons] == ["does not take a float8_e4m3fn cache"]
    assert "float32 over float8_e4m3fn blocks of 4" in str(shown)


def test_batch_invariance_is_proven_over_a_cache_too(toy: Any) -> None:
    backend = toy("toy_boast", 7.0)
    tensors, options = _call()
    out = attention_paged(*tensors, **options, batch_invariant=True)
    want = attention_paged(*tensors, **options, batch_invariant=True, backend="reference")
    assert (out - want).abs().max() < 1e-5 and backend.runs > 1
    shown = explain(attention_paged, *tensors, **options, batch_invariant=True)
    assert [r.code for r in shown["toy_boast"].reasons] == ["self_test"]
    device = shown.device
    assert warm.self_test_verdict("attention_paged", "toy_boast", device) is False
    assert warm.self_test_verdict("attention", "toy_boast", device) is None
    assert warm.self_test_verdict("attention_paged", "reference", device) is True


def test_explain_says_that_keys_and_values_are_copied() -> None:
    tensors, options = _call()
    shown = explain(attention_paged, *tensors, **options)
    assert shown["sdpa_cpu"].notes == ("copies keys and values out of the cache at every call",)
    assert "copies keys and values" in str(shown)
    notes = {c["name"]: c["notes"] for c in shown.as_dict()["candidates"]}
    assert notes["sdpa_cpu"] and not notes["reference"]


def test_limits_over_copies_are_those_of_the_packed_call() -> None:
    (q, k, v), options = _call()
    n = 40000  # of free lengths the memory-efficient kernel takes half of a grid's 65535 sequences
    options |= {"cu_seqlens_q": torch.zeros(n + 1, dtype=INT), "block_table": torch.zeros(n, 3, dtype=INT)}
    options["seqused_k"] = torch.zeros(n, dtype=INT)
    meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    shown = explain(attention_paged, *(t.half().to("meta") for t in (q, k, v)), **meta, device="h100")
    assert [reason.code for reason in shown["sdpa_efficient"].reasons] == ["grid_batch"]
    assert not shown["sdpa_flash"].reasons


@pytest.mark.parametrize("device", ["h100", "t4", "cpu", "mi300x"])
def test_explain_for_another_machine_from_meta_tensors(device: str) -> None:
    tensors, options = _call()
    meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    halves = [t.half().to("meta") for t in tensors]
    shown = explain(attention_paged, *halves, **meta, device=device)
    assert shown.chosen is not None and Feature.PAGED in shown.spec.features
    assert shown.chosen in {c.name for c in shown.candidates if c.state is State.CHOSEN}


# --- transforms ------------------------------------------------------------------------------------------------------


def test_autocast_casts_queries_and_leaves_the_cache() -> None:
    (q, k, v), options = _call()
    k, v = k.bfloat16(), v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_paged(q, k, v, **options)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, attention_paged(q.bfloat16(), k, v, **options))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="k_cache must have q's dtype"):
        attention_paged(q, k.float(), v.float(), **options)


def test_transforms_are_refused() -> None:
    (q, k, v), options = _call()
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda q: attention_paged(q, k, v, **options))(q[None])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        attention_paged(torch.autograd.forward_ad.make_dual(q, q), k, v, **options)
    with pytest.raises(TypeError, match="nested or sparse"):
        attention_paged(q.to_sparse(), k, v, **options)


def test_queries_of_any_stride() -> None:
    (q, k, v), options = _call()
    strided = q.mT.contiguous().mT
    assert strided.stride(-1) != 1
    for backend in (None, "reference"):
        assert torch.equal(
            attention_paged(strided, k, v, **options, backend=backend),
            attention_paged(q, k, v, **options, backend=backend),
        )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "softmax_scale": 0.3},
    "window": {"window_size": (3, 1), "softcap": 2.0},
    "tensors": {"sinks": torch.tensor([0.1, 1.0, -1.0, 0.5]), "k_descale": torch.tensor(0.5)},
    "named": {"backend": ("sdpa_cpu", "reference"), "finite_tail": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_one_graph_and_the_eager_numbers(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    (q, k, v), options = _call()

    def model(q: Any, k: Any, v: Any, n: int) -> Any:
        out, lse = attention_paged(q * 1.0, k, v, return_lse=True, **{**options, "max_seqlen_k": n}, **OPTIONS[name])
        return out + 0, lse, attention_paged(q, k, v, **options, **OPTIONS[name])

    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for n in (11, 30, 31, 50):
        got, want = compiled(q, k, v, n), model(q, k, v, n)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counter.frame_count <= 2  # the second length is the last one that recompiles


def test_compiled_mla_and_no_gradient() -> None:
    torch._dynamo.reset()
    (q, k, _), options = _call()
    kv_cache = k[:, :, 0].contiguous()

    def model(q: Any, kv_cache: Any) -> Any:
        return attention_mla(q * 1.0, kv_cache, head_dim_v=12, softmax_scale=0.2, return_lse=True, **options)

    got, want = torch.compile(model, backend="aot_eager", fullgraph=True)(q, kv_cache), model(q, kv_cache)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and got[0].shape == (5, 4, 12)
    with pytest.raises(Exception, match="requires a gradient"):
        torch.compile(model, backend="eager", fullgraph=True)(q.requires_grad_(), kv_cache)


def test_meta_tensors_of_the_operators_have_the_shapes_of_the_real_ones() -> None:
    from torch._subclasses import FakeTensorMode

    for name, lse in (("decode", False), ("fp8_queries", True), ("value_dim", True), ("mla_small", True)):
        inputs = BY_NAME[name].make(torch.float32)
        options = {**inputs.options, "return_lse": lse}
        real = call()(inputs.q, inputs.k_cache, inputs.v_cache, mla=inputs.case.mla, **options)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in (inputs.q, inputs.k_cache, inputs.v_cache)]
            options = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in options.items()}
            fake = call()(*fakes, mla=inputs.case.mla, **options)
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (real, fake)), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
