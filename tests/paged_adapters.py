"""What the tests of the third-party paged adapters share: each over its fake, its GPU, and the cases it must refuse."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from fakes import install
from vllm_accel.backends import flashinfer_workspace, library
from vllm_accel.dispatch.device import PRESETS, Device
from vllm_accel.errors import UnsupportedCallError
from vllm_accel.testing import PAGED_CASES, Outcome, PagedCase, attention_paged_oracle, paged_kernel_call
from vllm_accel.testing.conformance_paged import _NOT_MATHS
from vllm_accel.testing.oracle import plain_attention_paged
from vllm_accel.testing.tolerance import assert_close

BF16, FP16 = torch.bfloat16, torch.float16
_CAUSAL: dict[str, Any] = {"causal": True}
_GAP = ((1, 40), (0, 3), (1, 0), (1, 129))
_CROSS = ((9, 30), (20, 7), (0, 5), (3, 0), (6, 6))

#: Beyond the public cases: what only the conversions of these adapters make dangerous.
OWN_CASES: tuple[PagedCase, ...] = (
    PagedCase("decode_gap", "row b is not sequence b", _GAP, tail=2, num_heads=8),
    PagedCase("decode_gap_sinks", "", _GAP, tail=2, sinks=True),
    PagedCase("decode_gap_window", "", _GAP, tail=1, options={"window_size": (17, -1)}),
    PagedCase("decode_gap_alibi", "", _GAP, tail=1, alibi="batch", options=_CAUSAL),
    PagedCase("decode_gap_fp8", "", _GAP, tail=1, cache=torch.float8_e4m3fn, descale="batch"),
    PagedCase("speculative_window", "every row's window ends at its own token", ((4, 50), (2, 3), (7, 133)),
              options={"window_size": (9, -1), **_CAUSAL}),
    PagedCase("speculative_right", "a right side is spent in the lengths", ((4, 50), (2, 3), (7, 133)),
              options={"window_size": (-1, 2)}),
    PagedCase("speculative_longer", "more queries than keys", ((4, 2), (5, 9), (3, 0)), tail=2, options=_CAUSAL),
    PagedCase("cross_causal", "rows without keys in the middle", _CROSS, tail=3, options=_CAUSAL),
    PagedCase("cross_open_right", "FlashAttention 2 cuts an open right side", ((50, 20), (3, 9)),
              options={"window_size": (3, -1)}),
    PagedCase("cross_alibi", "the shift of its log-sum-exp counts from the end of the keys", _CROSS, alibi="heads",
              tail=2, options=_CAUSAL),
    PagedCase("cross_alibi_window", "no shift inside a window", _CROSS, alibi="batch",
              options={"window_size": (4, -1), **_CAUSAL}),
    PagedCase("decode_alibi", "no shift for one query", alibi="heads"),
    PagedCase("mla_128", "the one number of heads that XQA has", ((1, 70), (0, 9), (1, 3)), tail=1, num_heads=128,
              head_dim=576, head_dim_v=512, mla=True, block_size=64, finite=True, options={"softmax_scale": 192**-0.5}),
    PagedCase("mla_decode_tail", "", _GAP, tail=2, num_heads=16, head_dim=576, head_dim_v=512, mla=True, sinks=True,
              options={"softmax_scale": 192**-0.5}),
)  # fmt: skip
#: A GPU for which there is no preset; XQA has multi-head latent attention there alone.
SM_120 = replace(PRESETS["b200"], arch="sm_120", compute_capability=(12, 0), name="RTX 5090")
CASES = {case.name: case for case in (*PAGED_CASES, *OWN_CASES)}


@dataclass(frozen=True)
class Adapter:
    """An adapter over a fake, and how the cases are changed to be worth asking.

    Attributes:
        name: of the backend. fake: of the stand-in. preset: the GPU that it is told of.
        changes: of every case (FlashAttention 2 knows large blocks alone; some need finite tails).
        queries: most query tokens of a sequence, cut off.
        refused: names of the cases that it must refuse so, and no others. lse: it returns one.
        only: the cases worth asking, where another adapter of the list has asked the rest. dtype: to ask them in.
    """

    name: str
    fake: str
    preset: str
    refused: frozenset[str]
    changes: dict[str, Any] = field(default_factory=dict)
    queries: int = 1000
    lse: bool = True
    only: frozenset[str] = frozenset()
    dtype: torch.dtype = BF16

    @property
    def backend(self) -> Any:
        return importlib.import_module(f"vllm_accel.backends.{self.name}").BACKEND

    @property
    def device(self) -> Device:
        return PRESETS.get(self.preset, SM_120)

    def case(self, name: str) -> PagedCase:
        case = CASES[name]
        lengths = tuple((min(n, self.queries), keys) for n, keys in case.lengths)
        return replace(case, lengths=lengths, **self.changes)

    @contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """Put the fake in the library's place, and give the module whose attributes say what it pretends to be."""
        library.forget()
        source = install.install(monkeypatch, self.fake)
        major, minor = self.device.compute_capability or (0, 0)
        if self.fake == "flash_attn_4":
            monkeypatch.setattr(source, "ARCH", 10 * major + minor)
        if hasattr(source, "COMPUTE_CAPABILITY"):
            monkeypatch.setattr(source, "COMPUTE_CAPABILITY", (major, minor))
        if self.fake == "flashinfer":
            monkeypatch.setattr(flashinfer_workspace, "_buffers", {})
            monkeypatch.setattr(flashinfer_workspace, "BYTES", 16 << 20)
        try:
            yield source
        finally:
            library.forget()

    def check(self, case: PagedCase, dtype: torch.dtype | None = None) -> Outcome:
        """Check one case; the output alone where the library has no log-sum-exp to give."""
        from vllm_accel.testing import check_paged_backend

        dtype = dtype or self.dtype
        if self.lse:
            return check_paged_backend(self.backend, case, dtype=dtype, device=self.device)
        return check_out(self, case, dtype)


def check_out(adapter: Adapter, case: PagedCase, dtype: torch.dtype) -> Outcome:
    """Compare the output with the oracle's."""
    inputs = case.make(dtype)
    tensors = (inputs.q, inputs.k_cache, inputs.v_cache)
    maths = {name: value for name, value in inputs.options.items() if name not in _NOT_MATHS}
    try:
        out = paged_kernel_call(adapter.backend, adapter.device)(*tensors, mla=case.mla, **inputs.options)
    except UnsupportedCallError as refusal:
        reasons = refusal.reasons[adapter.name]
        assert reasons
        return Outcome(False, reasons)
    assert out.is_contiguous() and out.dtype is inputs.q.dtype
    want, plain = (f(*tensors, **maths)[0] for f in (attention_paged_oracle, plain_attention_paged))
    assert_close(out, want, plain, what=case.name)
    return Outcome(True)


_SIZES = {"value_dim", "value_dim_larger"}
_ALIBI = {"alibi", "alibi_batch", "decode_alibi", "decode_gap_alibi", "cross_alibi", "cross_alibi_window"}
_MLA = {"mla", "mla_prefill", "mla_small", "mla_fp8", "mla_window", "mla_decode_tail", "mla_invariant",
        "mla_128"}  # fmt: skip
_FP8 = {"fp8_scalar", "fp8_heads", "fp8_batch", "fp8_plain", "fp8_head_major", "decode_gap_fp8"}
_FACTORS = _FP8 - {"fp8_plain"}
_INT8 = {"int8_scalar", "int8_heads", "int8_batch"}
_NEVER = {"fp8_queries", "q_descale", "batch_invariant", "everything", "mla_invariant"}
_NO_CACHE = _NEVER | _FP8 | _INT8 | {"fp8_wide"}
_FLASH = _NO_CACHE | _MLA | _SIZES
_FI = _NEVER | _INT8 | _MLA | _ALIBI | _SIZES | {"head_40", "spare_maxima", "window", "cross_open_right"}
_TRT = _NEVER | _INT8 | _ALIBI | _SIZES | {"softcap", "deterministic", "fp8_wide", "head_40"}
_XQA = _TRT | (_MLA - {"mla_window"}) | {"mla_window", "block_1", "block_24", "block_256", "spare_maxima"}
_GEN = _TRT | {"head_256", "window", "cross_open_right", "speculative_right", "mla_prefill", "mla_small", "mla_fp8"}
_FINITE: dict[str, Any] = {"finite": True}
_FEW = frozenset({"decode", "decode_gap", "no_keys", "mixed", "speculative", "sinks_tail", "window_causal",
                  "cross_causal", "cross_open_right", "scale", "softcap", "head_256", "alibi"})  # fmt: skip

_SDPA = _NEVER | _ALIBI | _FACTORS | _INT8 | {"softcap", "fp8_wide"} | (_MLA - {"mla_small"})
_FMHA = _NEVER | _ALIBI | {"softcap", "mla_window"}
_WINDOWS = {"window", "window_decode", "window_zero", "decode_gap_window", "speculative_right", "cross_open_right"}

ADAPTERS = {
    "xformers": Adapter("xformers", "xformers", "h100", frozenset(_FMHA | _WINDOWS)),
    "xformers_t4": Adapter("xformers", "xformers", "t4", frozenset(_FMHA | _WINDOWS), dtype=FP16,
                           only=_FEW | _MLA | _INT8),
    "sdpa": Adapter("sdpa_flash", "aten", "a100", frozenset(_SDPA), {"block_size": 256}),
    "fa2": Adapter("flash_attn_2", "flash_attn_2", "a100", frozenset(_FLASH), {"block_size": 256}),
    "fa3": Adapter("flash_attn_3", "flash_attn_3", "h100", frozenset(_FLASH | _ALIBI), _FINITE),
    "fa3_old": Adapter("flash_attn_3", "flash_attn_3_old", "h100", frozenset(_FLASH | _ALIBI), _FINITE, only=_FEW),
    "fa4_sm90": Adapter("flash_attn_4", "flash_attn_4", "h100", frozenset(_FLASH | _ALIBI), _FINITE),
    "fa4_sm100": Adapter("flash_attn_4", "flash_attn_4", "b200", frozenset(_FLASH | _ALIBI | {"head_256"}), _FINITE,
                         only=_FEW),
    "flashinfer": Adapter("flashinfer", "flashinfer", "h100", frozenset(_FI | _FACTORS | {"fp8_wide"}), queries=8),
    "flashinfer_out": Adapter("flashinfer", "flashinfer", "a100", frozenset(_FI), queries=8, lse=False,
                              only=frozenset(_FP8 | {"decode_gap", "speculative"})),
    "xqa": Adapter("tensorrt_llm", "flashinfer", "h100", frozenset(_XQA | _FP8), queries=1, lse=False),
    "xqa_sm120": Adapter("tensorrt_llm", "flashinfer", "sm_120", frozenset(_XQA - {"mla_128"}), queries=1, lse=False,
                         only=frozenset(_FP8 | _MLA | {"decode_gap", "sinks"})),
    "gen": Adapter("tensorrt_llm", "flashinfer", "b200", frozenset(_GEN | _FACTORS | {"mla_window"}),
                   {**_FINITE, "block_size": 32}),
    "gen_out": Adapter("tensorrt_llm", "flashinfer", "b200", frozenset(_GEN | {"mla_window"}),
                       {**_FINITE, "block_size": 64}, lse=False, only=frozenset(_FP8 | _MLA | {"decode_gap", "sinks"})),
}  # fmt: skip
