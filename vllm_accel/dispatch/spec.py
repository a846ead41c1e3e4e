"""What a call is, without its tensors: frozen, hashable, the kind of each option and never its value."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import torch


class Feature(enum.Flag):
    """Everything that a call may ask of a backend. A backend refuses each flag that it does not declare."""

    VARLEN = enum.auto()  # packed sequences, cu_seqlens
    PAGED = enum.auto()  # keys and values behind a block table
    GRAD = enum.auto()  # an input requires a gradient
    LSE = enum.auto()  # return_lse
    LSE_GRAD = enum.auto()  # return_lse while an input requires a gradient
    CAUSAL = enum.auto()
    WINDOW_LEFT = enum.auto()  # window_size[0] >= 0
    WINDOW_RIGHT = enum.auto()  # window_size[1] >= 0
    SCALE = enum.auto()  # softmax_scale given
    SOFTCAP = enum.auto()
    ALIBI = enum.auto()
    BIAS = enum.auto()  # additive attn_bias
    MASK = enum.auto()  # boolean attn_bias
    BIAS_GRAD = enum.auto()
    SINKS = enum.auto()
    SINKS_GRAD = enum.auto()
    DROPOUT = enum.auto()
    Q_DESCALE = enum.auto()
    K_DESCALE = enum.auto()
    V_DESCALE = enum.auto()
    DETERMINISTIC = enum.auto()
    BATCH_INVARIANT = enum.auto()
    GQA = enum.auto()  # num_kv_heads < num_heads
    VALUE_DIM = enum.auto()  # head_dim_v != head_dim


#: What every call may use and every attention backend therefore has to do: a caller's scale is just a number.
PLAIN = Feature.SCALE


class Relation(enum.Enum):
    """How the query length stands to the key length; kernels that align causal masks top-left need to know."""

    EQUAL = "Sq = Sk"
    SHORTER = "Sq < Sk"
    LONGER = "Sq > Sk"
    MIXED = "differs by sequence"  # packed sequences with separate lengths


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The kind of an attention call. Lengths and batch are bucket representatives (`bucket`), never the exact ones.

    Attributes:
        dtype: of q; kv_dtype: of k and v.
        batch: sequences. seqlen_q, seqlen_k: tokens of the longest sequence.
        features: what the call asks for.
    """

    dtype: torch.dtype
    kv_dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    batch: int
    seqlen_q: int
    seqlen_k: int
    relation: Relation
    features: Feature

    def compile_kind(self) -> AttentionSpec:
        """Return the part that a compiled kernel depends on: everything but lengths and batch."""
        return replace(self, batch=0, seqlen_q=0, seqlen_k=0)

    def __str__(self) -> str:
        heads = f"{self.num_heads} heads"
        if self.num_kv_heads != self.num_heads:
            heads += f" over {self.num_kv_heads} key heads"
        size = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        flags = ", ".join(feature_names(self.features)) or "plain"
        return (
            f"attention {str(self.dtype).removeprefix('torch.')}, batch ~{self.batch}, "
            f"Sq ~{self.seqlen_q}, Sk ~{self.seqlen_k} ({self.relation.value}), {heads} of {size}: {flags}"
        )


@dataclass(frozen=True, slots=True)
class GemmSpec:
    """The kind of a dense matrix product ``(M, K) @ (K, N)``; m, n, k are bucket representatives."""

    dtype: torch.dtype
    m: int
    n: int
    k: int
    bias: bool
    grad: bool

    def compile_kind(self) -> GemmSpec:
        """Return the part that a compiled kernel depends on: everything but the sizes."""
        return replace(self, m=0, n=0, k=0)

    def __str__(self) -> str:
        tail = " + bias" if self.bias else ""
        return f"gemm {str(self.dtype).removeprefix('torch.')}, M ~{self.m}, N ~{self.n}, K ~{self.k}{tail}"


def feature_names(features: Feature) -> list[str]:
    """Name the flags in lower case, in declaration order."""
    return [flag.name.lower() for flag in Feature if flag in features and flag.name]


def bucket(n: int) -> int:
    """Round a length down to its quarter octave: 1..8 exact, then 4 steps per power of two (4096, 5120, 6144, ...)."""
    shift = n.bit_length() - 3
    return n if shift <= 0 else n >> shift << shift
