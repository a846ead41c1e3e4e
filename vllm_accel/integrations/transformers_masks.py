"""The masks of transformers models, described instead of filled in: built once per forward, followed by every layer.

transformers asks a mask builder once per forward and kind of layer (`AttentionMaskInterface`) and hands what it returns
to the layers untouched. Ours answers with None where nothing is masked, else with a `Mask`: causal or not, window,
which keys are padding, where packed sequences start. Patterns that these cannot say (overlays of multimodal models,
chunked attention, functions of the user's own; packed positions while tracing) go to transformers' own builder, which
returns a 4-D boolean tensor.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import causal_mask_function, sdpa_mask

if "q_offset" not in inspect.signature(sdpa_mask).parameters:  # releases before describe queries by a cache_position
    raise ImportError("vllm_accel.integrations.transformers needs transformers 5.4 or newer")

NO_WINDOW = (-1, -1)

#: On a CPU, sequences are packed if that saves each query this many keys on average: gathering, scattering and one call
#: per sequence cost about as much. Packed : mask of keys, ms, fp32, one thread of a 2-core EPYC, torch 2.13, 2026-11-23
#: (`make bench ARGS="-k padding"`). (32, 128, 12, 32): 84 keys saved 12.5 : 20.3, 45 keys 20.7 : 20.5, 15 keys 25.6 :
#: 20.7. (16, 256, 12, 64): 151 keys 35 : 53, 51 keys 70 : 66. Causal (8, 512, 8 over 2, 64): 294 keys 39 : 88, 38 keys
#: 63 : 71. With two threads the small ones break even at about 70. A GPU packs always: FlashAttention has no key masks.
MIN_SAVED_KEYS = 64


class Mask(NamedTuple):
    """Who sees whom in the layers of one kind, during one forward.

    A named tuple, so that torch.compile, device hooks and FSDP see through it to the tensors.

    Attributes:
        causal, window_size: as `vllm_accel.attention` takes them, aligned to the last key in use.
        kv_length: key slots that each layer brings. keys: how many are in use (fewer in a static cache).
        key_mask: bool (B, 1, 1, keys), False for padding; None without padding, or where causality hides it anyway.
        query_mask: bool (B, queries), False for padding, whose rows become 0; None without.
        rows: int64 (tokens,), the rows of the flattened batch that are no padding; None if packing is impossible
            (queries and keys differ, padding in the middle) or does not pay.
        cu_seqlens: int32, where the sequences start among the rows of `index`, or of the whole flattened batch.
        max_seqlen: the longest of them.
    """

    causal: bool
    window_size: tuple[int, int]
    kv_length: int
    keys: int
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    rows: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0

    @property
    def ndim(self) -> int:
        """Say 4, so that transformers takes a mask that `generate` has prepared for a finished one."""
        return 4

    def contiguous(self) -> Mask:
        """Return self: `generate` calls this on every mask that it prepares."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Mask:
        """Move the tensors, as `Tensor.to`; hooks of models spread over several devices call this."""
        return Mask._make(t.to(*args, **kwargs) if isinstance(t, Tensor) else t for t in self)

    def __getattr__(self, name: str) -> Any:
        """Tell a model that computes with its mask why it cannot."""
        fix = "load this model with attn_implementation='sdpa' or 'eager'"
        raise AttributeError(f"a mask of vllm_accel is no tensor and has no {name!r}; {fix}")


class Pattern(NamedTuple):
    """What mask functions say without padding. Window as in `Mask`."""

    causal: bool
    window_size: tuple[int, int]


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Mask | Tensor | None:
    """Describe the mask of one kind of layer; the builder that transformers calls.

    Reads the device once where the 2-D `attention_mask` is given (or a static cache is filled) for more than one
    query, and never while it is traced or while single tokens are decoded.

    Args:
        batch_size, q_length, kv_length: sizes. q_offset, kv_offset: position of the first query and of the first key;
            a static cache gives the former as a tensor.
        mask_function: transformers' composition of index functions, used where nothing else describes the pattern.
        attention_mask: bool (B, tokens seen so far), None, or what an earlier call of this function returned.
        local_size: window or chunk size. config: of the model, to tell one from the other.
        allow_is_causal_skip, allow_is_bidirectional_skip: transformers vouches for a plain causal (bidirectional)
            pattern, windowed or chunked if local_size is given. Neither: it wants a tensor, or sequences are packed.

    Returns:
        None where layers may attend to everything that causality allows, a `Mask`, or a bool tensor
        (B, 1, q_length, kv_length), True where a query may attend.
    """
    if isinstance(attention_mask, Mask):  # prepared by generate(), which then calls the model with it
        return attention_mask
    pattern = _pattern(local_size, config, allow_is_causal_skip, allow_is_bidirectional_skip, kv_offset + kv_length)
    if pattern is not None:
        sizes = (q_length, kv_length, q_offset, kv_offset)
        found = _describe(pattern, sizes, attention_mask, config)
        if found is not _INEXPRESSIBLE:
            return found  # type: ignore[no-any-return]
    elif attention_mask is None and q_length == kv_length and not torch.compiler.is_compiling():
        packed = _packed(mask_function)
        if packed is not None:
            return _describe_packed(*packed, batch_size, q_length)
    filled: Tensor = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )
    return filled


_INEXPRESSIBLE = object()


def read(values: Tensor) -> Any:
    """Return a tensor's values to the host: the only place here that waits for the device."""
    return values.tolist()


def _pattern(
    local_size: int | None, config: Any, causal_skip: bool, bidirectional_skip: bool, last_key: int
) -> Pattern | None:
    """Return the pattern that transformers vouches for, None if it is neither causal, bidirectional nor a window."""
    if not (causal_skip or bidirectional_skip):
        return None
    if local_size is None:
        return Pattern(causal_skip, NO_WINDOW)
    # Windows and chunks both come as local_size; the configuration tells which it is.
    chunk = getattr(config, "attention_chunk_size", None) == local_size
    if chunk or getattr(config, "sliding_window", None) != local_size:
        return Pattern(causal_skip, NO_WINDOW) if chunk and last_key <= local_size else None
    # A causal window of W counts the query's own key; a bidirectional one counts the keys on either side of it.
    return Pattern(True, (local_size - 1, 0)) if causal_skip else Pattern(False, (local_size, local_size))


def _describe(pattern: Pattern, sizes: tuple[int, int, int | Tensor, int], padding: Tensor | None, config: Any) -> Any:
    """Return None, a Mask or a key mask for a known pattern; _INEXPRESSIBLE where slots and positions disagree."""
    q_length, kv_length, q_offset, kv_offset = sizes
    tracing = torch.compiler.is_compiling()
    positional = pattern.causal or pattern.window_size != NO_WINDOW
    facts: dict[str, Tensor] = {}
    if isinstance(q_offset, Tensor):
        if tracing:
            return _INEXPRESSIBLE
        facts["offset"] = q_offset.reshape(1)
    if padding is not None:
        padding = padding[:, kv_offset:]
        if not tracing and (q_length > 1 or facts):
            facts.update(_runs(padding))
    found = _read_all(facts)
    offset = found["offset"][0] if "offset" in found else q_offset
    # Keys beyond the last query (a static cache has room for them) are cut off, so that the last key is its own.
    keys: Any = offset + q_length - kv_offset if positional else kv_length
    if not 0 < keys <= kv_length or (padding is not None and padding.shape[1] != keys):
        return _INEXPRESSIBLE
    window = pattern.window_size if keys > pattern.window_size[0] + 1 else NO_WINDOW
    mask = Mask(pattern.causal, window, kv_length, keys)
    if padding is None or ("length" in found and min(found["length"]) == keys):
        # The layers' own arguments say the same, unless a model with windows gives one to its other layers too.
        plain = window == NO_WINDOW and keys == kv_length and getattr(config, "sliding_window", None) is None
        return None if plain else mask
    mask = mask._replace(key_mask=padding[:, None, None, :])
    if q_length == 1:
        return mask.key_mask if keys == kv_length and window == NO_WINDOW else mask
    if pattern.causal or (q_length == keys and not _may_cross(config)):  # the queries are the last of these tokens
        mask = mask._replace(query_mask=padding[:, keys - q_length :])
        if "length" in found and q_length == keys:
            return _pack(mask, facts, found)
    return mask


def _runs(padding: Tensor) -> dict[str, Tensor]:
    """Return, for each row, the first and last token that is no padding, and how many there are."""
    slots, ones = padding.shape[1], padding.int()
    return {"first": ones.argmax(-1), "last": slots - 1 - ones.flip(-1).argmax(-1), "length": ones.sum(-1)}


def _read_all(facts: dict[str, Tensor]) -> dict[str, list[int]]:
    """Read several small integer tensors in one go."""
    if not facts:
        return {}
    values, found = read(torch.cat([t.long() for t in facts.values()])), {}
    for name, tensor in facts.items():
        found[name], values = values[: len(tensor)], values[len(tensor) :]
    return found


def _pack(mask: Mask, facts: dict[str, Tensor], found: dict[str, list[int]]) -> Mask:
    """Use what is known about each row's padding: pack the rest, or at least drop a mask that causality implies.

    The tensors are computed on the device from numbers that the host knows already.
    """
    slots, lengths = mask.keys, found["length"]
    runs = zip(found["first"], found["last"], lengths, strict=True)
    if not all(n == 0 or last - first + 1 == n for first, last, n in runs):
        return mask  # padding in the middle: positions within a packed row would shift
    first, length = facts["first"], facts["length"]
    if mask.causal and not any(found["first"]):
        mask = mask._replace(key_mask=None)  # padding on the right is the future of every token
    if first.device.type == "cpu" and slots - sum(n * n for n in lengths) / (len(lengths) * slots) < MIN_SAVED_KEYS:
        return mask
    ends, total = length.cumsum(0), sum(lengths)
    start = torch.arange(len(lengths), device=ends.device) * slots + first
    shift = torch.repeat_interleave(start - (ends - length), length, output_size=total)
    return mask._replace(
        rows=shift + torch.arange(total, device=ends.device),
        cu_seqlens=pad(ends, (1, 0)).int(),
        max_seqlen=max(lengths),
    )


def _may_cross(config: Any) -> bool:
    """Tell whether a bidirectional mask may be for cross-attention, whose queries are not the tokens of its mask."""
    return bool(getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False))


def _packed(mask_function: Any) -> tuple[Tensor, Pattern] | None:
    """Recognise transformers' mask function for packed `position_ids`: sequence numbers (B, S), and what it wraps.

    The function is a closure over closures; anything not known to the last part is left to transformers.
    """
    parts = _intersection(mask_function)
    for packing, rest in (parts, parts[::-1]) if parts else ():
        name, held = _opened(packing)
        if name == "packed_sequence_mask_function":
            inner = _opened(rest)  # 5.21 and later count positions within each sequence, which changes no order
            inner = inner[1]["mask_function"] if inner[0] == "remap_positions_for_packed_sequence" else rest
            pattern = _causal_pattern(inner)
            return None if pattern is None else (held["packed_sequence_mask"], pattern)
    return None


def _causal_pattern(mask_function: Any) -> Pattern | None:
    """Recognise transformers' causal mask function, with or without a window."""
    if mask_function is causal_mask_function:
        return Pattern(True, NO_WINDOW)
    overlay, causal = _intersection(mask_function) or (None, None)
    name, held = _opened(overlay)
    if causal is causal_mask_function and name == "sliding_window_overlay":
        return Pattern(True, (held["sliding_window"] - 1, 0))
    return None


def _intersection(mask_function: Any) -> tuple[Any, Any] | None:
    """Return the two functions of which a third is the intersection."""
    name, held = _opened(mask_function)
    functions = held.get("mask_functions", ())
    return tuple(functions) if name == "and_masks" and len(functions) == 2 else None


def _opened(function: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of the factory that made a closure, and the variables that it closed over."""
    if not inspect.isfunction(function):
        return "", {}
    return function.__qualname__.partition(".")[0], dict(inspect.getclosurevars(function).nonlocals)


def _describe_packed(numbers: Tensor, pattern: Pattern, batch: int, slots: int) -> Mask:
    """Describe sequences packed one after another in each row, numbered (B, S), in one read."""
    tokens = batch * slots
    starts = torch.ones((batch, slots), dtype=torch.bool, device=numbers.device)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    places = torch.arange(tokens, device=numbers.device)
    # The starts in order, then `tokens` as often as it takes, so that the shape does not depend on the values.
    bounds = pad(torch.where(starts.flatten(), places, tokens), (0, 1), value=tokens).sort().values
    count, longest = read(torch.stack([starts.sum(), bounds.diff().max()]))
    return Mask(
        *pattern,
        kv_length=slots,
        keys=slots,
        cu_seqlens=bounds[: count + 1].int(),
        max_seqlen=longest,
    )
