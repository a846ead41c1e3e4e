"""Which tiles `benchmarks.gpu_triton` tries on which calls, so that the tables can be set from measurement.

Few candidates, all of which compile for sm_90 without spills in their loops (``python -m benchmarks.tile_search
--arch sm_90``); first in each list is what the table has.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks import tile_problems
from benchmarks.tile_problem import Data, Where, unwritten
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.device import PRESETS, detect
from vllm_accel.dispatch.spec import AttentionSpec, Feature, Relation
from vllm_accel.kernels.triton import splits
from vllm_accel.kernels.triton.launch import Launch, run
from vllm_accel.kernels.triton.paged_launch import Lie
from vllm_accel.kernels.triton.tiles import Tile, lookup
from vllm_accel.testing.oracle import attention_oracle, plain_attention
from vllm_accel.testing.tolerance import assert_close, assert_lse_close
from vllm_accel.tuning import timing
from vllm_accel.tuning.grid import ragged

ROUNDS = 5
_BF16, _E4M3 = torch.bfloat16, torch.float8_e4m3fn


class Problem(NamedTuple):
    """One timed call and the tiles to try on it.

    Attributes:
        name: unique. kernel, key: the entry of a table; kernel "gluon" has variants instead of tiles.
        candidates: to try beside the entry. check: a small call with odd lengths. timed: the call that is timed.
        flops, bytes: of the timed call, 0 where they do not bound it.
    """

    name: str
    kernel: str
    key: str
    candidates: tuple[Any, ...]
    check: Callable[[Where], Data]
    timed: Callable[[Where], Data]
    flops: float = 0.0
    bytes: float = 0.0


def _tiles(*numbers: tuple[int, ...]) -> tuple[Tile, ...]:
    return tuple(Tile(*n) for n in numbers)


# --- forward, backward -----------------------------------------------------------------------------------------------


def _square(d: int, s: int, causal: bool) -> tuple[dict[str, Any], float]:
    """Return the sizes of a timed call (16k tokens, 2048 channels) and the operations of its forward."""
    heads, batch = 2048 // d, 16384 // s
    flops = 4.0 * batch * heads * s * s * d * (0.5 if causal else 1.0)
    return {"batch": batch, "lengths": (s, s), "heads": heads, "kv_heads": heads}, flops


_SMALL: dict[str, Any] = {"batch": 1, "lengths": (177, 333), "heads": 2, "kv_heads": 1}

_FORWARD = {
    64: _tiles((64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3, 128), (128, 128, 8, 2), (64, 128, 4, 2)),
    128: _tiles((128, 64, 8, 2, 128), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2)),
    256: _tiles((128, 32, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2)),
}
#: The same, by TMA.
_FORWARD_TMA = {
    64: _tiles((64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3)),
    128: _tiles((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2)),
    256: _tiles((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (128, 32, 8, 2)),
}
_BACKWARD = {
    "fused_d64": _tiles((64, 128, 8, 2), (64, 64, 4, 2), (64, 128, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2)),
    "dkv_d64": _tiles((64, 128, 8, 2), (32, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 2)),
    "dq_d64": _tiles((128, 64, 8, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2)),
    "fused_d128": _tiles((64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
    "dkv_d128": _tiles((64, 128, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 1)),
    "dq_d128": _tiles((128, 64, 8, 2), (64, 32, 4, 2), (128, 128, 8, 2), (64, 32, 4, 3)),
}


def _forwards() -> list[Problem]:
    made = []
    for d, s, causal in ((128, 8192, False), (128, 8192, True), (64, 4096, False), (64, 4096, True),
                         (256, 4096, False), (256, 4096, True)):  # fmt: skip
        sizes, flops = _square(d, s, causal)
        kind = "_causal" if causal else ""
        call = functools.partial(tile_problems.forward_data, d=d, dtype=_BF16, kind=kind)
        name = f"forward_d{d}_{s}{kind or '_full'}"
        made.append(
            Problem(name, "forward", f"d{d}", _FORWARD[d], functools.partial(call, **_SMALL),
                    functools.partial(call, **sizes), flops=flops)
        )  # fmt: skip
        by_tma = functools.partial(call, tma=True)
        made.append(
            Problem(f"{name}_tma", "forward", f"d{d}_tma", _FORWARD_TMA[d], functools.partial(by_tma, **_SMALL),
                    functools.partial(by_tma, **sizes), flops=flops)
        )  # fmt: skip
    return made


def _backwards() -> list[Problem]:
    made = []
    for key, candidates in _BACKWARD.items():
        part, size = key.split("_")
        d = int(size[1:])
        sizes, flops = _square(d, 4096, True)
        products = {"fused": 5, "dkv": 4, "dq": 3}[part]  # half the batch, and two products in `flops`
        call = functools.partial(tile_problems.backward_data, d=d, dtype=_BF16, part=part, kind="")
        made.append(
            Problem(f"backward_{key}_4096_causal", "backward", key, candidates, functools.partial(call, **_SMALL),
                    functools.partial(call, **{**sizes, "batch": 2}), flops=flops / 4 * products)
        )  # fmt: skip
    return made


# --- paged -----------------------------------------------------------------------------------------------------------

_DECODE = {
    "m16_d128": _tiles((16, 64, 4, 3), (16, 32, 4, 4), (16, 128, 4, 2), (16, 64, 4, 2), (16, 128, 8, 3)),
    "m16_d64": _tiles((16, 64, 4, 3), (16, 128, 4, 3), (16, 128, 8, 3), (16, 64, 2, 4)),
    "m16_d128_8bit": _tiles((16, 64, 4, 3), (16, 128, 4, 3), (16, 128, 8, 3), (16, 64, 4, 4)),
    "m16_d512": _tiles((16, 32, 4, 3), (16, 64, 8, 2), (16, 32, 8, 3), (16, 16, 4, 3)),
    "prefill_d128": _tiles((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2)),
    "prefill_d512": _tiles((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 3), (64, 16, 8, 3), (32, 32, 8, 3)),
}
#: Name, entry, query tokens, key heads, heads of each, sequences and keys of each, block size.
_CACHES = (
    ("decode_b32_4k_page16", "m16_d128", 1, 8, 4, 32, 4096, 16),
    ("decode_b32_4k_page64", "m16_d128", 1, 8, 4, 32, 4096, 64),
    ("decode_b16_16k_page16", "m16_d128", 1, 8, 4, 16, 16384, 16),
    ("decode_b1_16k_page16", "m16_d128", 1, 8, 4, 1, 16384, 16),
    ("decode_d64_b32_4k_page16", "m16_d64", 1, 8, 4, 32, 4096, 16),
    ("decode_fp8_b32_4k_page16", "m16_d128_8bit", 1, 8, 4, 32, 4096, 16),
    ("mla_16h_b32_4k_page64", "m16_d512", 1, 1, 16, 32, 4096, 64),
    ("mla_128h_b32_4k_page64", "prefill_d512", 1, 1, 128, 32, 4096, 64),
    ("mla_128h_b4_8k_page64", "prefill_d512", 1, 1, 128, 4, 8192, 64),
    ("prefill_2k_of_8k_page16", "prefill_d128", 2048, 8, 4, 1, 8192, 16),
)


def _paged() -> list[Problem]:
    made = []
    for name, key, queries, kv_heads, group, batch, length, page in _CACHES:
        latent = key.endswith("d512")
        d = 576 if latent else int(key.split("_d")[1].split("_")[0])
        d_v = 512 if latent else d
        cache = _E4M3 if key.endswith("8bit") else _BF16
        call = functools.partial(tile_problems.paged_data, d=d, d_v=d_v, cache=cache, group=group)
        stored = batch * length * kv_heads * (d if latent else 2 * d) * cache.itemsize
        passed = batch * queries * group * kv_heads * (d + d_v) * 2
        # With few heads a key head a decode is bound by the memory.
        bound = queries > 1 or group > 64
        flops = 2.0 * batch * queries * (length - queries / 2) * group * kv_heads * (d + d_v) if bound else 0.0
        small = {"queries": min(queries, 40), "kv_heads": 1, "used": [min(queries, 40), 175, 1333], "page": page}
        large = {"queries": queries, "kv_heads": kv_heads, "used": [length] * batch, "page": page}
        made.append(
            Problem(name, "mla" if latent else "paged", key, _DECODE[key], functools.partial(call, **small),
                    functools.partial(call, **large), flops=flops, bytes=0.0 if flops else float(stored + passed))
        )  # fmt: skip
    return made


# --- Gluon -----------------------------------------------------------------------------------------------------------


def _gluon_data(
    where: Where, d: int, causal: bool, *, batch: int, lengths: tuple[int, int], heads: int, kv_heads: int
) -> Data:
    from vllm_accel.kernels.gluon import forward_sm90_launch as gluon

    q, k, v = (
        torch.randn((batch, s, n, d), device=where.device).to(_BF16)
        for s, n in ((lengths[0], heads), (lengths[1], kv_heads), (lengths[1], kv_heads))
    )
    out = unwritten(q.shape, q.dtype, where.device)
    lse = unwritten((batch, heads, lengths[0]), torch.float32, where.device)

    def launches(variant: Any) -> tuple[Launch, ...]:
        return (
            gluon.forward_launch(
                q, k, v, out, lse, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=lengths[0],
                max_seqlen_k=lengths[1], softmax_scale=d**-0.5, causal=causal, head_dim_v=d, variant=variant,
                sm_count=where.sm_count,
            ),
        )  # fmt: skip

    def verify() -> None:
        want, want_lse = attention_oracle(q, k, v, causal=causal)
        assert_close(out, want, plain_attention(q, k, v, causal=causal)[0], what="out")
        assert_lse_close(lse, want_lse, dtype=_BF16)

    return Data(launches, verify)


def _gluons() -> list[Problem]:
    try:
        from vllm_accel.kernels.gluon.forward_sm90_launch import VARIANTS, Variant
    except ImportError:  # a Triton without Gluon
        return []
    base, taking_turns, persistent = Variant(128), Variant(128, pingpong=True), Variant(128, persistent=True)
    three = Variant(64, stages=4, consumers=3, consumer_registers=160)
    variants = {
        64: (VARIANTS[64], VARIANTS[64]._replace(q_slots=1), Variant(128, stages=3, held=True), base, three),
        128: (base, taking_turns, persistent, Variant(128, persistent=True, q_slots=2), Variant(64, stages=4)),
        256: (Variant(64), Variant(64, pingpong=True), Variant(32, stages=3), Variant(64, overlap=False)),
    }
    made = []
    for d, s, causal in ((128, 8192, False), (128, 8192, True), (64, 4096, False), (64, 4096, True),
                         (256, 4096, False), (256, 4096, True)):  # fmt: skip
        sizes, flops = _square(d, s, causal)
        call = functools.partial(_gluon_data, d=d, causal=causal)
        name = f"gluon_d{d}_{s}_{'causal' if causal else 'full'}"
        made.append(
            Problem(name, "gluon", str(d), variants[d], functools.partial(call, **_SMALL),
                    functools.partial(call, **sizes), flops=flops)
        )  # fmt: skip
    return made


def _gluon_backwards() -> list[Problem]:
    try:
        from vllm_accel.kernels.gluon.backward_sm90_launch import PACKED_VARIANTS, VARIANTS
    except ImportError:
        return []
    small, large = VARIANTS[64], VARIANTS[128]
    variants = {
        ("dkv", 64): (small._replace(persistent=False), small._replace(dkv_stages=4)),
        ("dkv", 128): (large._replace(dkv_stages=2),),
        ("dq", 64): (PACKED_VARIANTS[64], small._replace(persistent=False), small._replace(dq_stages=4)),
        ("dq", 128): (large._replace(bn=128, dq_stages=2, dq_overlap=False), large._replace(dq_overlap=False)),
    }
    made = []
    for (part, d), others in variants.items():
        sizes, flops = _square(d, 4096, True)
        products = {"dkv": 4, "dq": 3}[part]
        call = functools.partial(tile_problems.backward_data, d=d, dtype=_BF16, part=part, kind="")
        made.append(
            Problem(f"gluon_{part}_d{d}_4096_causal", "gluon", f"{part}_d{d}", (VARIANTS[d], *others),
                    functools.partial(call, **_SMALL), functools.partial(call, **{**sizes, "batch": 2}),
                    flops=flops / 4 * products)
        )  # fmt: skip
    return made


# --- tasks -----------------------------------------------------------------------------------------------------------


@functools.cache
def problems() -> dict[str, Problem]:
    """Return every problem by name, those that matter most first."""
    made = [*_gluons(), *_gluon_backwards(), *_forwards(), *_paged(), *_backwards()]
    return {problem.name: problem for problem in made}


def candidates(problem: Problem, arch: str) -> tuple[Any, ...]:
    """Return the tiles to try: the table's own first, where it has one."""
    if problem.kernel == "gluon":
        return problem.candidates
    own: list[Any] = []
    with contextlib.suppress(LookupError):  # a fused form is in the table only where it is the better one
        own = [lookup(problem.kernel, arch, [problem.key])]
    return tuple(dict.fromkeys((*own, *problem.candidates)))


def prepare(name: str, index: int) -> dict[str, Any]:
    """Compile one candidate, hold it against the oracle on the small call, and run the timed call once."""
    problem, where = problems()[name], here()
    tile = candidates(problem, where.arch)[index]
    small = problem.check(where)
    for launch in small.launches(tile):
        run(launch)
    small.verify()
    compiled = [run(launch) for launch in problem.timed(where).launches(tile)]
    torch.cuda.synchronize()
    shared = compiled[0].metadata.shared
    del small, compiled[1:]
    torch.cuda.empty_cache()  # as many processes as cores share the memory
    return {
        "tile": tile._asdict(), "registers": compiled[0].n_regs, "spills": compiled[0].n_spills,
        "shared": shared,
    }  # fmt: skip


def time_tiles(name: str, indices: tuple[int, ...]) -> dict[str, Any]:
    """Time candidates of a problem as CUDA graphs, in turns, beside a product and a copy."""
    from benchmarks.attention import COPY, MATMUL, yardsticks

    problem, where = problems()[name], here()
    tiles = candidates(problem, where.arch)
    data = problem.timed(where)
    calls, work = yardsticks(where.device, _BF16, small=False)
    errors = {}
    for i in indices:
        try:
            calls[str(i)] = _graph(data.launches(tiles[i]))
        except Exception as error:  # one tile that fails is a result
            errors[str(i)] = timing.text_of(error)
    found = timing.in_turns(calls, timing.clock(where.device), ROUNDS)
    matmul, copy = (found.pop(key) for key in (MATMUL, COPY))
    tflops = work[MATMUL] / matmul.seconds * 1e-12 if matmul.seconds else None
    gbs = work[COPY] / copy.seconds * 1e-9 if copy.seconds else None
    rows = [_row(problem, tiles[int(i)], timed, tflops, gbs) for i, timed in found.items()]
    return {"kernel": problem.kernel, "key": problem.key, "matmul_tflops": tflops, "copy_gbs": gbs,
            "results": rows, "errors": errors}  # fmt: skip


class Decode(NamedTuple):
    """A decode whose keys are shared out: lengths of its sequences, the entry of the table, blocks, how keys lie."""

    used: list[int]
    key: str = "m16_d128"
    page: int = 16
    queries: int = 1
    lie: Lie = "paged"
    group: int = 4


def _ragged(batch: int, longest: int) -> list[int]:
    return [keys for _, keys in ragged(batch, 1, longest)]


def _dense(batch: int, keys: int, **more: Any) -> Decode:
    return Decode([keys] * batch, lie="dense", **more)


#: 8 key heads of as many query heads as `group` says, but for the latent one: 16 over 1.
SPLIT_CALLS = {
    "b32_4k": Decode([4096] * 32), "b32_4k_page64": Decode([4096] * 32, page=64), "b16_16k": Decode([16384] * 16),
    "b64_2k": Decode([2048] * 64), "b1_16k": Decode([16384]), "b1_32k": Decode([32768]), "b8_1k": Decode([1024] * 8),
    "b256_1k": Decode([1024] * 256), "uneven_b16_8k": Decode(_ragged(16, 8192)),
    "uneven_b16_32k": Decode(_ragged(16, 32768)), "uneven_b64_2k": Decode(_ragged(64, 2048)),
    "uneven_b64_32k": Decode(_ragged(64, 32768)), "one_32k_31_1k": Decode([32768, *[1024] * 31]),
    "one_32k_127_1k": Decode([32768, *[1024] * 127]), "b32_4k_e4m3": Decode([4096] * 32, "m16_d128_8bit"),
    "b32_4k_d64": Decode([4096] * 32, "m16_d64"), "b32_4k_latent": Decode([4096] * 32, "m16_d512", page=64),
    "b32_4k_4_tokens": Decode([4096] * 32, queries=4), "dense_b32_4k": _dense(32, 4096),
    "dense_b1_512": _dense(1, 512), "dense_b1_2k": _dense(1, 2048), "dense_b1_8k": _dense(1, 8192),
    "dense_b1_16k": _dense(1, 16384), "dense_b1_32k": _dense(1, 32768), "dense_b4_2k": _dense(4, 2048),
    "dense_b4_8k": _dense(4, 8192), "dense_b16_512": _dense(16, 512), "dense_b16_2k": _dense(16, 2048),
    "dense_b16_8k": _dense(16, 8192), "dense_b64_2k": _dense(64, 2048), "dense_b256_1k": _dense(256, 1024),
    "dense_b12_43k_24_heads": _dense(12, 43290, group=3), "dense_b16_2k_64_heads": _dense(16, 2048, group=8),
    "dense_b16_8k_d64": _dense(16, 8192, key="m16_d64"), "packed_b32_4k": Decode([4096] * 32, lie="packed"),
    "packed_uneven_b16_8k": Decode(_ragged(16, 8192), lie="packed"),
    "packed_uneven_b64_2k": Decode(_ragged(64, 2048), lie="packed"),
}  # fmt: skip


def time_splits(name: str, where: Where | None = None) -> dict[str, Any]:
    """Time a decode as it is planned and with other numbers of teams, as CUDA graphs, in turns."""
    from benchmarks.attention import COPY, MATMUL, yardsticks

    where, call = where or here(), SPLIT_CALLS[name]
    latent = call.key.endswith("d512")
    d, d_v, group, kv_heads = (
        (576, 512, 16, 1) if latent else (*[int(call.key.split("_d")[1].split("_")[0])] * 2, call.group, 8)
    )
    cache = _E4M3 if call.key.endswith("8bit") else _BF16
    tile = lookup("mla" if latent else "paged", where.arch, [call.key])
    row_bytes = (d if latent else d + d_v) * cache.itemsize
    calls, work = yardsticks(where.device, _BF16, small=where.device.type != "cuda")
    data = tile_problems.paged_data(
        where, d, d_v, cache, group, queries=call.queries, kv_heads=kv_heads, used=call.used, page=call.page,
        lie=call.lie,
    )  # fmt: skip
    room = splits.places(tile, row_bytes, splits.Gpu(where.sm_count))
    ways = {
        "chosen": data.launches(tile),
        "one team a sequence": data.launches(tile, 1),
        "busy places": data.launches(tile, teams=max(1, room.busy // kv_heads)),
        "all places": data.launches(tile, teams=max(1, room.all // kv_heads)),
        "twice the busy places": data.launches(tile, teams=max(1, 2 * room.busy // kv_heads)),
    }
    calls |= {way: _graph(launches) for way, launches in ways.items()}
    found = timing.in_turns(calls, timing.clock(where.device), ROUNDS)
    found.pop(MATMUL)
    copy = found.pop(COPY)
    stored = sum(call.used) * kv_heads * row_bytes
    rate = work[COPY] / copy.seconds if copy.seconds else 0.0
    rows = [
        {"way": way, "programs": ways[way][0].grid[0], "seconds": t.seconds, "error": t.error,
         "of_copy": stored / t.seconds / rate if t.seconds and rate else None}
        for way, t in found.items()
    ]  # fmt: skip
    return {"copy_gbs": rate * 1e-9, "tile": tile._asdict(), "results": rows}


class Chunk(NamedTuple):
    """A dense causal call whose tiles may be too few for the GPU."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int


#: Tiles of 128 rows -> calls of so many: batch, queries, heads, key heads.
_TILES = {
    8: (1, 128, 8, 2), 16: (1, 128, 16, 4), 24: (1, 128, 24, 8), 36: (1, 384, 12, 4), 48: (1, 256, 24, 8),
    64: (1, 512, 16, 4), 72: (1, 384, 24, 8), 96: (1, 512, 24, 8), 112: (1, 512, 28, 7), 160: (1, 512, 40, 10),
}  # fmt: skip
CHUNK_CALLS = {
    f"chunk_{tiles}_tiles_{keys // 1024}k": Chunk(batch, queries, keys, heads, kv_heads)
    for keys in (1024, 2048, 4096, 8192, 16384)
    for tiles, (batch, queries, heads, kv_heads) in _TILES.items()
}
CHUNK_CALLS |= {"chunk_264_of_3843": Chunk(1, 264, 3843, 12, 4), "chunk_3x179_of_11632": Chunk(3, 179, 11632, 12, 4)}


def time_chunk(name: str, where: Where | None = None) -> dict[str, Any]:
    """Time a chunk with its keys shared out and without, as CUDA graphs, in turns."""
    from vllm_accel.backends.triton import BACKEND
    from vllm_accel.backends.triton_decode import prepare_shared, shares_keys

    where, (batch, queries, keys, heads, kv_heads) = where or here(), CHUNK_CALLS[name]
    sizes = ((batch, queries, heads, 128), *[(batch, keys, kv_heads, 128)] * 2)
    q, k, v = (torch.randn(size, device=where.device, dtype=_BF16) for size in sizes)
    features = Feature.CAUSAL | Feature.GQA
    spec = AttentionSpec(_BF16, _BF16, heads, kv_heads, 128, 128, batch, queries, keys, Relation.SHORTER, features)
    args = AttentionArgs(
        *(None,) * 8, queries, keys, 128**-0.5, True, (-1, -1), 0.0, 0.0, False, False, False
    )  # fmt: skip
    device = detect(where.device) if where.device.type == "cuda" else PRESETS["h200"]
    whole = BACKEND.bind(spec, device).prepare_whole(q, k, v, args)
    ways = {"whole": whole, "shared": prepare_shared(spec, device, q, args)}
    calls = {way: captured(functools.partial(call, q, k, v, args)) for way, call in ways.items()}
    found = timing.in_turns(calls, timing.clock(where.device), ROUNDS)
    rows = [{"way": way, "seconds": t.seconds, "error": t.error} for way, t in found.items()]
    return {
        "tiles": batch * heads * -(-queries // 128), "call": CHUNK_CALLS[name]._asdict(),
        "chosen": "shared" if shares_keys(spec, q, k, v, args, device.sm_count or 0) else "whole", "results": rows,
    }  # fmt: skip


def _row(
    problem: Problem, tile: Any, timed: timing.Timed, matmul_tflops: float | None, copy_gbs: float | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tile": tile._asdict(),
        "seconds": timed.seconds,
        "rounds": timed.rounds,
        "error": timed.error,
    }
    if timed.seconds and problem.flops:
        row["tflops"] = problem.flops / timed.seconds * 1e-12
        row["of_matmul"] = row["tflops"] / matmul_tflops if matmul_tflops else None
    if timed.seconds and problem.bytes:
        row["gbs"] = problem.bytes / timed.seconds * 1e-9
        row["of_copy"] = row["gbs"] / copy_gbs if copy_gbs else None
    return row


def _graph(launches: tuple[Launch, ...]) -> Callable[[], Any]:
    """Return what replays some launches, so that no Python is in their time.

    It keeps their tensors alive. Their addresses are in the graph, and the next capture gives unused memory back to the
    driver: a replay would write partial results where no memory is.
    """

    def call() -> None:
        for launch in launches:
            run(launch)

    return captured(call)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return what replays a call that has run once; it keeps what the call has, and what it returned, alive."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return functools.partial(_replay, graph, (call, kept))


def _replay(graph: torch.cuda.CUDAGraph, kept: Any) -> None:
    graph.replay()


def here() -> Where:
    """Return the current GPU."""
    device = detect(torch.device("cuda", torch.cuda.current_device()))
    return Where(torch.device("cuda", device.index or 0), device.arch, device.sm_count or 132)
