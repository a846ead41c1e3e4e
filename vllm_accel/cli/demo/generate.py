"""Generate with a small Llama of random weights, through vllm_accel and through sdpa: the tokens must be the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_accel.cli import console
from vllm_accel.cli.demo import report_times, require
from vllm_accel.cli.demo.timing import medians
from vllm_accel.dispatch.device import Device


@dataclass(frozen=True, slots=True)
class Size:
    """How large the model and the work are. Grouped key heads, as in real models."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    prompt: int
    new_tokens: int
    rounds: int


FULL = Size(hidden=512, layers=8, heads=8, kv_heads=4, vocabulary=8192, prompt=256, new_tokens=32, rounds=5)
QUICK = Size(hidden=128, layers=2, heads=4, kv_heads=2, vocabulary=512, prompt=48, new_tokens=8, rounds=1)


def run(device: Device, size: Size) -> bool:
    """Compare the tokens, print the times; tell whether they agree."""
    require("transformers", "vllm_accel.integrations.transformers")
    models = build(device, size)
    prompt = torch.randint(size.vocabulary, (1, size.prompt), generator=torch.Generator().manual_seed(1)).to(
        device.type
    )
    tokens = {name: generate(model, prompt, size.new_tokens) for name, model in models.items()}
    ours, theirs = tokens["vllm_accel"], tokens["sdpa"]
    same = int((ours == theirs).int().cumprod(-1).sum())
    count = sum(p.numel() for p in models["sdpa"].parameters()) / 1e6
    dtype = str(next(models["sdpa"].parameters()).dtype).removeprefix("torch.")
    out = console.console()
    out.print(console.plain(f"Llama of {count:.0f} M random parameters, {dtype}, prompt of {size.prompt} tokens"))
    agree = same == theirs.numel()
    if agree:
        out.print(console.plain(f"all {same} generated tokens are equal: {ours.flatten().tolist()[:12]} ..."))
    else:
        agree = _near_tie(models["sdpa"], prompt, ours, theirs, same)
    calls = {name: lambda model=model: generate(model, prompt, size.new_tokens) for name, model in models.items()}
    report_times(f"{size.new_tokens} tokens", medians(calls, device.type, size.rounds, budget=6.0, warm=True))
    return agree


def build(device: Device, size: Size) -> dict[str, Any]:
    """Return the same random model twice, once per attention implementation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import vllm_accel.integrations.transformers  # noqa: F401, makes attn_implementation="vllm_accel" work

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.prompt + size.new_tokens,
        bos_token_id=None,
        eos_token_id=None,  # so that every run makes as many tokens
        initializer_range=0.05,  # with the usual 0.02 random weights repeat a few tokens for ever
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sdpa = LlamaForCausalLM(config).to(device.type, dtype).eval()
    ours = copy.deepcopy(sdpa)
    ours.set_attn_implementation("vllm_accel")
    return {"vllm_accel": ours, "sdpa": sdpa}


@torch.no_grad()
def generate(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """Return the tokens that greedy decoding appends."""
    made: Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return made[:, prompt.shape[1] :]


@torch.no_grad()
def _near_tie(model: Any, prompt: Tensor, ours: Tensor, theirs: Tensor, same: int) -> bool:
    """Tell whether two runs parted where the two best logits are closer than the dtype can tell apart.

    Random weights give nearly level logits, so 16-bit rounding alone can turn one token. Two logits that each carry
    the rounding of the last layer's sum may differ by a few units in the last place: 8 are allowed.
    """
    context = torch.cat([prompt, theirs[:, :same]], dim=1)
    logits = model(context).logits[0, -1].float()
    a, b = int(ours[0, same]), int(theirs[0, same])
    gap = float((logits[a] - logits[b]).abs())
    step = torch.finfo(next(model.parameters()).dtype).eps * float(logits.abs().max())
    agree = gap <= 8 * step
    text = (
        f"the first {same} of {theirs.numel()} tokens are equal; then the two best logits are {gap:.1e} apart, "
        f"{gap / step:.1f} rounding steps: {'a tie, decided by rounding' if agree else 'DISAGREE'}"
    )
    console.console().print(console.plain(text))
    return agree
