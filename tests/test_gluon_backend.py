"""The adapter `gluon_hopper` and its launcher, with the kernel's source run on the CPU by `gluon_interpreter`."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from gluon_interpreter import interpret
from vllm_accel.backends import gluon_hopper, triton
from vllm_accel.dispatch import registry
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.device import preset
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation
from vllm_accel.kernels.gluon import bound
from vllm_accel.kernels.gluon import forward_sm90_launch as launches
from vllm_accel.kernels.gluon import parts as gluon_parts
from vllm_accel.kernels.triton import backward as triton_backward
from vllm_accel.kernels.triton import merge_launch
from vllm_accel.testing import CASES, check_backend
from vllm_accel.testing.conformance import kernel_call
from vllm_accel.testing.oracle import attention_oracle, merge_oracle, plain_attention
from vllm_accel.testing.tolerance import assert_close, assert_lse_close

BACKEND = gluon_hopper.BACKEND
H200 = preset("h200")


@pytest.fixture
def launched(monkeypatch):
    """Run launches on the CPU and collect them."""
    seen = []

    def run(launch):
        seen.append(launch)
        interpret(launch)

    monkeypatch.setattr(bound, "run", run)
    monkeypatch.setattr(bound, "_DIRECT", False)
    monkeypatch.setattr(triton_backward, "start", delta_by_torch)
    monkeypatch.setattr(merge_launch, "Join", lambda: join_by_torch)
    monkeypatch.setattr(gluon_hopper, "_built", Everything())
    return seen


class Everything:
    """All kinds of calls."""

    def __contains__(self, kind):
        return True


def join_by_torch(parts, part_lse, out, lse):
    assert parts.dtype is part_lse.dtype is lse.dtype is torch.float32
    merged = merge_oracle(list(parts.double()), list(part_lse.double()))
    out.copy_(merged[0])
    lse.copy_(merged[1])


def delta_by_torch(launch):
    out, dout, dlse, delta = launch.args[:4]
    assert launch.fn.__name__ == "delta_kernel"
    assert dlse is None or (dlse.is_contiguous() and dlse.dtype is torch.float32)
    delta.copy_((out.float() * dout.float()).sum(-1).transpose(-1, -2) - (0 if dlse is None else dlse))


#: Cases of a kind that it runs; what it refuses has a name of one of these features.
REFUSED = {
    "window_left", "window_right", "softcap", "alibi", "bias", "mask", "sinks", "dropout", "q_descale", "k_descale",
    "v_descale",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conformance(case, launched):
    outcome = check_backend(
        BACKEND, dataclasses.replace(case, grad=False), dtype=torch.bfloat16, device=H200, where="cpu"
    )
    if outcome.ran:
        assert launched or "empty" in case.name or 0 in (case.batch, case.seqlen_q, case.seqlen_k), case.name
    else:
        assert {reason.code.removeprefix("feature:") for reason in outcome.reasons} & REFUSED or any(
            reason.code == "head_dim" for reason in outcome.reasons
        ), outcome.reasons


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_layouts_that_tma_reads_are_read_in_place_and_others_copied(launched):
    call = kernel_call(BACKEND, H200)
    packed = draw(2, 40, 3, 4, 64)
    q, k, v = packed.unbind(2)
    call(q, k, v)
    assert [d.base.data_ptr() for d in launched[-1].args[:3]] == [t.data_ptr() for t in (q, k, v)]

    heads_first = draw(2, 4, 40, 64).transpose(1, 2)
    call(heads_first, heads_first, heads_first)
    assert all(d.base.data_ptr() == heads_first.data_ptr() for d in launched[-1].args[:3])
    assert launched[-1].args[0].strides == [4 * 40 * 64, 40 * 64, 64, 1]

    expanded = draw(2, 40, 1, 64).expand(2, 40, 4, 64)  # a stride of 0
    shifted = draw(2, 40, 4, 65)[..., 1:]  # rows that start at odd addresses
    for tensor in (expanded, shifted):
        want = call(heads_first, tensor.contiguous(), tensor.contiguous())
        assert torch.equal(call(heads_first, tensor, tensor), want)
        assert launched[-1].args[1].base.data_ptr() != tensor.data_ptr()
        assert launches.strides_are_ready(launched[-1].args[1].base)


def test_one_plan_serves_addresses_of_any_alignment(launched):
    """Strides belong to a plan, addresses do not: both ways round, and with rows of 72 bytes that are padded."""
    spec = AttentionSpec(torch.bfloat16, torch.bfloat16, 4, 4, 64, 64, 2, 40, 40, Relation.EQUAL, Feature.CAUSAL)
    args = AttentionArgs(*(None,) * 8, 40, 40, 0.1, True, (-1, -1), 0.0, 0.0, True, False, False)
    flat = draw(3 * 2 * 40 * 4 * 72 + 1)
    for strides in ((40 * 4 * 72, 4 * 72, 72, 1), (40 * 4 * 72, 72, 40 * 72, 1)):
        for head_dim in (64, 36):
            even, odd = (flat.as_strided((2, 40, 4, head_dim), strides, offset) for offset in (0, 1))
            want = plain_attention(odd, odd, odd, softmax_scale=0.1, causal=True)[0]
            for first in (even, odd):
                forward = BACKEND.bind(spec, H200).prepare(first, first, first, args)
                for tensor in (odd, even, odd):
                    out, _, _ = forward(tensor, tensor, tensor, args)
                torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("padding", [0, 1], ids=["read in place", "copied for TMA"])
def test_a_plan_keeps_and_makes_no_large_tensor(padding, launched, monkeypatch):
    """On an H200 the first call of a plan took twice the memory of out, and the plan kept all of it."""
    spec = AttentionSpec(torch.bfloat16, torch.bfloat16, 4, 4, 64, 64, 2, 40, 40, Relation.EQUAL, Feature.CAUSAL)
    args = AttentionArgs(*(None,) * 8, 40, 40, 0.1, True, (-1, -1), 0.0, 0.0, True, False, False)
    own = draw(2, 40, 4, 64 + padding)[..., padding:]
    made = []

    def watched(real):
        def method(tensor, *args, **kwargs):
            made.append(tensor.device.type)
            return real(tensor, *args, **kwargs)

        return method

    with monkeypatch.context() as patch:
        for name in ("clone", "new_empty"):
            patch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
        forward = BACKEND.bind(spec, H200).prepare(own, own, own, args)
    assert made and set(made) == {"meta"}
    forward(own, own, own, args)
    launched.clear()
    alive = weakref.ref(own)
    del own
    gc.collect()
    assert alive() is None


def test_heads_that_fit_in_l2_go_together(launched):
    q = torch.empty(4, 8192, 32, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(4, 8192, 8, 128, dtype=torch.bfloat16, device="meta")
    launch = launches.forward_launch(
        q, k, k, q, torch.empty(4, 32, 8192, device="meta"), cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=8192,
        max_seqlen_k=8192, softmax_scale=1.0, causal=True, head_dim_v=128, sm_count=132,
        variant=launches.VARIANTS[128]._replace(persistent=True),
    )  # fmt: skip
    names = dict(zip(launch.fn.arg_names, launch.args, strict=False))
    # 4 MiB of K and V for each of 8 key heads in 32 MiB, each read by 4 query heads.
    assert names["heads_together"] == 32
    assert names["num_tiles"] == 64 * 32 * 4
    assert launch.grid == (132, 1, 1)


def test_a_second_call_goes_straight_to_the_launcher(monkeypatch):
    """As on Triton 3.6: same arguments in the same order as the ordinary way, under the current stream."""
    ordinary, direct = [], []
    kernel = SimpleNamespace(run=lambda *args: direct.append(args), function="function", packed_metadata="metadata")
    monkeypatch.setattr(bound, "run", lambda launch: ordinary.append(launch) or kernel)
    monkeypatch.setattr(bound, "_DIRECT", True)
    monkeypatch.setattr(bound, "_compiled", {})
    monkeypatch.setattr(gluon_hopper, "_built", Everything())
    active = SimpleNamespace(get_current_stream=lambda index: 77)
    monkeypatch.setattr(bound.triton.runtime, "driver", SimpleNamespace(active=active))

    call = kernel_call(BACKEND, H200)
    first, second = draw(1, 20, 2, 64), draw(3, 50, 2, 64)
    for tensor in (first, second):
        call(tensor, tensor, tensor, softmax_scale=0.25, causal=True)
    assert len(ordinary) == len(direct) == 1, "other lengths are the same kernel"
    names = ordinary[0].fn.arg_names
    grid, stream, rest, args = direct[0][:3], direct[0][3], direct[0][4:9], direct[0][9:]
    assert (grid, stream, rest) == ((6, 1, 1), 77, ("function", "metadata", None, None, None))
    given = dict(zip(names, args, strict=True))
    for name in ("q_desc", "k_desc", "v_desc"):
        assert given[name].base.data_ptr() == second.data_ptr()
        assert (given[name].shape, given[name].strides) == ([3, 2, 50, 64], [6400, 64, 128, 1])
        assert given[name].padding == "zero"
    assert given["out"].shape == (3, 50, 2, 64)
    assert given["lse"].shape == (3, 2, 50)
    assert (given["softmax_scale"], given["seqlen_q"], given["num_tiles"]) == (0.25, 50, 6)
    assert {name: given[name] for name in ordinary[0].constexprs} == ordinary[0].constexprs
    assert given["CAUSAL"] is True

    call(first, first, first, softmax_scale=0.25)
    assert len(ordinary) == 2, "without a mask it is another kernel"


def sharing(launched):
    """Return how many parts the last launch cut each tile's keys into."""
    launch = launched[-1]
    names = dict(zip(launch.fn.arg_names, launch.args, strict=False))
    assert launch.constexprs["SPLIT"] == (names["out"].dim() == 5)
    return names["out"].shape[0] if launch.constexprs["SPLIT"] else 1


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 64), (20, 36), (128, 128), (256, 200)])
@pytest.mark.parametrize("causal", [False, True])
def test_few_tiles_over_many_keys_are_shared_out(launched, monkeypatch, head_dim, head_dim_v, causal):
    monkeypatch.setattr(gluon_parts, "SHORTEST", dict.fromkeys(gluon_parts.SHORTEST, 0))
    q, k, v = draw(2, 7, 2, head_dim), draw(2, 1540, 1, head_dim), draw(2, 1540, 1, head_dim_v)
    call = kernel_call(BACKEND, H200)
    out, lse = call(q, k, v, causal=causal, return_lse=True)
    assert sharing(launched) == 3
    want, want_lse = attention_oracle(q, k, v, softmax_scale=head_dim**-0.5, causal=causal)[:2]
    plain = plain_attention(q, k, v, softmax_scale=head_dim**-0.5, causal=causal)[0]
    assert_close(out, want, plain, what="out")
    assert_lse_close(lse, want_lse, dtype=torch.bfloat16)
    again = call(q, k, v, causal=causal, return_lse=True)
    assert torch.equal(again[0], out)

    call(q, k, v, causal=causal, batch_invariant=True)
    assert sharing(launched) == 1
    call(q.requires_grad_(), k, v, causal=causal)
    assert sharing(launched) == 1


def test_both_forms_are_compiled_at_the_first_call_of_a_kind(launched, monkeypatch):
    monkeypatch.setattr(gluon_hopper, "_built", set())
    monkeypatch.setattr(gluon_parts, "SHORTEST", dict.fromkeys(gluon_parts.SHORTEST, 0))
    call = kernel_call(BACKEND, H200)
    q, k = draw(1, 8, 2, 64), draw(1, 20, 2, 64)
    call(q, k, k)
    assert [launch.constexprs["SPLIT"] for launch in launched] == [False, True, False]
    launched.clear()
    k = draw(1, 1540, 2, 64)
    call(q, k, k)
    assert [launch.constexprs["SPLIT"] for launch in launched] == [True], "the same kind, other lengths"
    launched.clear()
    call(q, k, k, batch_invariant=True)
    assert len(launched) == 1, "has one form"


def test_how_many_parts():
    def parts(q, k, heads, causal=True, dim=128):
        return gluon_parts.choose_parts(q, k, heads, causal, dim, 128, 132)

    # An H200 was fastest with so many (NOTES.md), or within 2 % of it.
    assert [parts(128, 32768, 32), parts(256, 8192, 32), parts(935, 8143, 24), parts(422, 15214, 40)] == [4, 2, 2, 4]
    assert parts(128, 8192, 4 * 32) == 1, "a full wave"
    assert parts(8192, 8192, 32) == parts(2**20, 2**20, 8) == 1, "many waves"
    assert parts(128, 4096, 4) == parts(128, 5000, 4, dim=64) == 1, "too short a call for a second launch"
    assert parts(128, 5000, 4) > 1 and parts(128, 4096, 4, dim=256) > 1 and parts(128, 8192, 4, dim=64) > 1
    assert parts(256, 4096, 80) > 1, "two waves take twice as long"
    assert parts(128, 2**20, 1) == gluon_parts.MOST_PARTS
    assert parts(0, 4096, 8) == parts(128, 0, 8) == parts(128, 4096, 0) == 1
    # The tiles of a causal square are short and long: the longest of few keep the others waiting.
    assert parts(8192, 8192, 1) > 1 and parts(8192, 8192, 4) == 1
    for tiles in range(1, 1056, 7):
        for keys in (512, 1024, 4096, 65536):
            assert 1 <= parts(128, keys, tiles) <= min(16, keys // 512)


#: Small cases of each kind that our own backward takes.
TRAINING = [case for case in CASES if case.grad and max(case.head_dim, case.head_dim_v) <= 128]


@pytest.mark.parametrize("case", TRAINING, ids=lambda case: case.name)
def test_gradients(case, launched):
    outcome = check_backend(BACKEND, case, dtype=torch.bfloat16, device=H200, where="cpu")
    if outcome.ran and "empty" not in case.name and 0 not in (case.batch, case.seqlen_q, case.seqlen_k):
        assert [launch.fn.__name__ for launch in launched[-2:]] == ["attention_dkv", "attention_dq"]


def test_gradients_of_large_heads_are_the_triton_kernels_of_the_same_call(launched, monkeypatch):
    seen = {}

    def backward(self, q, k, v, args, out, lse, rng, dout, dlse):
        seen.update(spec=self._spec, out=out, lse=lse, dout=dout, dlse=dlse, rng=rng)
        return triton.AttentionGrads(torch.ones_like(q), 2 * torch.ones_like(k), 3 * torch.ones_like(v))

    monkeypatch.setattr(triton.TritonAttention, "backward", backward)
    q, k, v = (draw(1, 20, 2, 136).requires_grad_() for _ in range(3))
    out, lse = kernel_call(BACKEND, H200)(q, k, v, causal=True, return_lse=True)
    (out.float().sum() + lse.sum()).backward()
    assert [t.grad.unique().item() for t in (q, k, v)] == [1, 2, 3]
    assert torch.equal(seen["lse"], lse)
    assert torch.equal(seen["out"], out)
    assert (seen["dlse"] == 1).all()
    assert seen["rng"] is None
    assert {Feature.CAUSAL, Feature.GRAD, Feature.LSE_GRAD} <= set(seen["spec"].features)


def test_what_it_refuses():
    refused = {
        "h100": (), "a100": ("compute_capability",), "b200": ("compute_capability",), "mi300x": ("platform",),
        "cpu": ("platform",),
    }  # fmt: skip
    call = {name: kernel_call(BACKEND, preset(name)) for name in refused}
    q = draw(1, 8, 2, 64)
    for name, codes in refused.items():
        if codes:
            with pytest.raises(gluon_hopper_error()) as error:
                call[name](q, q, q)
            assert [reason.code for reason in error.value.reasons["gluon_hopper"]] == list(codes)
    with pytest.raises(gluon_hopper_error(), match="head sizes up to 256; this call has 264"):
        call["h100"](draw(1, 8, 2, 264), draw(1, 8, 2, 264), q)
    with pytest.raises(gluon_hopper_error(), match="takes bfloat16, float16, not float32"):
        call["h100"](q.float(), q.float(), q.float())
    many = torch.empty(2**16, 2**16, 1, 64, dtype=torch.bfloat16, device="meta")
    with pytest.raises(gluon_hopper_error(), match="32 bits; this call may have 4294967296 rows"):
        call["h100"](many, many, many)


def gluon_hopper_error():
    from vllm_accel.errors import UnsupportedCallError

    return UnsupportedCallError


@pytest.mark.parametrize(("version", "known"), [("3.6.0", True), ("3.7.1", True), ("3.5.1", False), ("3.8.0", False)])
def test_other_releases_of_triton_are_refused(monkeypatch, version, known):
    from vllm_accel.kernels.triton import toolchain

    monkeypatch.setattr(toolchain, "problems", lambda arch: ())
    monkeypatch.setattr(toolchain, "triton_version", lambda: version)
    reason = BACKEND.unavailable_reason()
    assert (reason is None) is known
    assert known or (reason.code == "version" and version in reason.text)


def test_it_is_registered_and_needs_no_triton_to_be_declared():
    assert registry.get("attention", "gluon_hopper") is BACKEND
    assert "gluon_hopper" in registry.resolve("attention", "triton")
