"""Stand-ins for the mask classes of xformers 0.0.35 (and mslk 1.1.0) which an adapter needs.

Read in xformers/ops/fmha/attn_bias.py and mslk/attention/fmha/attn_bias.py: constructors, field names, what they
refuse, and what ``materialize`` means. Not modelled: the gappy and the paged masks, and moving between devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fakes import kernel


def _log_mask(seen: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.log(seen.to(torch.float32)).to(dtype).expand(shape)


class AttentionBias:
    def materialize(self, shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
        raise NotImplementedError()


class LowerTriangularMask(AttentionBias):
    """Causal from the *top left*: query i sees key j <= i, whatever the lengths."""

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def materialize(self, shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
        return _log_mask(kernel.band(*shape[-2:], None, 0, top_left=True), shape, dtype)

    def add_bias(self, bias: torch.Tensor) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def __init__(self, bias: torch.Tensor) -> None:
        self._bias = bias

    def materialize(self, shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
        return super().materialize(shape, dtype=dtype, device=device) + self._bias


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Keys from ``window_left`` before to ``window_right`` after the bottom-right diagonal; no side unlimited."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        if self.window_left < 0 or self.window_right < 0:
            raise ValueError("Invalid window value passed to `LocalAttentionFromBottomRightMask`")

    def materialize(self, shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
        return _log_mask(kernel.band(*shape[-2:], self.window_left, self.window_right), shape, dtype)


class LowerTriangularFromBottomRightMask(AttentionBias):
    def materialize(self, shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
        return _log_mask(kernel.band(*shape[-2:], None, 0), shape, dtype)

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """A window of W sees W keys, the diagonal included: it is ``window_size=(W - 1, 0)``."""

    _window_size: int

    def __post_init__(self) -> None:
        if self._window_size <= 0:
            raise ValueError(f"Expected `window_size > 0`, but window_size={self._window_size}")

    def materialize(self, shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
        return _log_mask(kernel.band(*shape[-2:], self._window_size - 1, 0), shape, dtype)


@dataclass
class _SeqLenInfo:
    """Both a device tensor and a Python list of where sequences start: the list costs a synchronisation."""

    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    def intervals(self) -> Iterator[tuple[int, int]]:
        yield from zip(self.seqstart_py, self.seqstart_py[1:], strict=False)

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: torch.device | None = None) -> _SeqLenInfo:
        assert not isinstance(seqlens, torch.Tensor)
        lengths, starts = list(seqlens), [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        return cls(
            seqstart=torch.tensor(starts, dtype=torch.int32), max_seqlen=max(lengths, default=-1),
            min_seqlen=min(lengths, default=-1), seqstart_py=starts,
        )  # fmt: skip


@dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    seqlen: torch.Tensor
    seqlen_py: Sequence[int]
    padding: int

    def __post_init__(self) -> None:
        assert len(self.seqstart_py) == len(self.seqlen_py) + 1

    def intervals(self) -> Iterator[tuple[int, int]]:
        for start, length in zip(self.seqstart_py, self.seqlen_py, strict=False):
            yield start, start + length

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: torch.device | None = None) -> _SeqLenInfo:
        raise RuntimeError("Use either `_SeqLenInfo.from_seqlens` or `_PaddedSeqLenInfo.from_seqlens_padded`")

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: torch.device | None = None
    ) -> _PaddedSeqLenInfo:
        assert not isinstance(seqlens, torch.Tensor)
        assert all(seqlen <= padding for seqlen in seqlens), f"Seqlens {seqlens} Padding {padding}"
        starts = list(range(0, len(seqlens) * padding + 1, padding))
        return cls(
            seqlen=torch.tensor(seqlens, dtype=torch.int32), seqlen_py=list(seqlens), max_seqlen=max(seqlens),
            min_seqlen=min(seqlens), seqstart=torch.tensor(starts, dtype=torch.int32), seqstart_py=starts,
            padding=padding,
        )  # fmt: skip


class _Blocks(AttentionBias):
    """Queries of block i see keys of block i only, as ``_block`` says."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo

    def _block(self, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
        return kernel.band(seqlen_q, seqlen_k, None, None)

    def materialize(self, shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
        ends = (self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1])
        assert tuple(shape[-2:]) == ends, (shape, ends)
        seen = torch.zeros(shape[-2:], dtype=torch.bool)
        for (q0, q1), (k0, k1) in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=False):
            seen[q0:q1, k0:k1] = self._block(q1 - q0, k1 - k0)
        return _log_mask(seen, shape, dtype)

    def _lengths(self) -> Iterator[tuple[int, int]]:
        for (q0, q1), (k0, k1) in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=False):
            yield q1 - q0, k1 - k0


@dataclass
class BlockDiagonalMask(_Blocks):
    """Packed sequences; tensors have batch size 1. Lengths are Python integers."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *,
        device: torch.device | None = None,
    ):  # fmt: skip
        assert kv_seqlen is None or len(q_seqlen) == len(kv_seqlen)
        q_seqinfo = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        same = kv_seqlen is None or q_seqlen == kv_seqlen
        k_seqinfo = q_seqinfo if same else _SeqLenInfo.from_seqlens(kv_seqlen, device=device)
        return cls(q_seqinfo=q_seqinfo, k_seqinfo=k_seqinfo)

    def make_causal(self) -> BlockDiagonalCausalMask:
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        return BlockDiagonalCausalLocalAttentionMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Causal from the top left of each block."""

    def _block(self, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
        return kernel.band(seqlen_q, seqlen_k, None, 0, top_left=True)


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Refuses a block with fewer keys than queries when it is built."""

    def __post_init__(self) -> None:
        for i, (seqlen_q, seqlen_k) in enumerate(self._lengths()):
            if seqlen_k < seqlen_q:
                raise ValueError(
                    f"Block #{i} has num_keys={seqlen_k} and num_queries={seqlen_q}. Expected `num_keys >= num_queries`"
                )

    def _block(self, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
        return kernel.band(seqlen_q, seqlen_k, None, 0)


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    _window_size: int = 0

    def __post_init__(self) -> None:
        if self._window_size <= 0:
            raise ValueError(f"Expected `window_size > 0`, but window_size={self._window_size}")
        for seqlen_q, seqlen_k in self._lengths():
            if seqlen_q - self._window_size >= seqlen_k:
                raise RuntimeError(f"No keys are attended in q_seqlen {seqlen_q} k_seqlen {seqlen_k}")

    def _block(self, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
        return kernel.band(seqlen_q, seqlen_k, self._window_size - 1, 0, top_left=True)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    _window_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._window_size <= 0:
            raise ValueError(f"Expected `window_size > 0`, but window_size={self._window_size}")

    def _block(self, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
        return kernel.band(seqlen_q, seqlen_k, self._window_size - 1, 0)


@dataclass
class BlockDiagonalPaddedKeysMask(_Blocks):
    """Every sequence has ``kv_padding`` rows of k and v, of which the first ``kv_seqlen`` count."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], causal_diagonal: Any = None, *,
        device: torch.device | None = None,
    ):  # fmt: skip
        assert kv_seqlen is None or len(q_seqlen) == len(kv_seqlen), (q_seqlen, kv_seqlen)
        return cls(
            q_seqinfo=_SeqLenInfo.from_seqlens(q_seqlen, device=device),
            k_seqinfo=_PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device),
        )


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Causal from the bottom right of what counts."""

    causal_diagonal: Any = None

    def _block(self, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
        return kernel.band(seqlen_q, seqlen_k, None, 0)


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    window_left: int
    window_right: int

    @classmethod
    def from_seqlens_local(cls, q_seqlen, kv_padding, kv_seqlen, window_left, window_right):
        base = BlockDiagonalPaddedKeysMask.from_seqlens(q_seqlen, kv_padding, kv_seqlen)
        return cls(base.q_seqinfo, base.k_seqinfo, window_left, window_right)

    def _block(self, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
        return kernel.band(seqlen_q, seqlen_k, self.window_left, self.window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    _window_size: int

    @classmethod
    def from_seqlens_local(cls, q_seqlen, kv_padding, kv_seqlen, window_size):
        base = BlockDiagonalPaddedKeysMask.from_seqlens(q_seqlen, kv_padding, kv_seqlen)
        return cls(base.q_seqinfo, base.k_seqinfo, window_size)

    def _block(self, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
        return kernel.band(seqlen_q, seqlen_k, self._window_size - 1, 0)


VARLEN_BIASES = (BlockDiagonalMask, BlockDiagonalPaddedKeysMask)
