"""`PagedKVCache`: what it holds is what was written, whatever was shared, copied, freed and used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from vllm_accel import Attention, CacheFullError, PagedKVCache, attention, attention_mla, attention_paged
from vllm_accel.testing import attention_oracle
from vllm_accel.testing.tolerance import assert_close

H, HKV, D, DV = 4, 2, 16, 8


def _tokens(n: int, seed: int = 0, heads: int = HKV, size: int = D) -> torch.Tensor:
    return torch.randn(n, heads, size, generator=torch.Generator().manual_seed(seed))


def _stored(cache: PagedKVCache, sequence: int, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a sequence back, block by block."""
    blocks, n = list(cache.blocks(sequence)), cache.length(sequence)
    k, v = (c[layer][blocks].reshape(-1, *c[layer].shape[2:])[:n] for c in (cache.k_caches, cache.v_caches))
    return k, v


class Shared(RuleBasedStateMachine):
    """Sequences that grow, fork and end in a small cache, beside a plain list of tokens for each."""

    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedKVCache(9, 3, 1, 2, dtype=torch.float32, num_layers=2)
        self.model: dict[int, list[float]] = {}
        self.counter = 0

    @rule(target=live)
    def allocate(self) -> int:
        sequence = self.cache.allocate()
        self.model[sequence] = []
        return sequence

    @rule(target=live, parent=live)
    def fork(self, parent: int) -> int:
        sequence = self.cache.fork(parent)
        self.model[sequence] = list(self.model[parent])
        return sequence

    @rule(ended=consumes(live))
    def free(self, ended: int) -> None:
        self.cache.free(ended)
        del self.model[ended]

    @rule(batch=st.lists(st.tuples(live, st.integers(0, 5)), max_size=3, unique_by=lambda pair: pair[0]))
    def extend(self, batch: list[tuple[int, int]]) -> None:
        sequences, counts = [s for s, _ in batch], [n for _, n in batch]
        before = ({s: self.cache.blocks(s) for s in self.cache.sequences}, self.cache.free_blocks)
        try:
            step = self.cache.extend(sequences, counts)
        except CacheFullError:
            assert ({s: self.cache.blocks(s) for s in self.cache.sequences}, self.cache.free_blocks) == before
            return
        values = [float(self.counter + i + 1) for i in range(sum(counts))]
        self.counter += sum(counts)
        k = torch.tensor(values).view(-1, 1, 1).expand(-1, 1, 2)
        for layer in range(2):
            step[layer].write(k * (layer + 1), -k * (layer + 1))
        for sequence, n in batch:
            self.model[sequence] += [values.pop(0) for _ in range(n)]
        assert step.seqused_k.tolist() == [len(self.model[s]) for s in sequences]
        assert step.cu_seqlens_q.diff().tolist() == counts
        for row, sequence in zip(step.block_table.tolist(), sequences, strict=True):
            assert tuple(row[: len(self.cache.blocks(sequence))]) == self.cache.blocks(sequence)
            assert all(0 <= block < 9 for block in row)

    @invariant()
    def holds_what_was_written(self) -> None:
        for sequence, want in self.model.items():
            for layer in range(2):
                k, v = _stored(self.cache, sequence, layer)
                assert k[:, 0, 0].tolist() == [w * (layer + 1) for w in want]
                assert torch.equal(v, -k)

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        held = [block for sequence in self.model for block in self.cache.blocks(sequence)]
        assert len(set(held)) + self.cache.free_blocks == 9
        for sequence, want in self.model.items():
            assert len(self.cache.blocks(sequence)) == -(-len(want) // 3)


TestShared = Shared.TestCase
TestShared.settings = settings(max_examples=40, stateful_step_count=20, deadline=None, derandomize=True)


def test_a_failed_step_changes_nothing_and_says_what_is_missing() -> None:
    cache = PagedKVCache(2, 4, HKV, D, dtype=torch.float32)
    a = cache.allocate()
    cache.append(_tokens(5), _tokens(5, 1), [a], [5])
    with pytest.raises(CacheFullError, match=r"4 new tokens need 1 more blocks of 4 tokens; 0 of 2 are free") as error:
        cache.extend([a], [4])
    assert "free a sequence" in str(error.value) and cache.length(a) == 5
    cache.extend([a], [3])
    cache.free(a)
    assert cache.free_blocks == 2


def test_a_fork_of_a_full_cache_cannot_write_into_the_shared_block() -> None:
    cache = PagedKVCache(2, 4, HKV, D, dtype=torch.float32)
    a = cache.allocate()
    cache.append(_tokens(6), _tokens(6, 1), [a], [6])
    b = cache.fork(a)
    with pytest.raises(CacheFullError):
        cache.extend([b], [1])
    cache.free(a)  # now b holds the block alone, and needs no copy
    cache.extend([b], [1])
    assert torch.equal(_stored(cache, b)[0][:6], _tokens(6))


def test_both_forks_writing_at_once_copy_once() -> None:
    cache = PagedKVCache(3, 4, HKV, D, dtype=torch.float32)
    a = cache.allocate()
    cache.append(_tokens(6), _tokens(6, 1), [a], [6])
    b = cache.fork(a)
    k = _tokens(2, 5)
    cache.append(k, k[..., :D], [a, b], [1, 1])
    assert cache.free_blocks == 0 and cache.blocks(a)[0] == cache.blocks(b)[0]
    assert torch.equal(_stored(cache, a)[0], torch.cat([_tokens(6), k[:1]]))
    assert torch.equal(_stored(cache, b)[0], torch.cat([_tokens(6), k[1:]]))


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attend_step_by_step_is_attention_over_everything(dtype: torch.dtype, head_major: bool) -> None:
    cache = PagedKVCache(20, 4, HKV, D, DV, dtype=dtype, head_major=head_major)
    lengths = (11, 3)
    q, k, v = (
        [_tokens(n, seed + i, heads, size).to(dtype) for i, n in enumerate(lengths)]
        for seed, heads, size in ((0, H, D), (10, HKV, D), (20, HKV, DV))
    )
    sequences = [cache.allocate() for _ in lengths]
    outs: list[list[torch.Tensor]] = [[], []]
    for part in ([(0, 7), (0, 2)], [(7, 8), (2, 3)], [(8, 11), (3, 3)]):
        rows = [slice(*p) for p in part]
        step = cache.append(
            *(torch.cat([t[i][r] for i, r in enumerate(rows)]) for t in (k, v)), sequences, [b - a for a, b in part]
        )
        out = step.attend(torch.cat([q[i][r] for i, r in enumerate(rows)]), causal=True)
        for i, piece in enumerate(out.split([b - a for a, b in part])):
            outs[i].append(piece)
    for i in range(2):
        want, _ = attention_oracle(q[i][None], k[i][None], v[i][None], causal=True)
        plain = attention(q[i][None], k[i][None], v[i][None], causal=True)
        assert_close(torch.cat(outs[i]), want[0], plain[0], what=f"sequence {i}")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("scale", ["float", "heads", "layers"])
def test_eight_bit_caches_hand_their_scales_to_attention(dtype: torch.dtype, scale: str) -> None:
    scales = {"float": 0.05, "heads": torch.tensor([0.05, 0.03]), "layers": torch.tensor([[0.5, 0.3], [0.05, 0.03]])}
    cache = PagedKVCache(8, 4, HKV, D, dtype=dtype, num_layers=2, k_scale=scales[scale], v_scale=scales[scale])
    k, v, q = _tokens(9), _tokens(9, 1), _tokens(9, 2, H)
    step = cache.extend([cache.allocate()], [9])[1]
    step.write(k, v)
    out = step.attend(q, causal=True)
    factor = torch.as_tensor(scales[scale])
    factor = (factor[1] if factor.dim() == 2 else factor).reshape(-1, 1)
    rounded = [
        (t / factor).round().clamp(-127, 127) * factor
        if dtype is torch.int8
        else (t / factor).to(dtype).float() * factor
        for t in (k, v)
    ]
    want, _ = attention_oracle(q[None], rounded[0][None], rounded[1][None], causal=True)
    assert (out - want[0]).abs().max() < 1e-5
    assert not cache.k_caches[0].view(torch.uint8).any()  # the other layer was left alone


def test_mla_cache() -> None:
    cache = PagedKVCache(8, 4, 1, 24, 16, dtype=torch.float32, mla=True, num_layers=2)
    latent, q = _tokens(9, 0, 1, 24), _tokens(9, 1, H, 24)
    step = cache.extend([cache.allocate()], [9])[1]
    step.write(latent[:, 0])
    out = step.attend(q, causal=True, softmax_scale=0.2)
    want, _ = attention_oracle(q[None], latent[None], latent[None, ..., :16], causal=True, softmax_scale=0.2)
    assert (out - want[0]).abs().max() < 1e-5
    again = attention_mla(
        q, cache.k_caches[1], head_dim_v=16, softmax_scale=0.2, causal=True, cu_seqlens_q=step.cu_seqlens_q,
        max_seqlen_q=9, block_table=step.block_table, seqused_k=step.seqused_k, max_seqlen_k=9,
    )  # fmt: skip
    assert torch.equal(out, again) and cache.v_cache.shape == (8, 4, 16)


def test_a_new_cache_is_zero_and_reads_as_a_finite_tail() -> None:
    cache = PagedKVCache(4, 4, HKV, D, dtype=torch.float16)
    assert not cache.k_cache.any() and not cache.v_cache.any()
    seen: dict[str, Any] = {}
    step = cache.append(_tokens(3).half(), _tokens(3).half(), [cache.allocate()], [3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "vllm_accel.ops.cache_step.attention_paged", lambda *a, **kw: seen.update(kw) or attention_paged(*a, **kw)
        )
        step.attend(_tokens(3, 1, H).half())
    assert seen["finite_tail"] is True


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no blocks": ({"num_blocks": 0}, ValueError, "num_blocks must be a positive int, not 0"),
    "head size": ({"head_dim": 1.5}, ValueError, "head_dim must be"),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype must be one of"),
    "scale of a wide cache": ({"k_scale": 0.5}, ValueError, "k_scale is for FP8 and int8"),
    "scale shape": ({"dtype": torch.int8, "v_scale": torch.ones(3)}, ValueError, r"v_scale must be a float, \(2,\)"),
    "mla heads": ({"mla": True}, ValueError, "num_kv_heads=1"),
    "mla scale": (
        {"mla": True, "num_kv_heads": 1, "dtype": torch.int8, "k_scale": 1.0, "v_scale": 1.0},
        ValueError,
        "one scale",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_caches_that_make_no_sense(name: str) -> None:
    changes, error, message = WRONG[name]
    given = {"num_blocks": 4, "block_size": 4, "num_kv_heads": HKV, "head_dim": D, "dtype": torch.float32}
    with pytest.raises(error, match=message):
        PagedKVCache(**{**given, **changes})


def test_wrong_steps() -> None:
    cache = PagedKVCache(4, 4, HKV, D, dtype=torch.float32)
    a = cache.allocate()
    for sequences, counts, error in (
        ([a, a], [1, 1], "no sequence twice"),
        ([a], [1, 2], "one a sequence"),
        ([a], [-1], "at least 0"),
    ):
        with pytest.raises(ValueError, match=error):
            cache.extend(sequences, counts)
    with pytest.raises(KeyError, match="no sequence 7"):
        cache.extend([7], [1])
    with pytest.raises(IndexError, match="layer 1 of a cache with 1 layers"):
        cache.extend([a], [1])[1]


# --- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_the_module_decodes_like_one_long_prompt(flat: bool) -> None:
    module = Attention(H, D, D**-0.5, num_kv_heads=HKV, sliding_window=6)
    q, k, v = (
        torch.randn(2, 9, heads, D, generator=torch.Generator().manual_seed(s)) for s, heads in enumerate((H, HKV, HKV))
    )
    if flat:
        q, k, v = (t.flatten(2) for t in (q, k, v))
    cache = PagedKVCache(12, 4, HKV, D, dtype=torch.float32)
    parts = [slice(0, 5), slice(5, 6), slice(6, 9)]
    out = torch.cat([module(q[:, p], k[:, p], v[:, p], cache=cache) for p in parts], dim=1)
    assert (out - module(q, k, v)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="query has 3 sequences, the cache 2"):
        module(*(torch.cat([t, t[:1]]) for t in (q, k, v)), cache=cache)


def test_the_module_takes_a_step_of_a_layer() -> None:
    module = Attention(H, D, 0.2, num_kv_heads=HKV)
    cache = PagedKVCache(12, 4, HKV, D, dtype=torch.float32, num_layers=2)
    q, k, v = _tokens(8, 0, H), _tokens(8, 1), _tokens(8, 2)
    step = cache.extend([cache.allocate(), cache.allocate()], [5, 3])
    out = module(q.flatten(1), k.flatten(1), v.flatten(1), cache=step[1])
    cu = torch.tensor([0, 5, 8], dtype=torch.int32)
    assert (out - module(q.flatten(1), k.flatten(1), v.flatten(1), cu_seqlens=cu, max_seqlen=5)).abs().max() < 1e-5
    assert torch.equal(module(q, k, v, cache=step[1], cu_seqlens=cu).flatten(1), out)
    with pytest.raises(ValueError, match="2 sequences and 8 new tokens"):
        module(q[:7].flatten(1), k[:7].flatten(1), v[:7].flatten(1), cache=step)
    with pytest.raises(ValueError, match=r"the cache has 2 layers: pass step\[i\]"):
        module(q[None], k[None], v[None], cache=cache)
