"""Mixture of experts: the layer against a loop over tokens, its options, its gradients, and the modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_accel import (
    MoE,
    QuantizedLinear,
    State,
    UnsupportedCallError,
    explain,
    fused_moe,
    quantize_fp8,
    quantize_int8,
)
from vllm_accel.testing import moe_oracle
from vllm_accel.testing.tolerance import assert_close, assert_grad_close

T, D, I, E, K = 23, 32, 20, 5, 2


def _draw(dtype: torch.dtype = torch.float32, seed: int = 0, bias: bool = False) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    weights, ids = torch.softmax(draw(T, E).float(), -1).topk(K)
    given: dict[str, Any] = {
        "x": draw(T, D), "w_gate_up": draw(E, D, 2 * I, scale=D**-0.5), "w_down": draw(E, I, D, scale=I**-0.5),
        "topk_weights": weights, "topk_ids": ids,
    }  # fmt: skip
    return given | ({"bias_gate_up": draw(E, 2 * I), "bias_down": draw(E, D)} if bias else {})


def _check(found: torch.Tensor, given: dict[str, Any]) -> None:
    want, plain = (moe_oracle(**given, dtype=dtype) for dtype in (torch.float64, found.dtype))
    assert found.dtype is given["x"].dtype and found.is_contiguous()
    assert_close(found, want, plain, what="out")


@pytest.mark.parametrize("backend", ["reference", "cpu", "torch_grouped", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_to_the_loop(dtype: torch.dtype, backend: str | None) -> None:
    given = _draw(dtype, bias=True)
    if backend == "torch_grouped" and dtype is torch.float64:
        with pytest.raises(UnsupportedCallError, match="not float64"):
            fused_moe(**given, backend=backend)
        return
    _check(fused_moe(**given, backend=backend), given)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations_differ_and_are_right(activation: str) -> None:
    given = _draw() | {"activation": activation}
    found = fused_moe(**given)
    _check(found, given)
    other = "relu" if activation != "relu" else "silu"
    assert (found - fused_moe(**_draw(), activation=other)).abs().max() > 1e-2


def test_routing_of_every_kind() -> None:
    given = _draw(torch.bfloat16, bias=True)
    given["topk_ids"] = given["topk_ids"].to(torch.int32)
    given["topk_ids"][3] = E  # nobody's token
    given["topk_ids"][4, 1] = E
    given["topk_ids"][5] = 2  # the same expert twice
    given["topk_weights"][3] = float("nan")
    _check(fused_moe(**given), given)
    given["topk_ids"].fill_(1)  # all to one
    given["topk_weights"] = torch.full((T, K), 0.5).bfloat16()
    _check(fused_moe(**given), given)
    given["topk_ids"] = torch.arange(T * K).view(T, K) % E
    stored = given["w_gate_up"].mT.contiguous().mT  # as (E, 2I, D)
    assert stored.stride(-2) == 1
    _check(fused_moe(**given | {"w_gate_up": stored, "x": given["x"].t().contiguous().t()}), given)


def test_gradients() -> None:
    given = _draw(bias=True)
    given["topk_ids"][0, 0] = E
    names = ("x", "w_gate_up", "w_down", "topk_weights", "bias_gate_up", "bias_down")
    leaves = [given[name].requires_grad_() for name in names]
    dout = torch.randn(T, D, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad(fused_moe(**given), leaves, dout)
    want, plain = (
        torch.autograd.grad(moe_oracle(**given, dtype=dtype), leaves, dout.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    for name, got, ref, rough in zip(names, found, want, plain, strict=True):
        assert_grad_close(got, ref, rough, what=name)


def test_traced_and_under_autocast() -> None:
    given = _draw()
    compiled = torch.compile(fused_moe, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**given), fused_moe(**given))
    with torch.autocast("cpu", torch.bfloat16):
        cast = fused_moe(**given)
    assert cast.dtype is torch.bfloat16
    low = {n: t.bfloat16() if n in ("x", "w_gate_up", "w_down") else t for n, t in given.items()}
    assert torch.equal(cast, fused_moe(**low))


def test_quantised_weights() -> None:
    given = _draw(torch.bfloat16)
    want = moe_oracle(**given)
    for scaling in ("tensor", "row", "128x128", "1x128"):
        blocks = scaling.endswith("128")
        quantised = [quantize_fp8(given[name].mT, scaling=scaling) for name in ("w_gate_up", "w_down")]
        (up, up_scale), (down, down_scale) = ((q.mT, s.mT if blocks else s) for q, s in quantised)
        call = given | {"w_gate_up": up, "w_down": down, "scale_gate_up": up_scale, "scale_down": down_scale}
        for backend in ("cpu", "reference"):
            found = fused_moe(**call, scale_recipe=scaling, backend=backend)
            # FP8 e4m3 keeps 3 bits: a sixteenth of each factor, three factors a term, errors of either sign.
            assert (found - want).abs().max() < 0.12 * want.abs().max()
        with pytest.raises(ValueError, match="scale_recipe is missing"):
            fused_moe(**_draw(torch.bfloat16) | {"scale_gate_up": up_scale, "scale_down": down_scale})
    quantised = [quantize_int8(given[name].mT) for name in ("w_gate_up", "w_down")]
    (up, up_scale), (down, down_scale) = ((q.mT, s) for q, s in quantised)
    call = given | {"w_gate_up": up, "w_down": down, "scale_gate_up": up_scale, "scale_down": down_scale}
    assert (fused_moe(**call, scale_recipe="row") - want).abs().max() < 0.05 * want.abs().max()
    with pytest.raises(NotImplementedError, match="no derivative"):
        fused_moe(**call | {"x": given["x"].requires_grad_()}, scale_recipe="row")


@pytest.mark.parametrize("scaling", ["row", "128x128", "int8"])
def test_quantised_weights_are_traced(scaling: str) -> None:
    given = _draw(torch.bfloat16, bias=True)
    named = {"w_gate_up": "scale_gate_up", "w_down": "scale_down"}
    call: dict[str, Any] = dict(given)
    for name, scale in named.items():
        if scaling == "int8":
            values, factors = quantize_int8(given[name].mT)
        else:
            values, factors = quantize_fp8(given[name].mT, scaling=scaling)
        call |= {name: values.mT, scale: factors.mT if scaling == "128x128" else factors}
    call["scale_recipe"] = "row" if scaling == "int8" else scaling
    compiled = torch.compile(fused_moe, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**call), fused_moe(**call))
    if scaling != "row":
        return
    with pytest.raises(Exception, match="no derivative"):
        compiled(**call | {"x": given["x"].clone().requires_grad_()})
    with pytest.raises(Exception, match="scale_recipe is missing"):
        compiled(**given | {scale: call[scale] for scale in named.values()})


def test_int8_weights_have_no_blocks() -> None:
    given = _draw(torch.bfloat16)
    call = given | {"w_gate_up": given["w_gate_up"].to(torch.int8), "w_down": given["w_down"].to(torch.int8)}
    scales = {"scale_gate_up": torch.ones(E, 1, 1), "scale_down": torch.ones(E, 1, 1)}
    with pytest.raises(ValueError, match='int8 weights is "tensor" or "row"'):
        fused_moe(**call, **scales, scale_recipe="128x128")


def test_a_token_does_not_see_the_others() -> None:
    given = _draw(torch.float32)
    alone = {n: t[4:7] if n in ("x", "topk_weights", "topk_ids") else t for n, t in given.items()}
    together = fused_moe(**given, batch_invariant=True)
    assert torch.equal(together[4:7], fused_moe(**alone, batch_invariant=True))
    assert torch.equal(fused_moe(**given, deterministic=True), fused_moe(**given, deterministic=True))
    assert explain(fused_moe, **given, batch_invariant=True).chosen == "reference"


def test_nothing_to_do() -> None:
    given = _draw(bias=True)
    none = {n: t[:0] if n in ("x", "topk_weights", "topk_ids") else t for n, t in given.items()}
    assert fused_moe(**none).shape == (0, D)
    no_expert = given | {"topk_ids": torch.full((T, K), E)}
    assert not fused_moe(**no_expert).any()
    thin = given | {"w_gate_up": given["w_gate_up"][..., :0], "w_down": given["w_down"][:, :0]}
    thin |= {"bias_gate_up": given["bias_gate_up"][:, :0]}
    _check(fused_moe(**thin), thin)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(T, D + 1)}, ValueError, r"w_gate_up must be \(E, D, 2I\)"),
        ({"x": torch.zeros(T)}, ValueError, r"x must be \(T, D\)"),
        ({"topk_ids": torch.zeros(T, K + 1, dtype=torch.int64)}, ValueError, "topk_weights and topk_ids must be"),
        ({"topk_ids": torch.zeros(T, K)}, TypeError, "topk_ids must be int32 or int64"),
        ({"topk_ids": torch.full((T, K), E + 1)}, ValueError, f"topk_ids must be in 0..{E - 1}"),
        ({"topk_ids": torch.full((T, K), -1)}, ValueError, "values from -1 to -1"),
        ({"topk_weights": torch.zeros(T, K).half()}, TypeError, "topk_weights must be float32"),
        ({"w_down": torch.zeros(E, I, D).half()}, TypeError, "w_gate_up and w_down must be torch.float32"),
        ({"activation": "swish"}, ValueError, "activation must be one of silu"),
        ({"bias_down": torch.zeros(E, D + 1)}, ValueError, "bias_down must have shape"),
        ({"bias_down": torch.zeros(E, D).half()}, TypeError, "bias_down must be torch.float32"),
        ({"scale_recipe": "rows"}, ValueError, "is not a scaling"),
        ({"w_gate_up": torch.zeros(E, D, 2 * I, device="meta")}, ValueError, "must be on x's device"),
    ],
)
def test_wrong_arguments_by_name(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fused_moe(**_draw() | change)


def test_explain_knows_layers() -> None:
    given = _draw(torch.bfloat16)
    shown = explain(fused_moe, **given, device="h100")
    assert shown.op == "gemm" and shown.chosen == "triton" and shown["torch_grouped"].state is State.ABLE
    assert "reads offs on the host" in shown["cublas"].why
    older = explain(fused_moe, **given, device="a100")
    assert "reads offs on the host" in older["torch_grouped"].why
    # Each option has to be in the kind of the call.
    plain = shown.spec
    flips: tuple[dict[str, Any], ...] = (
        {"activation": "relu"}, {"deterministic": True}, {"batch_invariant": True}, _draw(torch.bfloat16, bias=True),
        {"w_down": given["w_down"].mT.contiguous().mT}, {"topk_ids": given["topk_ids"][:, :1],
         "topk_weights": given["topk_weights"][:, :1]}, {"x": given["x"].clone().requires_grad_()},
    )  # fmt: skip
    for flip in flips:
        assert explain(fused_moe, **given | flip, device="h100").spec != plain


def test_module() -> None:
    torch.manual_seed(0)
    layer = MoE(D, I, E, K, bias=True)
    x = torch.randn(3, 7, D, requires_grad=True)
    out = layer(x)
    tokens = x.detach().view(-1, D)
    logits = tokens.double() @ layer.router.double().t()
    weights, ids = torch.softmax(logits, -1).topk(K)
    weights = weights / weights.sum(-1, keepdim=True)
    call = (tokens, layer.w_gate_up, layer.w_down, weights, ids)
    want = moe_oracle(*call, bias_gate_up=layer.bias_gate_up, bias_down=layer.bias_down)
    assert (out.view(-1, D) - want).abs().max() < 1e-5
    out.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
    assert layer.router.grad.abs().max() > 0
    raw = MoE(D, I, E, K, normalize=False)
    assert raw.route(tokens)[0].sum(-1).max() < 0.99 and "top 2 of 5" in repr(raw)
    with pytest.raises(ValueError, match="top_k at most"):
        MoE(D, I, 2, 3)
    with pytest.raises(ValueError, match="activation must be"):
        MoE(D, I, E, K, activation="tanh")


@pytest.mark.parametrize("scaling", ["tensor", "row", "1x128", "128x128"])
def test_quantized_linear(scaling: str) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(200, 136)
    x = torch.randn(4, 9, 200)
    layer = QuantizedLinear.from_linear(linear, scaling=scaling)
    want = linear(x)
    error = (layer(x) - want).abs().max() / want.abs().max()
    assert 1e-4 < error < 0.08 and layer(x).dtype is torch.float32 and scaling in repr(layer)
    state = QuantizedLinear(torch.zeros(136, 200), torch.zeros(136), scaling=scaling)
    state.load_state_dict(layer.state_dict())
    assert torch.equal(state(x), layer(x))
    if scaling in ("tensor", "row"):
        fine = QuantizedLinear.from_linear(linear, scaling=scaling, dtype=torch.int8)
        assert (fine(x) - want).abs().max() / want.abs().max() < 0.02
    else:
        with pytest.raises(ValueError, match="for int8"):
            QuantizedLinear.from_linear(linear, scaling=scaling, dtype=torch.int8)
