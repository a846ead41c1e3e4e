"""The transformers integration by itself: what masks are described as, what layers do with them, what is refused."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import transformers_zoo as zoo
from vllm_accel import attention
from vllm_accel.errors import UnsupportedCallError
from vllm_accel.integrations import transformers_masks
from vllm_accel.integrations.transformers import NAME, attention_forward
from vllm_accel.integrations.transformers_masks import NO_WINDOW, Mask, build_mask

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


class Layer(torch.nn.Module):
    """What a model's attention layer is to the function that it calls."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.eval()


class CrossAttentionLayer(Layer):
    """Transformers' names for such layers contain `Cross`."""


def qkv(
    batch: int = 3, queries: int = 9, keys: int = 9, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys))
    q, k, v = (torch.randn(batch, *shape, HEAD_DIM, generator=generator, dtype=dtype) for shape in shapes)
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attend with a filled-in mask; rows that see nothing are 0."""
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    logits = (q @ k.mT) * HEAD_DIM**-0.5 + bias
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2)


def build(
    padding: Tensor | None, queries: int, keys: int | None = None, bidirectional: bool = False, **config: Any
) -> Any:
    """Build a mask as transformers does for a model with this configuration."""
    window = config.get("sliding_window")
    arguments: dict[str, Any] = {"local_size": window} if window else {}
    keys = keys or queries
    return build_mask(
        batch_size=3,
        q_length=queries,
        kv_length=keys,
        q_offset=keys - queries,
        attention_mask=padding,
        allow_is_causal_skip=not bidirectional,
        allow_is_bidirectional_skip=bidirectional,
        config=types.SimpleNamespace(**config),
        **arguments,
    )


def padded(side: str) -> Tensor:
    """Rows of 3, 9 and 6 tokens."""
    lengths = torch.tensor([[3], [9], [6]])
    slots = torch.arange(9)
    return slots < lengths if side == "right" else slots >= 9 - lengths


def test_importing_registers_the_function_and_the_mask_builder() -> None:
    assert AttentionInterface()[NAME] is attention_forward
    assert AttentionMaskInterface()[NAME] is build_mask


# What the builder returns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
def test_no_padding_needs_no_mask(bidirectional: bool) -> None:
    assert build(None, 9, bidirectional=bidirectional) is None
    assert build(torch.ones(3, 9, dtype=torch.bool), 9, bidirectional=bidirectional) is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_packed_away(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_masks, "MIN_SAVED_KEYS", 0)
    mask = build(padded(side), 9)
    assert isinstance(mask, Mask)
    assert mask.causal
    assert mask.rows is not None
    assert mask.rows.tolist() == padded(side).flatten().nonzero().flatten().tolist()
    assert mask.cu_seqlens is not None
    assert mask.cu_seqlens.dtype is torch.int32
    assert mask.cu_seqlens.tolist() == [0, 3, 12, 18]
    assert mask.max_seqlen == 9


def test_the_longest_sequence_may_be_shorter_than_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_masks, "MIN_SAVED_KEYS", 0)
    mask = build(padded("left") & (torch.arange(9) >= 4), 9)
    assert (mask.max_seqlen, mask.cu_seqlens.tolist()) == (5, [0, 3, 8, 13])


def test_packing_has_to_pay_on_a_cpu() -> None:
    mask = build(padded("left"), 9)
    assert mask.rows is mask.cu_seqlens is None
    assert mask.key_mask.shape == (3, 1, 1, 9)


def test_causality_implies_a_mask_of_padding_on_the_right() -> None:
    assert build(padded("right"), 9).key_mask is None
    assert build(padded("right"), 9, bidirectional=True).key_mask is not None


def test_padding_in_the_middle_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_masks, "MIN_SAVED_KEYS", 0)
    holes = torch.ones(3, 9, dtype=torch.bool)
    holes[1, 4] = False
    mask = build(holes, 9)
    assert mask.rows is None
    assert mask.key_mask is not None


@pytest.mark.parametrize("flag", ["is_encoder_decoder", "add_cross_attention"])
def test_a_mask_that_may_be_for_cross_attention_leaves_the_queries_alone(
    flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_masks, "MIN_SAVED_KEYS", 0)
    mask = build(padded("right"), 9, bidirectional=True, **{flag: True})
    assert mask.rows is mask.query_mask is None
    assert mask.key_mask is not None


@pytest.mark.parametrize(
    ("bidirectional", "window"), [(False, (3, 0)), (True, (4, 4))], ids=["causal", "bidirectional"]
)
def test_windows(bidirectional: bool, window: tuple[int, int]) -> None:
    mask = build(None, 9, bidirectional=bidirectional, sliding_window=4)
    assert mask == Mask(not bidirectional, window, kv_length=9, keys=9)
    reach = 5 if bidirectional else 4  # a window that no key is outside of is none
    assert build(None, reach, bidirectional=bidirectional, sliding_window=4).window_size == NO_WINDOW
    assert build(None, reach + 1, bidirectional=bidirectional, sliding_window=4).window_size == window


def test_layers_without_a_window_say_so_in_models_with_one() -> None:
    config = types.SimpleNamespace(sliding_window=4)
    assert build_mask(3, 9, 9, config=config) == Mask(True, NO_WINDOW, kv_length=9, keys=9)


def test_a_chunk_is_no_window() -> None:
    config = types.SimpleNamespace(attention_chunk_size=4, sliding_window=None)
    assert build_mask(3, 4, 4, local_size=4, config=config) is None
    filled = build_mask(3, 9, 9, local_size=4, config=config)
    assert isinstance(filled, Tensor)
    assert torch.equal(filled, sdpa_mask(3, 9, 9, allow_is_causal_skip=False))  # the function given is plain causal


@pytest.mark.parametrize("case", ["longer mask", "shorter mask", "more queries than keys"])
def test_lengths_that_disagree_are_left_to_transformers(case: str) -> None:
    sizes: dict[str, Any] = {"batch_size": 3, "q_length": 5, "kv_length": 16, "q_offset": 4}
    if case == "more queries than keys":
        sizes = {"batch_size": 3, "q_length": 9, "kv_length": 5}
    else:
        sizes["attention_mask"] = torch.ones(3, 16 if case == "longer mask" else 8, dtype=torch.bool)
        sizes["attention_mask"][0, :3] = False
    filled = build_mask(**sizes, config=types.SimpleNamespace())
    assert isinstance(filled, Tensor)
    assert torch.equal(filled, sdpa_mask(**sizes, allow_is_causal_skip=False))


def test_custom_functions_are_filled_in_by_transformers() -> None:
    def strided(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query - key) % 3 == 0

    filled = build_mask(2, 6, 6, mask_function=strided, allow_is_causal_skip=False, use_vmap=True)
    i = torch.arange(6)
    assert isinstance(filled, Tensor)
    assert torch.equal(filled, ((i[:, None] - i) % 3 == 0).expand(2, 1, 6, 6))


def test_a_static_cache_is_cut_at_the_last_key_in_use() -> None:
    mask = build_mask(3, 5, 16, q_offset=torch.tensor(4), config=types.SimpleNamespace())
    assert mask == Mask(True, NO_WINDOW, kv_length=16, keys=9)


def test_a_rolling_cache_is_aligned_to_its_first_key() -> None:
    """Nine tokens so far, the last four of them kept, five more: keys 5 to 13 for queries 9 to 13."""
    config = types.SimpleNamespace(sliding_window=5)
    padding = torch.ones(3, 14, dtype=torch.bool)
    padding[0, :7] = False
    mask = build_mask(3, 5, 9, q_offset=9, kv_offset=5, attention_mask=padding, local_size=5, config=config)
    assert mask._replace(key_mask=None, query_mask=None) == Mask(True, (4, 0), kv_length=9, keys=9)
    assert mask.key_mask[0].flatten().tolist() == [False, False] + [True] * 7
    assert mask.query_mask.all()


def test_decoding_gets_a_mask_of_keys() -> None:
    mask = build(padded("left"), 1, keys=9)
    assert isinstance(mask, Tensor)
    assert torch.equal(mask, padded("left")[:, None, None])


def test_masks_move_and_pass_through_generate() -> None:
    mask = build(padded("left"), 9)
    assert mask.ndim == 4
    assert mask.contiguous() is mask
    moved = mask.to("meta", non_blocking=True)
    assert moved.key_mask.device.type == moved.query_mask.device.type == "meta"
    assert moved.causal is mask.causal
    assert build_mask(3, 9, 9, attention_mask=mask) is mask


def test_a_model_that_computes_with_its_mask_is_told_what_to_do() -> None:
    with pytest.raises(AttributeError, match=r"no tensor and has no 'masked_fill'; load this model with .*'eager'"):
        build(padded("left"), 9).masked_fill(torch.ones(9), 0)


# One read per forward ----------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Count the operators that bring a value to the host or make a shape depend on one."""

    _NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name.startswith(self._NAMES) or (name == "repeat_interleave.Tensor" and not kwargs.get("output_size")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what the mask builder read."""
    sizes: list[int] = []

    def counted(values: Tensor) -> Any:
        sizes.append(values.numel())
        return values.tolist()

    monkeypatch.setattr(transformers_masks, "read", counted)
    return sizes


@pytest.mark.parametrize("saved", [0, 1000], ids=["packed", "mask of keys"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_forward_reads_once(side: str, saved: int, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_masks, "MIN_SAVED_KEYS", saved)
    model = zoo.build("Llama", NAME)
    assert len(model.model.layers) == 4
    with torch.no_grad(), Reads() as others:
        model(zoo.tokens(), attention_mask=zoo.padding(side), use_cache=False)
    assert len(reads) == 1
    assert others.seen == []


def test_a_packed_forward_reads_once(reads: list[int]) -> None:
    model = zoo.build("Llama", NAME)
    positions = torch.cat([torch.arange(5), torch.arange(12)]).expand(3, -1)
    with torch.no_grad(), Reads() as others:
        model(zoo.tokens(), position_ids=positions, use_cache=False)
    assert len(reads) == 1
    # transformers' own look at position_ids, which every attn_implementation pays; nothing in the layers.
    assert others.seen == ["_local_scalar_dense"]


def test_decoding_reads_nothing(reads: list[int]) -> None:
    model, cache = zoo.build("Llama", NAME), DynamicCache()
    padding = zoo.padding("left")
    assert padding is not None
    with torch.no_grad():
        model(zoo.tokens(), attention_mask=padding, past_key_values=cache)
        assert len(reads) == 1
        longer = torch.cat([padding, padding.new_ones(3, 1)], 1)
        with Reads() as others:
            model(zoo.tokens(3, 1), attention_mask=longer, past_key_values=cache)
    assert len(reads) == 1
    assert others.seen == []


# What a layer does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [0, 1000], ids=["packed", "mask of keys"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(
    side: str, bidirectional: bool, window: int | None, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded rows are 0, the others what a filled-in mask makes them; NaN in padding harms nobody when packed."""
    monkeypatch.setattr(transformers_masks, "MIN_SAVED_KEYS", saved)
    q, k, v = qkv()
    valid, i = padded(side), torch.arange(9)
    valid[0] = False  # a row of nothing but padding
    mask = build(valid, 9, bidirectional=bidirectional, sliding_window=window)
    distance = i[:, None] - i
    visible = valid[:, None, None] & valid[:, None, :, None]
    if not bidirectional:
        visible = visible & (distance >= 0)
    if window:
        visible = visible & (distance.abs() <= (window if bidirectional else window - 1))
    expected = dense(q, k, v, visible)
    if not saved:
        for t in (q, k, v):
            t.masked_fill_(~valid[:, None, :, None], torch.nan)
    out, weights = attention_forward(Layer(), q, k, v, mask)
    assert weights is None
    assert out.is_contiguous()
    assert out.shape == (3, 9, HEADS, HEAD_DIM)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert out[~valid].eq(0).all()


def test_cross_attention_keeps_queries_where_its_keys_are_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_masks, "MIN_SAVED_KEYS", 0)
    q, k, v = qkv()
    mask = build(padded("right"), 9, bidirectional=True)
    assert mask.rows is not None
    expected = dense(q, k, v, padded("right")[:, None, None])
    for layer in (CrossAttentionLayer(False), Layer(False)):
        layer.is_cross_attention = True
        torch.testing.assert_close(attention_forward(layer, q, k, v, mask)[0], expected, rtol=0, atol=1e-12)


def test_queries_that_are_fewer_than_keys_are_none_of_them() -> None:
    """A configuration need not say that a model crosses; a resampler's learned queries are never padding."""
    q, k, v = qkv(queries=5)
    mask = build_mask(
        3, 5, 9, attention_mask=padded("left"), allow_is_causal_skip=False, allow_is_bidirectional_skip=True
    )
    out, _ = attention_forward(Layer(False), q, k, v, mask)
    torch.testing.assert_close(out, dense(q, k, v, padded("left")[:, None, None]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("window", [None, 3, 8])
def test_without_a_mask_the_layer_decides(is_causal: bool | None, window: int | None) -> None:
    q, k, v = qkv(queries=5)
    distance = torch.arange(5)[:, None] + 4 - torch.arange(9)
    for own in (True, False):
        causal = own if is_causal is None else is_causal
        visible = distance >= 0 if causal else torch.ones(5, 9, dtype=torch.bool)
        if window:
            visible = visible & (distance.abs() < window)
        out, _ = attention_forward(Layer(own), q, k, v, None, is_causal=is_causal, sliding_window=window)
        torch.testing.assert_close(out, dense(q, k, v, visible), rtol=0, atol=1e-12)


def test_the_mask_decides_over_the_layer() -> None:
    q, k, v = qkv()
    mask = Mask(False, NO_WINDOW, kv_length=9, keys=9)
    out, _ = attention_forward(Layer(True), q, k, v, mask, is_causal=True, sliding_window=2)
    torch.testing.assert_close(out, dense(q, k, v, torch.ones(9, 9, dtype=torch.bool)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bool", "additive", "half", "two dimensions"])
def test_masks_of_the_user(kind: str) -> None:
    q, k, v = qkv(dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    visible = torch.rand(3, 1, 9, 9, generator=generator) < 0.5
    visible[..., 0] = True
    mask: Tensor = visible
    layer = Layer(is_causal=kind == "two dimensions")  # a 4-D mask says all there is to say
    if kind == "additive":
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    elif kind == "half":
        mask = torch.where(visible, 0.0, -torch.inf).half()
    elif kind == "two dimensions":
        mask = padded("right").long()
        visible = padded("right")[:, None, None] & torch.ones(9, 9, dtype=torch.bool).tril()
    out, _ = attention_forward(layer, q, k, v, mask)
    torch.testing.assert_close(out, dense(q, k, v, visible), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "padded"])
def test_position_bias(kind: str) -> None:
    q, k, v = qkv()
    bias = torch.randn(1, HEADS, 9, 9, generator=torch.Generator().manual_seed(3), dtype=q.dtype)
    mask: Any = None
    visible = torch.ones(9, 9, dtype=torch.bool)
    if kind in ("bool", "additive"):
        visible = visible.tril()
        mask = visible[None, None] if kind == "bool" else torch.where(visible, 0.0, -torch.inf)[None, None]
    elif kind == "padded":
        mask, visible = (
            build(padded("right"), 9, bidirectional=True, is_encoder_decoder=True),
            padded("right")[:, None, None],
        )
    out, _ = attention_forward(Layer(False), q, k, v, mask, position_bias=bias)
    torch.testing.assert_close(out, dense(q, k, v, visible, bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("longest", [6, torch.tensor(6), None], ids=["int", "tensor", "none"])
def test_flash_attention_kwargs(longest: Any) -> None:
    q, k, v = qkv(batch=1)
    starts = torch.tensor([0, 3, 9])  # int64, as data collators make them
    numbers = torch.tensor([0] * 3 + [1] * 6)
    visible = (numbers[:, None] == numbers) & torch.ones(9, 9, dtype=torch.bool).tril()
    out, _ = attention_forward(
        Layer(), q, k, v, None, cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=longest, max_length_k=longest
    )
    torch.testing.assert_close(out, dense(q, k, v, visible), rtol=0, atol=1e-12)


def test_flattened_sequences_may_span_rows() -> None:
    q, k, v = qkv()
    starts = torch.tensor([0, 27], dtype=torch.int32)
    distance = torch.arange(27)[:, None] - torch.arange(27)
    long = [t.transpose(1, 2).reshape(1, 27, -1, HEAD_DIM).transpose(1, 2) for t in (q, k, v)]
    expected = dense(*long, (distance >= 0) & (distance < 12)).view(3, 9, HEADS, HEAD_DIM)
    out, _ = attention_forward(Layer(), q, k, v, None, sliding_window=12, cu_seq_lens_q=starts, cu_seq_lens_k=starts)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_position_bias_of_a_static_cache() -> None:
    q, k, v = qkv(queries=6)
    bias = torch.randn(1, HEADS, 6, 9, generator=torch.Generator().manual_seed(3), dtype=q.dtype)
    out, _ = attention_forward(Layer(), q, k, v, Mask(True, NO_WINDOW, kv_length=9, keys=6), position_bias=bias)
    expected = dense(q, k, v, torch.ones(6, 9, dtype=torch.bool).tril(), bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_one_set_of_queries_for_the_whole_batch() -> None:
    q, k, v = qkv()
    out, _ = attention_forward(Layer(False), q[:1], k, v, None)
    everything = torch.ones(9, 9, dtype=torch.bool)
    torch.testing.assert_close(out, dense(q[:1].expand(3, -1, -1, -1), k, v, everything), rtol=0, atol=1e-12)


def test_sinks_of_another_dtype() -> None:
    q, k, v = qkv(dtype=torch.float32)
    sinks = torch.tensor([1.0, -2.0, 0.5, 3.0])
    out, _ = attention_forward(Layer(), q, k, v, None, s_aux=sinks.bfloat16())
    expected, _ = attention_forward(Layer(), q, k, v, None, s_aux=sinks)
    assert torch.equal(out, expected)
    assert not torch.allclose(out, attention_forward(Layer(), q, k, v, None)[0], atol=0.1)


@pytest.mark.parametrize("deterministic", [None, False, True])
def test_determinism_is_passed_on(deterministic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def spy(*tensors: Tensor, **options: Any) -> Any:
        given.append(options["deterministic"])
        return attention(*tensors, **options)

    monkeypatch.setattr("vllm_accel.integrations.transformers.attention", spy)
    attention_forward(Layer(), *qkv(), None, deterministic=deterministic)
    assert given == [bool(deterministic)]


def test_dropout_only_while_training() -> None:
    q, k, v = qkv()
    layer = Layer()
    plain = attention_forward(layer, q, k, v, None)[0]
    assert torch.equal(attention_forward(layer, q, k, v, None, dropout=0.5)[0], plain)
    layer.train()
    assert torch.equal(attention_forward(layer, q, k, v, None)[0], plain)
    torch.manual_seed(0)
    drawn = torch.stack([attention_forward(layer, q, k, v, None, dropout=0.5)[0] for _ in range(400)])
    assert not torch.allclose(drawn[0], plain, atol=0.1)
    # The mean of 400 draws: each is off by about the values' own size.
    torch.testing.assert_close(drawn.mean(0), plain, rtol=0, atol=6 * v.abs().max().item() / 20)


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["output_attentions", "cache", "indices", "sinks", "head_mask"])
def test_keywords_that_only_eager_understands(name: str) -> None:
    with pytest.raises(UnsupportedCallError, match=f"(?s){name}.*eager"):
        attention_forward(Layer(), *qkv(), None, **{name: torch.ones(1) if name != "output_attentions" else True})
    attention_forward(Layer(), *qkv(), None, **{name: None}, output_router_logits=True, position_ids=torch.arange(9))


def test_output_attentions_of_a_model() -> None:
    with pytest.raises(UnsupportedCallError, match=r"(?s)output_attentions.*set_attn_implementation\('eager'\)"):
        zoo.build("Llama", NAME)(zoo.tokens(), output_attentions=True)


def eager_attention_forward(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, pull: float = 0.0
) -> None:
    """Stand for a model's own function, which knows a keyword that no one else does."""


def test_keywords_that_the_models_own_eager_function_names() -> None:
    with pytest.raises(UnsupportedCallError, match="cannot take pull"):
        attention_forward(Layer(), *qkv(), None, pull=0.5)
    attention_forward(Layer(), *qkv(), None, push=0.5)  # its eager function would not take that either


def test_contradictions() -> None:
    q, k, v = qkv()
    starts = {"cu_seq_lens_q": torch.tensor([0, 27]), "cu_seq_lens_k": torch.tensor([0, 27])}
    for mask in (build(padded("left"), 9), build(padded("right"), 9), torch.ones(3, 1, 9, 9, dtype=torch.bool)):
        with pytest.raises(ValueError, match="either attention_mask or cu_seq_lens_q"):
            attention_forward(Layer(), q, k, v, mask, **starts)
    bias = torch.zeros(1, HEADS, 9, 9)
    with pytest.raises(UnsupportedCallError, match="position_bias"):
        attention_forward(Layer(), q, k, v, None, position_bias=bias, **starts)
    packed = Mask(True, NO_WINDOW, 9, 9, cu_seqlens=torch.tensor([0, 27], dtype=torch.int32), max_seqlen=27)
    with pytest.raises(UnsupportedCallError, match="position_bias"):
        attention_forward(Layer(), q, k, v, packed, position_bias=bias)
    with pytest.raises(ValueError, match="made for 12 keys, and the layer brings 9"):
        attention_forward(Layer(), q, k, v, Mask(True, NO_WINDOW, kv_length=12, keys=12))
    with pytest.raises(TypeError, match="2-D attention_mask must be bool or integer"):
        attention_forward(Layer(), q, k, v, torch.zeros(3, 9))
    with pytest.raises(TypeError, match="attn_bias must be bool"):
        attention_forward(Layer(), q, k, v, torch.ones(3, 1, 9, 9, dtype=torch.long))
