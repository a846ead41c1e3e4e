"""A shared prefix read once gives what reading it for every sequence gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_accel import attention_paged
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
    from vllm_accel.ops import shared_prefix

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
