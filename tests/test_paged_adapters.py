"""The third-party paged adapters over their fakes: every case is right or refused, and each conversion is needed."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from paged_adapters import ADAPTERS, BF16, CASES, FP16, Adapter
from vllm_accel.backends import aten, flashinfer, flashinfer_paged, flashinfer_workspace, paged_rows, tensorrt_llm_paged
from vllm_accel.dispatch.backend import PagedArgs
from vllm_accel.testing import PagedCase, attention_paged_oracle, paged_kernel_call

Mutation = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Adapter]:
    with ADAPTERS[request.param].installed(monkeypatch):
        yield ADAPTERS[request.param]


@pytest.mark.parametrize(
    ("which", "name"), [(which, name) for which, chosen in ADAPTERS.items() for name in chosen.only or CASES]
)
def test_right_or_refused(which: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[which]
    with adapter.installed(monkeypatch):
        assert adapter.backend.unavailable_reason() is None
        outcome = adapter.check(adapter.case(name))
    assert outcome.ran == (name not in adapter.refused), outcome.reasons
    assert outcome.ran or all(reason.code and reason.text for reason in outcome.reasons)


@pytest.mark.parametrize("name", ["decode", "decode_gap", "speculative", "sinks"])
def test_right_in_fp16(adapter: Adapter, name: str) -> None:
    assert adapter.check(adapter.case(name), FP16).ran


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4_sm90", "flashinfer", "xqa", "gen"])
def test_other_dtypes_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ADAPTERS[name].installed(monkeypatch):
        reasons = ADAPTERS[name].check(ADAPTERS[name].case("decode"), torch.float32).reasons
    assert "dtype" in [reason.code for reason in reasons]


@pytest.mark.parametrize("name", ["fa3", "fa3_old", "fa4_sm90", "fa4_sm100", "gen"])
def test_a_tail_that_may_be_nan_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ADAPTERS[name]
    with chosen.installed(monkeypatch):
        reasons = chosen.check(replace(chosen.case("decode"), finite=False)).reasons
    assert len(reasons) == 1
    assert "finite_tail" in reasons[0].text


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("fa2", {"block_size": 128}, "multiple of 256 tokens; this cache has blocks of 128"),
        ("fa2", {"head_dim": 36, "head_dim_v": 36}, "multiple of 8"),
        ("flashinfer", {"head_dim": 96, "head_dim_v": 96}, "64, 128 or 256"),
        ("flashinfer", {"lengths": ((9, 20),), "options": {"causal": True}}, "up to 8 query tokens"),
        ("flashinfer", {"lengths": ((3, 20),), "options": {"window_size": (4, 0)}}, "causal=True only"),
        ("flashinfer", {"cache": torch.float8_e4m3fn, "descale": "scalar"}, "log-sum-exp"),
        ("xqa", {"lengths": ((2, 20),)}, "one query token"),
        ("xqa", {"block_size": 8}, "16, 32, 64 or 128"),
        ("xqa", {"num_heads": 33, "num_kv_heads": 1}, "32 query heads"),
        ("xqa", {"cache": torch.float8_e4m3fn}, "FP8"),
        ("gen", {"block_size": 128}, "16, 32 or 64"),
        ("xqa", {"mla": True, "head_dim": 576, "head_dim_v": 512}, "for sm_90"),
        ("xqa_sm120", {"mla": True, "head_dim": 576, "head_dim_v": 512}, "finite_tail"),
        ("gen", {"lengths": ((2, 20),), "options": {"window_size": (-1, 3)}}, "causal=True only"),
    ],
)
def test_why_a_call_is_refused(name: str, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ADAPTERS[name]
    with chosen.installed(monkeypatch):
        outcome = chosen.check(replace(chosen.case("decode"), **changes))
    assert any(words in reason.text for reason in outcome.reasons), outcome.reasons


def run(chosen: Adapter, case: PagedCase, change: Callable[[dict[str, Any]], None] = lambda options: None) -> None:
    """Run a case with changed arguments, and compare the output with the oracle's."""
    inputs = case.make(chosen.dtype)
    options = dict(inputs.options)
    change(options)
    out = paged_kernel_call(chosen.backend, chosen.device)(inputs.q, inputs.k_cache, inputs.v_cache, **options)
    want, _ = attention_paged_oracle(
        inputs.q, inputs.k_cache, inputs.v_cache, **{
            name: inputs.options[name] for name in ("cu_seqlens_q", "block_table", "seqused_k")
        }, **case.options,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", ["decode", "speculative"])
def test_the_table_may_be_a_slice(adapter: Adapter, name: str) -> None:
    def widen(options: dict[str, Any]) -> None:
        table = options["block_table"]
        wide = torch.full((table.shape[0], table.shape[1] + 5), 10**6, dtype=torch.int32)
        wide[:, : table.shape[1]] = table
        options["block_table"] = wide[:, : table.shape[1]]

    run(adapter, adapter.case(name), widen)


def test_keys_and_values_may_have_other_strides(adapter: Adapter) -> None:
    inputs = adapter.case("decode").make(adapter.dtype)
    both = torch.stack([inputs.k_cache, inputs.v_cache], dim=1)
    k_cache, v_cache = both.unbind(1)
    v_cache = v_cache.transpose(1, 2).contiguous().transpose(1, 2)
    want = paged_kernel_call(adapter.backend, adapter.device)(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options
    )
    got = paged_kernel_call(adapter.backend, adapter.device)(inputs.q, k_cache, v_cache, **inputs.options)
    assert torch.equal(got, want)


# --- nothing on the host ------------------------------------------------------------------------------------------


def test_the_conversions_read_no_value() -> None:
    """Meta tensors have no values: whatever read one, and so would wait for a GPU, would fail."""

    def int32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    args = PagedArgs(
        int32(5), int32(4, 6), int32(4), torch.empty(4, 8, device="meta"), torch.empty(8, device="meta"),
        *(None,) * 3, 4, 90, 0.1, True, (-1, -1), 0.0, True, False, False,
    )  # fmt: skip
    rows = paged_rows.per_row(args, 9)
    assert rows.table.shape == (9, 6)
    assert rows.used.dtype is torch.int32
    assert paged_rows.without_strays(rows.table, rows.used, 16).dtype is torch.int32
    out, lse = torch.empty(9, 8, 64, device="meta"), torch.empty(9, 8, device="meta")
    assert tensorrt_llm_paged.finished(out, lse, rows, args)[1] is not None
    plan = flashinfer_paged._Plan(None, int32(10), int32(9 * 6 + 1), int32(9), 6, None)  # type: ignore[arg-type]
    flashinfer_paged.fill(plan, rows, 16)


# --- plans of FlashInfer ------------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Record what is planned, over FlashInfer's fake."""
    with ADAPTERS["flashinfer"].installed(monkeypatch) as fake:
        seen: list[dict[str, Any]] = []
        wrapper = fake.BatchPrefillWithPagedKVCacheWrapper
        real = wrapper.plan

        def plan(self: Any, **kwargs: Any) -> None:
            seen.append(kwargs)
            real(self, **kwargs)

        monkeypatch.setattr(wrapper, "plan", plan)
        yield seen


def bound(case: PagedCase) -> tuple[Any, Any, list[Any]]:
    """Return a kernel, the inputs of a case, and the arguments that a call would give it."""
    inputs = case.make(BF16)
    kernels: list[Any] = []
    chosen = ADAPTERS["flashinfer"]
    real = chosen.backend.bind

    class Backend:
        name, capability = chosen.name, chosen.backend.capability

        def bind(self, spec: Any, device: Any) -> Any:
            kernels.append(kernels[0] if kernels else real(spec, device))
            return kernels[0]

    return paged_kernel_call(Backend(), chosen.device), inputs, kernels  # type: ignore[arg-type]


def test_one_plan_serves_all_lengths_of_an_octave(planned: list[dict[str, Any]]) -> None:
    call, inputs, _ = bound(CASES["decode"])
    call(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options)
    assert len(planned) == 1
    shorter = {**inputs.options, "seqused_k": inputs.options["seqused_k"] - 1}
    call(inputs.q, inputs.k_cache, inputs.v_cache, **shorter)
    assert len(planned) == 1
    call(inputs.q, inputs.k_cache, inputs.v_cache, **{**inputs.options, "softmax_scale": 0.5})
    call(inputs.q[:3], inputs.k_cache, inputs.v_cache, **_first(inputs.options, 3))
    assert len(planned) == 3
    for option in ({"window_size": (9, 0)}, {"softcap": 2.0}, {"max_seqlen_k": 300}):
        call(inputs.q, inputs.k_cache, inputs.v_cache, **{**inputs.options, **option})
    assert len(planned) == 6
    assert all(kwargs["qo_indptr"].device.type == "cpu" for kwargs in planned)
    assert planned[0]["paged_kv_indptr"].tolist() == [0, 10, 20, 30, 40]  # blocks of 16 for 129 keys, rounded up to 160


def _first(options: dict[str, Any], n: int) -> dict[str, Any]:
    own = {"cu_seqlens_q": n + 1, "block_table": n, "seqused_k": n}
    return {name: value[: own[name]] if name in own else value for name, value in options.items()}


def test_old_plans_are_dropped(planned: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_paged, "MAX_PLANS", 2)
    call, inputs, kernels = bound(CASES["decode"])
    for scale in (0.1, 0.2, 0.3, 0.1):
        call(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options, softmax_scale=scale)
    assert len(planned) == 4
    assert len(kernels[0]._plans) == 2


def test_plans_of_captured_graphs_stay(planned: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_paged, "MAX_PLANS", 1)
    monkeypatch.setattr(flashinfer_paged, "_captured", {})
    call, inputs, kernels = bound(CASES["decode"])
    call(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options)
    ((key, _), plan), *_ = kernels[0]._plans.items()
    kernels[0]._plans[key, flashinfer_workspace.GRAPH] = plan  # as the first call on a GPU leaves it
    with monkeypatch.context() as capture:
        capture.setattr(flashinfer_paged, "place", lambda device: flashinfer_workspace.GRAPH)
        call(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options)
    call(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options, softmax_scale=0.5)
    assert plan not in kernels[0]._plans.values()
    assert [kept is plan for kept in flashinfer_paged._captured.values()] == [True]


@pytest.mark.parametrize("name", ["flashinfer", "xqa", "gen"])
def test_a_capture_that_nothing_prepared_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ADAPTERS[name]
    with chosen.installed(monkeypatch):
        for module in (flashinfer_workspace, flashinfer_paged):
            monkeypatch.setattr(module, "place", lambda device: flashinfer_workspace.GRAPH)
        with pytest.raises(ValueError, match="before capturing"):
            run(chosen, chosen.case("decode"))


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with ADAPTERS["flashinfer"].installed(monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setenv("CUDA_HOME", "/nowhere")
        monkeypatch.setattr("shutil.which", lambda name: None)
        reason = flashinfer.BACKEND.unavailable_reason()
        assert reason is not None
        assert reason.code == "no_compiler"
        monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        assert flashinfer.BACKEND.unavailable_reason() is None


# --- mutations ----------------------------------------------------------------------------------------------------

_LIBRARIES = ("flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute.interface")
_FLASHINFER = ("flashinfer.decode", "flashinfer.prefill", "flashinfer.mla")


def passes(only: str = "", **changes: Any) -> Mutation:
    """Change what the library is given, where it is given that; a callable gets the value and returns another."""

    def between(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for key, value in changes.items():
                if key in kwargs:
                    kwargs[key] = value(kwargs[key]) if callable(value) else value
            return real(*args, **kwargs)

        call.__wrapped__ = real  # type: ignore[attr-defined]  # the signature stays
        return call

    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        for path in (*_LIBRARIES, *_FLASHINFER):
            module = sys.modules.get(path)
            for name, real in list(vars(module).items()) if module else ():
                attention = name.startswith(("_flash_attn", "flash_attn_with", "trtllm", "xqa"))
                if attention and only in name and callable(real):
                    monkeypatch.setattr(module, name, between(real))
        wrapper = getattr(sys.modules.get("flashinfer"), "BatchPrefillWithPagedKVCacheWrapper", None)
        for name in ("plan", "run") if wrapper and not only else ():
            monkeypatch.setattr(wrapper, name, between(getattr(wrapper, name)))

    return mutate


def attribute(module: str, name: str, value: Any) -> Mutation:
    """Put something else in the place of what an adapter's module uses; dots reach into classes."""

    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        owner, _, last = name.rpartition(".")
        place = importlib.import_module(f"vllm_accel.backends.{module}")
        monkeypatch.setattr(getattr(place, owner) if owner else place, last, value)

    return mutate


def operator(**changes: Any) -> Mutation:
    """Change what PyTorch's operator is given, where it is given that."""

    def between(name: str) -> Callable[..., Any]:
        real = getattr(torch.ops.aten, name).default

        def call(**kwargs: Any) -> Any:
            for key, value in changes.items():
                kwargs[key] = value(kwargs[key]) if callable(value) else value
            return real(**kwargs)

        return call

    return attribute("aten", "operator", between)


def same(x: Any, *_: Any, **__: Any) -> Any:
    return x


_real_rows = paged_rows.per_row


def row_b_is_sequence_b(args: PagedArgs, tokens: int) -> paged_rows.Rows:
    rows = torch.arange(tokens).clamp(max=args.seqused_k.shape[0] - 1)
    return paged_rows.Rows(rows, args.block_table[rows], args.seqused_k[rows])


def rows_of_none_have_keys(args: PagedArgs, tokens: int) -> paged_rows.Rows:
    rows = _real_rows(args, tokens)
    return rows._replace(used=torch.where(rows.used == 0, args.seqused_k[rows.sequence], rows.used))


def every_row_sees_the_end(args: PagedArgs, tokens: int) -> paged_rows.Rows:
    return _real_rows(args._replace(causal=False, window_size=(-1, -1)), tokens)


def everywhere(rows: Any) -> Mutation:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("flash_attn_2_paged", "sdpa_flash_paged", "flashinfer_paged", "tensorrt_llm_paged"):
            attribute(module, "per_row", rows)(monkeypatch)

    return mutate


class _Math:
    inf = math.inf

    @staticmethod
    def log(x: float) -> float:
        return 1.0


def unfinished(out: Tensor, lse: Tensor | None, *_: Any) -> tuple[Tensor, Tensor | None]:
    return out, None if lse is None else (lse * math.log(2)).t()


def no_sinks(out: Tensor, lse: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    return out, lse


def of_all(self: Any, value: Any) -> Any:
    return value if value.dim() < 2 else value[torch.arange(len(self.used)) % value.shape[0]]


SDPA = "sdpa_flash_paged"
FA2, FA3, FA4 = "flash_attn_2_paged", "flash_attn_3_paged", "flash_attn_4_paged"
FI, TRT = "flashinfer_paged", "tensorrt_llm_paged"
FLASH = ("fa2", "fa3", "fa3_old", "fa4_sm90", "fa4_sm100")
OVER_ROWS = ("fa2", "sdpa", "flashinfer", "xqa", "xqa_sm120", "gen")
THREE, FOUR = ("fa3", "fa3_old"), ("fa4_sm90", "fa4_sm100")
GPUS = ("xqa", "xqa_sm120", "gen", "gen_out")

#: (adapters, what is broken, how, the case that must notice)
TABLE: tuple[tuple[tuple[str, ...], str, Mutation, str], ...] = (
    (FLASH, "causal is dropped", passes(causal=False), "prefill"),
    (FLASH, "the caller's scale is dropped", passes(softmax_scale=0.1), "scale"),
    (FLASH, "softcap is dropped", passes(softcap=0.0), "softcap"),
    (FLASH, "lengths are dropped", passes(seqused_k=lambda used: torch.full_like(used, 3), cache_seqlens=3), "decode"),
    (THREE, "the sinks are not folded in", attribute(FA3, "fold_sinks", no_sinks), "sinks"),
    (THREE, "rows of no sequence are left", attribute(FA3, "clear_past_end", same), "sinks_tail"),
    (FOUR, "rows of no sequence are left", attribute(FA4, "clear_past_end", same), "tail"),
    (FOUR, "the sinks are dropped", passes(learnable_sink=None), "sinks"),
    (FOUR, "-1 is passed for an open side", passes(window_size_right=-1), "cross_open_right"),
    (("fa2",), "+inf is kept", attribute(FA2, "empty_rows_to_minus_inf", same), "mixed"),
    (("fa2",), "+inf is kept, decode", attribute(FA2, "empty_rows_to_minus_inf", same), "decode_gap"),
    (("fa2",), "the sinks are not folded in", attribute(FA2, "fold_sinks", no_sinks), "sinks"),
    (("fa2",), "sinks of rows of no sequence", attribute(FA2, "clear_past_end", same), "decode_gap_sinks"),
    (("fa2",), "rows of no sequence are left", passes(zero_tensors=False), "tail"),
    (("fa2",), "slopes are dropped", passes(alibi_slopes=None), "alibi"),
    (("fa2",), "lse keeps its shift", attribute(FA2, "_alibi_lse_shift", lambda *_: torch.zeros(())), "cross_alibi"),
    (("fa2",), "lse is shifted in a window", attribute(FA2, "longest_k", lambda args: 0), "cross_alibi_window"),
    (("fa2",), "the open right side is cut", attribute(FA2, "longest_k", lambda a: a.max_seqlen_k), "cross_open_right"),
    (("fa2",), "the window of a decode is dropped", passes("kvcache", window_size=(-1, -1)), "window_decode"),
    (("fa2",), "causal decode takes the kernel with a shift", passes("kvcache", causal=True), "decode_alibi"),
    (("fa2",), "the slopes are those of other rows", attribute("paged_rows", "Rows.of", of_all), "decode_gap_alibi"),
    (("sdpa",), "causal is dropped", operator(is_causal=False), "prefill"),
    (("sdpa",), "the caller's scale is dropped", operator(scale=None), "scale"),
    (("sdpa",), "a window is dropped", operator(window_size_left=None), "window_causal"),
    (("sdpa",), "the right side is dropped", operator(window_size_right=None), "speculative_right"),
    (("sdpa",), "lengths are dropped", operator(seqused_k=lambda used: torch.full_like(used, 3)), "decode"),
    (("sdpa",), "+inf is kept", attribute(FA2, "empty_rows_to_minus_inf", same), "mixed"),
    (("sdpa",), "the sinks are not folded in", attribute(FA2, "fold_sinks", no_sinks), "sinks"),
    (("sdpa",), "sinks of rows of no sequence", attribute(FA2, "clear_past_end", same), "decode_gap_sinks"),
    (("sdpa",), "rows of no sequence are left", attribute(SDPA, "clear_past_end", same), "tail"),
    (("sdpa",), "the open side is cut", attribute(SDPA, "longest_k", lambda a: a.max_seqlen_k), "cross_open_right"),
    (OVER_ROWS, "row b is sequence b", everywhere(row_b_is_sequence_b), "decode_gap"),
    (OVER_ROWS, "rows of no sequence have keys", everywhere(rows_of_none_have_keys), "decode_gap"),
    (("flashinfer",), "every row sees the end", everywhere(every_row_sees_the_end), "speculative"),
    (("flashinfer",), "every row sees the end, in a window", everywhere(every_row_sees_the_end), "speculative_window"),
    (("flashinfer",), "a right side is not spent", everywhere(every_row_sees_the_end), "speculative_right"),
    (("flashinfer",), "lse stays in base 2", passes(lse_base="log2"), "decode"),
    (("flashinfer",), "lse stays (T, H)", passes(lse_layout="NH"), "decode"),
    (("flashinfer",), "the scale is dropped", passes(sm_scale=None), "scale"),
    (("flashinfer",), "softcap is dropped", passes(logits_soft_cap=0.0), "softcap"),
    (("flashinfer",), "the window is dropped", passes(window_left=-1), "window_decode"),
    (("flashinfer",), "the sinks are dropped", attribute(FI, "fold_sinks", no_sinks), "sinks"),
    (("flashinfer",), "sinks of rows of no sequence", attribute(FI, "clear_past_end", same), "decode_gap_sinks"),
    (("flashinfer",), "the plan is for half of the keys", passes(paged_kv_indptr=lambda ends: ends // 2), "long"),
    (("flashinfer",), "an old table is used", attribute(FI, "fill", same), "decode"),
    (("flashinfer_out",), "factors of other rows", attribute("paged_rows", "Rows.of", of_all), "decode_gap_fp8"),
    (("flashinfer_out",), "the factors are dropped", attribute(FI, "scaled_heads", same), "fp8_heads"),
    (("xqa_sm120", "gen_out"), "the factors are dropped", attribute(TRT, "scaled_heads", same), "fp8_heads"),
    (GPUS, "the scale is dropped", passes(bmm1_scale=0.1), "scale"),
    (GPUS, "the window is dropped", passes(window_left=-1), "window_decode"),
    (GPUS, "the caches change places", passes(kv_cache=lambda caches: caches[::-1]), "decode"),
    (("xqa", "xqa_sm120"), "the sinks are dropped", passes(sinks=None), "sinks"),
    (GPUS, "entries that are nobody's are followed", attribute(TRT, "without_strays", same), "decode_gap"),
    (("gen",), "lse stays in base 2", attribute(TRT, "math", _Math), "decode"),
    (("gen",), "the sinks are dropped", attribute(TRT, "fold_sinks", no_sinks), "sinks"),
    (("gen",), "causal is always", passes("context", causal=True), "prefill_full"),
    (("gen",), "causal is never", passes("context", causal=False), "prefill"),
    (("gen",), "empty rows are left", attribute(TRT, "finished", unfinished), "cross_causal"),
    (("gen", "xqa_sm120"), "the MLA scale is dropped", passes("mla", bmm1_scale=0.1), "mla_128"),
    (("gen",), "the MLA log-sum-exp is of base e", passes("mla", return_lse_base="basee"), "mla"),
)  # fmt: skip

#: A torch without block tables copies instead, and the conversions are those of packed calls, tested elsewhere.
NO_BLOCK_TABLE = pytest.mark.skipif(
    "block_table" not in aten.parameters("_flash_attention_forward"),
    reason=f"the operator of torch {torch.__version__} takes no block table",
)
PARAMETERS = [
    pytest.param(name, mutation, case, id=f"{name}-{what}", marks=NO_BLOCK_TABLE if name == "sdpa" else ())
    for names, what, mutation, case in TABLE
    for name in names
]


@pytest.mark.parametrize(("name", "mutation", "case"), PARAMETERS)
def test_a_case_notices(name: str, mutation: Mutation, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ADAPTERS[name]
    with chosen.installed(monkeypatch):
        assert chosen.check(chosen.case(case)).ran
    with chosen.installed(monkeypatch):
        mutation(monkeypatch)
        assert chosen.backend.unavailable_reason() is None
        with pytest.raises((AssertionError, RuntimeError)):
            chosen.check(chosen.case(case))


@pytest.mark.parametrize("name", ["fa2", "fa3", "flashinfer", "xqa", "gen"])
def test_misaligned_caches_are_copied(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ADAPTERS[name]
    module = {"fa2": "flash_attn_2_paged", "fa3": "flash_attn_3_paged", "flashinfer": "flashinfer_paged"}
    with chosen.installed(monkeypatch):
        inputs = chosen.case("decode").make(BF16)
        odd = torch.zeros((*inputs.k_cache.shape[:-1], inputs.k_cache.shape[-1] + 1), dtype=BF16)[..., 1:]
        odd.copy_(inputs.k_cache)
        call = paged_kernel_call(chosen.backend, chosen.device)
        want = call(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options)
        assert torch.equal(call(inputs.q, odd, inputs.v_cache, **inputs.options), want)
        attribute(module.get(name, "tensorrt_llm_paged"), "aligned", same)(monkeypatch)
        with pytest.raises(RuntimeError, match="misaligned address"):
            call(inputs.q, odd, inputs.v_cache, **inputs.options)
