"""What only a GPU can tell: conformance of the CUDA backends, graphs, streams, no synchronisation, memory, choice."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_triton_tasks import FAR_CASES
from gpu_sync import no_synchronisation
from vllm_accel import State, UnsupportedCallError, attention, attention_varlen, explain
from vllm_accel.dispatch import registry
from vllm_accel.testing import CASES, Case
from vllm_accel.testing.conformance import check_backend, check_call

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BACKENDS = (
    "reference",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_cudnn",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "xformers",
    "mslk",
    "triton",
    "gluon_hopper",
)


def _available() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [name for name in BACKENDS if registry.get("attention", name).unavailable_reason() is None]


def _qkv(s: int = 256, dtype: torch.dtype = torch.bfloat16, **kw) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(s)
    return [torch.randn(2, s, heads, 64, generator=g).to("cuda", dtype, **kw) for heads in (8, 2, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", _available())
def test_every_backend_is_right_or_says_why_not(name: str, case: Case, dtype: str) -> None:
    outcome = check_backend(registry.get("attention", name), case, dtype=DTYPES[dtype], where="cuda")
    assert outcome.ran or outcome.reasons


@pytest.mark.parametrize("case", FAR_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", [name for name in _available() if name in ("triton", "gluon_hopper")])
def test_long_calls_of_our_kernels_are_right(name: str, case: Case) -> None:
    outcome = check_backend(registry.get("attention", name), case, dtype=torch.bfloat16, where="cuda")
    assert outcome.ran or outcome.reasons


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_automatic_choice(case: Case) -> None:
    check_call(lambda q, k, v, **kw: (attention_varlen if "cu_seqlens_q" in kw else attention)(q, k, v, **kw),
               case, dtype=torch.bfloat16, where="cuda", seed=3)  # fmt: skip


def test_automatic_choice_is_not_the_reference_for_plain_calls() -> None:
    assert explain(attention, *_qkv(), causal=True).chosen not in ("reference", None)


def _packed(lengths: list[int]) -> tuple[torch.Tensor, dict]:
    ends = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    q = torch.randn(sum(lengths), 8, 64, device="cuda", dtype=torch.bfloat16)
    longest = max(lengths)
    return q, {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", [None, *_available()])
def test_no_host_synchronisation(name: str | None, grad: bool) -> None:
    q, k, v = (t.requires_grad_(grad) for t in _qkv())
    packed, lengths = _packed([100, 3, 57])
    packed.requires_grad_(grad)

    def step() -> None:
        out = attention(q, k, v, causal=True, backend=name)
        ragged = attention_varlen(packed, packed, packed, causal=True, backend=name, **lengths)
        if grad:
            (out.float().sum() + ragged.float().sum()).backward()

    try:
        step()
    except UnsupportedCallError:
        assert name is not None
        return
    with no_synchronisation():
        step()


@pytest.mark.parametrize("name", [None, *_available()])
def test_cuda_graph_capture(name: str | None) -> None:
    q, k, v = _qkv()
    attention(q, k, v, causal=True, backend=name)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, causal=True, backend=name)
    for source, seed in ((q, 1), (k, 2)):
        source.copy_(torch.randn(source.shape, generator=torch.Generator().manual_seed(seed)))
    graph.replay()
    torch.cuda.synchronize()
    want = attention(q, k, v, causal=True, backend="reference")
    assert (out - want).abs().max() < 2e-2


def test_the_current_stream_is_used() -> None:
    q, k, v = _qkv(2048)
    want = attention(q, k, v)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = q * 2
        out = attention(late / 2, k, v)
    side.synchronize()
    assert torch.equal(out, want)


@pytest.mark.parametrize("grad", [False, True])
def test_memory_is_linear(grad: bool) -> None:
    peaks = []
    for s in (4096, 8192, 16384):
        q, k, v = (
            torch.randn(1, s, h, 64, device="cuda", dtype=torch.bfloat16).requires_grad_(grad) for h in (8, 2, 2)
        )
        mask = torch.ones(1, 1, 1, s, dtype=torch.bool, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outs = [attention(q, k, v, causal=True), attention(q, k, v, attn_bias=mask)]
        if grad:
            sum(o.float().sum() for o in outs).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del outs, q, k, v
    assert peaks[1] < 2.3 * peaks[0] and peaks[2] < 2.3 * peaks[1], peaks


def test_compiled_on_the_gpu() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(64))
    compiled = torch.compile(lambda q, k, v: attention(q * 1.5, k, v, causal=True) + 1, fullgraph=True)
    got = torch.autograd.grad(compiled(q, k, v).float().square().sum(), (q, k, v))
    want = torch.autograd.grad((attention(q * 1.5, k, v, causal=True) + 1).float().square().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


@pytest.mark.parametrize("name", _available())
def test_same_bits_where_declared(name: str) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(512))

    def once() -> list[torch.Tensor]:
        out = attention(q, k, v, causal=True, deterministic=True, backend=name)
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]

    try:
        first = once()
    except UnsupportedCallError as refusal:
        if not refusal.reasons[name]:
            raise
        return
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_batch_invariance_is_proven_on_this_device() -> None:
    q, k, v = _qkv(130)
    alone = attention(q[:1], k[:1], v[:1], causal=True, batch_invariant=True)
    together = attention(*(torch.cat([t, t, t]) for t in (q, k, v)), causal=True, batch_invariant=True)
    assert torch.equal(alone[0], together[0]) and torch.equal(together[0], together[2])


def test_dropout_masks_agree_between_forward_and_backward() -> None:
    for name in _available():
        q, k, v = (t.requires_grad_() for t in _qkv(128, torch.float16))
        if explain(attention, q, k, v, dropout_p=0.25, backend=name)[name].state is not State.CHOSEN:
            continue
        out = attention(q, k, v, dropout_p=0.25, backend=name)
        dout = torch.randn_like(out)
        (dv,) = torch.autograd.grad(out, v, dout)
        left, right = (out.double() * dout).sum(), (dv.double() * v).sum()
        assert torch.allclose(left, right, rtol=2e-2, atol=0.5), name
        mean = attention(q, k, torch.ones_like(v), dropout_p=0.25, backend=name).double().mean()
        assert abs(mean - 1) < 0.02, name
