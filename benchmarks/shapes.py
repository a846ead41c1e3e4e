"""The shapes that backends are compared on: one short list for CPUs, one for data-centre GPUs.

Sizes follow what is published (heads and head sizes of Llama, DeepSeek and diffusion models), so that numbers can be
held beside other people's.
"""

from __future__ import annotations

from typing import Any

from vllm_accel.tuning.shape import Inputs, Kind, Shape

__all__ = ["CPU_SHAPES", "GPU_SHAPES", "QUICK_SHAPES", "Inputs", "Kind", "Shape", "named"]


def _square(name: str, kind: Kind, s: int, **sizes: Any) -> Shape:
    return Shape(name, kind, seqlen_q=s, seqlen_k=s, **sizes)


def _ragged(*lengths: int) -> tuple[tuple[int, int], ...]:
    return tuple((n, n) for n in lengths)


_SMALL: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 64}

CPU_SHAPES: tuple[Shape, ...] = (
    _square("prefill_512_causal", "prefill", 512, **_SMALL),
    _square("prefill_2k_causal", "prefill", 2048, **_SMALL),
    _square("prefill_1k_full", "prefill", 1024, causal=False, **_SMALL),
    Shape("chunk_256_of_2k", "prefill", seqlen_q=256, seqlen_k=2048, **_SMALL),
    Shape("decode_b4_2k", "decode", batch=4, seqlen_q=1, seqlen_k=2048, **_SMALL),
    Shape("varlen_mix", "prefill", lengths=_ragged(700, 3, 260, 17, 512, 1, 90), **_SMALL),
    _square("train_1k_causal", "train", 1024, heads=4, kv_heads=4, head_dim=64),
)

_D64: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 64}

#: Documents of a training batch: 16384 tokens, 1024 in the mean.
_TRAINING = _ragged(3000, 2200, 1800, 1500, 1300, 1100, 1000, 900, 800, 700, 600, 500, 400, 300, 200, 84)

GPU_SHAPES: tuple[Shape, ...] = (
    _square("prefill_1k_causal", "prefill", 1024, batch=8),
    _square("prefill_4k_causal", "prefill", 4096, batch=2),
    _square("prefill_16k_causal", "prefill", 16384),
    _square("prefill_8k_causal", "prefill", 8192),
    _square("prefill_8k_full", "prefill", 8192, causal=False),
    _square("prefill_d64_4k_causal", "prefill", 4096, batch=4, **_D64),
    _square("prefill_d64_4k_full", "prefill", 4096, batch=4, causal=False, heads=16, kv_heads=16, head_dim=64),
    _square("prefill_d256_4k_causal", "prefill", 4096, heads=16, kv_heads=8, head_dim=256),
    _square("prefill_mla_192_128_4k", "prefill", 4096, heads=32, kv_heads=32, head_dim=192, head_dim_v=128),
    Shape("chunk_512_of_16k", "prefill", seqlen_q=512, seqlen_k=16384),
    Shape("decode_b1_4k", "decode", batch=1, seqlen_q=1, seqlen_k=4096),
    Shape("decode_b32_4k", "decode", batch=32, seqlen_q=1, seqlen_k=4096),
    Shape("decode_b16_16k", "decode", batch=16, seqlen_q=1, seqlen_k=16384),
    Shape("decode_b1_16k", "decode", batch=1, seqlen_q=1, seqlen_k=16384),
    *[
        Shape(f"paged{page}_{name}", "decode", batch=batch, seqlen_q=1, seqlen_k=length, block_size=page)
        for name, batch, length in (("b32_4k", 32, 4096), ("b16_16k", 16, 16384), ("b1_16k", 1, 16384))
        for page in (16, 64)
    ],
    Shape("varlen_mix_16k", "prefill", lengths=_ragged(6000, 40, 2500, 17, 4096, 1, 900, 3000, 250)),
    Shape("varlen_decode_b32", "decode", lengths=tuple((1, 500 + 211 * i) for i in range(32))),
    _square("train_4k_causal", "train", 4096, batch=2, heads=16, kv_heads=16),
    _square("train_4k_full", "train", 4096, batch=2, causal=False, heads=16, kv_heads=16),
    _square("train_8k_causal_gqa", "train", 8192),
    _square("train_4k_full_d64", "train", 4096, batch=2, causal=False, heads=16, kv_heads=16, head_dim=64),
    _square("train_4k_causal_d64", "train", 4096, batch=2, heads=16, kv_heads=16, head_dim=64),
    *[
        Shape(f"train_varlen_16k{name}", "train", lengths=_TRAINING, heads=16, kv_heads=16, head_dim=head_dim)
        for name, head_dim in (("", 128), ("_d64", 64))
    ],
)

#: For the tests of the benchmark itself.
QUICK_SHAPES: tuple[Shape, ...] = (
    _square("quick_causal", "prefill", 48, heads=4, kv_heads=2, head_dim=16),
    Shape("quick_decode", "decode", batch=2, seqlen_q=1, seqlen_k=40, heads=4, kv_heads=2, head_dim=16),
    Shape("quick_paged", "decode", batch=2, seqlen_q=1, seqlen_k=40, heads=4, kv_heads=2, head_dim=16, block_size=16),
    Shape("quick_varlen", "prefill", lengths=((7, 7), (1, 1), (20, 20)), heads=4, kv_heads=2, head_dim=16),
    _square("quick_train", "train", 32, heads=2, kv_heads=2, head_dim=16),
)


def named(shapes: tuple[Shape, ...], names: str) -> tuple[Shape, ...]:
    """Return the shapes whose name contains one of the comma-separated words; all of them for an empty string.

    Raises:
        ValueError: no shape matches; the message lists the names.
    """
    words = [word.strip() for word in names.split(",") if word.strip()]
    found = tuple(shape for shape in shapes if not words or any(word in shape.name for word in words))
    if not found:
        raise ValueError(f"no shape matches {names!r}; there are {', '.join(shape.name for shape in shapes)}")
    return found
