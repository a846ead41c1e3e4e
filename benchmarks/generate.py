"""``python -m benchmarks.generate``: tokens per second of a random Llama in transformers, vllm_accel beside sdpa.

The model has half a billion parameters and random weights, so nothing is downloaded. `--context` tokens are in the
cache before the clock starts, with random keys and values: prefill in bf16 takes minutes on a processor without bf16
instructions, and says nothing about decode. `--prompt` tokens go through the model inside the measured time. Both
implementations generate in turns, from copies of one cache; how many tokens agree is printed, because in bf16 the
largest of 32,000 random logits may differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = ("sdpa", "vllm_accel")


def build(dtype: torch.dtype, longest: int) -> Any:
    """Return the model: 24 layers of 1024, 16 heads over 4 key heads of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import vllm_accel.integrations.transformers  # noqa: F401  (makes the name known)

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=5120, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=longest, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def filled(config: Any, context: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return random keys and values of every layer."""
    shape = (1, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype))
        for _ in range(config.num_hidden_layers)
    ]


def generate(model: Any, past: list[tuple[Tensor, Tensor]], ids: Tensor, tokens: int) -> tuple[float, list[int]]:
    """Return the seconds and the new tokens of one greedy generation."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (k, v) in enumerate(past):
        cache.update(k, v, layer)
    start = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return time.perf_counter() - start, out[0, ids.shape[1] :].tolist()


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__)
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache before the clock starts")
    parser.add_argument("--prompt", type=int, default=1, help="tokens that go through the model first")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args(argv)
    dtype = DTYPES[options.dtype]
    facts = machine.about("benchmarks.generate", torch.device("cpu"))
    print(machine.describe(facts), flush=True)
    model = build(dtype, options.context + options.prompt + options.tokens)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e9:.2f} billion parameters in {options.dtype}, {options.context} tokens in the cache")
    past = filled(model.config, options.context, dtype)
    ids = torch.arange(options.context + options.prompt)[None] % model.config.vocab_size
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    said: dict[str, list[int]] = {}
    for index in range(options.rounds + 1):
        for name in NAMES if index % 2 else NAMES[::-1]:
            model.set_attn_implementation(name)
            seconds, said[name] = generate(model, past, ids, options.tokens if index else 2)
            if index:  # the first round warms up
                rates[name].append(options.tokens / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    equal = sum(a == b for a, b in zip(said["sdpa"], said["vllm_accel"], strict=True))
    for name in NAMES:
        print(f"{name:12s} {medians[name]:7.2f} tokens/s   rounds {', '.join(f'{rate:.2f}' for rate in rates[name])}")
    ratio = medians["vllm_accel"] / medians["sdpa"]
    print(f"vllm_accel / sdpa: {ratio:.2f}; {equal} of {options.tokens} tokens equal")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        asked = {name: getattr(options, name) for name in ("dtype", "context", "prompt", "tokens")}
        found = {**asked, "parameters": parameters, "rates": rates, "ratio": ratio, "equal": equal}
        options.json.write_text(json.dumps({"about": facts, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
