"""A shared prefix read once gives what reading it for every sequence gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import shared_prefix as benchmark
from vllm_accel import PagedKVCache, attention_paged
from vllm_accel.ops import cache_step, shared_prefix
from vllm_accel.ops.shared_prefix import attention_shared_prefix
from vllm_accel.testing import attention_paged_oracle
from vllm_accel.testing.oracle import plain_attention_paged
from vllm_accel.testing.tolerance import assert_close, assert_lse_close

OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "sinks": {"causal": True, "sinks": torch.tensor([3.0, -1.0, 0.5, 2.0])},
    "softcap": {"causal": True, "softcap": 2.0, "softmax_scale": 0.5},
    "factors": {"causal": True, "k_descale": torch.tensor([0.5, 2.0]), "v_descale": torch.tensor(0.7)},
}


def _call(dtype: torch.dtype = torch.float32) -> tuple[tuple[Any, ...], dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    caches = [torch.randn(20, 4, 2, 16, generator=g).to(dtype) for _ in range(2)]
    for cache in caches:
        cache[11, 2:] = torch.nan  # past the end of the first sequence
    table = torch.tensor([[7, 2, 19, 11, -1], [7, 2, 19, 4, 5], [7, 2, 19, 0, 1]], dtype=torch.int32)
    q = torch.randn(9, 4, 16, generator=g).to(dtype)
    q[8] = torch.nan  # of no sequence
    return (q, *caches), {
        "cu_seqlens_q": torch.tensor([0, 1, 6, 8], dtype=torch.int32), "max_seqlen_q": 5, "block_table": table,
        "seqused_k": torch.tensor([14, 19, 17], dtype=torch.int32), "max_seqlen_k": 19,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix_blocks", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_numbers(name: str, prefix_blocks: int, dtype: torch.dtype) -> None:
    tensors, options = _call(dtype)
    out, lse = attention_shared_prefix(
        *tensors, prefix_blocks=prefix_blocks, return_lse=True, **options, **OPTIONS[name]
    )
    maths = {n: v for n, v in options.items() if not n.startswith("max_")} | OPTIONS[name]
    want, want_lse = attention_paged_oracle(*tensors, **maths)
    plain, _ = plain_attention_paged(*tensors, **maths)
    assert_close(out, want, plain, what="out")
    assert_lse_close(lse, want_lse, dtype=dtype)
    alone = attention_shared_prefix(*tensors, prefix_blocks=prefix_blocks, **options, **OPTIONS[name])
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, out)


def test_the_prefix_is_one_sequence_of_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(shared_prefix, "attention_paged", lambda *a, **kw: seen.append(kw) or attention_paged(*a, **kw))
    tensors, options = _call()
    attention_shared_prefix(*tensors, prefix_blocks=3, causal=True, **options)
    first, second = seen
    assert first["cu_seqlens_q"].tolist() == [0, 8] and first["seqused_k"].tolist() == [12] and not first["causal"]
    assert second["seqused_k"].tolist() == [2, 7, 5] and second["causal"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": (4, -1)}, "windows and ALiBi"),
        ({"alibi_slopes": torch.ones(4)}, "windows and ALiBi"),
        ({"batch_invariant": True}, "batch_invariant"),
        ({"k_descale": torch.ones(3, 2)}, "k_descale differs by sequence"),
        ({"prefix_blocks": 6}, "prefix_blocks=6"),
        ({"prefix_blocks": 4}, "not every row starts"),
        ({"seqused_k": torch.tensor([14, 16, 17], dtype=torch.int32)}, r"seqused_k\[1\] is 16: a prefix of 12"),
    ],
)
def test_what_does_not_split(changes: dict[str, Any], message: str) -> None:
    tensors, options = _call()
    with pytest.raises(ValueError, match=message):
        attention_shared_prefix(*tensors, **{"prefix_blocks": 3, **options, **changes})


# --- when it pays ----------------------------------------------------------------------------------------------------


def test_it_pays_where_enough_bytes_are_saved_and_memory_is_the_limit() -> None:
    """(B - 1) * tokens * Hkv * (D + Dv) * bytes against the limit of the device, both sides of each threshold."""

    def pays(q: tuple[int, ...], tokens: int, batch: int, device: str = "cpu", **options: Any) -> bool:
        cache = torch.empty(1, 16, 2, 64, dtype=torch.bfloat16, device="meta")
        queries = SimpleNamespace(shape=q, device=torch.device(device))
        return shared_prefix.pays(queries, cache, cache, prefix_tokens=tokens, batch=batch, options=options)  # type: ignore[arg-type]

    token = 2 * (64 + 64) * 2
    enough = shared_prefix.MIN_SAVED["cpu"] // token // 8
    assert pays((9, 8, 64), enough, 9) and not pays((9, 8, 64), enough - 16, 9)
    assert not pays((8, 8, 64), enough, 8), "a sequence less saves less"
    assert pays((18, 8, 64), enough, 9) and not pays((27, 8, 64), enough, 9), "2 x 4 rows a key, and 3 x 4"
    assert not pays((1, 8, 64), 1 << 30, 1) and not pays((9, 8, 64), 0, 9)
    assert not pays((9, 8, 64), enough, 9, "mps"), "nothing is known of other devices"
    on_gpu = shared_prefix.MIN_SAVED["cuda"] // token // 8
    assert pays((9, 8, 64), on_gpu, 9, "cuda") and not pays((9, 8, 64), on_gpu - 16, 9, "cuda")
    for option in ({"window_size": (4, 0)}, {"alibi_slopes": torch.ones(8)}, {"batch_invariant": True}):
        assert not pays((9, 8, 64), enough, 9, **option)


def _forks(count: int, own: list[int], prompt: int = 22) -> tuple[PagedKVCache, list[int]]:
    """Return a cache with sequences that share `prompt` tokens (two blocks of 8 and a part) and some of their own."""
    cache = PagedKVCache(40, 8, 2, 16, dtype=torch.float32)
    g = torch.Generator().manual_seed(3)
    root = cache.allocate()
    cache.append(*(torch.randn(prompt, 2, 16, generator=g) for _ in range(2)), [root], [prompt])
    forks = [cache.fork(root) for _ in range(count)]
    tokens = sum(own)
    cache.append(*(torch.randn(tokens, 2, 16, generator=g) for _ in range(2)), forks, own)
    return cache, forks


@pytest.mark.parametrize(("counts", "blocks"), [([1, 1, 1], 2), ([5, 1, 4], 2), ([0, 1, 2], 2)])
def test_a_step_knows_what_its_sequences_share(counts: list[int], blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, forks = _forks(3, [5, 1, 3])
    step = cache.extend(forks, counts)
    k, v, q = (torch.randn(sum(counts), n, 16, generator=torch.Generator().manual_seed(n)) for n in (2, 2, 4))
    step.write(k, v)
    assert step.prefix_blocks == blocks and step[0].prefix_blocks == blocks
    calls: list[int] = []
    real = cache_step.attention_shared_prefix
    monkeypatch.setattr(
        cache_step, "attention_shared_prefix", lambda *a, **kw: calls.append(kw["prefix_blocks"]) or real(*a, **kw)
    )
    plain, lse = step.attend(q, causal=True, return_lse=True)
    assert not calls, "so few bytes are not worth it"
    forced = step.attend(q, causal=True, shared_prefix=True)
    assert calls == [blocks] and (forced - plain).abs().max() < 1e-5
    monkeypatch.setitem(shared_prefix.MIN_SAVED, "cpu", 1)
    again, again_lse = step.attend(q, causal=True, return_lse=True)
    assert calls == [blocks] * 2 and (again - plain).abs().max() < 1e-5 and (again_lse - lse).abs().max() < 1e-5
    assert torch.equal(
        step.attend(q, causal=True, shared_prefix=False), step.attend(q, causal=True, window_size=(99, 0))
    )
    assert calls == [blocks] * 2, "forbidden, or with a window"
    with pytest.raises(ValueError, match="windows and ALiBi"):
        step.attend(q, causal=True, window_size=(99, 0), shared_prefix=True)


def test_no_prefix_where_there_is_none_or_new_tokens_begin_in_it() -> None:
    cache, forks = _forks(2, [1, 1])
    other = cache.allocate()
    assert cache.extend([*forks, other], [1, 1, 1]).prefix_blocks == 0
    assert cache.extend(forks[:1], [1]).prefix_blocks == 0
    young = PagedKVCache(9, 4, 1, 8, dtype=torch.float32)
    first = young.allocate()
    young.extend([first], [8])
    second = young.fork(first)
    assert young.extend([first, second], [1, 1]).prefix_blocks == 2
    third = young.fork(first)
    assert young.extend([first, third], [2, 2]).prefix_blocks == 2  # the third block was copied for one of them


def test_a_latent_cache_does_not_split() -> None:
    cache = PagedKVCache(9, 4, 1, 24, 16, dtype=torch.float32, mla=True)
    a = cache.allocate()
    cache.append(torch.randn(8, 24), None, [a], [8])
    step = cache.append(torch.randn(2, 24), None, [a, cache.fork(a)], [1, 1])
    q = torch.randn(2, 4, 24)
    assert step.prefix_blocks == 2 and step.attend(q, softmax_scale=0.2).shape == (2, 4, 16)
    with pytest.raises(ValueError, match="attention_mla"):
        step.attend(q, softmax_scale=0.2, shared_prefix=True)


def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert benchmark.main(["--quick", "--device", "cpu", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["heads"], row["prefix"]) for row in rows] == [(32, 32), (32, 64), (8, 32), (8, 64)]
    assert rows[0]["saved"] == 32 * 8 * 2 * 128 * 4 and all(row["each"] > 0 and row["once"] > 0 for row in rows)
    assert "0 of 0 steps that read once" in capsys.readouterr().out
