"""What only a GPU can tell about paged calls: every backend, captured graphs, streams, no synchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpu_sync import no_synchronisation
from vllm_accel import (
    PagedKVCache,
    attention_mla,
    attention_paged,
    explain,
    merge_attention,
    reload_settings,
    write_kv,
)
from vllm_accel.dispatch import registry
from vllm_accel.testing import PAGED_CASES, PagedCase, check_paged_backend, check_paged_call
from vllm_accel.testing.oracle import merge_oracle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")

BF16, INT = torch.bfloat16, torch.int32
BACKENDS = (
    "reference", "sdpa_flash", "sdpa_efficient", "flash_attn_2", "flash_attn_3", "flash_attn_4", "xformers", "mslk",
    "flashinfer", "tensorrt_llm", "triton",
)  # fmt: skip
#: For libraries that compile for a minute at each kind of call.
FEW = ("decode", "speculative", "mixed", "sinks", "mla")
BLOCK = 256  # every backend takes it, or says why not


def available() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [name for name in BACKENDS if registry.get("attention", name).unavailable_reason() is None]


def cases(name: str) -> list[PagedCase]:
    seconds = registry.get("attention", name).capability.first_call_seconds
    slow = not callable(seconds) and seconds > 30
    return [case for case in PAGED_CASES if not slow or case.name in FEW]


def call(backend: str | None = None) -> Any:
    """Return the public call of a case."""

    def run(q: Any, k_cache: Any, v_cache: Any, *, mla: bool = False, **options: Any) -> Any:
        if not mla:
            return attention_paged(q, k_cache, v_cache, backend=backend, **options)
        factor = options.pop("k_descale", None)
        options.pop("v_descale", None)
        latent = {"head_dim_v": v_cache.shape[-1], "kv_descale": factor, "backend": backend}
        return attention_mla(q, k_cache.squeeze(2), **latent, **options)

    return run


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(n, c, id=f"{n}-{c.name}") for n in available() for c in cases(n)]
)
def test_every_backend_is_right_or_says_why_not(name: str, case: PagedCase, dtype: torch.dtype) -> None:
    outcome = check_paged_backend(registry.get("attention", name), case, dtype=dtype, where="cuda")
    assert outcome.ran or outcome.reasons


@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name)
def test_automatic_choice(case: PagedCase) -> None:
    check_paged_call(call(), case, dtype=BF16, where="cuda", seed=3)


class Decode:
    """Four sequences in a cache, in tensors that stay where they are while lengths, blocks and queries change."""

    def __init__(self, queries: int = 1) -> None:
        g = torch.Generator().manual_seed(queries)
        self.k_cache, self.v_cache = (torch.randn(24, BLOCK, 2, 64, generator=g).to("cuda", BF16) for _ in range(2))
        self.q = torch.zeros(4 * queries, 8, 64, dtype=BF16, device="cuda")
        self.options = {
            "cu_seqlens_q": torch.arange(0, 4 * queries + 1, queries, dtype=INT, device="cuda"),
            "block_table": torch.zeros(4, 6, dtype=INT, device="cuda"),
            "seqused_k": torch.zeros(4, dtype=INT, device="cuda"),
            "max_seqlen_q": queries, "max_seqlen_k": 6 * BLOCK, "causal": True, "finite_tail": True,
        }  # fmt: skip
        self.change(1)

    def change(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(9, 6 * BLOCK, (4,), generator=g, dtype=INT)
        self.options["seqused_k"].copy_(lengths)
        self.options["block_table"].copy_(torch.randperm(24, generator=g).view(4, 6).to(INT))
        self.q.copy_(torch.randn(self.q.shape, generator=g))

    def runs(self, backend: str | None, **more: Any) -> bool:
        """Ask whether a backend takes the call; where not, there is a reason."""
        tensors = (self.q, self.k_cache, self.v_cache)
        shown = explain(attention_paged, *tensors, backend=backend, **self.options, **more)
        assert shown.chosen or (backend and shown[backend].reasons)
        return shown.chosen is not None

    def attend(self, backend: str | None = None, **more: Any) -> Any:
        return attention_paged(self.q, self.k_cache, self.v_cache, backend=backend, **self.options, **more)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("name", [None, *available()])
def test_a_captured_graph_serves_other_lengths(name: str | None, queries: int) -> None:
    decode = Decode(queries)
    if not decode.runs(name):
        return
    decode.attend(name)  # plans, compiles, and prepares what a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode.attend(name)
    for seed in (2, 3, 4):
        decode.change(seed)
        graph.replay()
        torch.cuda.synchronize()
        assert (out - decode.attend("reference")).abs().max() < 2e-2, seed


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("name", [None, *available()])
def test_no_host_synchronisation(name: str | None, queries: int) -> None:
    decode = Decode(queries)
    ways: list[dict[str, Any]] = [way for way in ({}, {"return_lse": True}) if decode.runs(name, **way)]
    for way in ways:
        decode.attend(name, **way)
    with no_synchronisation():
        found = [decode.attend(name, **way) for way in ways]
    want, want_lse = decode.attend("reference", return_lse=True)
    for way, result in zip(ways, found, strict=True):
        out, lse = result if way else (result, want_lse)
        assert (out - want).abs().max() < 2e-2 and (lse - want_lse).abs().max() < 1e-2


def test_the_current_stream_is_used() -> None:
    decode = Decode()
    want = decode.attend()
    kept = decode.q.clone()
    decode.q.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        decode.q.copy_(kept)
        out = decode.attend()
    side.synchronize()
    assert torch.equal(out, want)


@pytest.mark.parametrize("streams", [2])
@pytest.mark.parametrize("name", available())
def test_calls_on_several_streams_do_not_share_scratch_memory(name: str, streams: int) -> None:
    decodes = [Decode() for _ in range(streams)]
    for seed, decode in enumerate(decodes):
        decode.change(seed + 5)
    if not decodes[0].runs(name):
        return
    wanted = [decode.attend(name) for decode in decodes]
    torch.cuda.synchronize()
    lanes = [torch.cuda.Stream() for _ in decodes]
    for _ in range(20):
        outs = []
        for lane, decode in zip(lanes, decodes, strict=True):
            with torch.cuda.stream(lane):
                outs.append(decode.attend(name))
        torch.cuda.synchronize()
        assert all((a - b).abs().max() < 2e-2 for a, b in zip(outs, wanted, strict=True))


@pytest.mark.parametrize("queries", [1, 4])
def test_whoever_comes_last_joins_to_the_same_bits(queries: int) -> None:
    """Programs that share a sequence finish in any order, in scratch memory that holds anything."""
    decode = Decode(queries)
    decode.change(7)
    first = decode.attend("triton")
    assert (first - decode.attend("reference")).abs().max() < 2e-2
    for _ in range(200):
        torch.empty(1 << 18, device="cuda").fill_(float("nan"))  # what the next call may get as scratch memory
        assert torch.equal(decode.attend("triton"), first)


# --- the cache, and what writes into it ------------------------------------------------------------------------------

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def written(device: str, dtype: torch.dtype, head_major: bool) -> list[torch.Tensor]:
    """Return keys, values and the output of two steps over a cache with a fork, as fp32 on the CPU."""
    g = torch.Generator().manual_seed(0)
    scales = {"k_scale": 0.05, "v_scale": 0.02} if dtype.itemsize == 1 else {}
    cache = PagedKVCache(12, 16, 2, 64, dtype=dtype, device=device, head_major=head_major, **scales)
    first = cache.allocate()
    outs = []
    for sequences, counts in (([first], [37]), (None, [5, 1]), (None, [1, 1])):
        if sequences is None:
            sequences = [first, cache.sequences[1] if len(cache.sequences) > 1 else cache.fork(first)]
        tokens = sum(counts)
        q, k, v = (torch.randn(tokens, n, 64, generator=g).to(device, BF16) for n in (8, 2, 2))
        step = cache.append(k, v, sequences, counts)
        outs.append(step.attend(q, causal=True).float().cpu())
    return [*(c.float().cpu() for c in (cache.k_cache, cache.v_cache)), *outs]


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2, torch.int8], ids=str)
def test_a_cache_holds_and_gives_what_it_does_on_the_cpu(dtype: torch.dtype, head_major: bool) -> None:
    for got, want in zip(written("cuda", dtype, head_major), written("cpu", dtype, head_major), strict=True):
        assert (got - want).abs().max() <= 0.02 * want.abs().max()


def test_writing_skips_and_clamps_and_is_captured() -> None:
    k, v = (torch.randn(5, 2, 64, device="cuda", dtype=BF16) for _ in range(2))
    slots = torch.tensor([3, -1, 40, 10**6, 7], device="cuda")
    caches = [torch.zeros(3, 16, 2, 64, device="cuda", dtype=BF16) for _ in range(2)]
    write_kv(k, v, *caches, slot_mapping=slots)
    want = torch.zeros(48, 2, 64, device="cuda", dtype=BF16)
    want[[3, 40, 7]] = k[[0, 2, 4]]
    assert torch.equal(caches[0].flatten(0, 1), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write_kv(k, v, *caches, slot_mapping=slots)
    slots.copy_(torch.tensor([0, 1, 2, -7, 47]))
    graph.replay()
    torch.cuda.synchronize()
    want[[0, 1, 2, 47]] = k[[0, 1, 2, 4]]
    assert torch.equal(caches[0].flatten(0, 1), want)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("parts", [2, 5])
def test_merging_in_one_launch(parts: int, dtype: torch.dtype) -> None:
    outs = [torch.randn(33, 4, 64, device="cuda").to(dtype) for _ in range(parts)]
    lses = [torch.randn(4, 33, device="cuda") for _ in range(parts)]
    lses[0][:, 3], lses[1][:, 3:5] = -torch.inf, -torch.inf
    sinks = torch.randn(4, device="cuda")
    for given in (None, sinks):
        out, lse = merge_attention(outs, lses, sinks=given)
        want, want_lse = merge_oracle(outs, lses, sinks=given)
        assert (out - want).abs().max() < (1e-5 if dtype is torch.float32 else 2e-2)
        torch.testing.assert_close(lse.double(), want_lse.double(), rtol=1e-5, atol=1e-5)


def test_a_shared_prefix_read_once() -> None:
    cache = PagedKVCache(40, 16, 2, 64, dtype=BF16, device="cuda")
    prompt = cache.allocate()
    k, v = (torch.randn(100, 2, 64, device="cuda", dtype=BF16) for _ in range(2))
    cache.append(k, v, [prompt], [100])
    forks = [cache.fork(prompt) for _ in range(3)]
    q = torch.randn(6, 8, 64, device="cuda", dtype=BF16)
    step = cache.append(k[:6], v[:6], forks, [1, 2, 3])
    once, each = (step.attend(q, causal=True, shared_prefix=way) for way in (True, False))
    assert step.prefix_blocks == 6 and (once - each).abs().max() < 2e-2


# --- values inside tensors -------------------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_ACCEL_CHECK", "1")
    reload_settings()
    yield
    monkeypatch.undo()
    reload_settings()


def test_values_are_checked_where_the_setting_says_so(checked: None) -> None:
    decode = Decode()
    decode.options["block_table"][2, 0] = 24
    with pytest.raises(ValueError, match=r"block_table\[2, 0\] is 24; the caches have blocks 0 to 23"):
        decode.attend()
    decode = Decode()
    decode.options["seqused_k"][1] = -1
    with pytest.raises(ValueError, match=r"seqused_k\[1\] is -1"):
        decode.attend()
    caches = [torch.zeros(3, 16, 2, 64, device="cuda", dtype=BF16) for _ in range(2)]
    k = torch.randn(1, 2, 64, device="cuda", dtype=BF16)
    with pytest.raises(ValueError, match="slot_mapping has 48; the cache has 48 slots"):
        write_kv(k, k, *caches, slot_mapping=torch.tensor([48], device="cuda"))


def test_compiled_on_the_gpu() -> None:
    decode = Decode(2)

    def model(q: torch.Tensor, n: int) -> torch.Tensor:
        given = {**decode.options, "max_seqlen_k": n}
        return attention_paged(q * 2, decode.k_cache, decode.v_cache, **given) + 1

    compiled = torch.compile(model, fullgraph=True)
    for n in (6 * BLOCK, 6 * BLOCK + 5):
        assert (compiled(decode.q, n) - model(decode.q, n)).abs().max() < 2e-2


def test_the_example_serves_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.serve import __main__ as program

    arguments = ["--requests", "4", "--layers", "1", "--blocks", "40", "--device", "cuda", "--compare-one-by-one"]
    assert program.main(arguments) == 0
    assert "4 of 4 answers equal" in capsys.readouterr().out
