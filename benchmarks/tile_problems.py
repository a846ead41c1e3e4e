"""What a tile search works on: for each entry of the tables, its candidates, their launches and the truth.

The kernels' own launchers take a tile, so nothing here knows how a kernel works; only what calls an entry serves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.crosscompile import ARCHS
from benchmarks.tile_gemm import grouped_gemm
from benchmarks.tile_problem import Data, Entry, Where, random_tensor, tiles, unwritten
from vllm_accel.dispatch.backend import AttentionArgs, PagedArgs
from vllm_accel.kernels.triton import backward_launch as bwd
from vllm_accel.kernels.triton import forward_launch, paged_launch, splits
from vllm_accel.kernels.triton.launch import Launch, run
from vllm_accel.kernels.triton.tiles import Tile
from vllm_accel.testing.oracle import attention_oracle, attention_paged_oracle, plain_attention, plain_attention_paged
from vllm_accel.testing.tolerance import assert_close, assert_grad_close, assert_lse_close

HEAD_DIMS = (64, 128, 256)
#: q heads times head size of the timed calls, as in the FlashAttention papers.
WIDTH = 2048


def entries(kernels: Sequence[str], head_dims: Sequence[int]) -> Iterator[Entry]:
    """Return the entries of some kernels for some head sizes (MLA has one of its own, products none)."""
    for kernel in kernels:
        yield from KERNELS[kernel](head_dims)


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward(head_dims: Sequence[int]) -> Iterator[Entry]:
    for d, dtype in itertools.product(head_dims, (torch.bfloat16, torch.float32)):
        for kind in ("", "_causal", "_heavy"):
            call = (d, dtype, kind)
            yield Entry(
                kernel="forward",
                key=f"{_prefix(dtype)}d{d}{kind}",
                candidates=_square(d, dtype),
                check=lambda w, c=call: forward_data(w, *c, batch=1, lengths=(77, 133), heads=2, kv_heads=1),  # type: ignore[misc]
                timed=lambda w, c=call: [  # type: ignore[misc]
                    forward_data(w, *c, batch=b, lengths=(s, s), heads=WIDTH // c[0], kv_heads=WIDTH // c[0])
                    for b, s in ((16, 1024), (2, 8192))
                ],
            )
        if archs := tuple(arch for arch in ARCHS if _by_tma(arch, d, dtype)):
            yield _forward_by_tma(d, dtype, archs)


def _by_tma(arch: str, d: int, dtype: torch.dtype) -> bool:
    return forward_launch.by_tma(arch, dtype, d, d, heavy=False, packed=False, invariant=False)


def _forward_by_tma(d: int, dtype: torch.dtype, archs: tuple[str, ...]) -> Entry:
    """Return the entry of calls whose tiles come by TMA: one for causal ones and others, of TMA_WORK and more."""
    sizes: dict[str, Any] = {"heads": WIDTH // d, "kv_heads": WIDTH // d, "tma": True}
    return Entry(
        kernel="forward",
        key=f"d{d}_tma",
        candidates=tiles((64, 128), (32, 64, 128), (4, 8), (2, 3, 4) if d <= 128 else (1, 2), (0,)),
        check=lambda w: forward_data(w, d, dtype, "", batch=1, lengths=(77, 133), heads=2, kv_heads=1, tma=True),
        timed=lambda w: [
            forward_data(w, d, dtype, kind, batch=b, lengths=(s, s), **sizes)
            for kind, b, s in (("", 4, 4096), ("_causal", 4, 4096), ("", 2, 8192))
        ],
        archs=archs,
    )


def _prefix(dtype: torch.dtype) -> str:
    return "fp32_" if dtype is torch.float32 else ""


def _square(head_dim: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Return candidates where queries and keys come in long rows."""
    if dtype is torch.float32:
        # Products are unrolled, not on tensor cores: a larger tile takes minutes to compile, and spills.
        made = tiles((16, 32, 64), (16, 32, 64), (4, 8), (1, 2), (0,))
        return tuple(t for t in made if (t.block_m + t.block_n) * head_dim <= 64 * 128)
    return tiles((64, 128), (32, 64, 128), (4, 8), (1, 2, 3) if head_dim <= 128 else (1, 2), (0, 128))


def _inputs(where: Where, d: int, dtype: torch.dtype, batch: int, lengths: tuple[int, int], heads: int, kv_heads: int):
    seqlen_q, seqlen_k = lengths
    shapes = [(batch, seqlen_q, heads, d), *[(batch, seqlen_k, kv_heads, d)] * 2, (batch, seqlen_q, heads, d)]
    return [random_tensor(shape, dtype, where, seed) for seed, shape in enumerate(shapes)]


def _options(kind: str, heads: int, where: Where) -> dict[str, Any]:
    """Return what sets a kind of call apart; a heavy one is stood for by softcap and ALiBi."""
    if kind == "_heavy":
        slopes = torch.linspace(0.5, 0.01, heads, device="cpu" if where.device.type == "meta" else where.device)
        return {"softcap": 30.0, "alibi_slopes": slopes.to(where.device), "causal": True}
    return {"causal": kind == "_causal"}


def _attention_args(lengths: tuple[int, int], d: int, **options: Any) -> AttentionArgs:
    given = dict.fromkeys(AttentionArgs._fields) | {
        "max_seqlen_q": lengths[0], "max_seqlen_k": lengths[1], "softmax_scale": d**-0.5, "causal": False,
        "window_size": (-1, -1), "softcap": 0.0, "dropout_p": 0.0, "need_lse": True, "deterministic": False,
        "batch_invariant": False,
    }  # fmt: skip
    return AttentionArgs(**{**given, **options})


def forward_data(
    where: Where, d: int, dtype: torch.dtype, kind: str, *,
    batch: int, lengths: tuple[int, int], heads: int, kv_heads: int, tma: bool = False,
) -> Data:  # fmt: skip
    q, k, v, _ = _inputs(where, d, dtype, batch, lengths, heads, kv_heads)
    out = unwritten(q.shape, q.dtype, where.device)
    lse = unwritten((batch, heads, lengths[0]), torch.float32, where.device)
    options = _options(kind, heads, where)
    args = _attention_args(lengths, d, **options)

    def launches(tile: Tile) -> tuple[Launch, ...]:
        return (forward_launch.forward_launch(q, k, v, out, lse, None, args, tile, tma=tma),)

    def verify() -> None:
        want, want_lse = attention_oracle(q, k, v, **options)
        assert_close(out, want, plain_attention(q, k, v, **options)[0], what="out")
        assert_lse_close(lse, want_lse, dtype=dtype)

    return Data(launches, verify)


# --- backward --------------------------------------------------------------------------------------------------------


def _backward(head_dims: Sequence[int]) -> Iterator[Entry]:
    for d, dtype in itertools.product(head_dims, (torch.bfloat16, torch.float32)):
        for part in ("dkv", "dq", "bias", "fused"):
            if part == "fused" and dtype is torch.float32:
                continue
            for kind in ("", "_heavy") if part in ("dkv", "dq") else ("",):
                call = (d, dtype, part, kind)
                yield Entry(
                    kernel="backward",
                    key=f"{part}_{_prefix(dtype)}d{d}{kind}",
                    candidates=_square(d, dtype),
                    check=lambda w, c=call: backward_data(w, *c, batch=1, lengths=(77, 133), heads=2, kv_heads=1),  # type: ignore[misc]
                    timed=lambda w, c=call: [  # type: ignore[misc]
                        backward_data(w, *c, batch=b, lengths=(s, s), heads=WIDTH // c[0], kv_heads=WIDTH // c[0])
                        for b, s in ((8, 1024), (1, 8192) if c[2] != "bias" else (2, 2048))
                    ],
                )


def backward_data(
    where: Where, d: int, dtype: torch.dtype, part: str, kind: str, *,
    batch: int, lengths: tuple[int, int], heads: int, kv_heads: int,
) -> Data:  # fmt: skip
    q, k, v, dout = _inputs(where, d, dtype, batch, lengths, heads, kv_heads)
    bias = random_tensor((1, heads, *lengths), dtype, where, 9) if part == "bias" else None
    options = _options(kind or "_causal", heads, where)
    args = _attention_args(lengths, d, attn_bias=bias, **options)
    out = unwritten(q.shape, q.dtype, where.device)
    lse = unwritten((batch, heads, lengths[0]), torch.float32, where.device)
    delta = unwritten(lse.shape, lse.dtype, where.device)
    problem = bwd.Problem(
        q, k, v, out, lse, None, dout, None, None, None, args.alibi_slopes, bias, None, None, None, None,
        *lengths, args.softmax_scale, (-1, 0), args.softcap, 0.0, False,
    )  # fmt: skip
    if where.device.type != "meta":
        choice = forward_launch.choose_tile(where.arch, dtype, d, d, causal=True, heavy=True)
        run(forward_launch.forward_launch(q, k, v, out, lse, None, args, choice))
        run(bwd.delta_launch(problem, delta))
    dk, dv = (unwritten(t.shape, t.dtype, where.device) for t in (k, v))
    dq = torch.zeros(q.shape, dtype=torch.float32 if part == "fused" else dtype, device=where.device)
    made: list[Tensor] = []

    def launches(tile: Any) -> tuple[Launch, ...]:
        if not isinstance(tile, Tile):
            given = {
                "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": lengths[0], "max_seqlen_k": lengths[1],
                "softmax_scale": args.softmax_scale, "causal": True, "variant": tile,
                "sm_count": where.sm_count,
            }  # fmt: skip
            return (gluon_launch(part, (q, k, v, dout), lse, delta, (dq, dk, dv), given),)
        if part == "dq":
            return (bwd.dq_launch(problem, delta, dq, None, tile),)
        if part == "bias":
            parts = bwd.bias_parts(problem, tile)
            made[:] = [unwritten((parts, 1, heads, *lengths), dtype if parts == 1 else torch.float32, q.device)]
            return (bwd.bias_launch(problem, delta, made[0], tile),)
        dq.zero_()
        return (bwd.dkv_launch(problem, delta, dk, dv, dq if part == "fused" else None, tile),)

    def verify() -> None:
        want, plain = (
            _gradients(fn, (q, k, v), dout, bias, options, of)
            for fn, of in ((attention_oracle, torch.float64), (plain_attention, dtype))
        )
        found = {"dq": [dq.to(dtype)], "dkv": [dk, dv], "fused": [dq.to(dtype), dk, dv]}
        names = {"dq": ["dq"], "dkv": ["dk", "dv"], "fused": ["dq", "dk", "dv"], "bias": ["dbias"]}[part]
        results = found[part] if part != "bias" else [made[0].sum(0).to(dtype)]
        largest = max(float(t.abs().max()) for t in want.values())
        for name, result in zip(names, results, strict=True):
            assert_grad_close(result, want[name], plain[name], what=name, scale=largest)

    return Data(launches, verify)


def gluon_launch(
    part: str, inputs: tuple[Tensor, ...], lse: Tensor, delta: Tensor, grads: tuple[Tensor, ...], given: dict[str, Any]
) -> Launch:  # fmt: skip
    """Return the launch of a Gluon kernel of the backward pass: "dq", or else "dkv"."""
    from vllm_accel.kernels.gluon import backward_sm90_launch as gluon

    q, k, v, dout = inputs
    dq, dk, dv = grads
    if part == "dq":
        return gluon.dq_launch(q, k, v, dout, lse, delta, dq, **given, after_dkv=False)
    return gluon.dkv_launch(q, k, v, dout, lse, delta, dk, dv, **given)


def _gradients(
    fn: Callable[..., Any], given: tuple[Tensor, ...], dout: Tensor, bias: Tensor | None, options: dict[str, Any],
    dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    leaves = [t.detach().to(dtype).requires_grad_() for t in (*given, *([bias] if bias is not None else []))]
    q, k, v, *rest = leaves
    out, _ = fn(q, k, v, attn_bias=rest[0] if rest else None, **options)
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=False))


# --- paged -----------------------------------------------------------------------------------------------------------

#: Entry -> query tokens of a sequence when checked and timed, q heads for one key head, rows of its tile.
_HEIGHTS = {
    "m16": (1, 1, 4, (16,)), "m32": (4, 4, 8, (32,)), "m64": (8, 8, 8, (64,)), "prefill": (40, 2048, 4, (64, 128)),
}  # fmt: skip
_CACHES = {"": torch.bfloat16, "_8bit": torch.float8_e4m3fn, "_fp32": torch.float32}


def _paged(head_dims: Sequence[int]) -> Iterator[Entry]:
    for d in head_dims:
        yield from _cached("paged", d, d, 0)


def _mla(head_dims: Sequence[int]) -> Iterator[Entry]:
    yield from _cached("mla", 576, 512, 64)


def _cached(kernel: str, d: int, d_v: int, rope: int) -> Iterator[Entry]:
    for (height, (small, large, group, rows)), (kind, cache) in itertools.product(_HEIGHTS.items(), _CACHES.items()):
        group = {"m16": 16, "m32": 8, "m64": 8, "prefill": 16}[height] if rope else group
        call = (d, d_v, cache, group)
        stages = (1, 2, 3) if rope else (2, 3, 4)
        yield Entry(
            kernel=kernel,
            key=f"{height}_d{d_v}{kind}",
            candidates=tiles(rows, (16, 32) if kind == "_fp32" else (16, 32, 64, 128), (4, 8), stages, (0, 128)),
            check=lambda w, c=call, n=small: paged_data(w, *c, queries=n, kv_heads=1, used=[n, 75, 133]),  # type: ignore[misc]
            timed=lambda w, c=call, n=large: [  # type: ignore[misc]
                paged_data(w, *c, queries=n, kv_heads=1 if rope else 8, used=[s] * b)
                for b, s in (((2, 2048), (1, 8192)) if n > 8 else ((64, 2048), (4, 32768)))
            ],
        )


def paged_data(
    where: Where, d: int, d_v: int, cache: torch.dtype, group: int, *,
    queries: int, kv_heads: int, used: list[int], page: int = 0, lie: paged_launch.Lie = "paged",
) -> Data:  # fmt: skip
    """Return a call over a paged cache whose sequences have `used` keys each, in blocks of `page` (0: 16 or 64).

    Its launches take a number of splits of each sequence too, and a number of teams, 0 for what the plan chooses.

    Args:
        lie: how keys lie, as `backends.triton_decode` has it: dense sequences are equally long.
    """
    page, batch = page or (64 if max(used) > 1000 else 16), len(used)
    if lie != "paged":
        page = max(used) if lie == "dense" else 1
    wanted = [-(-n // page) for n in used]
    dtype = torch.float32 if cache is torch.float32 else torch.bfloat16
    mla = d != d_v
    q = random_tensor((batch * queries, group * kv_heads, d), dtype, where, 0)
    k = random_tensor((sum(wanted), page, kv_heads, d), cache, where, 1)
    v = k[..., :d_v] if mla else random_tensor((sum(wanted), page, kv_heads, d_v), cache, where, 2)

    def ints(values: Tensor) -> Tensor:
        return values.to(torch.int32).to(where.device)

    order = torch.arange(sum(wanted))
    if lie == "paged":
        order = torch.randperm(sum(wanted), generator=torch.Generator().manual_seed(3))
    table = torch.nn.utils.rnn.pad_sequence(list(order.split(wanted)), batch_first=True)
    counts, ends = torch.tensor(used), torch.tensor([0, *used]).cumsum(0)
    args = PagedArgs(
        ints(torch.arange(batch + 1) * queries), ints(table), ints(ends if lie == "packed" else counts),
        None, None, None, None, None, queries, max(used), d**-0.5, True, (-1, -1), 0.0, True, False, False,
    )  # fmt: skip
    out = unwritten((*q.shape[:2], d_v), dtype, where.device)
    lse = unwritten((q.shape[1], q.shape[0]), torch.float32, where.device)
    chip = paged_launch.chip_of(where.arch)

    def launches(
        tile: Tile, num_splits: int = 0, chip: paged_launch.Chip = chip, teams: int = 0
    ) -> tuple[Launch, ...]:  # fmt: skip
        sizes = paged_launch.sizes_of(q, v, args, mla=mla, lie=lie)
        works = splits.plan_work(sizes, lambda rows, form: tile, splits.Gpu(where.sm_count), num_splits)
        if teams:
            works = tuple(
                work._replace(
                    teams=teams, num_splits=0, split=True, part_rows=work.high_q, unit=tile.block_n, most=sizes.most
                )
                for work in works
            )
        room = splits.scratch(works, sizes)
        part = torch.empty(max(room, 1), device=where.device) if room or works[-1].grows else None
        made = []
        for work in works:
            kind = {"chip": chip, "mla": mla, "lie": lie}
            made.append(paged_launch.attention_launch(work, q, k, v, out, lse, part, args, **kind))
            if work.split and not work.teams and part is not None:
                made.append(paged_launch.combine_launch(work, out, lse, part, args, lie))
        return tuple(made)

    def verify() -> None:
        lengths = {"cu_seqlens_q": args.cu_seqlens_q, "block_table": args.block_table, "seqused_k": ints(counts)}
        # Values of 8 bits are exact in either: the kernel has to multiply the same numbers.
        caches = (k.to(dtype), v.to(dtype))
        want, want_lse = attention_paged_oracle(q, *caches, causal=True, **lengths)
        assert_close(out, want, plain_attention_paged(q, *caches, causal=True, **lengths)[0], what="out")
        assert_lse_close(lse, want_lse, dtype=dtype)

    return Data(launches, verify)


KERNELS: dict[str, Callable[[Sequence[int]], Iterator[Entry]]] = {
    "forward": _forward,
    "backward": _backward,
    "paged": _paged,
    "mla": _mla,
    "grouped_gemm": lambda head_dims: grouped_gemm(),
}
