"""`attention_mla`: the latent cache, beside the full attention that absorbing the weights must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_accel import attention_mla, attention_paged, explain
from vllm_accel.dispatch.spec import Feature
from vllm_accel.testing import attention_oracle
from vllm_accel.testing.tolerance import assert_close

H, LATENT, ROPE, NOPE, BLOCK = 4, 32, 8, 16, 4


def _call(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {
        "q": torch.randn(5, H, LATENT + ROPE, generator=g),
        "kv_cache": torch.randn(6, BLOCK, LATENT + ROPE, generator=g),
        "head_dim_v": LATENT, "softmax_scale": 0.2, "causal": True, "max_seqlen_q": 4, "max_seqlen_k": 11,
        "cu_seqlens_q": torch.tensor([0, 1, 5], dtype=torch.int32),
        "block_table": torch.tensor([[3, 0, -1], [5, 1, 2]], dtype=torch.int32),
        "seqused_k": torch.tensor([6, 11], dtype=torch.int32),
    }  # fmt: skip
    given |= changes
    return (given.pop("q"), given.pop("kv_cache")), given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absorbed_weights_give_what_the_model_says(dtype: torch.dtype) -> None:
    """DeepSeek's own formula: keys (W_k latent, rotary), values W_v latent, for every head."""
    g = torch.Generator().manual_seed(1)
    n = 11
    w_k, w_v = (torch.randn(H, NOPE, LATENT, generator=g, dtype=torch.float64) * 0.2 for _ in range(2))
    latent, rope = torch.randn(n, LATENT, generator=g).to(dtype), torch.randn(n, ROPE, generator=g).to(dtype)
    q_nope, q_rope = torch.randn(n, H, NOPE, generator=g).to(dtype), torch.randn(n, H, ROPE, generator=g).to(dtype)
    scale = (NOPE + ROPE) ** -0.5

    k = torch.cat([torch.einsum("hdl,tl->thd", w_k, latent.double()), rope.double()[:, None].expand(-1, H, -1)], -1)
    v = torch.einsum("hdl,tl->thd", w_v, latent.double())
    q = torch.cat([q_nope, q_rope], -1).double()
    want, _ = attention_oracle(q[None], k[None], v[None], causal=True, softmax_scale=scale)

    absorbed = torch.cat([torch.einsum("thd,hdl->thl", q_nope.double(), w_k).to(dtype), q_rope], -1)
    cache = torch.zeros(4, BLOCK, LATENT + ROPE, dtype=dtype)
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    for t in range(n):
        cache[int(table[0, t // BLOCK]), t % BLOCK] = torch.cat([latent[t], rope[t]])
    out = attention_mla(
        absorbed, cache, head_dim_v=LATENT, softmax_scale=scale, causal=True, block_table=table, max_seqlen_q=n,
        seqused_k=torch.tensor([n], dtype=torch.int32), cu_seqlens_q=torch.tensor([0, n], dtype=torch.int32),
        max_seqlen_k=n,
    )  # fmt: skip
    got = torch.einsum("thl,hdl->thd", out.double(), w_v)
    assert (got - want[0]).abs().max() < (1e-5 if dtype is torch.float32 else 0.03)


@pytest.mark.parametrize("backend", ["reference", "sdpa_cpu"])
def test_one_cache_of_one_head_says_the_same(backend: str) -> None:
    (q, kv), options = _call()
    out, lse = attention_mla(q, kv, return_lse=True, backend=backend, **options)
    head_dim_v = options.pop("head_dim_v")
    keys = kv[:, :, None]
    want, want_lse = attention_paged(q, keys, keys[..., :head_dim_v], return_lse=True, backend=backend, **options)
    assert_close(out, want.double(), want, what="out")
    assert torch.equal(lse, want_lse)


def test_one_factor_serves_keys_and_values() -> None:
    (q, kv), options = _call()
    narrow = kv.to(torch.float8_e4m3fn)
    for factor in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5], [0.5]])):
        out = attention_mla(q, narrow, kv_descale=factor, **options)
        want = attention_mla(q, narrow.float() * 0.5, **options)
        assert (out - want).abs().max() < 1e-5


def test_explain_names_the_feature() -> None:
    (q, kv), options = _call()
    shown = explain(attention_mla, q, kv, **options)
    assert Feature.MLA in shown.spec.features and (shown.spec.head_dim, shown.spec.head_dim_v) == (40, 32)
    assert (shown.spec.num_kv_heads, shown.spec.block_size) == (1, BLOCK) and "mla" in str(shown)
    assert "does not do values that are a part of the keys (MLA)" in str(shown["sdpa_cudnn"])


def test_every_option_changes_the_spec() -> None:
    import inspect

    tensors, options = _call()
    plain = explain(attention_mla, *tensors, **options).spec
    flipped: dict[str, Any] = {
        "causal": False, "window_size": (3, -1), "softcap": 2.0, "sinks": torch.rand(4), "q_descale": torch.ones(()),
        "kv_descale": torch.ones(()), "return_lse": True, "deterministic": True, "batch_invariant": True,
        "finite_tail": True,
    }  # fmt: skip
    fixed = {"q", "kv_cache", "backend", "head_dim_v", "softmax_scale", "max_seqlen_q", "max_seqlen_k"}
    tables = {"cu_seqlens_q", "block_table", "seqused_k"}
    assert set(inspect.signature(attention_mla).parameters) - fixed - tables == set(flipped)
    specs = [explain(attention_mla, *tensors, **{**options, name: value}).spec for name, value in flipped.items()]
    assert plain not in specs and len(set(specs)) == len(specs)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"kv_cache": torch.randn(6, BLOCK, 1, 40)}, ValueError, "kv_cache must be"),
    "not a tensor": ({"kv_cache": 3}, TypeError, "kv_cache must be a tensor, not int"),
    "value size": ({"head_dim_v": 41}, ValueError, "head_dim_v must be an int from 1 to D=40, not 41"),
    "value size 0": ({"head_dim_v": 0}, ValueError, "from 1 to D=40, not 0"),
    "head size": ({"q": torch.randn(5, H, 32)}, ValueError, r"kv_cache \(6, 4, 40\)"),
    "dtype": ({"kv_cache": torch.randn(6, BLOCK, 40).half()}, TypeError, "kv_cache must have q's dtype"),
    "factor": ({"kv_descale": torch.ones(2)}, ValueError, "kv_descale must have shape"),
    "gradient": ({"kv_cache": torch.randn(6, BLOCK, 40, requires_grad=True)}, ValueError, "kv_cache requires a grad"),
    "scale": ({"softmax_scale": 0.0}, ValueError, "positive finite"),
    "block": ({"block_table": torch.tensor([[3, 6, 0], [5, 1, 2]], dtype=torch.int32)}, ValueError, r"\[0, 1\] is 6"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    changes, error, message = WRONG[name]
    tensors, options = _call(**changes)
    with pytest.raises(error, match=message):
        attention_mla(*tensors, **options)
