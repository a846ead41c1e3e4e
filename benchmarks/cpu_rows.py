"""The pieces of work that `benchmarks.cpu` times: contestants, yardsticks, and what is wanted of each ratio."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cpu_others
from benchmarks.shapes import Shape
from vllm_accel import PagedKVCache, attention, attention_paged, attention_varlen
from vllm_accel.kernels.cpu import load

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 32, 8, 128
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What the machine gives: a contestant's operations or bytes, and the share wanted (0: for information)."""

    amount: float
    share: float = 0.0


@dataclass(slots=True)
class Row:
    """One piece of work with its contestants.

    Attributes:
        name: what is measured. calls: contestants, "ours" among them; others are PyTorch's, other libraries' or
            yardsticks. amount: operations or bytes of "ours". machine: the yardsticks, the one that counts first.
        over: least ratio wanted over a contestant (0: for information). grad: with gradients.
        seconds, errors: medians, and why a contestant has none. disturbed: the yardstick varied between rounds.
    """

    name: str
    calls: dict[str, Callable[[], Any]]
    amount: float
    machine: dict[str, Yardstick] = field(default_factory=dict)
    over: dict[str, float] = field(default_factory=dict)
    grad: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    disturbed: bool = False

    def ratio(self, other: str) -> float:
        """Return how many times faster ours is."""
        return self.seconds[other] / self.seconds["ours"]

    def share(self, yardstick: str) -> float:
        """Return our rate as a share of a yardstick's."""
        return (self.amount / self.seconds["ours"]) / (self.machine[yardstick].amount / self.seconds[yardstick])


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Callable[[], Tensor]:
    """Return PyTorch's call on the same (B, S, H, D) tensors."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def bottom_right(n_q: int, n_k: int) -> dict[str, Any]:
    """Return the options that make PyTorch's call causal, aligned bottom-right."""
    if n_q == n_k:
        return {"is_causal": True}
    return {"attn_mask": torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)}


def matmul(dtype: torch.dtype, n: int) -> tuple[Callable[[], Tensor], float]:
    """Return a matrix product and its operations."""
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    return (lambda: a @ b), 2.0 * n**3


def multiply_adds() -> tuple[Callable[[], Any], float]:
    """Return a loop of fused multiply-adds on all threads, and its operations."""
    module, threads = load().module, torch.get_num_threads()
    return (lambda: module.probe_fma(400_000, threads, 0)), 2.0 * module.probe_fma(1, threads, 0) * 400_000


def has_bf16_products() -> bool:
    """Tell whether the kernels multiply bf16 pairs here; elsewhere they widen to fp32 and the FMA peak is the limit."""
    return "bf16" in load().module.instruction_sets()[0]


def of_machine(dtype: torch.dtype, share: float) -> tuple[dict[str, Callable[[], Any]], dict[str, Yardstick]]:
    """Return the yardsticks of products in a dtype.

    bf16: torch's product, or the FMA peak where there are no bf16 instructions (torch's takes 80 times as long as its
    fp32 product there: shown, small). fp32: the FMA peak, and torch's product beside it. fp16: the FMA peak.
    """
    peak, of_peak = multiply_adds()
    if dtype is torch.bfloat16 and has_bf16_products():
        product, work = matmul(dtype, 2048)
        return {"bf16 matmul": product}, {"bf16 matmul": Yardstick(work, share)}
    calls: dict[str, Callable[[], Any]] = {"FMA peak": peak}
    sticks = {"FMA peak": Yardstick(of_peak, min(share, 0.70))}
    if dtype is not torch.float16:
        product, work = matmul(dtype, 2048 if dtype is torch.float32 else 384)
        name = f"{NAMES[dtype]} matmul"
        calls[name], sticks[name] = product, Yardstick(work)
    return calls, sticks


#: A name and what builds its row: tensors of one row do not outlive it, and those left out are never made.
Case = tuple[str, Callable[[], Row]]


def prefill_rows(quick: bool) -> Iterator[Case]:
    """Causal prefill: one dense shape per dtype, then the others in bf16."""
    main = {torch.bfloat16: (5.0, 0.88), torch.float32: (2.4, 0.70), torch.float16: (3.8, 0.70)}
    for dtype, (over, share) in main.items():
        shape = Shape(f"{NAMES[dtype]} prefill H16 D128 S2048", "prefill", 1, 2048, 2048, 16, 16, 128)
        yield shape.name, partial(dense, shape, dtype, over, share)
    if quick:
        return
    others = [
        ("S512", 512, 512, 16, 128), ("S8192", 8192, 8192, 16, 128), ("D64 S2048", 2048, 2048, 16, 64),
        ("GQA 16/4 S2048", 2048, 2048, 4, 128), ("Sq512 Sk2048", 512, 2048, 16, 128),
    ]  # fmt: skip
    for name, n_q, n_k, kv_heads, dim in others:
        shape = Shape(f"bf16 prefill {name}", "prefill", 1, n_q, n_k, 16, kv_heads, dim)
        yield shape.name, partial(dense, shape, torch.bfloat16, 4.0, 0.75)
    lengths = tuple((n, n) for n in (2048, 1100, 700, 512, 300, 128))
    shape = Shape("bf16 prefill varlen, 6 lengths to 2048", "prefill", heads=16, kv_heads=16, lengths=lengths)
    yield shape.name, partial(varlen, shape)


def dense(shape: Shape, dtype: torch.dtype, over: float, share: float) -> Row:
    """One causal call."""
    q, k, v, _, _, _ = shape.make(dtype, CPU)
    theirs = sdpa(q, k, v, **bottom_right(shape.seqlen_q, shape.seqlen_k))
    calls, machine = of_machine(dtype, share)
    calls = {"ours": lambda: attention(q, k, v, causal=True, backend="cpu"), "PyTorch": theirs, **calls}
    return Row(shape.name, calls, shape.flops(), machine, {"PyTorch": over})


#: Sentences: heads, head size, (sentences, tokens) of each. PyTorch's kernel is at its best at 32 tokens.
_SENTENCES = ((12, 32, ((32, 17), (8, 32), (32, 64), (1, 128))), (12, 64, ((32, 17), (8, 32), (32, 33))))


def short_rows() -> Iterator[Case]:
    """Short prompts in fp32: padded ones with their mask, as models like MiniLM make them, and without."""
    for heads, dim, sizes in _SENTENCES:
        for batch, tokens in sizes:
            padded = dim == 32
            name = f"fp32 {'padded ' if padded else ''}sentences {batch}x{tokens} H{heads} D{dim}"
            shape = Shape(name, "prefill", batch, tokens, tokens, heads, heads, dim, causal=False, padded=padded)
            yield name, partial(sentences, shape)


def sentences(shape: Shape) -> Row:
    """One call that is not causal; PyTorch's mask is made before, as a model makes it once for all layers."""
    q, k, v, _, options, _ = shape.make(torch.float32, CPU)
    mask = options.get("attn_bias")
    theirs = sdpa(q, k, v, attn_mask=mask)
    ours = partial(attention, q, k, v, attn_bias=mask, backend="cpu")
    return Row(shape.name, {"ours": ours, "PyTorch": theirs}, shape.flops(), over={"PyTorch": 1.0})


def varlen(shape: Shape) -> Row:
    """Packed sequences of mixed lengths, beside PyTorch's call on one after the other."""
    q, k, v, _, options, _ = shape.make(torch.bfloat16, CPU)
    ends = options["cu_seqlens_q"].tolist()
    one_by_one = [sdpa(*(t[None, a:b] for t in (q, k, v)), is_causal=True) for a, b in itertools.pairwise(ends)]
    calls, machine = of_machine(torch.bfloat16, 0.75)
    calls |= {
        "ours": lambda: attention_varlen(q, k, v, backend="cpu", **options),
        "PyTorch": lambda: [call() for call in one_by_one],
    }
    return Row(shape.name, calls, shape.flops(), machine, {"PyTorch": 4.0})


def decode_rows(quick: bool) -> Iterator[Case]:
    """GQA decode, 32 query heads over 8, head size 128: contiguous, then paged."""
    shapes = [(8, 4096)] if quick else [(8, 4096), (1, 4096), (1, 32768)]
    for dtype, over in ((torch.bfloat16, 4.0), (torch.float16, 8.0)):
        for batch, keys in shapes:
            name = f"{NAMES[dtype]} decode 32/8 B{batch} {keys} keys, contiguous"
            yield name, partial(contiguous, name, dtype, batch, keys, over)
    for block, over in ((64, 3.5), (16, 3.0)):
        for dtype in (torch.bfloat16, torch.float16):
            for batch, keys in shapes:
                name = f"{NAMES[dtype]} decode 32/8 B{batch} {keys} keys, random blocks of {block}"
                yield name, partial(paged, name, dtype, batch, keys, block, over)
    for kind in (torch.float8_e4m3fn, torch.int8):
        name = f"bf16 decode 32/8 B8 4096 keys, random blocks of 64 in {str(kind).removeprefix('torch.')}"
        yield name, partial(paged, name, torch.bfloat16, 8, 4096, 64, 0.0, kind)


def _decode_tensors(dtype: torch.dtype, batch: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, 1, HEADS, DIM).to(dtype)
    k, v = (torch.randn(batch, keys, KV_HEADS, DIM).to(dtype) for _ in range(2))
    return q, k, v


def _theirs(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    """PyTorch's two ways: heads of a group folded into queries, and its own grouping."""
    folded = q.reshape(q.shape[0], KV_HEADS, HEADS // KV_HEADS, DIM)
    k_t, v_t = k.transpose(1, 2), v.transpose(1, 2)
    return {
        "folded": lambda: F.scaled_dot_product_attention(folded, k_t, v_t),
        "enable_gqa": sdpa(q, k, v),
    }


def contiguous(name: str, dtype: torch.dtype, batch: int, keys: int, over: float) -> Row:
    """Keys and values (B, S, Hkv, D), one after the other."""
    q, k, v = _decode_tensors(dtype, batch, keys)
    module, threads = load().module, torch.get_num_threads()
    size = k.numel() * k.element_size()
    calls = {
        "ours": lambda: attention(q, k, v, backend="cpu"),
        **_theirs(q, k, v),
        "contiguous read": lambda: module.probe_read(k, v, None, size // threads, threads, 0),
    }
    machine = {"contiguous read": Yardstick(2.0 * size, 0.80)}
    return Row(name, calls, 2.0 * size, machine, {"folded": over, "enable_gqa": 20.0})


def paged(
    name: str, dtype: torch.dtype, batch: int, keys: int, block: int, over: float, kind: torch.dtype | None = None
) -> Row:
    """A random table over the memory that `PagedKVCache` lays out, beside PyTorch's call on contiguous keys."""
    q, k, v = _decode_tensors(dtype, batch, keys)
    cache = PagedKVCache(batch * keys // block, block, KV_HEADS, DIM, dtype=kind or dtype)
    k_cache, v_cache = cache.k_cache, cache.v_cache
    for to, source in ((k_cache, k), (v_cache, v)):
        to.copy_((source.reshape(to.shape) * 20).round() if kind is torch.int8 else source.reshape(to.shape))
    table = torch.randperm(cache.num_blocks, generator=torch.Generator().manual_seed(0)).int()
    options = {
        "cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32),
        "max_seqlen_q": 1,
        "block_table": table.view(batch, -1),
        "seqused_k": torch.full((batch,), keys, dtype=torch.int32),
        "max_seqlen_k": keys,
    }
    module, threads = load().module, torch.get_num_threads()
    packed, of_block = q.flatten(0, 1), block * KV_HEADS * DIM * k_cache.element_size()
    calls = {
        "ours": lambda: attention_paged(packed, k_cache, v_cache, backend="cpu", **options),
        **_theirs(q, k, v),
        "paged read": lambda: module.probe_read(k_cache, v_cache, table, of_block, threads, 0),
    }
    size = 2.0 * k_cache.numel() * k_cache.element_size()
    machine = {"paged read": Yardstick(size, 0.0 if kind else 0.75)}
    return Row(name, calls, size, machine, {"folded": over, "enable_gqa": 0.0})


def overhead() -> Row:
    """One token, one head, 16 keys: nothing but the call, as automatic choice makes it.

    PyTorch's call on (B, S, H, D) tensors needs them transposed, and its result transposed back.
    """
    q, k, v = torch.randn(1, 1, 1, 64), torch.randn(1, 16, 1, 64), torch.randn(1, 16, 1, 64)

    def theirs() -> Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)

    calls = {"ours": lambda: attention(q, k, v), "PyTorch": theirs, "PyTorch, transposed before": sdpa(q, k, v)}
    over = {"PyTorch": 1.0, "PyTorch, transposed before": 0.0}
    return Row("call overhead: 1 token, 1 head, 16 keys", calls, 1.0, over=over)


def training(name: str, dtype: torch.dtype) -> Row:
    """Forward and backward together."""
    q, k, v, dout, _, _ = Shape(name, "train", 1, 1024, 1024, 16, 16, 64).make(dtype, CPU)
    theirs = sdpa(q, k, v, is_causal=True)

    def step(out: Tensor, dout: Tensor) -> Any:
        return torch.autograd.grad(out, (q, k, v), dout)

    calls = {
        "ours": lambda: step(attention(q, k, v, causal=True, backend="cpu"), dout),
        "PyTorch": lambda: step(theirs(), dout.transpose(1, 2)),
    }
    return Row(name, calls, 1.0, over={"PyTorch": 1.0}, grad=True)


def others(name: str, dtype: torch.dtype, batch: int, n_q: int, n_k: int, heads: int, kv_heads: int) -> Row:
    """What else a user could take; results are compared before anything is timed."""
    q = torch.randn(batch, n_q, heads, DIM).to(dtype)
    k, v = (torch.randn(batch, n_k, kv_heads, DIM).to(dtype) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: attention(q, k, v, causal=True, backend="cpu"),
        "PyTorch": sdpa(q, k, v, is_causal=n_q > 1),
    }
    makers = {
        "FlexAttention": lambda: cpu_others.flex(q, k, v, causal=n_q > 1),
        "ONNX Runtime": lambda: cpu_others.onnx_gqa(q, k, v),
    }
    errors, expected = {}, calls["ours"]().float()
    for other, make in makers.items():
        try:
            calls[other] = make()
        except cpu_others.Missing as reason:
            errors[other] = str(reason)
            continue
        with torch.no_grad():
            torch.testing.assert_close(calls[other]().float(), expected, atol=2e-2, rtol=2e-2)
    return Row(name, calls, 1.0, over=dict.fromkeys(list(calls)[1:], 0.0), errors=errors)


def cases(quick: bool) -> Iterator[Case]:
    """Return everything that is measured."""
    yield "call overhead: 1 token, 1 head, 16 keys", overhead
    yield from prefill_rows(quick)
    if not quick:
        yield from short_rows()
    yield from decode_rows(quick)
    for dtype in (torch.bfloat16, torch.float32)[: 1 if quick else 2]:
        name = f"{NAMES[dtype]} training H16 D64 S1024"
        yield name, partial(training, name, dtype)
    if quick:
        return
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for what, sizes in (
            ("prefill S1024 16/16", (1, 1024, 1024, 16, 16)),
            ("decode B8 4096 32/8", (8, 1, 4096, 32, 8)),
        ):
            name = f"{NAMES[dtype]} others: {what}"
            yield name, partial(others, name, dtype, *sizes)
