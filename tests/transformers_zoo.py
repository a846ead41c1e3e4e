"""Small transformers models with random weights, large enough for attention to decide what they say."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
# Weights of standard deviation 0.4 make logits of about 10, so that a wrong mask moves them by whole units.
COMMON = {**SHAPE, "num_hidden_layers": 4, "initializer_range": 0.4, "pad_token_id": 0, "bos_token_id": 1}
DECODER = {**COMMON, "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": None}
WINDOWED = {**DECODER, "head_dim": 16, "sliding_window": 5}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SEQ2SEQ = {"vocab_size": 97, "d_model": 32, **SPECIAL}

DECODERS = ("Llama", "Qwen3", "Mistral", "Gemma2", "Gemma3", "GptOss")

_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 16}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 5}),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**WINDOWED, "attn_logit_softcapping": 2.0}),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**WINDOWED, "sliding_window_pattern": 2}),
    "Gemma3 bidirectional": (
        "Gemma3TextModel",
        "Gemma3TextConfig",
        {**WINDOWED, "sliding_window_pattern": 2, "use_bidirectional_attention": True},
    ),
    "GptOss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2,
            # The default scaling is for a context that this model does not have.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "Llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**DECODER, "head_dim": 16, "attention_chunk_size": 6, "intermediate_size_mlp": 40, "num_local_experts": 2},
    ),
    "Llama bidirectional": ("LlamaModel", "LlamaConfig", {**DECODER, "is_causal": False}),
    "Bert": ("BertModel", "BertConfig", COMMON),
    "ModernBert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**COMMON, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "Bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **SEQ2SEQ, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "init_std": 0.4,
            "max_position_embeddings": 64,
        },
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**SEQ2SEQ, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0},
    ),
}  # fmt: skip


def build(name: str, implementation: str = "eager", **overrides: Any) -> Any:
    """Return a model of the zoo in evaluation mode, always with the same weights."""
    model, config, options = _MODELS[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)._from_config(
        getattr(transformers, config)(**{**options, **overrides}), attn_implementation=implementation
    )
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(std=2.0)
    return built.eval()


def tokens(batch: int = 3, length: int = 17) -> torch.Tensor:
    """Return token ids that are neither special nor the same anywhere."""
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side: str, batch: int = 3, length: int = 17) -> torch.Tensor | None:
    """Return a 2-D attention mask: rows of length 7 and 14 with padding on one side, or holes, or none of it."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if side == "right":
        mask[0, 7:], mask[2, 14:] = 0, 0
    elif side == "left":
        mask[0, : length - 7], mask[2, : length - 14] = 0, 0
    elif side == "holes":
        mask[0, :3], mask[0, 8], mask[1, 12:] = 0, 0, 0
    return None if side == "none" else mask
