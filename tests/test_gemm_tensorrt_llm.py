"""TensorRT-LLM's fused layer over a fake with the conventions of flashinfer 0.7.2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_accel.backends.gemm.tensorrt_llm import BACKEND, TensorrtLlmMoe
from vllm_accel.dispatch.backend import MoeArgs
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.ops.gemm_arguments import spec_of
from vllm_accel.ops.moe_arguments import MoeOptions, describe_moe
from vllm_accel.testing import moe_oracle
from vllm_accel.testing.tolerance import assert_close

T, D, I, E, K = 11, 32, 24, 5, 2


def fake(
    *, input: Tensor, token_selected_experts: Tensor, token_final_scales: Tensor, fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor, output_dtype: torch.dtype, quant_scales: list[Tensor],
    fc1_expert_biases: Tensor | None, fc2_expert_biases: Tensor | None, output: Tensor, use_fused_finalize: bool,
) -> Tensor:  # fmt: skip
    """Reject what the checks of flashinfer_cutlass_fused_moe_binding.cu reject, then compute."""
    given = (input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights, output)
    assert all(t.is_contiguous() for t in given) and quant_scales == [] and output_dtype is input.dtype
    assert token_selected_experts.dtype is torch.int32 and token_final_scales.dtype is torch.float32
    experts, hidden, inner = fc2_expert_weights.shape
    assert fc1_expert_weights.shape == (experts, 2 * inner, hidden) and hidden % 8 == 0 and inner % 8 == 0
    assert int(token_selected_experts.min()) >= 0 and int(token_selected_experts.max()) < experts
    for t in range(input.shape[0]):
        total = torch.zeros(hidden)
        for e, factor in zip(token_selected_experts[t].tolist(), token_final_scales[t], strict=True):
            both = fc1_expert_weights[e].float() @ input[t].float()
            both = both if fc1_expert_biases is None else both + fc1_expert_biases[e].float()
            up, gate = both[:inner], both[inner:]  # doGatedActivation
            down = fc2_expert_weights[e].float() @ (torch.nn.functional.silu(gate) * up)
            total += factor * (down if fc2_expert_biases is None else down + fc2_expert_biases[e].float())
        output[t] = total
    return output


def draw(bias: bool, along_k: bool = False) -> tuple[Tensor, Tensor, Tensor, MoeArgs]:
    g = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * 0.3).bfloat16()

    up, down = (numbers(E, 2 * I, D).mT, numbers(E, D, I).mT) if along_k else (numbers(E, D, 2 * I), numbers(E, I, D))
    ids = torch.randint(E, (T, K), generator=g)
    ids[3, 0], ids[4, 1] = E, -1  # nobody's
    biases = (numbers(E, 2 * I), numbers(E, D)) if bias else (None, None)
    return numbers(T, D), up, down, MoeArgs(torch.rand(T, K, generator=g), ids, *biases)


def check(bias: bool, along_k: bool) -> None:
    x, up, down, args = draw(bias, along_k)
    spec = spec_of(describe_moe(x, up, down, args, MoeOptions(), False).kind)
    assert BACKEND.capability.unsupported_reasons(spec, PRESETS["h200"]) == ()
    made = TensorrtLlmMoe(fake, spec).forward(x, up, down, args)
    given: dict[str, Any] = args._asdict() | {"w_gate_up": up, "w_down": down}
    given = {name: value for name, value in given.items() if not name.startswith("scale")}
    want, plain = (moe_oracle(x, **given, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    assert_close(made, want, plain, what="layer")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("along_k", [False, True])
def test_equal_to_the_oracle(bias: bool, along_k: bool) -> None:
    check(bias, along_k)


@pytest.mark.parametrize("name", ["roll", "masked_fill", "contiguous"])
def test_every_conversion_is_needed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(Tensor, name, lambda t, *args, **kwargs: t)
    with pytest.raises(AssertionError):
        check(True, False)


def test_it_repeats_bits_without_the_fused_epilogue() -> None:
    x, up, down, args = draw(False)
    seen = []
    for deterministic in (False, True):
        described = describe_moe(x, up, down, args, MoeOptions(deterministic=deterministic), False)
        kernel = TensorrtLlmMoe(lambda **given: seen.append(given["use_fused_finalize"]), spec_of(described.kind))
        kernel.forward(x, up, down, args)
    assert seen == [True, False]


def test_what_it_refuses_says_why() -> None:
    x, up, down, args = draw(False)
    described = describe_moe(x[:, :30], up[:, :30], down[..., :30], args, MoeOptions(activation="gelu"), False)
    spec = spec_of(described.kind)
    assert [reason.code for reason in BACKEND.capability.unsupported_reasons(spec, PRESETS["h200"])] == ["activation"]
    assert [reason.code for reason in BACKEND.capability.guard_reasons(spec, described.sizes)] == ["aligned"]
