"""The C++ CPU kernels, each instruction set of this machine, against the float64 oracle."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vllm_accel
from vllm_accel import UnsupportedCallError, attention, attention_paged, attention_varlen, explain
from vllm_accel.backends.cpu import BACKEND, CpuKernel
from vllm_accel.backends.cpu_paged import CpuPagedKernel
from vllm_accel.dispatch import device as devices
from vllm_accel.dispatch import plan as plans
from vllm_accel.dispatch.backend import AttentionArgs, PagedArgs
from vllm_accel.dispatch.spec import Feature
from vllm_accel.kernels import cpu as kernels
from vllm_accel.kernels.cpu import load
from vllm_accel.testing import CASES, PAGED_CASES, Case, PagedCase, check_paged_call
from vllm_accel.testing.conformance import check_call, kernel_call
from vllm_accel.testing.conformance_paged import paged_kernel_call
from vllm_accel.testing.oracle import attention_oracle, plain_attention

pytestmark = pytest.mark.skipif(load().reason is not None, reason=f"cpu kernels: {load().reason}")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ISAS = load().module.instruction_sets() if load().reason is None else ()
CPU = devices.detect(torch.device("cpu"))
BY_NAME = {case.name: case for case in CASES}


@dataclasses.dataclass(frozen=True)
class WithIsa:
    """The backend, held to one instruction set."""

    isa: int
    name: str = "cpu"
    capability = BACKEND.capability

    def bind(self, spec, device):
        if Feature.PAGED in spec.features:
            return CpuPagedKernel(spec.dtype, spec.kv_dtype, isa=self.isa)
        return CpuKernel(spec.dtype, isa=self.isa, bias_grad=Feature.BIAS_GRAD in spec.features)


def call_with(isa: int):
    return kernel_call(WithIsa(isa), CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case: Case, dtype: str) -> None:
    # Backward in fp16 runs the same code as in fp32: only how numbers are read and written differs.
    check_call(call_with(0), dataclasses.replace(case, grad=case.grad and dtype != "fp16"), dtype=DTYPES[dtype])


SOME = ("everything", "causal_shorter", "head_33", "varlen_cross_causal", "sinks_window", "bias_row", "mqa", "long",
        "descale", "mask_full", "softcap_large", "decode")  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("isa", range(1, len(ISAS)), ids=ISAS[1:])
def test_other_instruction_sets(isa: int, name: str, dtype: str) -> None:
    case = BY_NAME[name]
    check_call(call_with(isa), dataclasses.replace(case, grad=case.grad and dtype != "fp16"), dtype=DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda case: case.name)
def test_every_paged_case(case: PagedCase, dtype: str) -> None:
    check_paged_call(paged_kernel_call(WithIsa(0), CPU), case, dtype=DTYPES[dtype])


@pytest.mark.parametrize("case", [c for c in PAGED_CASES if c.cache or c.mla or c.head_major], ids=lambda c: c.name)
@pytest.mark.parametrize("isa", range(1, len(ISAS)), ids=ISAS[1:])
def test_other_instruction_sets_paged(isa: int, case: PagedCase) -> None:
    check_paged_call(paged_kernel_call(WithIsa(isa), CPU), case, dtype=torch.float16)


def test_refuses_what_it_has_not() -> None:
    q = torch.randn(1, 4, 2, 16, dtype=torch.float64)
    with pytest.raises(UnsupportedCallError, match="float64"):
        attention(q, q, q, backend="cpu")
    with pytest.raises(UnsupportedCallError, match="dropout"):
        attention(q.float(), q.float(), q.float(), dropout_p=0.1, backend="cpu")
    assert Feature.DROPOUT not in BACKEND.capability.features
    assert frozenset(DTYPES.values()) <= BACKEND.capability.dtypes


# One row, tiles of every size, the last length that is read in place and the first that is packed; keys of one split,
# of several, and not a multiple of anything.
DECODES = list(itertools.product(((1, 1), (1, 6), (3, 5), (2, 8), (17, 1)), (511, 1300)))


@pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)
@pytest.mark.parametrize(("shape", "keys"), DECODES)
def test_decode_in_splits(shape: tuple[int, int], keys: int, isa: int) -> None:
    queries, group = shape
    case = Case(
        "splits", "", batch=2, seqlen_q=queries, seqlen_k=keys, num_heads=2 * group, num_kv_heads=2, head_dim=48,
        head_dim_v=80, sinks=True, alibi="heads", options={"causal": True, "window_size": (keys - 100, -1)}, grad=False,
    )  # fmt: skip
    check_call(call_with(isa), case, dtype=torch.bfloat16)
    check_call(call_with(isa), dataclasses.replace(case, sinks=False, alibi=None, options={}), dtype=torch.float32)


def _surrounded(*shape: int, dtype: torch.dtype = torch.bfloat16, fill: float = float("nan")) -> torch.Tensor:
    """Return random numbers with NaN before, behind and beside each row."""
    wide = torch.full([n + 3 for n in shape], fill, dtype=dtype)
    inner = wide[tuple(slice(1, n + 1) for n in shape)]
    inner.copy_(torch.randn(shape))
    return inner


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)
@pytest.mark.parametrize("queries", [1, 37])
def test_what_lies_around_the_tensors_stays_outside(isa: int, queries: int, dtype: str) -> None:
    torch.manual_seed(0)
    q, k, v = (_surrounded(2, n, 2, 41, dtype=DTYPES[dtype]) for n in (queries, 75, 75))
    bias = _surrounded(2, 2, queries, 75, dtype=torch.float32)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, bias)]
    copies = [t.detach().clone().contiguous().requires_grad_() for t in (q, k, v, bias)]
    results = []
    for a, b, c, d in (leaves, copies):
        out = call_with(isa)(a, b, c, attn_bias=d, causal=True)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (a, b, c, d))])
    for mine, other in zip(*results, strict=True):
        assert torch.isfinite(mine).all() and torch.equal(mine, other)


def _decode_inputs(batch: int, keys: int, queries: int = 1) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(keys)
    shapes = ((batch, queries, 8, 64), (batch, keys, 2, 64), (batch, keys, 2, 64))
    return [torch.randn(shape, generator=g).bfloat16() for shape in shapes]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1800), (3, 700), (40, 40), (40, 300), (40, 3000)])
def test_bits_do_not_depend_on_threads_or_on_the_batch(queries: int, keys: int) -> None:
    q, k, v = _decode_inputs(5, keys, queries)
    run = call_with(0)
    together = run(q, k, v, causal=True, batch_invariant=True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(run(q, k, v, causal=True), together)
    finally:
        torch.set_num_threads(before)
    for b in range(5):
        assert torch.equal(run(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True), together[b : b + 1])


def test_many_callers_at_once() -> None:
    work = [_decode_inputs(1 + n % 3, 100 + 211 * n, 1 if n % 2 else 30) for n in range(8)]
    leaves = [[t.clone().requires_grad_() for t in inputs] for inputs in work]

    def once(index: int) -> list[torch.Tensor]:
        q, k, v = leaves[index]
        out = attention(q, k, v, causal=True, backend="cpu")
        return [out.detach(), *torch.autograd.grad(out.float().sum(), (q, k, v))]

    alone = [once(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(once, [index % 8 for index in range(48)]))
    for index, results in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(results, alone[index % 8], strict=True))
    assert load().module.kept_bytes() <= 256 << 20


def test_scratch_is_kept_and_bounded() -> None:
    q, k, v = (torch.randn(1, 4096, 1, 64) for _ in range(3))
    for _ in range(3):
        for n in (64, 1000, 4096):
            attention(q[:, :n], k[:, :n], v[:, :n], backend="cpu")
    kept = load().module.kept_bytes()
    attention(q, k, v, backend="cpu")
    assert load().module.kept_bytes() == kept  # nothing new for a size seen before
    assert 0 < kept <= 256 << 20


def test_packed_keys_beyond_the_limit_go_in_groups() -> None:
    # 4 x 6000 keys of 8 heads of 64 in fp32: 98 MiB packed, more than all threads and a call take at a time.
    g = torch.Generator().manual_seed(0)
    q = torch.randn(4, 24, 8, 64, generator=g)
    k, v = (torch.randn(4, 6000, 8, 64, generator=g) for _ in range(2))
    out = attention(q, k, v, backend="cpu")
    for b in range(4):
        assert torch.equal(out[b], attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], backend="cpu")[0])
    want = torch.nn.functional.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v)))
    assert torch.allclose(out.double(), want.transpose(1, 2), atol=1e-6)


ARGS = AttentionArgs(
    None, None, None, None, None, None, None, None, 4, 4, 0.25, False, (-1, -1), 0.0, 0.0, False, False, False
)


def test_tensors_without_memory_never_reach_the_kernels() -> None:
    kernel = CpuKernel(torch.float32)
    with FakeTensorMode():
        fake = torch.empty(1, 4, 2, 16)
    for tensor in (fake, torch.empty(1, 4, 2, 16, device="meta")):
        with pytest.raises((ValueError, RuntimeError, BufferError, TypeError)):
            kernel.forward(tensor, tensor, tensor, ARGS)
    shown = torch.compile(lambda q: attention(q, q, q, backend="cpu"), fullgraph=True, backend="eager")
    q = torch.randn(1, 4, 2, 16)
    assert torch.equal(shown(q), attention(q, q, q, backend="cpu"))


def _paged_args(table: list[list[int]], used: list[int]) -> PagedArgs:
    ends = torch.arange(len(used) + 1, dtype=torch.int32)
    return PagedArgs(
        ends, torch.tensor(table, dtype=torch.int32), torch.tensor(used, dtype=torch.int32),
        None, None, None, None, None, 1, 64, 0.25, False, (-1, -1), 0.0, False, False, False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("table", "used", "what"),
    [([[0, 9]], [20], "block_table"), ([[0, -1]], [20], "block_table"), ([[0, 1]], [33], "seqused_k"),
     ([[0, 1]], [-1], "seqused_k")],
)  # fmt: skip
def test_wrong_tables_are_refused_below_the_front_end_too(table: list[list[int]], used: list[int], what: str) -> None:
    cache = torch.randn(4, 16, 2, 16)
    with pytest.raises(ValueError, match=what):
        CpuPagedKernel(torch.float32, torch.float32).forward(
            torch.randn(1, 2, 16), cache, cache, _paged_args(table, used)
        )


def test_wrong_lengths_are_refused_below_the_front_end_too() -> None:
    q, cu = torch.randn(8, 2, 16), torch.tensor([0, 5, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        CpuKernel(torch.float32).forward(q, q, q, ARGS._replace(cu_seqlens_q=cu, cu_seqlens_k=cu))


def test_paged_equals_contiguous_bit_for_bit() -> None:
    q, k, v = _decode_inputs(3, 1040)
    table = torch.randperm(3 * 65, generator=torch.Generator().manual_seed(0)).int().view(3, 65)
    k_cache, v_cache = (torch.empty(195, 16, 2, 64, dtype=torch.bfloat16) for _ in range(2))
    for cache, source in ((k_cache, k), (v_cache, v)):
        cache[table.flatten().long()] = source.reshape(195, 16, 2, 64)
    out = attention_paged(
        q.flatten(0, 1), k_cache, v_cache, cu_seqlens_q=torch.arange(4, dtype=torch.int32), max_seqlen_q=1,
        block_table=table, seqused_k=torch.full((3,), 1040, dtype=torch.int32), max_seqlen_k=1040, backend="cpu",
    )  # fmt: skip
    assert torch.equal(out, attention(q, k, v, backend="cpu").flatten(0, 1))


def test_mixed_decode_and_prefill_in_one_packed_call() -> None:
    lengths = [(1, 700), (40, 40), (3, 90), (0, 5), (25, 300), (20, 1500)]  # the last one's keys are packed before
    ends_q, ends_k = ([0, *itertools.accumulate(column)] for column in zip(*lengths, strict=True))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 32, generator=g) for n, h in ((ends_q[-1], 4), (ends_k[-1], 2), (ends_k[-1], 2)))
    out = attention_varlen(
        q, k, v, cu_seqlens_q=torch.tensor(ends_q, dtype=torch.int32), causal=True, max_seqlen_q=40, max_seqlen_k=1500,
        cu_seqlens_k=torch.tensor(ends_k, dtype=torch.int32), backend="cpu",
    )  # fmt: skip
    for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        if a < b:
            alone = attention(q[None, a:b], k[None, c:d], v[None, c:d], causal=True, backend="reference")
            assert torch.allclose(out[a:b], alone[0], atol=2e-6)


# Lengths around the tiles of every instruction set: 32 rows and 32 keys of AMX, items of 128 keys, blocks of 512, with
# more rows than a task; head sizes that fill no tile.
TILES = [(33, 129, 3, 72, 40), (97, 640, 1, 32, 128), (40, 31, 2, 17, 16), (200, 1100, 2, 96, 33)]


@pytest.mark.parametrize("window", [(-1, -1), (70, -1), (150, 20)])
@pytest.mark.parametrize("sizes", TILES, ids=str)
@pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)
def test_around_the_tiles(isa: int, sizes: tuple[int, ...], window: tuple[int, int]) -> None:
    queries, keys, group, dim, dim_v = sizes
    case = Case(
        "tiles", "", batch=2, seqlen_q=queries, seqlen_k=keys, num_heads=2 * group, num_kv_heads=2, head_dim=dim,
        head_dim_v=dim_v, sinks=group == 2, alibi="heads" if group == 3 else None, grad=False,
        options={"causal": window[1] < 0, "window_size": window},
    )  # fmt: skip
    check_call(call_with(isa), case, dtype=torch.bfloat16)


# One vector of keys to five, the last of a panel full or with one key; the packed keys of the task's own scratch.
FEW_KEYS = (17, 32, 33, 48, 49, 64, 65, 80)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("keys", FEW_KEYS)
@pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)
def test_few_keys(isa: int, keys: int, dtype: str) -> None:
    base = Case("few", "", batch=3, seqlen_q=keys, seqlen_k=keys, num_heads=6, num_kv_heads=6, head_dim=40, grad=False)
    for case in (
        base,
        dataclasses.replace(base, options={"causal": True}),
        dataclasses.replace(base, bias="keys", bool_bias=True, num_kv_heads=2),  # as a padded batch has it
    ):
        check_call(call_with(isa), case, dtype=DTYPES[dtype])


def _keys_bias(kind: str, keys: int) -> torch.Tensor:
    """Return a bias (2, 1 or 4 heads, 1, keys) that does not vary by query."""
    seen = torch.arange(keys) < torch.tensor([keys, keys - 9])[:, None]
    seen = seen[:, None, None]
    if kind == "bool":
        return seen
    if kind == "lowest":
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    if kind == "strided":
        return torch.randn(2, 1, 1, 3 * keys)[..., ::3]
    if kind == "one":
        return torch.randn(2, 1, 1, 1)
    return torch.randn(2, 4, 1, keys)


@pytest.mark.parametrize("kind", ["bool", "lowest", "strided", "one", "heads"])
@pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)
def test_a_bias_that_rows_share(isa: int, kind: str) -> None:
    """Read once for a key head: with softcap and slopes, with grouped heads of which each has its own, over blocks."""
    torch.manual_seed(3)
    for keys, kv_heads, options in (
        (61, 4, {}),
        (61, 2, {"causal": True}),
        (700, 4, {"softcap": 3.0, "alibi_slopes": torch.rand(4), "window_size": (300, 5)}),
    ):
        q, k, v = (torch.randn(2, n, h, 24).bfloat16() for n, h in ((45, 4), (keys, kv_heads), (keys, kv_heads)))
        bias = _keys_bias(kind, keys)
        want = attention_oracle(q, k, v, attn_bias=bias, **options)[0]
        for dtype, off in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
            found = call_with(isa)(*(t.to(dtype) for t in (q, k, v)), attn_bias=bias, **options)
            assert float((found - want).abs().max()) < off, (keys, dtype)


@pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)
@pytest.mark.parametrize("queries", [2, 20])  # decode, prefill
def test_thousands_of_keys_cost_no_digits_in_fp32(isa: int, queries: int) -> None:
    """One chain of sums through all keys would be four to five times as far off as plain attention."""
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, n, 2, 64, generator=g) for n in (queries, 8000, 8000))
    want = attention_oracle(q, k, v)[0]
    off, plain = (float((x - want).abs().max()) for x in (call_with(isa)(q, k, v), plain_attention(q, k, v)[0]))
    assert off <= 2 * plain, (off, plain)


@pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)
@pytest.mark.parametrize("step", [0.5, 30.0])
def test_scores_that_grow_along_the_row(isa: int, step: float) -> None:
    """The running maximum changes in every block, by less and by more than what is worth rescaling the result for."""
    keys = 1000
    q = torch.zeros(1, 40, 1, 32)
    q[..., 0] = 1
    k = torch.zeros(1, keys, 1, 32)
    k[0, :, 0, 0] = torch.arange(keys) // 128 * step
    v = torch.randn(1, keys, 1, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    out, lse = call_with(isa)(q, k, v, softmax_scale=1.0, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double())
    want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    assert torch.allclose(out.double(), want, atol=4e-3)
    assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=1e-4, rtol=1e-6)


def test_the_matrix_unit_is_shared_with_torch() -> None:
    """torch configures the tiles of a thread for its own products; before, between and after ours they stay right."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 100, 2, 64, generator=g).bfloat16()
    a, b = (torch.randint(-3, 4, (200, 200), generator=g).bfloat16() for _ in range(2))
    product = a.double() @ b.double()  # sums of small integers: exact in fp32, rounded once
    expected = attention(q, q, q, causal=True, backend="cpu")

    def both(_: int) -> bool:
        right = torch.equal((a @ b).double(), product.bfloat16().double())
        return right and torch.equal(attention(q, q, q, causal=True, backend="cpu"), expected)

    assert all(both(n) for n in range(5))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(both, range(40)))


def test_the_version_tells_instruction_set_and_sources() -> None:
    version = BACKEND.version()
    assert version is not None
    release, _, local = version.partition("+")
    assert release == vllm_accel.__version__ and local == f"{ISAS[0]}.{load().module.sources()}"
    assert re.fullmatch("[0-9a-f]{8}", load().module.sources())
    q = torch.randn(1, 40, 2, 16)
    assert ISAS[0] in str(explain(attention, q, q, q, backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pytorch_is_first_where_it_alone_has_the_matrix_unit(dtype: torch.dtype, monkeypatch) -> None:
    q = torch.randn(1, 40, 2, 16).to(dtype)
    asked = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}[dtype]

    def chosen(has: bool, sets: tuple[str, ...], queries: int = 40, causal: bool = False) -> str | None:
        monkeypatch.setattr(torch.cpu, asked, lambda: has, raising=False)
        module = types.SimpleNamespace(**{name: getattr(load().module, name) for name in ("forward", "sources")})
        module.instruction_sets = lambda: sets
        monkeypatch.setattr(kernels, "load", lambda: kernels.Loaded(module, None))
        kernels._torch_has.cache_clear()
        plans.invalidate()
        return explain(attention, q[:, :queries], q, q, causal=causal).chosen

    try:
        ours = "cpu" if dtype is torch.bfloat16 else "sdpa_cpu"
        assert chosen(True, ("avx512", "avx2", "portable")) == "sdpa_cpu"
        assert chosen(True, ("amx_bf16", "avx512")) == ours
        assert chosen(False, ("avx512", "avx2", "portable")) == "cpu"
        assert chosen(True, ("avx512", "avx2"), queries=1) == "cpu"  # decode is bound by memory
        q.requires_grad_()
        assert chosen(True, ("amx_bf16", "avx512")) == ours  # so short that it does not matter
        q = torch.randn(1, 1024, 2, 64, dtype=dtype, requires_grad=True)
        assert chosen(True, ("amx_bf16", "avx512"), queries=1024) == "sdpa_cpu"  # backward has no kernel for it
        assert chosen(True, ("amx_bf16", "avx512"), queries=1024, causal=True) == ours
        assert chosen(False, ("amx_bf16", "avx512"), queries=1024) == "cpu"
    finally:
        monkeypatch.undo()
        kernels._torch_has.cache_clear()
        plans.invalidate()


# Threads of a process that has run a product and our kernels; how many OpenMP runtimes are mapped.
RUNTIMES = """
import os, torch
from vllm_accel import attention
torch.set_num_threads({threads})
a = torch.randn(512, 512); a @ a
before = len(os.listdir("/proc/self/task"))
q = torch.randn(2, 512, 4, 64)
attention(q, q, q, backend="cpu")
a @ a
paths = {{line.split()[-1] for line in open("/proc/self/maps") if "/" in line}}
runtimes = [p for p in paths if os.path.basename(p).startswith(("libgomp", "libiomp", "libomp"))]
print(len(runtimes), len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_one_openmp_runtime_and_no_threads_of_its_own(threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUNTIMES.format(threads=threads)],
        capture_output=True, text=True, timeout=120, check=True, env=dict(os.environ),
    )  # fmt: skip
    assert done.stdout.split() == ["1", "0"], done.stdout + done.stderr
