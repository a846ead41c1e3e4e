"""How a backend is chosen: GPUs that are not here, precedence of requests, settings, quarantine, known-bad rows."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from host import FIRST_ON_CPU, FIRST_WITH_SOFTCAP
from tables import spec_of
from vllm_accel import (
    BackendUnavailableError,
    Device,
    State,
    UnsupportedCallError,
    attention,
    attention_varlen,
    backends,
    explain,
    register_backend,
    reload_settings,
    use_backend,
    warmup,
)
from vllm_accel.dispatch import quarantine, registry, warm
from vllm_accel.dispatch import settings as settings_module
from vllm_accel.dispatch.capability import Capability, Guard
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.dispatch.gemm_spec import Form, GemmSpec, Scaling
from vllm_accel.dispatch.preference import shipped_order
from vllm_accel.dispatch.spec import Feature
from vllm_accel.ops.run import PLANS

EVERYTHING = ~Feature(0)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    quarantine.release()
    warm._warm.clear()
    warm._ran.clear()
    settings_module._current = None
    registry.plan.invalidate()


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch):
    def set_(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        reload_settings()

    yield set_
    monkeypatch.undo()
    settings_module._current = None


class Toy:
    """A backend whose answer is a constant, so that a test sees which one ran."""

    def __init__(self, name: str, value: float, fails: Exception | None = None, **capability: Any) -> None:
        self.name, self._value, self._fails = name, value, fails
        self.runs = 0
        wanted = {"dtypes": frozenset({torch.float32}), "features": EVERYTHING, **capability}
        self.capability = Capability(**wanted)

    def version(self) -> str:
        return "1.0"

    def unavailable_reason(self) -> None:
        return None

    def bind(self, spec: Any, device: Device) -> Toy:
        return self

    def forward(self, q, k, v, args):
        self.runs += 1
        if self._fails is not None:
            raise self._fails
        out = torch.full((*q.shape[:-1], v.shape[-1]), self._value)
        return out, torch.zeros(q.shape[0], q.shape[2], q.shape[1]), None

    def backward(self, q, k, v, args, out, lse, rng, dout, dlse):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None, None


@pytest.fixture
def toy():
    added: list[str] = []

    def add(name: str, value: float, *, before: str | None = None, **kwargs: Any) -> Toy:
        backend = Toy(name, value, **kwargs)
        register_backend("attention", backend, before=before)
        added.append(name)
        return backend

    yield add
    for name in dict.fromkeys(added):
        registry.unregister_backend("attention", name)


def _qkv(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*(shape or (1, 8, 2, 16))).to(dtype) for _ in range(3))


def _meta(dtype: torch.dtype = torch.float16, **sizes: int) -> tuple[torch.Tensor, ...]:
    s = {"b": 2, "sq": 1024, "sk": 1024, "h": 32, "hkv": 8, "d": 128, **sizes}
    q = torch.empty(s["b"], s["sq"], s["h"], s["d"], dtype=dtype, device="meta")
    k = torch.empty(s["b"], s["sk"], s["hkv"], s["d"], dtype=dtype, device="meta")
    return q, k, k


# --- GPUs that are not here ------------------------------------------------------------------------------------------

#: The document's compatibility lists, and what automatic choice takes first with everything installed.
DOCUMENT = {
    "a100": (True, "flash_attn_2"),
    "h100": (True, "flash_attn_3"),
    "h200": (True, "flash_attn_3"),
    "rtx3080": (True, "flash_attn_2"),
    "rtx3090": (True, "flash_attn_2"),
    "rtx4080": (True, "flash_attn_2"),
    "rtx4090": (True, "flash_attn_2"),
    "v100": (False, "xformers"),
    "t4": (False, "xformers"),
    "cpu": (False, "cpu"),
    "mps": (False, "reference"),
}


@pytest.mark.parametrize("gpu", DOCUMENT)
def test_compatibility_lists_of_the_document(gpu: str) -> None:
    flash, first = DOCUMENT[gpu]
    selection = explain(attention, *_meta(), causal=True, device=gpu)
    assert selection.chosen == first, str(selection)
    able = {State.CHOSEN, State.ABLE, State.HELD_BACK}
    runs = {name for name in ("flash_attn_2", "flash_attn_3", "flash_attn_4") if selection[name].state in able}
    assert bool(runs) is flash
    if not flash and PRESETS[gpu].platform == "cuda":
        assert any(r.code == "compute_capability" for r in selection["flash_attn_2"].reasons)
        assert PRESETS[gpu].arch in str(selection["flash_attn_2"])


def test_each_version_of_flash_attention_has_its_own_list() -> None:
    able = {State.CHOSEN, State.ABLE, State.HELD_BACK}
    names = ("flash_attn_2", "flash_attn_3", "flash_attn_4")
    found = {}
    for gpu in ("t4", "a100", "rtx4090", "h100", "b200", "mi300x"):
        selection = explain(attention, *_meta(), device=gpu)
        found[gpu] = {name[-1] for name in names if selection[name].state in able}
    assert found["t4"] == set() and found["mi300x"] == set()
    assert found["a100"] == {"2"} and found["rtx4090"] == {"2"}
    assert found["h100"] == {"2", "3", "4"}
    assert "4" in found["b200"] and "3" not in found["b200"]


def test_flash_attention_4_leads_on_blackwell_once_it_is_built() -> None:
    q, k, v = _meta(torch.bfloat16)
    selection = explain(attention, q, k, v, device="b200")
    assert selection["flash_attn_4"].state is State.HELD_BACK
    assert [r.code for r in selection["flash_attn_4"].reasons] == ["first_call"]
    warm.mark_warm("attention", "flash_attn_4", selection.spec, PRESETS["b200"])
    assert explain(attention, q, k, v, device="b200").chosen == "flash_attn_4"


def test_xformers_is_the_fallback_of_flash_attention(env) -> None:
    env(VLLM_ACCEL_DISABLED_BACKENDS="flash_attn")
    selection = explain(attention, *_meta(), device="a100")
    assert selection.chosen == "xformers"
    assert selection["flash_attn_2"].state is State.DISABLED


def test_a_gpu_newer_than_the_lists_is_refused_with_its_name() -> None:
    future = dataclasses.replace(PRESETS["b200"], compute_capability=(13, 0), arch="sm_130", name="Future GPU")
    selection = explain(attention, *_meta(), device=future)
    assert selection.chosen == "reference"
    assert "sm_130" in selection["flash_attn_2"].reasons[0].text


@pytest.mark.parametrize(
    ("built", "flash", "xformers"), [((11, 2), False, False), ((11, 5), False, True), ((12, 8), True, True)]
)
def test_cuda_minimums_of_the_document(built: tuple[int, int], flash: bool, xformers: bool) -> None:
    device = dataclasses.replace(PRESETS["a100"], runtime_version=built)
    selection = explain(attention, *_meta(), device=device)
    codes = {name: {r.code for r in selection[name].reasons} for name in ("flash_attn_2", "xformers")}
    assert ("cuda_version" not in codes["flash_attn_2"]) is flash
    assert ("cuda_version" not in codes["xformers"]) is xformers


def test_bf16_on_turing_is_refused_where_the_chip_has_none() -> None:
    selection = explain(attention, *_meta(torch.bfloat16), device="t4")
    assert selection.chosen is not None and selection["xformers"].state is State.UNSUPPORTED


def test_selecting_for_every_gpu_takes_milliseconds() -> None:
    q, k, v = _meta()
    explain(attention, q, k, v, device="a100")
    start = time.perf_counter()
    for gpu in PRESETS:
        explain(attention, q, k, v, causal=True, device=gpu)
    assert (time.perf_counter() - start) / len(PRESETS) < 0.05


def test_the_shipped_order_is_known_names_only() -> None:
    planned = {"flashinfer", "tensorrt_llm", "gluon_hopper", "cpu"}
    for device in PRESETS.values():
        order = shipped_order("attention", device)
        assert len(order) == len(set(order)) and order[-1] == "reference"
        assert set(order) <= set(registry.names("attention")) | planned


def test_a_decode_on_hopper_takes_the_kernel_that_shares_out_the_keys() -> None:
    for seqlen_q, packed, first in (
        (1, False, "triton"), (8, False, "triton"), (8, True, "triton"), (16, False, "gluon_hopper"),
        (16, True, "gluon_hopper"),
    ):  # fmt: skip
        spec = replace(spec_of(seqlen_q, 4096), head_dim=128, head_dim_v=128, num_heads=1024, num_kv_heads=1024)
        spec = replace(spec, features=spec.features | Feature.VARLEN) if packed else spec
        order = shipped_order("attention", PRESETS["h200"], spec)
        assert next(name for name in order if name in ("triton", "gluon_hopper")) == first
        assert sorted(order) == sorted(shipped_order("attention", PRESETS["h200"]))
    invariant = spec_of(1, 4096)
    invariant = replace(invariant, features=invariant.features | Feature.BATCH_INVARIANT)
    assert shipped_order("attention", PRESETS["h200"], invariant) == shipped_order("attention", PRESETS["h200"])


def test_others_on_hopper_go_behind_ours_where_these_are_faster() -> None:
    def before(name: str, seqlen_q: int, features: Feature = Feature.CAUSAL, device: str = "h200") -> tuple[bool, bool]:
        spec = replace(spec_of(seqlen_q, 4096), head_dim=128, head_dim_v=128, features=features)
        spec = replace(spec, num_heads=64, num_kv_heads=64)
        order = shipped_order("attention", PRESETS[device], spec)
        assert sorted(order) == sorted(shipped_order("attention", PRESETS[device]))
        return order.index(name) < order.index("triton"), order.index(name) < order.index("gluon_hopper")

    for name in ("flash_attn_4", "flashinfer", "tensorrt_llm"):
        assert before(name, 4096) == before(name, 4096, Feature.PAGED) == (True, True)
        assert before(name, 1)[0] is before(name, 8, Feature.PAGED)[0] is False
        assert before(name, 1, device="b200") == before(name, 4096, Feature.VARLEN, "b200") == (True, True)
        assert before(name, 1, Feature.BATCH_INVARIANT) == (True, True)  # no choice may depend on lengths
    assert before("flash_attn_3", 1) == before("flash_attn_3", 1, Feature.VARLEN) == (True, True)
    assert before("flash_attn_4", 4096, Feature.VARLEN) == (True, False)
    assert not before("flash_attn_4", 1, Feature.VARLEN)[0]


def test_short_calls_on_hopper_take_what_the_host_launches_sooner() -> None:
    """flash_attn_4 takes 95 us of Python, gluon_hopper 35, triton 20; on Blackwell nobody has measured that."""

    def order(tokens: int, features: Feature = Feature.CAUSAL, device: str = "h200") -> tuple[str, ...]:
        spec = replace(spec_of(tokens), head_dim=128, head_dim_v=128, num_heads=32, num_kv_heads=8, features=features)
        ours = ("flash_attn_4", "gluon_hopper", "triton")
        return tuple(name for name in shipped_order("attention", PRESETS[device], spec) if name in ours)

    first, last = ("flash_attn_4", "gluon_hopper", "triton"), ("gluon_hopper", "triton", "flash_attn_4")
    assert order(512) == ("triton", "gluon_hopper", "flash_attn_4")
    assert order(2048) == last and order(4096) == order(16384) == first
    train = Feature.CAUSAL | Feature.GRAD
    assert order(512, train) == order(2048, train) == last and order(8192, train) == first
    assert order(512, device="b200")[0] == "flash_attn_4" and order(512, Feature.BATCH_INVARIANT)[0] == "flash_attn_4"


def test_small_heads_on_hopper_take_the_smaller_tiles_unless_they_are_trained() -> None:
    def first(head_dim: int, grad: bool) -> str:
        spec = replace(spec_of(4096, 4096), head_dim=head_dim, head_dim_v=head_dim)
        spec = replace(spec, features=spec.features | (Feature.GRAD if grad else spec.features))
        order = shipped_order("attention", PRESETS["h200"], spec)
        return next(name for name in order if name in ("triton", "gluon_hopper"))

    assert first(64, grad=False) == "triton"
    assert first(128, grad=False) == first(64, grad=True) == first(128, grad=True) == "gluon_hopper"


def test_groups_in_fp8_by_blocks_take_cutlass_unless_they_are_short() -> None:
    def first(rows: int, scaling: Scaling = Scaling.BLOCK_1x128, features: Feature = Feature.DETERMINISTIC) -> str:
        spec = GemmSpec(
            Form.GROUPED_M, torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16, rows, 4096, 7168, 64, features,
            scaling, scaling,
        )  # fmt: skip
        order = shipped_order("gemm", PRESETS["h200"], spec)
        return next(name for name in order if name in ("triton", "cutlass"))

    assert first(8192) == "cutlass" and first(512) == first(8192, Scaling.ROW) == "triton"
    assert first(8192, features=Feature.BATCH_INVARIANT) == "triton"  # no choice may depend on lengths


# --- who asked -------------------------------------------------------------------------------------------------------


def test_precedence_argument_over_context_over_environment(env) -> None:
    q, k, v = _qkv()
    env(VLLM_ACCEL_ATTENTION_BACKEND="reference")
    assert explain(attention, q, k, v).chosen == "reference"
    assert "VLLM_ACCEL_ATTENTION_BACKEND" in explain(attention, q, k, v).decided_by
    with use_backend(attention="sdpa_cpu"):
        assert explain(attention, q, k, v).chosen == "sdpa_cpu"
        with use_backend(attention="naive"):
            assert explain(attention, q, k, v).chosen == "reference"
        assert explain(attention, q, k, v, backend="reference").chosen == "reference"
    assert explain(attention, q, k, v).chosen == "reference"


def test_explain_and_the_call_agree_under_every_request(toy) -> None:
    a = toy("toy_a", 1.0)
    q, k, v = _qkv()
    assert not attention(q, k, v, backend="toy_a").sub(1.0).any() and a.runs == 1
    with use_backend(attention=["toy_a", "reference"]):
        assert explain(attention, q, k, v).chosen == "toy_a"
        assert not attention(q, k, v).sub(1.0).any()
    assert attention(q, k, v).sub(1.0).any()


def test_a_sequence_is_tried_in_order(toy) -> None:
    toy("toy_half", 1.0, dtypes=frozenset({torch.float16}))
    q, k, v = _qkv()
    selection = explain(attention, q, k, v, backend=["toy_half", "naive"])
    assert selection.chosen == "reference" and selection["toy_half"].state is State.UNSUPPORTED
    assert torch.equal(attention(q, k, v, backend=["toy_half", "naive"]), attention(q, k, v, backend="reference"))


def test_a_family_stands_for_its_members() -> None:
    q, k, v = _qkv()
    assert explain(attention, q, k, v, backend="sdpa").chosen == "sdpa_cpu"
    assert explain(attention, *_meta(), device="h100", backend="flash_attn").chosen == "flash_attn_4"
    assert explain(attention, *_meta(), device="a100", backend="flash_attn").chosen == "flash_attn_2"


def test_an_explicit_name_runs_or_says_why() -> None:
    q, k, v = _qkv()
    with pytest.raises(UnsupportedCallError) as refusal:
        attention(q, k, v, backend="sdpa_cpu", softcap=3.0)
    assert [r.code for r in refusal.value.reasons["sdpa_cpu"]] == ["feature:softcap"]
    assert repr(FIRST_WITH_SOFTCAP) in str(refusal.value)
    with pytest.raises(UnsupportedCallError, match="runs on cuda, not on cpu"):
        attention(q, k, v, backend="flash_attn_2")


@pytest.mark.parametrize("wrong", ["flashattn", "sdpa_gpu", "triton_flash"])
def test_a_misspelt_backend_names_the_nearest(wrong: str) -> None:
    q, k, v = _qkv()
    with pytest.raises(ValueError, match=f"unknown attention backend '{wrong}'"):
        attention(q, k, v, backend=wrong)
    with pytest.raises(ValueError, match="unknown attention backend"), use_backend(attention=wrong):
        pass


def test_wrong_kinds_of_request() -> None:
    q, k, v = _qkv()
    with pytest.raises(TypeError, match="backend must be a name"):
        attention(q, k, v, backend=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty sequence"):
        attention(q, k, v, backend=[])


def test_use_backend_is_local_to_a_thread() -> None:
    import threading

    seen = []
    with use_backend(attention="reference"):
        worker = threading.Thread(target=lambda: seen.append(explain(attention, *_qkv()).chosen))
        worker.start()
        worker.join()
        assert explain(attention, *_qkv()).chosen == "reference"
    assert seen == [FIRST_ON_CPU]


# --- settings --------------------------------------------------------------------------------------------------------


def test_an_unknown_setting_is_an_error_that_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ACCEL_ATENTION_BACKEND", "reference")
    with pytest.raises(ValueError, match="did you mean 'VLLM_ACCEL_ATTENTION_BACKEND'"):
        reload_settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VLLM_USE_TRITON_FLASH_ATTN", "yes", "use 1, 0, true or false"),
        ("VLLM_ACCEL_ATTENTION_BACKEND", "refrence", "did you mean 'reference'"),
        ("VLLM_ACCEL_DISABLED_BACKENDS", "gemm:nothing", "unknown gemm backend 'nothing'"),
        ("VLLM_ACCEL_DISABLED_BACKENDS", "conv:x", "'conv' is not one of"),
        ("VLLM_ACCEL_LIFT_KNOWN_BAD", "efficient-mask", "did you mean 'efficient-mask-65536'"),
    ],
)
def test_malformed_settings(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        reload_settings()


def test_a_change_after_the_first_call_is_reported_and_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _qkv()
    reload_settings()
    attention(q, k, v)
    monkeypatch.setenv("VLLM_ACCEL_ATTENTION_BACKEND", "reference")
    selection = explain(attention, q, k, v)
    assert selection.chosen == FIRST_ON_CPU
    assert any("has changed since it was read" in line for line in selection.settings)
    reload_settings()
    assert explain(attention, q, k, v).chosen == "reference"


def test_disabled_backends_are_gone_even_for_explicit_use(env) -> None:
    env(VLLM_ACCEL_DISABLED_BACKENDS="cpu,sdpa_cpu,gemm:reference")
    q, k, v = _qkv()
    assert explain(attention, q, k, v).chosen == "reference"
    with pytest.raises(BackendUnavailableError, match="VLLM_ACCEL_DISABLED_BACKENDS"):
        attention(q, k, v, backend="sdpa_cpu")


@pytest.mark.parametrize(
    ("value", "chosen"), [("1", "triton"), ("TRUE", "triton"), ("0", "flash_attn_2"), (None, "flash_attn_2")]
)
def test_the_triton_switch(env, value: str | None, chosen: str) -> None:
    if value is not None:
        env(VLLM_USE_TRITON_FLASH_ATTN=value)
    selection = explain(attention, *_meta(), device="a100")
    assert selection.chosen == chosen
    assert (selection.decided_by == "VLLM_USE_TRITON_FLASH_ATTN=1") is (chosen == "triton")
    if value == "0":
        assert selection["triton"].state is State.HELD_BACK
        assert [r.code for r in selection["triton"].reasons] == ["use_triton"]
        assert "VLLM_USE_TRITON_FLASH_ATTN=0" in str(selection["triton"])
    if value is None:
        assert selection["triton"].state is State.ABLE


def test_an_explicit_name_wins_over_the_triton_switch(env) -> None:
    env(VLLM_USE_TRITON_FLASH_ATTN="0")
    assert explain(attention, *_meta(), device="a100", backend="triton").chosen == "triton"
    env(VLLM_USE_TRITON_FLASH_ATTN="1")
    assert explain(attention, *_meta(), device="a100", backend="xformers").chosen == "xformers"


def test_the_triton_kernels_stand_before_pytorchs_for_gradients_once_they_are_built(env) -> None:
    env(VLLM_ACCEL_DISABLED_BACKENDS="flash_attn,xformers,mslk")
    assert explain(attention, *_meta(), device="a100").chosen == "triton", "a forward compiles in less than two seconds"
    training = [t.requires_grad_() for t in _meta()]
    selection = explain(attention, *training, device="a100")
    assert selection.chosen == "sdpa_flash" and selection["triton"].state is State.HELD_BACK
    assert "4 s" in str(selection["triton"])
    warm.mark_warm("attention", "triton", selection.spec, PRESETS["a100"])
    assert explain(attention, *training, device="a100").chosen == "triton"


def test_many_options_compile_longer_than_a_call_may_wait(env) -> None:
    env(VLLM_ACCEL_DISABLED_BACKENDS="flash_attn,xformers,mslk")
    options = {"window_size": (64, 64), "softcap": 4.0, "alibi_slopes": torch.empty(32, device="meta")}
    selection = explain(attention, *_meta(), device="a100", **options)
    assert selection["triton"].state is State.HELD_BACK and "about 3 s" in str(selection["triton"])


@pytest.mark.parametrize(
    ("grad", "options", "said"),
    [(False, {}, "about 10 s"), (True, {}, "about 10 s"), (False, {"batch_invariant": True}, "about 5 s")],
)
def test_what_a_kind_of_call_compiles_is_told(env, grad: bool, options: dict[str, bool], said: str) -> None:
    env(VLLM_ACCEL_DISABLED_BACKENDS="flash_attn,xformers,mslk")
    selection = explain(attention, *[t.requires_grad_(grad) for t in _meta()], device="h200", **options)
    assert selection["gluon_hopper"].state is State.HELD_BACK and said in str(selection["gluon_hopper"])


def test_the_triton_switch_says_so_where_it_has_no_effect(env) -> None:
    env(VLLM_USE_TRITON_FLASH_ATTN="1")
    selection = explain(attention, *_qkv())
    assert selection.chosen == FIRST_ON_CPU
    assert any("has no effect on cpu" in line for line in selection.settings)
    assert not any("has no effect" in line for line in explain(attention, *_meta(), device="a100").settings)


# --- what automatic choice leaves out --------------------------------------------------------------------------------


def test_quadratic_memory_is_never_automatic(toy) -> None:
    toy("toy_dense", 2.0, before="cpu", linear_memory=False)
    q, k, v = _qkv()
    selection = explain(attention, q, k, v)
    assert selection["toy_dense"].state is State.HELD_BACK and "O(Sq*Sk)" in str(selection["toy_dense"])
    assert not attention(q, k, v, backend="toy_dense").sub(2.0).any()


def test_a_compiling_backend_waits_for_warmup(toy) -> None:
    built = toy("toy_jit", 3.0, before="cpu", first_call_seconds=20.0)
    q, k, v = _qkv()
    assert "20 s" in str(explain(attention, q, k, v)["toy_jit"])
    assert attention(q, k, v).sub(3.0).any() and built.runs == 0
    assert warmup(attention, q, k, v) == ("toy_jit",)
    assert not attention(q, k, v).sub(3.0).any()
    longer = tuple(torch.cat([t, t], 1) for t in (q, k, v))
    assert explain(attention, *longer).chosen == "toy_jit", "built for any length"
    assert explain(attention, q, k, v, causal=True).chosen == FIRST_ON_CPU, "another kind of call is not built"
    assert warmup(attention, q, k, v) == ()


def test_a_short_compile_may_happen_at_a_call_but_not_in_a_capture(toy) -> None:
    from vllm_accel.dispatch.selector import Question, select

    built = toy("toy_quick", 3.0, before="cpu", first_call_seconds=1.5)
    q, k, v = _qkv()
    shown = explain(attention, q, k, v)
    question = Question("attention", shown.spec, shown.device, capturing=True)
    assert shown.chosen == "toy_quick" and "run the call once before" in select(question)["toy_quick"].why
    assert not attention(q, k, v).sub(3.0).any() and select(question).chosen == "toy_quick"
    warm._ran.clear()
    assert warmup(attention, q, k, v) == ("toy_quick",) and built.runs == 2
    warm._ran.clear()
    assert warmup(attention, q, k, v) == () and select(question).chosen == "toy_quick"


def test_a_graph_per_shape_is_for_training_at_fixed_shapes(toy) -> None:
    toy("toy_graph", 4.0, before="cpu", per_shape_cost=True)
    q, k, v = _qkv()
    assert explain(attention, q, k, v)["toy_graph"].state is State.HELD_BACK
    assert explain(attention, q.requires_grad_(), k, v).chosen == "toy_graph"


def test_a_plan_that_is_not_capture_safe_is_not_taken_during_capture(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_accel.ops.run import outside_capture

    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    check = outside_capture(lambda *tensors: True)
    assert check(1)
    capturing = True
    assert not check(1)
    toy("toy_plain", 1.0, platforms=frozenset({"cuda"}), dtypes=frozenset({torch.float16}), capture_safe=False)
    from vllm_accel.dispatch.selector import Question, select

    spec = explain(attention, *_meta(), device="a100").spec
    question = Question("attention", spec, PRESETS["a100"], asked=("toy_plain",), capturing=True, assume_available=True)
    assert [r.code for r in select(question)["toy_plain"].reasons] == ["capture"]


def test_exact_sizes_are_guarded_inside_one_bucket(toy) -> None:
    guard = Guard("even", lambda spec, sizes: f"{sizes.seqlen_k} keys is odd" if sizes.seqlen_k % 2 else None)
    toy("toy_even", 5.0, before="cpu", guards=(guard,))
    for keys, chosen in ((1024, "toy_even"), (1025, FIRST_ON_CPU), (1026, "toy_even")):
        q, k = torch.randn(1, 4, 1, 8), torch.randn(1, keys, 1, 8)
        assert explain(attention, q, k, k).chosen == chosen
        assert (attention(q, k, k) == 5.0).all().item() is (chosen == "toy_even")
    k = torch.randn(1, 1025, 1, 8)
    with pytest.raises(UnsupportedCallError, match="1025 keys is odd"):
        attention(torch.randn(1, 4, 1, 8), k, k, backend="toy_even")


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_failing_launch_falls_back_once_and_is_remembered(toy, caplog: pytest.LogCaptureFixture) -> None:
    bad = toy("toy_bad", 0.0, before="cpu", fails=RuntimeError("no kernel image is available"))
    q, k, v = _qkv()
    with caplog.at_level(logging.WARNING, "vllm_accel"):
        first, second = attention(q, k, v), attention(q, k, v)
    assert torch.equal(first, attention(q, k, v, backend=FIRST_ON_CPU)) and torch.equal(first, second)
    assert bad.runs == 1
    assert [r for r in caplog.records if "toy_bad" in r.message and "no kernel image" in r.message].__len__() == 1
    shown = explain(attention, q, k, v)["toy_bad"]
    assert shown.state is State.QUARANTINED and "no kernel image" in str(shown)
    assert explain(attention, q, k, v, causal=True).chosen == "toy_bad", "only this kind of call"
    with pytest.raises(RuntimeError, match="no kernel image"):
        attention(q, k, v, backend="toy_bad")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ValueError("bad argument"), MemoryError()])
def test_errors_that_are_the_callers_are_raised(toy, error: Exception) -> None:
    toy("toy_bad", 0.0, before="cpu", fails=error)
    with pytest.raises(type(error)):
        attention(*_qkv())
    assert explain(attention, *_qkv()).chosen == "toy_bad"


@pytest.mark.parametrize("option", ["deterministic", "batch_invariant"])
def test_a_reproducible_call_never_falls_back(toy, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy("toy_bad", 0.0, before="cpu", fails=RuntimeError("broken"))
    warm.record_self_test("attention", "toy_bad", explain(attention, *_qkv()).device, True)
    with pytest.raises(RuntimeError, match="broken"):
        attention(*_qkv(), **{option: True})


def test_a_failure_with_gradients_falls_back_too(toy) -> None:
    toy("toy_bad", 0.0, before="cpu", fails=RuntimeError("broken"))
    q, k, v = (t.requires_grad_() for t in _qkv())
    out = attention(q, k, v)
    want = attention(q, k, v, backend=FIRST_ON_CPU)
    assert torch.equal(out, want)
    assert torch.equal(*(torch.autograd.grad(o.sum(), q)[0] for o in (out, want)))


def test_a_poisoned_context_is_raised() -> None:
    from vllm_accel.ops.run import _poisoned

    assert _poisoned(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert _poisoned(RuntimeError("CUDA error: device-side assert triggered"))
    assert not _poisoned(RuntimeError("CUDA error: no kernel image is available for execution on the device"))
    assert not _poisoned(RuntimeError("head size 512 is not supported"))


def test_a_backend_that_fails_to_bind_is_quarantined(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = toy("toy_bad", 0.0, before="cpu")

    def bind(spec: Any, device: Device) -> Any:
        raise OSError("undefined symbol: _ZN3c105Error")

    monkeypatch.setattr(bad, "bind", bind, raising=False)
    assert torch.isfinite(attention(*_qkv())).all()
    assert "undefined symbol" in str(explain(attention, *_qkv())["toy_bad"])


def test_a_batch_invariance_claim_is_proven_before_it_is_used(toy) -> None:
    class Liar(Toy):
        def forward(self, q, k, v, args):
            out, lse, _ = super().forward(q, k, v, args)
            return out * (1 + q.shape[0] * 1e-3), lse, None

    liar = Liar("toy_liar", 1.0, dtypes=frozenset({torch.float32, torch.bfloat16}))
    register_backend("attention", liar, before="cpu")
    try:
        out = attention(*_qkv(), batch_invariant=True)
        assert liar.runs > 0 and out.sub(1.001).abs().max() > 0.01
        assert "self-test failed" in str(explain(attention, *_qkv(), batch_invariant=True)["toy_liar"])
        with pytest.raises(UnsupportedCallError, match="self-test failed"):
            attention(*_qkv(), batch_invariant=True, backend="toy_liar")
    finally:
        registry.unregister_backend("attention", "toy_liar")


def test_known_bad_rows_refuse_with_their_link_and_can_be_lifted(env) -> None:
    q, k, v = _meta(b=1, sq=70_000, sk=70_000, h=2, hkv=2, d=64)
    mask = torch.empty(1, 1, 1, 70_000, dtype=torch.bool, device="meta")
    shown = explain(attention, q, k, v, attn_bias=mask, device="t4")["sdpa_efficient"]
    assert shown.state is State.QUARANTINED and "pytorch/issues/162588" in str(shown)
    short = mask[..., :60_000]
    able = explain(attention, q[:, :60_000], k[:, :60_000], v[:, :60_000], attn_bias=short, device="t4")
    assert able["sdpa_efficient"].state in (State.CHOSEN, State.ABLE)
    env(VLLM_ACCEL_LIFT_KNOWN_BAD="efficient-boolmask-65536")
    lifted = explain(attention, q, k, v, attn_bias=mask, device="t4")["sdpa_efficient"]
    assert lifted.state in (State.CHOSEN, State.ABLE)


@pytest.mark.parametrize("row", quarantine.known_bad_rows(), ids=lambda row: row.name)
def test_known_bad_rows_are_complete(row: quarantine.KnownBad) -> None:
    assert (row.op, row.backend) in registry.BUILT_IN
    assert row.link.startswith("https://") and row.effect
    assert all(name.upper() in Feature.__members__ for name in row.features)


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_growing_decode_keeps_its_choice() -> None:
    q = torch.randn(1, 1, 2, 16)
    attention(q, *(2 * (torch.randn(1, 4, 2, 16),)))
    from vllm_accel.dispatch import choose

    before = len(PLANS)
    kinds = len(choose._choices)
    for length in range(1024, 1280):  # one quarter octave
        k = torch.randn(1, length, 2, 16)
        for _ in range(3):
            attention(q, k, k)
    assert len(PLANS) == before + 256
    assert len(choose._choices) == kinds + 1


def test_the_plan_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_accel.dispatch import plan

    monkeypatch.setattr(plan, "MAX_PLANS", 16)
    registry.plan.invalidate()
    q = torch.randn(1, 1, 1, 8)
    for length in range(1, 60):
        attention(q, torch.randn(1, length, 1, 8), torch.randn(1, length, 1, 8))
    assert len(PLANS) <= 17


def test_the_choice_does_not_depend_on_the_order_of_calls() -> None:
    calls = [(1, 1100, 1), (1, 1030, 1), (64, 64, 4), (1, 1200, 1), (63, 64, 4)]
    shapes = [(torch.randn(1, sq, h, 16), torch.randn(1, sk, h, 16)) for sq, sk, h in calls]

    def chosen(order: list[int]) -> dict[int, str]:
        registry.plan.invalidate()
        result = {}
        for i in order:
            q, k = shapes[i]
            attention(q, k, k, causal=True)
            result[i] = explain(attention, q, k, k, causal=True).chosen or ""
        return result

    assert chosen([0, 1, 2, 3, 4]) == chosen([4, 3, 2, 1, 0])


def test_every_option_changes_the_spec() -> None:
    q, k, v = _qkv(2, 8, 4, 16)
    plain = explain(attention, q, k, v).spec
    flipped: dict[str, Any] = {
        "causal": True, "window_size": (3, -1), "softmax_scale": 0.3, "softcap": 2.0, "alibi_slopes": torch.rand(4),
        "attn_bias": torch.randn(8, 8), "sinks": torch.rand(4), "dropout_p": 0.1, "q_descale": torch.ones(()),
        "k_descale": torch.ones(4), "v_descale": torch.ones(2, 4), "return_lse": True, "deterministic": True,
        "batch_invariant": True,
    }  # fmt: skip
    import inspect

    names = set(inspect.signature(attention).parameters) - {"q", "k", "v", "backend"}
    assert names == set(flipped), "every option of the call is flipped here"
    specs = {name: explain(attention, q, k, v, **{name: value}).spec for name, value in flipped.items()}
    assert all(spec != plain for spec in specs.values())
    assert len({spec.features for spec in specs.values()}) == len(specs)


@pytest.mark.parametrize("name", dict.fromkeys(["reference", "sdpa_cpu", FIRST_ON_CPU]))
def test_every_option_changes_the_output_or_is_refused(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 8, 4, 16, generator=g) for _ in range(3))
    plain = attention(q, k, v, backend=name)
    flipped: dict[str, Any] = {
        "causal": True, "window_size": (3, -1), "softmax_scale": 0.9, "softcap": 0.5, "alibi_slopes": torch.rand(4) + 1,
        "attn_bias": torch.randn(8, 8), "sinks": torch.rand(4) + 2, "dropout_p": 0.5, "q_descale": torch.full((), 2.0),
        "k_descale": torch.full((4,), 2.0), "v_descale": torch.full((2, 4), 2.0),
    }  # fmt: skip
    changed = refused = 0
    for option, value in flipped.items():
        try:
            out = attention(q, k, v, backend=name, **{option: value})
        except UnsupportedCallError:
            refused += 1
        else:
            assert (out - plain).abs().max() > 1e-3, option
            changed += 1
    assert (changed, refused) == {"reference": (11, 0), "cpu": (10, 1), "sdpa_cpu": (6, 5)}[name]


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_is_data_and_reads_well() -> None:
    selection = explain(attention, *_meta(), causal=True, device="t4")
    data = selection.as_dict()
    assert data["chosen"] == "xformers" and data["op"] == "attention"
    states = {c["name"]: c["state"] for c in data["candidates"]}
    assert states["xformers"] == "chosen" and set(states) == set(backends())
    text = str(selection)
    assert "-> xformers" in text and "Tesla T4" in text and "sm_75" in text and "causal" in text
    assert all(c.reasons for c in selection.candidates if c.state not in (State.CHOSEN, State.ABLE, State.NOT_ASKED))
    assert selection.assumed and "no such device" in text


def test_explain_launches_nothing(toy) -> None:
    backend = toy("toy_probe", 1.0, before="cpu")
    explain(attention, *_qkv())
    explain(attention, *_qkv(), batch_invariant=True)
    assert backend.runs == 0


def test_explain_takes_the_calls_of_the_library_only() -> None:
    with pytest.raises(TypeError, match="explain takes one of"):
        explain(torch.add, torch.ones(1), torch.ones(1))
    cu = torch.tensor([0, 3], dtype=torch.int32)
    q = torch.randn(3, 2, 16)
    packed = explain(attention_varlen, q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=3, max_seqlen_k=3)
    assert packed.chosen == FIRST_ON_CPU and Feature.VARLEN in packed.spec.features


def test_the_function_backends_outlives_the_package_of_that_name() -> None:
    import vllm_accel

    explain(attention, *_qkv())  # imports adapters from the package vllm_accel.backends
    assert "reference" in vllm_accel.backends() and vllm_accel.backends("gemm")


def test_a_third_partys_broken_availability_check_is_a_reason(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = toy("toy_odd", 1.0, before="cpu")
    monkeypatch.setattr(backend, "unavailable_reason", lambda: 1 / 0)
    selection = explain(attention, *_qkv())
    assert selection.chosen == FIRST_ON_CPU and selection["toy_odd"].state is State.UNAVAILABLE
    assert "division by zero" in str(selection["toy_odd"])


def test_a_call_does_not_import_what_it_will_not_take(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    backend = toy("toy_jit", 3.0, before="cpu", first_call_seconds=20.0)
    monkeypatch.setattr(backend, "unavailable_reason", lambda: asked.append(1))
    attention(*_qkv(), causal=True)
    assert not asked
    explain(attention, *_qkv(), causal=True)
    assert asked


def test_registered_names_are_protected() -> None:
    with pytest.raises(ValueError, match="taken by a built-in"):
        register_backend("attention", Toy("reference", 1.0))
    with pytest.raises(ValueError, match="is not an operation"):
        register_backend("convolution", Toy("x", 1.0))
    with pytest.raises(ValueError, match="was not registered"):
        registry.unregister_backend("attention", "reference")
