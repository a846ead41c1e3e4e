"""The forward kernel of `triton`, interpreted: every case of the library, edges of tiles, dropout, bound launches."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import math
import weakref

import numpy as np
import pytest
import torch

from vllm_accel.backends.triton import BACKEND, TritonAttention
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation
from vllm_accel.kernels.triton import forward_launch
from vllm_accel.kernels.triton.tiles import Tile
from vllm_accel.testing import CASES, Case, check_backend
from vllm_accel.testing.conformance import kernel_call
from vllm_accel.testing.oracle import attention_oracle

# tanh lets exp2 overflow to inf, which is what it wants; NumPy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
H200 = PRESETS["h200"]
#: Takes what is refused on an H200 for what one was seen to do.
A100 = PRESETS["a100"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Several blocks of keys, and but for the long list of cases of rows, in a call of forty tokens."""
    tall = request.function in (test_case, test_dropout_drops_what_its_key_says_and_scales_the_rest)
    tile = Tile(64, 32, 4, 1) if tall else Tile(32, 32, 4, 1)
    monkeypatch.setattr(forward_launch, "choose_tile", lambda *args, **kwargs: tile)


def _forward_only(case: Case) -> Case:
    return dataclasses.replace(case, grad=False)


#: Every case in one dtype, in turn; those where the dtype itself matters in all three.
EVERY_DTYPE = {"causal", "softcap_large", "everything", "varlen_tail"}
PAIRS = [
    (case, dtype)
    for i, case in enumerate(CASES)
    for j, dtype in enumerate(DTYPES)
    if case.name in EVERY_DTYPE or (i + 1) % 3 == j
]


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=lambda x: x.name if isinstance(x, Case) else str(x)[6:])
def test_case(case: Case, dtype: torch.dtype) -> None:
    device = A100 if case.name == "everything" else H200
    outcome = check_backend(BACKEND, _forward_only(case), dtype=dtype, device=device, where="cpu")
    assert outcome.ran == (case.head_dim <= 256), outcome.reasons


# --- edges -----------------------------------------------------------------------------------------------------------

EDGES = [(31, 33), (32, 32), (33, 65), (64, 31), (1, 64), (65, 64)]
MASKS = [{"causal": True}, {}, {"window_size": (32, -1), "causal": True}, {"window_size": (33, 15)}]


def _take(tma: bool, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Let dense calls with a head size of 16 read by TMA, or none; return their dtype."""
    monkeypatch.setattr(forward_launch, "_BY_TMA", (16,) if tma else ())
    monkeypatch.setattr(forward_launch, "TMA_WORK", 0.0)
    real = forward_launch.forward_launch

    def seen(*args, **kwargs):
        launch = real(*args, **kwargs)
        assert launch.constexprs["TMA"] == (tma and not launch.constexprs["LEFT"])
        return launch

    monkeypatch.setattr(forward_launch, "forward_launch", seen)
    return torch.float16 if tma else torch.float32


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("lengths", EDGES, ids=str)
def test_lengths_around_the_tile(lengths: tuple[int, int], tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seqlen_q, seqlen_k = lengths
    dtype = _take(tma, monkeypatch)
    for options in MASKS[:2] if tma else MASKS:
        case = Case(
            f"{options}", "", batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=1, num_kv_heads=1, head_dim=16,
            head_dim_v=16, options=options, grad=False,
        )  # fmt: skip
        assert check_backend(BACKEND, case, dtype=dtype, device=H200, where="cpu").ran


def test_packed_lengths_around_the_tile() -> None:
    for options in MASKS[::2]:
        case = Case(
            f"{options}", "", lengths=(*EDGES[:3], (0, 5), (40, 0)), tail=37, num_heads=1, num_kv_heads=1,
            head_dim=16, head_dim_v=24, options=options, sinks=True, grad=False,
        )  # fmt: skip
        assert check_backend(BACKEND, case, dtype=torch.float32, device=H200, where="cpu").ran


def test_what_tma_cannot_read_takes_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of one plan, at an address that is a multiple of 16 bytes and at one that is not."""
    ways: list[bool] = []
    real = forward_launch.forward_launch
    monkeypatch.setattr(forward_launch, "_BY_TMA", (16,))
    monkeypatch.setattr(forward_launch, "TMA_WORK", 0.0)
    monkeypatch.setattr(
        forward_launch,
        "forward_launch",
        lambda *a, **k: (made := real(*a, **k), ways.append(made.constexprs["TMA"]))[0],
    )
    kernel = _attention(Feature(0), torch.float16, 1, 16)
    storage = torch.randn(2 * 40 * 16 + 1).half()
    right, wrong = (storage[i : i + 1280].view(2, 40, 1, 16) for i in (0, 1))
    args = _args(40, 40)
    call = kernel.prepare(right, right, right, args)
    for t in (right, wrong, right):
        out, _, _ = call(t, t, t, args)
        want, _ = attention_oracle(t, t, t, softmax_scale=0.25)
        assert (out - want).abs().max() < 2e-3
    assert ways == [True, False]


@pytest.mark.parametrize("l2_bytes", [1, 16000])
def test_any_schedule_of_heads_covers_every_tile(monkeypatch: pytest.MonkeyPatch, l2_bytes: int) -> None:
    monkeypatch.setattr(forward_launch, "_L2_BYTES", l2_bytes)
    dense = Case(
        "dense", "", batch=2, seqlen_q=40, num_heads=4, num_kv_heads=2, head_dim=16, head_dim_v=16,
        options={"causal": True}, grad=False,
    )  # fmt: skip
    packed = dataclasses.replace(dense, name="packed", lengths=((40, 40), (33, 40)), tail=3)
    for case in (dense, packed) if l2_bytes > 1 else (dense,):
        assert check_backend(BACKEND, case, device=H200, where="cpu").ran


def test_wide_offsets_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.name == "everything")
    inputs = case.make(torch.float32)
    narrow = kernel_call(BACKEND, A100)(inputs.q, inputs.k, inputs.v, **inputs.options)
    original = forward_launch.forward_launch

    def wide(*args, **kwargs):
        launch = original(*args, **kwargs)
        assert launch.constexprs["WIDE"] is False
        return launch._replace(constexprs={**launch.constexprs, "WIDE": True})

    monkeypatch.setattr(forward_launch, "forward_launch", wide)
    assert torch.equal(kernel_call(BACKEND, A100)(inputs.q, inputs.k, inputs.v, **inputs.options), narrow)


def test_wrong_cu_seqlens_touch_nothing_outside_the_tensors() -> None:
    """Past the end, negative, decreasing: clamped. Sequences that are right keep their numbers."""
    storage = torch.full((40, 1, 16), math.nan)
    q = storage[8:24]  # neighbours in memory are NaN
    q.copy_(torch.randn(16, 1, 16))
    right = torch.tensor([0, 7, 16], dtype=torch.int32)
    kernel = _attention(Feature.VARLEN, torch.float32, 1, 16)
    want, _, _ = kernel.forward(q, q, q, _args(16, 16, cu_seqlens_q=right, cu_seqlens_k=right))
    for wrong in ([0, 7, 90], [-5, 7, 16], [0, 7, 3]):
        cu = torch.tensor(wrong, dtype=torch.int32)
        out, _, _ = kernel.forward(q, q, q, _args(16, 16, cu_seqlens_q=cu, cu_seqlens_k=cu))
        assert torch.isfinite(out).all(), wrong
        if wrong[-1] >= 7:  # else the first rows are also past the last sequence
            assert torch.equal(out[:7], want[:7]), wrong


def test_a_sequence_has_the_same_bits_in_any_company() -> None:
    lengths = ((21, 50), (40, 40), (1, 9))
    case = Case("", "", lengths=lengths, num_heads=2, num_kv_heads=1, head_dim=16, head_dim_v=16)
    inputs = case.make(torch.bfloat16)
    call = kernel_call(BACKEND, H200)
    options = {**inputs.options, "causal": True, "batch_invariant": True}
    together = call(inputs.q, inputs.k, inputs.v, **options)
    cu_q, cu_k = options["cu_seqlens_q"].tolist(), options["cu_seqlens_k"].tolist()
    for i, (len_q, len_k) in enumerate(lengths):
        q, k, v = (t[c[i] : c[i + 1]] for t, c in ((inputs.q, cu_q), (inputs.k, cu_k), (inputs.v, cu_k)))
        dense = call(q[None], k[None], v[None], causal=True, batch_invariant=True)[0]
        assert torch.equal(dense, together[cu_q[i] : cu_q[i + 1]]), (len_q, len_k)


@pytest.mark.parametrize("side", [2**31 - 1, 2**40])
def test_a_window_wider_than_any_sequence_is_none(side: int) -> None:
    q = torch.randn(1, 40, 1, 16)
    kernel = _attention(Feature.WINDOW_LEFT | Feature.WINDOW_RIGHT, torch.float32, 1, 16)
    want = kernel.forward(q, q, q, _args(40, 40))[0]
    assert torch.equal(kernel.forward(q, q, q, _args(40, 40, window_size=(side, side)))[0], want)


# --- dropout ---------------------------------------------------------------------------------------------------------


def _philox(counter: np.ndarray, key: int) -> np.ndarray:
    """First word of Philox 4x32-10 (Salmon et al. 2011), from the paper: counter (..., 4) uint64 below 2^32."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k = [np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c[0]


def _attention(spec_features: Feature, dtype: torch.dtype, heads: int, head_dim: int) -> TritonAttention:
    spec = AttentionSpec(
        dtype, dtype, heads, heads, head_dim, head_dim, 2, 40, 40, Relation.EQUAL, spec_features
    )  # fmt: skip
    return BACKEND.bind(spec, H200)


def _args(seqlen_q: int, seqlen_k: int, **given: object) -> AttentionArgs:
    empty = AttentionArgs(
        *(None,) * 8, seqlen_q, seqlen_k, 0.25, False, (-1, -1), 0.0, 0.0, True, False, False
    )  # fmt: skip
    return empty._replace(**given)


def test_dropout_drops_what_its_key_says_and_scales_the_rest() -> None:
    batch, heads, seqlen, dim, p = 2, 2, 40, 16, 0.3
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, seqlen, heads, dim, generator=g) for _ in range(3))
    kernel = _attention(Feature.DROPOUT, torch.float32, heads, dim)
    torch.manual_seed(5)
    out, lse, rng = kernel.forward(q, k, v, _args(seqlen, seqlen, dropout_p=p))
    assert rng is not None and rng.dtype is torch.int64 and rng.shape == (2,)
    counter = np.zeros((batch * heads, seqlen, seqlen, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(seqlen)
    counter[..., 1] = np.arange(seqlen)[:, None]
    counter[..., 2] = np.arange(batch * heads)[:, None, None]
    counter[..., 3] = int(rng[1]) & 0x7FFFFFFF
    bits = _philox(counter, int(rng[0]))
    # tl.uint_to_uniform_float folds the 32 bits on themselves: bits of the upper half count down from its end.
    folded = np.where(bits >= 2**31, 2**32 - 1 - bits, bits).astype(np.float64) / 2**31
    kept = torch.from_numpy(folded).view(batch, heads, seqlen, seqlen) >= p
    assert abs(float(kept.double().mean()) - (1 - p)) < 0.02
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 0.25
    weights = torch.softmax(scores, -1) * kept / (1 - p)
    torch.testing.assert_close(out.double(), torch.einsum("bhqk,bkhd->bqhd", weights, v.double()), rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), rtol=0, atol=1e-5)


def test_dropout_draws_from_torchs_generator() -> None:
    q = torch.randn(1, 20, 1, 16)
    kernel, args = _attention(Feature.DROPOUT, torch.float32, 1, 16), _args(20, 20, dropout_p=0.5)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(kernel.forward(q, q, q, args)[0])
    torch.manual_seed(1)
    kernel.forward(q, q, q, args)
    outs.append(kernel.forward(q, q, q, args)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[3])


# --- what a plan keeps -----------------------------------------------------------------------------------------------


@pytest.fixture
def prepared() -> tuple[TritonAttention, torch.Tensor, AttentionArgs]:
    q = torch.randn(2, 24, 2, 16)
    slopes = torch.tensor([[0.1, 7.0], [0.2, 7.0]])[:, 0]  # not contiguous
    return _attention(Feature.ALIBI | Feature.LSE, torch.float32, 2, 16), q, _args(24, 24, alibi_slopes=slopes)


def test_a_prepared_forward_takes_other_tensors_and_values(prepared) -> None:
    kernel, q, args = prepared
    forward = kernel.prepare(q, q, q, args)
    other, slopes = torch.randn(2, 24, 2, 16), torch.tensor([[0.5, 7.0], [0.9, 7.0]])[:, 0]
    changed = args._replace(softmax_scale=0.4, alibi_slopes=slopes)
    got, want = forward(other, other, other, changed), kernel.forward(other, other, other, changed)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert not torch.allclose(got[0], kernel.forward(other, other, other, args)[0], atol=1e-3)
    even = changed._replace(alibi_slopes=slopes.contiguous())
    assert torch.equal(got[0], kernel.forward(other, other, other, even)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_prepared_forward_keeps_no_tensor_alive(prepared, dtype: torch.dtype, monkeypatch) -> None:
    """Nor where fp32 products have two ways, IEEE and TF32, and the switch between them is turned."""
    _, q, args = prepared
    kernel = _attention(Feature.ALIBI | Feature.LSE, dtype, 2, 16)
    own = q.to(dtype, copy=True)
    alive = weakref.ref(own)
    module = importlib.import_module("vllm_accel.backends.triton")  # `vllm_accel.backends` is a function too
    forward = kernel.prepare(own, own, own, args)
    forward(own, own, own, args)
    del own
    gc.collect()
    assert alive() is None
    other = q.to(dtype, copy=True)
    for tf32 in (False, True):
        monkeypatch.setattr(module, "tf32_allowed", lambda tf32=tf32: tf32)
        assert forward(other, other, other, args)[0].shape == q.shape
    alive = weakref.ref(other)
    del other
    gc.collect()
    assert alive() is None
