"""What `benchmarks.gpu_triton` does in its worker processes: each function is one task and returns plain data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention as bench
from benchmarks import shapes
from benchmarks.attention_calls import contestants
from benchmarks.gpu_triton_tiles import ROUNDS
from vllm_accel import attention, write_kv
from vllm_accel.dispatch import registry
from vllm_accel.dispatch.device import detect
from vllm_accel.kernels.triton import launch, merge_launch, toolchain
from vllm_accel.testing import CASES, PAGED_CASES, Case, PagedCase, check_backend, check_paged_backend
from vllm_accel.testing.oracle import merge_oracle
from vllm_accel.testing.tolerance import assert_close, assert_lse_close
from vllm_accel.tuning import check, timing
from vllm_accel.tuning.shape import Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

# --- correctness -----------------------------------------------------------------------------------------------------

_CAUSAL: dict[str, Any] = {"causal": True}
_GQA: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
_COMBINED: dict[str, Any] = {"window_size": (70, -1), "softcap": 4.0}
_RAGGED = ((300, 300), (1, 700), (129, 513), (0, 40), (77, 5), (256, 256))
_LONG = ((1, 700), (1, 3), (1, 1300), (1, 4097))
_MANY = ((40, 1300), (1, 2100), (300, 300), (0, 9), (7, 900))

#: The shared cases are short: these have many tiles in a loop, many tiles in a launch, and splits.
LONG_CASES: tuple[Case, ...] = (
    *[
        Case(f"long_{kind}_d{d}", "", batch=1, seqlen_q=517, seqlen_k=777, head_dim=d, head_dim_v=d, lse_grad=True,
             options=options, **_GQA)
        for d in (64, 96, 128, 256)
        for kind, options in (("full", {}), ("causal", _CAUSAL), ("window", {"window_size": (200, 30)}))
    ],
    *[
        Case(f"long_varlen_{kind}_d{d}", "", lengths=_RAGGED, tail=9, head_dim=d, head_dim_v=d, options=options, **_GQA)
        for d in (64, 128, 256)
        for kind, options in (("full", {}), ("causal", _CAUSAL))
    ],
    Case("long_longer_d128", "", batch=3, seqlen_q=700, seqlen_k=300, head_dim=128, head_dim_v=128, options=_CAUSAL),
    Case("long_decode_d128", "", batch=3, seqlen_q=1, seqlen_k=4097, head_dim=128, head_dim_v=128, **_GQA),
    *[
        Case(f"long_varlen_decode_d{d}", "", lengths=((1, 4097), (1, 3), (0, 40), (2, 1300), (1, 700), (1, 0)), tail=9,
             head_dim=d, head_dim_v=d, options=_CAUSAL, **_GQA)
        for d in (64, 128)
    ],
    Case("long_speculative_d64", "", batch=2, seqlen_q=5, seqlen_k=1300, sinks=True, options=_CAUSAL, **_GQA),
    Case("long_bias_d64", "", batch=1, seqlen_q=300, seqlen_k=417, bias="heads", bias_grad=True, options=_CAUSAL),
    Case("long_sinks_d64", "", batch=1, seqlen_q=300, seqlen_k=417, sinks=True, options={"window_size": (100, 0)}),
    Case("long_softcap_d128", "", batch=1, seqlen_q=300, seqlen_k=417, head_dim=128, head_dim_v=128, alibi="heads",
         options={"softcap": 5.0, **_CAUSAL}),
    Case("long_deterministic_d64", "", batch=1, seqlen_q=517, seqlen_k=777, options={"deterministic": True, **_CAUSAL}),
)  # fmt: skip
#: And these have many turns of a loop in many programs: a race that hit one turn in some thousand passed all others
#: (docs/triton.md). The dense ones are long enough to be read by TMA.
FAR_CASES: tuple[Case, ...] = (
    *[
        Case(f"far_{kind}_d{d}", "", batch=1, seqlen_q=4096, seqlen_k=4096, num_heads=16, num_kv_heads=4, head_dim=d,
             head_dim_v=d, options=options, grad=False)
        for d in (64, 128, 256)
        for kind, options in (("full", {}), ("causal", _CAUSAL))
    ],
    *[
        Case(f"far_varlen_d{d}", "", lengths=((2048, 2048), (1024, 1024), (1, 3000), (1500, 1700)), tail=9,
             num_heads=16, num_kv_heads=4, head_dim=d, head_dim_v=d, options=_CAUSAL, grad=False)
        for d in (64, 128)
    ],
    # Few tiles over many keys: programs share out the keys (`backends.triton_decode`).
    *[
        Case(f"far_chunk_d{d}", "", batch=batch, seqlen_q=queries, seqlen_k=9000, num_heads=8, num_kv_heads=2,
             head_dim=d, head_dim_v=d, options=_CAUSAL)
        for d, batch, queries in ((64, 1, 200), (128, 2, 100))
    ],
)  # fmt: skip
LONG_PAGED_CASES: tuple[PagedCase, ...] = (
    *[
        PagedCase(f"long_{name}_d{d}_{page}", "", lengths, num_heads=8, num_kv_heads=2, head_dim=d, head_dim_v=d,
                  block_size=page, options=_CAUSAL)
        for d in (64, 128)
        for page in (16, 64)
        for name, lengths in (("decode", _LONG), ("mixed", _MANY))
    ],
    PagedCase("long_fp8", "", _MANY, cache=E4M3, descale="batch", head_dim=128, head_dim_v=128, options=_CAUSAL),
    PagedCase("long_e5m2", "", _LONG, cache=E5M2, descale="heads", options=_CAUSAL),
    PagedCase("long_sinks", "", _LONG, sinks=True, head_dim=128, head_dim_v=128, options=_CAUSAL),
    PagedCase("long_window", "", _MANY, options={"window_size": (600, 0), **_CAUSAL}),
    PagedCase("long_invariant", "", _MANY, options={"batch_invariant": True, **_CAUSAL}),
    PagedCase("long_mla", "", _LONG, num_heads=16, head_dim=576, head_dim_v=512, mla=True, block_size=64,
              options={"softmax_scale": 192**-0.5}),
    PagedCase("long_mla_many", "", _MANY, num_heads=16, head_dim=576, head_dim_v=512, mla=True,
              options={"softmax_scale": 192**-0.5, **_CAUSAL}),
)  # fmt: skip

#: What the sanitizer watches beside short cases (`benchmarks.gpu_triton_sanitizer`): several tiles for a block of
#: threads that knows of three multiprocessors, and more blocks of keys and of rows than a ring has slots.
TURN_CASES: tuple[Case, ...] = (
    *[
        Case(f"turns_{kind}_d{d}", "", batch=1, seqlen_q=300, seqlen_k=333, head_dim=d, head_dim_v=d, lse_grad=True,
             options=options, **_GQA)
        for d in (64, 128)
        for kind, options in (("full", {}), ("causal", _CAUSAL))
    ],
    *[
        Case(f"turns_varlen_d{d}", "", lengths=((300, 333), (1, 200), (0, 40), (77, 5), (129, 260)), tail=9, head_dim=d,
             head_dim_v=d, options=_CAUSAL, **_GQA)
        for d in (64, 128)
    ],
)  # fmt: skip
#: Tiles whose keys are cut into parts on three multiprocessors.
PART_CASES: tuple[Case, ...] = tuple(
    Case(f"parts_{kind}_d{d}", "", batch=1, seqlen_q=140, seqlen_k=keys, num_heads=2, num_kv_heads=1, head_dim=d,
         head_dim_v=d, options=options, grad=False)
    for d, keys, kind, options in ((64, 3500, "causal", _CAUSAL), (128, 4000, "full", {}))
)  # fmt: skip
#: And keys that programs share out: packed sequences as a stream, and a chunk of few tiles.
SHARED_CASES: tuple[Case, ...] = (
    Case("packed_stream", "", lengths=((1, 300), (1, 3), (2, 700), (1, 1), (1, 555)) * 3, grad=False, options=_CAUSAL,
         **_GQA),
    Case("shared_chunk", "", batch=1, seqlen_q=140, seqlen_k=2000, grad=False, options=_CAUSAL, **_GQA),
)  # fmt: skip
#: Few sequences, which several teams share, and many, of which a team has several.
STREAM_CASES: tuple[PagedCase, ...] = (
    PagedCase("stream_few", "", ((1, 900), (1, 3), (1, 700))),
    PagedCase("stream_few_d128", "", ((2, 900), (1, 3), (4, 700)), head_dim=128, head_dim_v=128, options=_CAUSAL),
    PagedCase("stream_many", "", ((1, 40), (1, 0), (2, 600), (1, 129), (0, 7)) * 6, tail=3, options=_CAUSAL),
    PagedCase("stream_many_fp8", "", ((1, 40), (1, 600), (1, 16)) * 8, cache=E4M3, descale="batch", sinks=True),
    PagedCase("shared_chunk", "", ((100, 2000),), options=_CAUSAL),
)


#: Options that make a kernel large, in every combination: what ptxas 12.8 made wrong of the largest.
COMBINED_CASES: tuple[Case, ...] = tuple(
    Case(f"combined_{'_'.join(('d', *chosen))}_{d}_{dv}", "", seqlen_q=121, seqlen_k=234, head_dim=d, head_dim_v=dv,
         bias="heads" if "bias" in chosen else None, alibi="batch" if "alibi" in chosen else None, sinks=True,
         options={**_CAUSAL, **{n: v for n, v in _COMBINED.items() if n in chosen}}, grad=False, **_GQA)
    for count in range(2, 5)
    for chosen in itertools.combinations(("window_size", "softcap", "alibi", "bias"), count)
    for d, dv in ((40, 24), (64, 64), (128, 128))
)  # fmt: skip


def dense_cases() -> dict[str, Case]:
    """Return the dense and packed cases by name."""
    watched = (*TURN_CASES, *PART_CASES, *SHARED_CASES)
    return {case.name: case for case in (*CASES, *LONG_CASES, *FAR_CASES, *COMBINED_CASES, *watched)}


def paged_cases() -> dict[str, PagedCase]:
    """Return the paged cases by name."""
    return {case.name: case for case in (*PAGED_CASES, *LONG_PAGED_CASES, *STREAM_CASES)}


def conformance(
    backend: str, paged: bool, name: str, dtype: str, where: str = "cuda", sm_count: int = 0
) -> dict[str, str]:
    """Hold a backend against the oracle on one case; a wrong number is a result, an error of CUDA is raised.

    Args:
        sm_count: multiprocessors that the backend is told of, 0 for those that there are.
    """
    made = registry.get("attention", backend)
    device = detect(torch.device(where))
    device = replace(device, sm_count=sm_count or device.sm_count)
    try:
        if paged:
            outcome = check_paged_backend(made, paged_cases()[name], dtype=DTYPES[dtype], device=device, where=where)
        else:
            outcome = check_backend(made, dense_cases()[name], dtype=DTYPES[dtype], device=device, where=where)
    except AssertionError as error:
        return {"outcome": "failed", "detail": str(error)[:600]}
    if where == "cuda":
        torch.cuda.synchronize()
    return {"outcome": "ran" if outcome.ran else "refused", "detail": "; ".join(r.text for r in outcome.reasons)}


def assembled(paged: bool, name: str, dtype: str, ptxas: str, where: str = "cuda") -> dict[str, str]:
    """Hold `triton` against the oracle on a case, with one assembler or the other.

    Args:
        ptxas: whose assembles: "ours" (see `kernels/triton/assembling.py`) or "Triton's".
    """
    ours = toolchain.hopper_ptxas
    launch._compiled.clear()  # knows no ptxas; Triton's own caches do
    if ptxas != "ours":
        toolchain.hopper_ptxas = lambda: None
    try:
        return conformance("triton", paged, name, dtype, where)
    finally:
        toolchain.hopper_ptxas = ours
        launch._compiled.clear()


def kv_writes(where: str = "cuda") -> dict[str, str]:
    """Write rows into caches of every dtype through `write_kv` and compare with the same on the CPU, bit for bit."""
    g = torch.Generator().manual_seed(0)
    for cache_dtype, scaled in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32, torch.int8, E4M3, E5M2), (False, True)
    ):
        dtype = torch.bfloat16 if cache_dtype.itemsize == 1 else cache_dtype
        if scaled and dtype is cache_dtype:
            continue
        k, v = ((torch.randn((7, 3, d), generator=g) * 30).to(dtype) for d in (20, 32))
        slots = torch.tensor([4, -1, 14, 0, 7, -5, 9])
        scales = (torch.tensor(0.37), torch.tensor([0.1, 3.0, 1.0])) if scaled else (None, None)
        results = []
        for device in ("cpu", where):
            caches = [torch.full((3, 5, 3, t.shape[-1]), 77.0).to(cache_dtype).to(device) for t in (k, v)]
            on = [None if t is None else t.to(device) for t in (k, v, slots, *scales)]
            write_kv(on[0], on[1], *caches, slot_mapping=on[2], k_scale=on[3], v_scale=on[4])
            results.append([cache.cpu().view(torch.uint8) for cache in caches])
        for cpu, here in zip(*results, strict=True):
            assert torch.equal(cpu, here), f"{cache_dtype}, scaled {scaled}: {int((cpu != here).sum())} bytes differ"
    return {"outcome": "ran", "detail": ""}


def merges(where: str = "cuda") -> dict[str, str]:
    """Merge partial results with our kernel and compare with float64."""
    g = torch.Generator().manual_seed(0)
    for count, shape in itertools.product((1, 2, 4, 5, 9), ((2, 5, 3, 20), (700, 8, 128))):
        *batch, tokens, heads, _ = shape
        outs = [torch.randn(shape, generator=g).to(torch.bfloat16).to(where) for _ in range(count)]
        lses = [(torch.randn((*batch, heads, tokens), generator=g) * 5).to(where) for _ in range(count)]
        lses[0][..., 0, 1] = float("-inf")
        for sinks in (None, torch.linspace(-2, 2, heads, device=where)):
            out, lse = merge_launch.merge(outs, lses, sinks)
            want, want_lse = merge_oracle([o.double() for o in outs], [t.double() for t in lses], sinks)
            assert_close(out, want, want.to(out.dtype), what=f"merge of {count}")
            assert_lse_close(lse, want_lse, dtype=torch.float32, what=f"merge of {count}")
    return {"outcome": "ran", "detail": ""}


# --- speed -----------------------------------------------------------------------------------------------------------


def peers(name: str, quick: bool = False) -> dict[str, Any]:
    """Time every backend that can run one shape of `benchmarks.shapes`, forward (of training shapes, with backward)."""
    shape, device, dtype = _place(name, quick)
    return asdict(bench.measure(shape, device, dtype, ROUNDS, ""))


def backwards(name: str, quick: bool = False) -> dict[str, Any]:
    """Time the backward pass alone of every backend that can run a training shape; each is checked first.

    Not that of `reference`, which takes a hundred times as long and is nobody's peer.
    """
    shape, device, dtype = _place(name, quick)
    inputs = shape.make(dtype, device)
    attends, refused, _ = contestants(shape, inputs)
    attends.pop("reference", None)
    truth = check.parts(shape, inputs)
    leaves = (inputs.q, inputs.k, inputs.v)
    calls: dict[str, Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    for backend, attend in attends.items():
        try:
            out = attend(inputs)

            def back(out: Tensor = out) -> tuple[Tensor, ...]:
                return torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)

            check.verify([out.detach(), *back()], truth)
            calls[backend] = back
        except Exception as error:  # wrong, or it raised: the others go on
            rows.append({"name": backend, "seconds": None, "error": timing.text_of(error)})
    operations = replace(shape, kind="prefill").flops() * 2.5
    for backend, timed in timing.in_turns(calls, timing.clock(device), ROUNDS).items():
        tflops = operations / timed.seconds * 1e-12 if timed.seconds else None
        rows.append({"name": backend, "seconds": timed.seconds, "rounds": timed.rounds, "tflops": tflops,
                     "peak": timed.peak, "error": timed.error})  # fmt: skip
    return {"shape": asdict(shape), "results": rows, "refused": refused}


def _place(name: str, quick: bool) -> tuple[Shape, torch.device, torch.dtype]:
    listed = shapes.QUICK_SHAPES if quick else shapes.GPU_SHAPES
    shape = next(shape for shape in listed if shape.name == name)
    return shape, torch.device("cpu" if quick else "cuda"), torch.float32 if quick else torch.bfloat16


def memory(backend: str, lengths: tuple[int, ...], head_dim: int, where: str = "cuda") -> list[dict[str, int]]:
    """Return the peak bytes beyond the inputs of forward, and of forward with backward, by sequence length."""
    timer = timing.clock(torch.device(where))
    rows = []
    for s in lengths:
        q, k, v = (
            torch.randn(1, s, 8, head_dim, device=where, dtype=torch.bfloat16).requires_grad_() for _ in range(3)
        )

        def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Any:
            with torch.no_grad():
                return attention(q, k, v, causal=True, backend=backend)

        def train(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Any:
            out: Any = attention(q, k, v, causal=True, backend=backend)
            return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        forward(), train()  # compiled, and whatever is kept for good
        rows.append({"seqlen": s, "forward": timer.peak(forward) or 0, "train": timer.peak(train) or 0})
    return rows
