"""The backward kernels of our own Triton attention, interpreted on the CPU, against the float64 oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_accel.backends.reference import KERNEL as REFERENCE
from vllm_accel.backends.reference import ReferenceBackend
from vllm_accel.backends.triton import TritonBackend
from vllm_accel.dispatch import device as devices
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads
from vllm_accel.kernels.triton import backward, backward_launch, scores
from vllm_accel.kernels.triton.tiles import Tile
from vllm_accel.testing.cases import CASES, Case
from vllm_accel.testing.conformance import check_gradients, kernel_call
from vllm_accel.testing.oracle import attention_oracle
from vllm_accel.testing.tolerance import assert_grad_close

CPU = devices.detect(torch.device("cpu"))
BY_NAME = {case.name: case for case in CASES}
#: Tiles so small that the cases have interior, edge and ragged blocks; the two kernels' differ.
SMALL = {"dkv": Tile(16, 32, 4, 1), "dq": Tile(32, 16, 4, 1), "bias": Tile(16, 32, 4, 1)}
LARGE = {"dkv": Tile(32, 32, 4, 1), "dq": Tile(32, 64, 4, 1), "bias": Tile(64, 32, 4, 1)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tiles_for(variant: str, tiles: dict[str, Tile] = SMALL) -> dict[str, Tile]:
    return {**tiles, "fused": tiles["dkv"]} if variant == "fused" else tiles


class LauncherBackend(ReferenceBackend):
    """Forward by the reference, backward by the launcher under test with given tiles."""

    def __init__(self, tiles: dict[str, Tile]) -> None:
        self.tiles = tiles

    def bind(self, spec: Any, device: Any) -> Any:
        return LauncherKernel(self.tiles)


class LauncherKernel:
    def __init__(self, tiles: dict[str, Tile]) -> None:
        self.tiles = tiles
        self.forward = REFERENCE.forward

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, out: Tensor, lse: Tensor, rng: Any, dout: Tensor,
        dlse: Tensor | None,
    ) -> AttentionGrads:  # fmt: skip
        given = args._asdict()
        for name in ("need_lse", "deterministic", "batch_invariant"):
            del given[name]
        bias_grad = args.attn_bias is not None and args.attn_bias.is_floating_point()
        grads = backward.backward(
            q,
            k,
            v,
            out,
            lse,
            rng,
            dout,
            dlse,
            tiles=self.tiles,
            **given,
            bias_grad=bias_grad,
            sinks_grad=args.sinks is not None,
        )
        return AttentionGrads(*grads)


def check(case: Case, dtype: torch.dtype, tiles: dict[str, Tile]) -> None:
    check_gradients(kernel_call(LauncherBackend(tiles), CPU), case, dtype=dtype)


# --- every case of the library ---------------------------------------------------------------------------------------

GRADIENTS = [case for case in CASES if case.grad and case.head_dim <= 256]
#: Cases go round the dtypes and variants; these, which between them have every option, meet several.
EVERYWHERE = ("causal_longer", "everything", "varlen_cross_causal")


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    at = GRADIENTS.index(case)
    check(case, DTYPES[at % 3], tiles_for(("split", "fused")[at % 2], (LARGE, LARGE, LARGE, SMALL)[at % 4]))


@pytest.mark.parametrize(
    ("dtype", "variant"),
    [(torch.float32, "split"), (torch.float32, "fused"), (torch.float16, "fused"), (torch.bfloat16, "split")],
    ids=["float32-split", "float32-fused", "float16-fused", "bfloat16-split"],
)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_dtype_and_variant(name: str, dtype: torch.dtype, variant: str) -> None:
    check(BY_NAME[name], dtype, tiles_for(variant, LARGE))


# --- edges of tiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), [(-1, 0), (5, 0), (-1, 7), (20, -1), (2, 1), (-1, -1)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(32, 64), (33, 47), (70, 31)])
def test_windows_at_the_edges_of_tiles(seqlen_q: int, seqlen_k: int, left: int, right: int) -> None:
    """Lengths that are multiples of the tiles, one more, and rows without keys, for every kind of window."""
    case = Case(
        "edges", "", batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=2, num_kv_heads=1, head_dim=16,
        head_dim_v=16, options={"window_size": (left, right)}, lse_grad=True,
    )  # fmt: skip
    check(case, torch.float32, tiles_for("fused" if seqlen_q == 33 else "split"))


# What lies past the end may overflow where nothing reads it; NumPy says so, a GPU does not.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("variant", ["split", "fused"])
@pytest.mark.parametrize("kind", ["boolean", "additive", "deep"])
def test_rows_that_a_bias_hides_or_sinks(kind: str, variant: str) -> None:
    """A row that a mask leaves without keys, or whose logits are all far below 0, in tiles inside and at a ragged end.

    "deep": the log-sum-exp is near -300, so that a key past the end, whose logit would be 0, would weigh exp(300).
    """
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 40, 2, 16, generator=g) for _ in range(4))
    bias = torch.randn(1, 1, 40, 40, generator=g)
    if kind == "deep":
        bias -= 300.0
    else:
        bias[:, :, 3] = bias[:, :, 35] = float("-inf")
        bias = bias > float("-inf") if kind == "boolean" else bias
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    out, lse = attention_oracle(*leaves, attn_bias=bias if kind == "boolean" else bias.double())
    want = torch.autograd.grad(out, leaves, dout.double())
    got = backward.backward(
        q, k, v, out.detach().float(), lse.detach().float(), None, dout, None, tiles=tiles_for(variant),
        softmax_scale=0.25, max_seqlen_q=40, max_seqlen_k=40, attn_bias=bias,
    )  # fmt: skip
    tolerance = 2e-4 if kind == "deep" else 1e-5  # fp32 logits near 300 are that coarse
    for actual, expected in zip(got, want, strict=False):
        torch.testing.assert_close(actual, expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", ["split", "fused"])
def test_rows_of_no_sequence_get_zeros(variant: str) -> None:
    """NaN past the last sequence (inputs, out, dout and dlse) reaches nothing, and the gradients there are 0."""
    case = dataclasses.replace(BY_NAME["varlen_tail_sinks"], num_kv_heads=2)
    inputs = case.make(torch.float32)
    tensors = {name: t for name, t in inputs.options.items() if isinstance(t, Tensor)}
    q, k, v = (t[: -case.tail] for t in (inputs.q, inputs.k, inputs.v))
    g = torch.Generator().manual_seed(2)
    dout, dlse = torch.randn(inputs.q.shape, generator=g), torch.randn(4, inputs.q.shape[0], generator=g)
    common = {
        "tiles": tiles_for(variant), "softmax_scale": 0.125, "causal": True, "sinks_grad": True, **tensors,
        "max_seqlen_q": inputs.options["max_seqlen_q"], "max_seqlen_k": inputs.options["max_seqlen_k"],
    }  # fmt: skip
    args = AttentionArgs(
        **{**dict.fromkeys(AttentionArgs._fields), **inputs.options, "softmax_scale": 0.125, "causal": True},
    )._replace(window_size=(-1, -1), softcap=0.0, dropout_p=0.0, batch_invariant=False)
    out, lse, _ = REFERENCE.forward(inputs.q, inputs.k, inputs.v, args)
    short = backward.backward(
        q, k, v, out[: -case.tail].contiguous(), lse[:, : -case.tail].contiguous(), None, dout[: -case.tail],
        dlse[:, : -case.tail], **common,
    )  # fmt: skip
    dout[-case.tail :] = dlse[:, -case.tail :] = float("nan")
    out[-case.tail :] = float("nan")
    long = backward.backward(inputs.q, inputs.k, inputs.v, out, lse, None, dout, dlse, **common)
    for name in ("dq", "dk", "dv"):
        got, want = getattr(long, name), getattr(short, name)
        assert torch.equal(got[: -case.tail], want), name
        assert torch.equal(got[-case.tail :], torch.zeros_like(got[-case.tail :])), name
    assert torch.equal(long.dsinks, short.dsinks)


@pytest.mark.parametrize("layout", ["inner", "expanded", "heads_first"])
def test_strides_of_dout(layout: str) -> None:
    """dout comes as autograd made it: transposed, or expanded from a sum."""
    q, k, v = (torch.randn(1, 20, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    dout = torch.randn(1, 20, 2, 16, generator=torch.Generator().manual_seed(3))
    if layout == "inner":
        dout = dout.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "heads_first":
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        dout = dout[:, :1, :1, :1].expand_as(q)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    out, lse = attention_oracle(*leaves, causal=True)
    want = torch.autograd.grad(out, leaves, dout.double())
    got = backward.backward(
        q, k, v, out.detach().float(), lse.detach().float(), None, dout, None, tiles=SMALL, softmax_scale=0.25,
        max_seqlen_q=20, max_seqlen_k=20, causal=True,
    )  # fmt: skip
    for actual, expected in zip(got, want, strict=False):
        assert actual is not None
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=2e-6)


# --- the bias --------------------------------------------------------------------------------------------------------

FULL = (2, 4, 40, 50)


@pytest.mark.parametrize("programs", [1, 40])
@pytest.mark.parametrize("kept", ["0000", "1001", "0110", "0011", "1110", "1111"])
def test_bias_of_every_broadcast_shape(kept: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one program for all that a bias was broadcast to, and with many that share it."""
    monkeypatch.setattr(backward_launch, "_BIAS_PROGRAMS", programs)
    g = torch.Generator().manual_seed(0)
    bias = torch.randn([n if keep == "1" else 1 for n, keep in zip(FULL, kept, strict=True)], generator=g)
    batch, heads, seqlen_q, seqlen_k = FULL
    q, k, v = (torch.randn(batch, s, h, 16, generator=g) for s, h in ((seqlen_q, heads), (seqlen_k, 2), (seqlen_k, 2)))
    dout, dlse = torch.randn(q.shape, generator=g), torch.randn(batch, heads, seqlen_q, generator=g)
    leaf = bias.double().requires_grad_()
    out, lse = attention_oracle(q.double(), k.double(), v.double(), attn_bias=leaf, window_size=(30, 20))
    (want,) = torch.autograd.grad([out, lse], leaf, [dout.double(), dlse.double()])
    problem = backward_launch.Problem(
        q, k, v, out.detach().float(), lse.detach().float(), None, dout, dlse, None, None, None, bias, None, None, None,
        None, seqlen_q, seqlen_k, 0.25, (30, 20), 0.0, 0.0, False,
    )  # fmt: skip
    delta = torch.empty_like(problem.lse)
    backward.start(backward_launch.delta_launch(problem, delta))
    tile = Tile(32, 32, 4, 1)
    assert (backward_launch.bias_parts(problem, tile) > 1) == (programs > 1 and kept != "1111")
    got = backward.bias_gradient(problem, delta, tile)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


# --- dropout ---------------------------------------------------------------------------------------------------------


@triton.jit
def _mask_kernel(rng, mask, p, HEADS: tl.constexpr, Q: tl.constexpr, K: tl.constexpr):
    at = tl.program_id(0)
    rows, cols = tl.arange(0, Q)[:, None], tl.arange(0, K)[None, :]
    keep = scores.kept(rng, at, rows, cols, p)
    tl.store(mask + at * Q * K + rows * K + cols, keep.to(tl.float32))


def dropout_mask(rng: Tensor, p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    mask = torch.empty(batch, heads, 64, 64)
    _mask_kernel[(batch * heads,)](rng, mask, p, heads, 64, 64)
    return mask[:, :, :seqlen_q, :seqlen_k].double()


@pytest.mark.parametrize("variant", ["split", "fused"])
def test_dropout_of_the_mask_that_forward_drew(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of the adapter against dense float64 attention with the same mask."""
    monkeypatch.setattr(backward, "choose_tiles", lambda *_, **__: tiles_for(variant, SMALL))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, s, h, 16, generator=g) for s, h in ((40, 4), (50, 2), (50, 2)))
    bias, dout = torch.randn(2, 1, 40, 50, generator=g), torch.randn(2, 40, 4, 16, generator=g)
    seen: list[Tensor] = []

    class Spy(TritonBackend):
        def bind(self, spec: Any, device: Any) -> Any:
            kernel = super().bind(spec, device)
            inner = kernel.backward

            def spied(*args: Any) -> Any:
                seen.append(args[6])
                return inner(*args)

            kernel.backward = spied
            return kernel

    leaves = [t.clone().requires_grad_() for t in (q, k, v, bias)]
    call = kernel_call(Spy(), devices.preset("H200"))
    out = call(*leaves[:3], attn_bias=leaves[3], causal=True, dropout_p=0.3)
    got = torch.autograd.grad(out, leaves, dout)
    mask = dropout_mask(seen[0], 0.3, 2, 4, 40, 50)
    assert 0.65 < float(mask.mean()) < 0.75

    exact = [t.double().requires_grad_() for t in (q, k, v, bias)]
    kk, vv = (t.repeat_interleave(2, 2) for t in exact[1:3])
    s = torch.einsum("bihd,bjhd->bhij", exact[0], kk) * 0.25 + exact[3]
    hidden = torch.arange(50)[None, :] > torch.arange(40)[:, None] + 10
    p = s.masked_fill(hidden, float("-inf")).softmax(-1) * mask / 0.7
    want_out = torch.einsum("bhij,bjhd->bihd", p, vv)
    want = torch.autograd.grad(want_out, exact, dout.double())
    torch.testing.assert_close(out.detach(), want_out.detach().float(), rtol=1e-5, atol=1e-5)
    for name, actual, expected in zip(("dq", "dk", "dv", "dbias"), got, want, strict=True):
        torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


# --- through the adapter, and what it relies on ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sinks_window", "bias_row", "varlen_alibi", "deterministic", "head_40"])
def test_adapter(name: str) -> None:
    """The shipped tiles of an H200, forward and backward by our own kernels."""
    check_gradients(kernel_call(TritonBackend(), devices.preset("H200")), BY_NAME[name], dtype=torch.float16)


def test_gradients_have_the_dtype_and_layout_of_new_tensors() -> None:
    case = BY_NAME["everything"]
    inputs = case.make(torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in inputs.leaves()]
    names = ("attn_bias", "sinks")
    options = inputs.options | dict(zip(names, leaves[3:], strict=True))
    out = kernel_call(LauncherBackend(tiles_for("fused")), CPU)(*leaves[:3], **options)
    for grad, leaf in zip(torch.autograd.grad(out.float().sum(), leaves), leaves, strict=True):
        assert grad.dtype is leaf.dtype and grad.is_contiguous() and grad.shape == leaf.shape


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_deterministic_calls_never_take_the_fused_form(arch: str) -> None:
    for head_dim in (16, 64, 128, 256):
        tiles = backward.choose_tiles(arch, torch.bfloat16, head_dim, 16, deterministic=True)
        assert tiles.keys() == {"dkv", "dq", "bias"}
    # On Hopper the split form was measured to be the faster one.
    assert ("fused" in backward.choose_tiles(arch, torch.bfloat16, 64, 64, deterministic=False)) == (arch != "sm_90")


def test_tolerance_notices_a_small_error() -> None:
    """The bound of these tests is no wider than a wrong last block of keys."""
    case = BY_NAME["long"]
    inputs = case.make(torch.float32)
    leaves = [t.double().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out, _ = attention_oracle(*leaves, causal=True)
    want = torch.autograd.grad(out.sum(), leaves)[0]
    with pytest.raises(AssertionError, match="dq"):
        assert_grad_close((want * 1.0001).float(), want, want.float(), what="dq")
