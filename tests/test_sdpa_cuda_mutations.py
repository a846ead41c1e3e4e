"""Break each conversion of the adapters over PyTorch's CUDA kernels, one at a time: some case must notice every one."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from flash_attn_adapters import one_thread
from torch_adapters import ADAPTERS, BF16, EVERY_CASE, Adapter, check_dropout, qkv
from vllm_accel.backends import flash_kernel
from vllm_accel.backends.convert import with_dlse_column
from vllm_accel.backends.cutlass_layout import Packed
from vllm_accel.testing import check_backend, kernel_call

Mutation = Callable[[Adapter, pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def attribute(path: str, value: Any) -> Mutation:
    """Put something else in the place of what ``module.name`` (or ``module.Class.name``) is."""
    module, _, rest = path.partition(".")
    *owners, name = rest.split(".")

    def mutate(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
        owner = importlib.import_module(f"vllm_accel.backends.{module}")
        for part in owners:
            owner = getattr(owner, part)
        monkeypatch.setattr(owner, name, value)

    return mutate


def passes(_only: str = "", **changes: Any) -> Mutation:
    """Change what the operator is given, where it is given that; a callable gets the value and returns another."""

    def look(name: str, kwargs: dict[str, Any]) -> None:
        for key, value in changes.items():
            if key in kwargs and _only in name:
                kwargs[key] = value(kwargs[key]) if callable(value) else value

    return lambda adapter, monkeypatch: adapter.between(monkeypatch, look)


def swap_windows(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(name: str, kwargs: dict[str, Any]) -> None:
        sides = kwargs["window_size_right"], kwargs["window_size_left"]
        kwargs["window_size_left"], kwargs["window_size_right"] = sides

    adapter.between(monkeypatch, look)


def same(x: Any, *_: Any, **__: Any) -> Any:
    return x


def no_dlse(v: Any, out: Any, dout: Any, dlse: Any, head_dim: int) -> Any:
    return with_dlse_column(v, out, dout, None, head_dim)


def no_sinks(out: Any, lse: Any, sinks: Any) -> Any:
    return out, lse


def zero_sinks_grad(sinks: Any, *_: Any) -> Any:
    return None if sinks is None else torch.zeros_like(sinks)


def none_hidden(self: Any) -> Any:
    return torch.zeros(self._tokens_q, dtype=torch.bool)


def no_idle_keys(self: Any) -> Any:
    return torch.zeros(self._tokens_k, dtype=torch.bool)


def interleaved(tensor: Any, num_heads: int) -> Any:
    """Head h reads key head h % Hkv, and not h // (H // Hkv)."""
    return tensor.repeat(*(1,) * (tensor.dim() - 2), num_heads // tensor.shape[-2], 1)


def first_of_group(grad: Any, kv_heads: int) -> Any:
    return grad.unflatten(-2, (kv_heads, -1))[..., 0, :]


_PACKED, _FLASH_CALL = Packed.__init__, flash_kernel._call


def unsplit(self: Any, args: Any, tokens_q: int, tokens_k: int, *, split: bool) -> None:
    _PACKED(self, args, tokens_q, tokens_k, split=False)


def zero_padded(lse: Any) -> Any:
    missing = -lse.shape[-1] % 32
    return torch.nn.functional.pad(torch.where(lse == -math.inf, math.inf, lse), (0, missing))


def own_lengths(q: Any, k: Any, args: Any) -> Any:
    """What `_call` gives, but with the true length of one query."""
    return _FLASH_CALL(q, k, args)._replace(max_seqlen_q=args.max_seqlen_q)


FLASH, EFFICIENT, CUDNN, ALL = ("flash",), ("efficient",), ("cudnn",), ("flash", "efficient", "cudnn")
KERNEL = {"flash": "flash_kernel", "efficient": "cutlass_kernel", "cudnn": "sdpa_cudnn"}


def kernel(name: str, value: Any) -> Mutation:
    """Mutate what the module of the adapter's kernel uses under that name."""
    return lambda adapter, mp: attribute(f"{KERNEL[adapter.name.removeprefix('sdpa_')]}.{name}", value)(adapter, mp)


#: (adapters, what is broken, how, the case that must notice)
TABLE: tuple[tuple[tuple[str, ...], str, Mutation, str], ...] = (
    (ALL, "the caller's scale is dropped", passes(scale=64**-0.5), "scale"),
    (ALL, "the scale is that of the padded head", passes(scale=40**-0.5), "head_33"),
    (ALL, "causal is dropped", passes(is_causal=False, custom_mask_type=0), "causal"),
    (ALL, "causal is dropped in the backward", passes("backward", is_causal=False, custom_mask_type=0), "causal"),
    (ALL, "heads are not padded", kernel("pad_heads", same), "head_33"),
    (ALL, "the sinks are not folded in", kernel("fold_sinks", no_sinks), "sinks"),
    (ALL, "the sinks get no gradient", kernel("sinks_grad", zero_sinks_grad), "sinks"),
    (ALL, "the gradient of lse is dropped", kernel("with_dlse_column", no_dlse), "plain"),
    (FLASH, "causal is dropped, unequal lengths", passes(is_causal=False), "causal_shorter"),
    (FLASH, "+inf is kept", attribute("sdpa_flash.empty_rows_to_minus_inf", same), "causal_longer"),
    (FLASH, "+inf is kept, packed", kernel("empty_rows_to_minus_inf", same), "varlen_cross_causal"),
    (FLASH, "the window's sides are swapped", swap_windows, "window"),
    (FLASH, "the window's sides are swapped, packed", swap_windows, "varlen_window"),
    (FLASH, "the open right side is cut", kernel("open_right_is_cut", lambda _: False), "window_open_right"),
    (FLASH, "the wide right side is opened", kernel("open_right_is_cut", lambda _: False), "window_wide_right"),
    (FLASH, "rows of no sequence are left as they are", kernel("clear_past_end", same), "varlen_tail"),
    (FLASH, "one query is one query", kernel("_call", own_lengths), "varlen_decode_gap"),
    (EFFICIENT, "the diagonal starts top-left", passes(custom_mask_type=1), "causal_shorter"),
    (EFFICIENT, "the diagonal starts top-left, packed", passes(custom_mask_type=1), "varlen_cross_causal"),
    (EFFICIENT, "queries without keys go in", kernel("_first_seeing_row", lambda _: 0), "causal_longer"),
    (EFFICIENT, "sequences are not split", attribute("cutlass_layout.Packed.__init__", unsplit), "varlen_cross_causal"),
    (EFFICIENT, "the window is one key short", passes(window_size=lambda w: w - 1), "window_square"),
    (EFFICIENT, "the window is dropped in the backward", passes("backward", window_size=0), "window_square"),
    (EFFICIENT, "the window is one key short, packed", passes(window_size=lambda w: w - 1), "varlen_window_cross"),
    (EFFICIENT, "the bias is dropped", passes(bias=torch.zeros_like), "bias_full"),
    (EFFICIENT, "a mask is added as 0 and 1", kernel("aligned_bias", lambda b, t, s: b.to(t).expand(s)), "mask_keys"),
    (EFFICIENT, "a bias is not aligned", kernel("aligned_bias", lambda b, t, s: b.expand(s)), "bias_odd"),
    (EFFICIENT, "its gradient is not summed", passes("backward", bias_requires_grad=False), "bias_grad"),
    (EFFICIENT, "heads share keys the other way", kernel("expand_heads", interleaved), "gqa"),
    (EFFICIENT, "a group's gradients are not added", kernel("sum_groups", first_of_group), "gqa"),
    (EFFICIENT, "lse is padded by zeros", kernel("pad_lse", zero_padded), "plain"),
    (EFFICIENT, "queries without keys are left", attribute("cutlass_layout.Packed.queries_without_keys", none_hidden),
     "varlen_cross"),
    (EFFICIENT, "keys past the end are left", attribute("cutlass_layout.Packed.keys_without_queries", no_idle_keys),
     "varlen_tail"),
    (EFFICIENT, "rows past the end are left", kernel("clear_past_end", same), "varlen_tail"),
    (EFFICIENT, "packed lse is not unpacked", attribute("cutlass_layout.Packed.lse_by_token",
     lambda self, lse: lse[0, :, : self._tokens_q]), "varlen"),
    (EFFICIENT, "packed lse is not packed again", attribute("cutlass_layout.Packed.lse_by_sequence",
     lambda self, lse: lse.new_full((self.sequences, lse.shape[0], 64), math.inf)), "varlen"),
    (CUDNN, "one query is causal, top-left", passes(is_causal=True), "decode_forward"),
    (CUDNN, "the mask is dropped", passes(attn_bias=None), "mask_forward"),
    (CUDNN, "(B, S, H, D) goes in", attribute("sdpa_cudnn._heads_first", same), "plain"),
    (CUDNN, "lse keeps its last dimension", attribute("sdpa_cudnn.stats_rank", lambda: 3), "plain"),
)  # fmt: skip

PARAMETERS = [
    pytest.param(name, mutation, case, id=f"{name}-{what}") for names, what, mutation, case in TABLE for name in names
]


@pytest.mark.parametrize(("name", "mutation", "case"), PARAMETERS)
def test_a_case_notices(name: str, mutation: Mutation, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[name]
    with adapter.installed(monkeypatch):
        assert check_backend(adapter.backend, EVERY_CASE[case], dtype=BF16, device=adapter.device).ran
        mutation(adapter, monkeypatch)
        with pytest.raises((AssertionError, RuntimeError, TypeError)):
            check_backend(adapter.backend, EVERY_CASE[case], dtype=BF16, device=adapter.device)


@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_misaligned_rows_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[name]
    odd = torch.zeros(2, 24, 4, 33, dtype=BF16)[..., 1:]
    with adapter.installed(monkeypatch):
        for module in ("aten", "flash_kernel", "cutlass_kernel"):
            attribute(f"{module}.ready", same)(adapter, monkeypatch)
        with pytest.raises(RuntimeError, match=r"align|no kernel found"):
            kernel_call(adapter.backend, adapter.device)(odd, *qkv()[1:])


@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_another_dropout_mask_in_the_backward_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[name]
    with adapter.installed(monkeypatch):
        other = torch.ones(2, dtype=torch.uint64)
        passes("backward", rng_state=other, philox_seed=torch.tensor(1))(adapter, monkeypatch)
        with pytest.raises(AssertionError, match="dv of the same mask"):
            check_dropout(adapter)
