"""Hugging Face transformers: importing this module makes ``attn_implementation="vllm_accel"`` work.

>>> import vllm_accel.integrations.transformers
>>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="vllm_accel")
>>> model.set_attn_implementation("vllm_accel")        # or later

Encoders and decoders, grouped key heads as they are, padding on either side, `generate` with dynamic, static and
sliding-window caches, packed `position_ids` or `FlashAttentionKwargs`, 4-D masks, training with gradient checkpointing
and `torch.compile`. `vllm_accel` chooses the kernel: see `vllm_accel.explain` and `vllm_accel.use_backend`.

Visible is what eager attention makes visible, with two things to know. Some models (gpt-oss) do not report packed
`position_ids` to transformers' masks, and mix the sequences: give them `FlashAttentionKwargs`. A model compiled whole
and called without `attention_mask` or `FlashAttentionKwargs` gets transformers' filled-in mask of O(S^2), because
positions cannot be read while tracing; compiling its layers, as `for layer in model.model.layers: layer.compile()`,
avoids that.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from vllm_accel.errors import UnsupportedCallError
from vllm_accel.integrations.transformers_masks import NO_WINDOW, Mask, build_mask
from vllm_accel.ops.attention import attention, attention_varlen

#: What to write for `attn_implementation`.
NAME = "vllm_accel"

# Keywords that some caller gives transformers' attention functions and that change what has to be computed.
_REFUSED = {
    "output_attentions": "attention weights are never formed",
    "head_mask": "single heads cannot be switched off",
    "sinks": "sinks that differ between queries are not supported (s_aux, one per head, is)",
    "indices": "sparse attention over chosen keys is not supported",
    "block_indices": "sparse attention over chosen blocks is not supported",
    "block_table": "transformers' paged cache is not supported",
    "cache": "transformers' paged cache (continuous batching) is not supported",
}
_KNOWN = frozenset(_REFUSED)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    deterministic: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend for one layer of a model; the function that transformers calls.

    A mask decides alone what is visible, as it does in `eager`; `is_causal` (else the module's own) and
    `sliding_window` count only where there is none.

    Args:
        module: the layer; its `training` switches dropout, its `is_causal` is the default.
        query: (B, H, Sq, D). key, value: (B, Hkv, Sk, D), not expanded.
        attention_mask: what `build_mask` returned, or the user's: 4-D bool (True may attend) or additive, broadcastable
            to (B, H, Sq, Sk); 2-D bool or integer (B, Sk), nonzero where a key may be seen.
        scaling: softmax scale. softcap: of the logits. s_aux: sinks (H,). position_bias: added to the logits.
        sliding_window: keys that a query sees, itself included; without causality on either side.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: sequences packed in the flattened batch.
        deterministic: the same bits on every run.
        kwargs: ignored where the model's own eager function ignores them too.

    Returns:
        (B, Sq, H, D), contiguous, and None for the weights. Rows of padding are 0 where queries are known to be
        padding: wherever a `Mask` of self-attention says so.

    Raises:
        UnsupportedCallError: a keyword asks for what only `eager` does. Else as `vllm_accel.attention`.
    """
    _refuse(module, kwargs)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if q.shape[0] != k.shape[0]:  # learned queries, one set for the whole batch
        q = q.expand(k.shape[0], -1, -1, -1)
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux if s_aux is None or s_aux.dtype in (torch.float32, q.dtype) else s_aux.float(),
        "dropout_p": dropout if module.training else 0.0,
        "deterministic": bool(deterministic),
    }
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        _refuse_mask_and_lengths(attention_mask, position_bias)
        causal, window = _flags(module, is_causal, sliding_window, k.shape[0] * k.shape[1])
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        return _flattened(q, k, v, lengths, causal=causal, window_size=window, **options), None
    if isinstance(attention_mask, Mask):
        return _masked(module, q, k, v, attention_mask, position_bias, options), None
    causal, window, bias = False, NO_WINDOW, attention_mask
    if bias is None or bias.dim() == 2:
        causal, window = _flags(module, is_causal, sliding_window, k.shape[1])
        bias = None if bias is None else _key_mask(bias)
    bias = _biased(bias, position_bias, q.dtype)
    return _tensor(attention(q, k, v, causal=causal, window_size=window, attn_bias=bias, **options)), None


def _masked(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    position_bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Attend as a `Mask` says: packed where it can be, else dense with a mask of keys."""
    if k.shape[1] != mask.kv_length:
        raise ValueError(f"the attention mask was made for {mask.kv_length} keys, and the layer brings {k.shape[1]}")
    k, v = k[:, : mask.keys], v[:, : mask.keys]
    options |= {"causal": mask.causal, "window_size": mask.window_size}
    own = not _crosses(module)
    if mask.cu_seqlens is not None and position_bias is None and (own or mask.rows is None):
        return _packed(q, k, v, mask, options)
    if mask.cu_seqlens is not None and mask.rows is None:
        raise UnsupportedCallError("position_bias with packed sequences", fix="pad them, and pass attention_mask")
    if position_bias is not None:
        position_bias = position_bias[..., : mask.keys]
    bias = _biased(mask.key_mask, position_bias, q.dtype)
    out = _tensor(attention(q, k, v, attn_bias=bias, **options))
    if mask.query_mask is not None and own:
        out = out.masked_fill(~mask.query_mask[:, :, None, None], 0)
    return out


def _packed(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
    """Attend within sequences without their padding, or within the sequences packed in each row."""
    cu_seqlens, rows = mask.cu_seqlens, mask.rows
    batch, slots = q.shape[:2]
    # index_select over the flattened batch is the fastest gather with gradients: 0.1 ms where flattening is a view and
    # 1 ms where it is a copy, against 1 and 1.5 ms of q[row, slot] ((16, 256, 12, 64) fp32, 2-core EPYC, 2026-11).
    q, k, v = (t.reshape(batch * slots, *t.shape[2:]) for t in (q, k, v))
    if rows is not None:
        q, k, v = (t.index_select(0, rows) for t in (q, k, v))
    assert cu_seqlens is not None
    out = _tensor(
        attention_varlen(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
            max_seqlen_q=mask.max_seqlen, max_seqlen_k=mask.max_seqlen, **options,
        )
    )  # fmt: skip
    if rows is not None:
        out = out.new_zeros((batch * slots, *out.shape[1:])).index_copy_(0, rows, out)
    return out.view(batch, slots, *out.shape[1:])


def _flattened(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Tensor, Tensor, Any, Any], **options: Any) -> Tensor:
    """Attend within sequences whose starts the caller gives (`FlashAttentionKwargs`)."""
    batch = q.shape[0]
    q, k, v = (t.reshape(t.shape[0] * t.shape[1], *t.shape[2:]) for t in (q, k, v))
    cu_seqlens_q = lengths[0].int()
    cu_seqlens_k = cu_seqlens_q if lengths[1] is lengths[0] else lengths[1].int()
    out = attention_varlen(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=_longest(lengths[2], q.shape[0]), max_seqlen_k=_longest(lengths[3], k.shape[0]), **options,
    )  # fmt: skip
    out = _tensor(out)
    return out.view(batch, -1, *out.shape[1:])


def _longest(given: int | Tensor | None, tokens: int) -> int:
    """Return the longest sequence as a Python int, without waiting for a device: an upper bound will do."""
    if isinstance(given, Tensor):
        readable = given.device.type == "cpu" and not torch.compiler.is_compiling()
        return int(given) if readable else tokens
    return tokens if given is None else given


def _flags(
    module: nn.Module, is_causal: bool | None, sliding_window: int | None, keys: int
) -> tuple[bool, tuple[int, int]]:
    """Return causality and window of a layer without a mask, as transformers' flash attention understands them."""
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    if not sliding_window or keys <= sliding_window:
        return causal, NO_WINDOW
    return causal, (sliding_window - 1, 0 if causal else sliding_window - 1)


def _key_mask(mask: Tensor) -> Tensor:
    if mask.dtype.is_floating_point:
        raise TypeError(f"a 2-D attention_mask must be bool or integer (1: may be seen), not {mask.dtype}")
    return mask.bool()[:, None, None, :]


def _biased(mask: Tensor | None, position_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Join a mask and a position bias, which the model has filled in, so that the sum is no larger."""
    if mask is not None and mask.dtype.is_floating_point and mask.dtype not in (torch.float32, dtype):
        mask = mask.float()
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    if mask.dtype is torch.bool:
        return torch.where(mask, position_bias, -math.inf)
    return mask + position_bias


def _crosses(module: nn.Module) -> bool:
    """Tell whether a layer attends from one set of tokens to another, by the names that transformers uses."""
    return getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__


def _tensor(out: Any) -> Tensor:
    assert isinstance(out, Tensor)
    return out


def _refuse_mask_and_lengths(mask: Mask | Tensor | None, position_bias: Tensor | None) -> None:
    """Raise if sequence lengths come with something else that hides keys, which only one of them could decide."""
    if position_bias is not None:
        raise UnsupportedCallError("position_bias with cu_seq_lens_q", fix="pad the sequences, and pass attention_mask")
    if mask is None or (isinstance(mask, Mask) and mask.query_mask is mask.key_mask is None):
        return
    if torch.compiler.is_compiling() and isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.dim() == 4:
        return  # made by transformers from position_ids while tracing: says the same, and is never computed
    raise ValueError("pass either attention_mask or cu_seq_lens_q with cu_seq_lens_k, not both")


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise for keywords that change the result and that no kernel here knows.

    A keyword changes the result if the model's own eager function names it; those that it swallows mean nothing to
    attention. Tracing cannot look at signatures, so there only the known ones are refused.
    """
    named = _KNOWN if torch.compiler.is_compiling() else _named_by_eager(type(module).__module__)
    for name, value in kwargs.items():
        if name in named and value is not None and value is not False:
            why = _REFUSED.get(name, "it means something to this model's eager attention and nothing here")
            raise UnsupportedCallError(
                f"attn_implementation={NAME!r} cannot take {name}: {why}",
                works="attn_implementation='eager'",
                fix="model.set_attn_implementation('eager')",
            )


@functools.cache
def _named_by_eager(file: str) -> frozenset[str]:
    """Return what is refused, with what the eager function of a model's file takes and `attention_forward` not."""
    eager = getattr(sys.modules.get(file), "eager_attention_forward", None)
    if eager is None:
        return _KNOWN
    parameters = inspect.signature(eager).parameters.values()
    taken = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    return _KNOWN | (taken - set(inspect.signature(attention_forward).parameters))


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, build_mask)
