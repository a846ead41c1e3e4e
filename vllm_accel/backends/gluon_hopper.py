"""Our own attention for Hopper: Gluon kernels (``kernels/gluon``), and backward our Triton kernels for heads above 128.

It takes dense and packed calls as they are, full or causal, with grouped heads and any head size up to 256. Whatever
changes a logit (windows, softcap, biases, sinks, dropout) is for `triton`. Both keep lse as a natural logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_accel.backends.gluon_backward import BACKWARD_HEAD_DIM, GluonBackward
from vllm_accel.backends.gluon_layout import for_tma, like_meta
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads
from vllm_accel.dispatch.capability import Capability, Guard
from vllm_accel.dispatch.device import Device, detect
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.errors import Reason

if TYPE_CHECKING:
    from vllm_accel.ops.arguments import AttentionSizes

Forward = Callable[[Tensor, Tensor, Tensor, AttentionArgs], tuple[Tensor, "Tensor | None", "Tensor | None"]]

#: Gluon is experimental and its names change: `thread_barrier` of 3.6 is `barrier` in 3.7.
_KNOWN = ("3.6.", "3.7.")
_MAX_INT = 2**31 - 1
_ROWS = 128  # of a tile


def _int32(spec: AttentionSpec, sizes: AttentionSizes) -> str | None:
    tiles = -(-sizes.seqlen_q // _ROWS) * spec.num_heads * sizes.batch
    rows = sizes.batch * max(sizes.seqlen_q, sizes.seqlen_k)
    if max(tiles, rows) > _MAX_INT:
        return f"counts rows and tiles in 32 bits; this call may have {rows} rows and {tiles} tiles"
    return None


def _compile_seconds(spec: AttentionSpec) -> float:
    """Return what compiling a kind of call takes; later processes find it on disk.

    An H200, `python -m benchmarks.first_calls --jobs 8`, 2026-11-30: 2.2 s (D = 64, no mask) to 4.8 s for a forward, 8
    and 10 s with gradients. Where keys may be shared out there are two forms of it.
    """
    return 10.0 if Feature.GRAD in spec.features or _may_share(spec) else 5.0


def _may_share(spec: AttentionSpec) -> bool:
    """Tell whether a tile's keys may be cut into parts.

    Not in a batch-invariant call, whose rows are summed in the same order whatever else is in it; nor in a packed one,
    whose lengths the host does not know; nor with gradients, where many tiles are the rule.
    """
    return not spec.features & (Feature.BATCH_INVARIANT | Feature.VARLEN | Feature.GRAD)


#: Kinds of calls, and devices, both forms of which this process has compiled.
_built: set[tuple[AttentionSpec, Device]] = set()


class GluonHopperBackend:
    """The backend `gluon_hopper`."""

    name = "gluon_hopper"
    capability = Capability(
        platforms=frozenset({"cuda"}),
        compute_capabilities=frozenset({(9, 0)}),  # wgmma is Hopper's alone
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        features=Feature.VARLEN
        | Feature.GRAD
        | Feature.LSE
        | Feature.LSE_GRAD
        | Feature.CAUSAL
        | Feature.SCALE
        | Feature.DETERMINISTIC
        | Feature.BATCH_INVARIANT
        | Feature.GQA
        | Feature.VALUE_DIM,
        max_head_dim=256,
        first_call_seconds=_compile_seconds,
        guards=(Guard("int32", _int32),),
    )

    def version(self) -> str | None:
        """Return Triton's version, without importing it."""
        from vllm_accel.kernels.triton.toolchain import triton_version

        return triton_version()

    def compile_cache(self) -> Path | None:
        """Return where compiled kernels are kept for later processes."""
        from vllm_accel.kernels.triton.toolchain import cache_dir

        return cache_dir()

    def unavailable_reason(self) -> Reason | None:
        """Say why Gluon cannot compile here: another release of Triton, or what keeps Triton itself from it."""
        from vllm_accel.kernels.triton.toolchain import problems

        arch = detect(torch.device("cuda", torch.cuda.current_device())).arch if torch.cuda.is_available() else None
        for problem in problems(arch):
            return Reason(problem.code, problem.text)
        version = self.version() or ""
        if not version.startswith(_KNOWN):
            return Reason("version", f"its kernel is written in the Gluon of Triton 3.6 and 3.7; this is {version}")
        return None

    def bind(self, spec: AttentionSpec, device: Device) -> GluonAttention:
        """Return the kernel for dense and packed calls of this kind."""
        return GluonAttention(spec, device)


class GluonAttention:
    """Dense and packed attention of one kind of call on one Hopper GPU."""

    def __init__(self, spec: AttentionSpec, device: Device) -> None:
        # Imported here: declaring a backend must not import Triton (0.5 s).
        from vllm_accel.kernels.gluon import forward_sm90_launch
        from vllm_accel.kernels.gluon.bound import Bound
        from vllm_accel.kernels.gluon.parts import choose_parts
        from vllm_accel.kernels.triton.merge_launch import Join

        self._launches, self._bound = forward_sm90_launch, Bound
        self._choose_parts, self._join = choose_parts, Join
        self._tile_dim = forward_sm90_launch.tile_dim(spec.head_dim, spec.head_dim_v)
        self._variant = forward_sm90_launch.VARIANTS[self._tile_dim]
        self._spec, self._device = spec, device
        ours = max(spec.head_dim, spec.head_dim_v) <= BACKWARD_HEAD_DIM
        self._backward = GluonBackward(device.sm_count) if ours else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return out and lse."""
        return self.prepare(q, k, v, args)(q, k, v, args)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> Forward:
        """Return `forward` for calls with these sizes, strides and options; tensors and the scale may differ."""
        forward = self._prepare(q, k, v, args, self._parts(q, k, args))
        kind = (self._spec.compile_kind(), self._device)
        if kind in _built or not _may_share(self._spec):
            return forward
        built = False

        def first(q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor | None, Tensor | None]:
            nonlocal built
            if not built:
                built = True
                if kind not in _built:
                    _built.add(kind)
                    self._build(q, k, v, args)
            return forward(q, k, v, args)

        return first

    def _build(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> None:
        """Compile and load both forms, on a few zeros: calls of a kind take either, and the library warms up kinds."""
        q, k, v = (t.new_zeros(1, 8, *t.shape[2:]) for t in (q, k, v))
        for parts in (1, 2):
            self._prepare(q, k, v, args, parts)(q, k, v, args)

    def _prepare(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, parts: int) -> Forward:
        """Return `forward` for these sizes, with the keys of a tile in so many parts."""
        *lead, tokens, heads, _ = q.shape
        head_dim_v = v.shape[-1]
        ready_q, ready_k, ready_v = (for_tma(t) for t in (q, k, v))
        out_shape, lse_shape = (*lead, tokens, heads, head_dim_v), (*lead, heads, tokens)
        dtype, device, empty = q.dtype, q.device, torch.empty
        part_shape, part_lse_shape = ((parts, *shape) if parts > 1 else shape for shape in (out_shape, lse_shape))
        # Described by tensors that take no memory: a copy for TMA, and out, are made by the call alone.
        meta_q, meta_k, meta_v = (like_meta(t) for t in (q, k, v))
        bound = self._bound(
            self._launches.forward_launch(
                ready_q(meta_q), ready_k(meta_k), ready_v(meta_v),
                meta_q.new_empty(part_shape, dtype=torch.float32 if parts > 1 else dtype),
                meta_q.new_empty(part_lse_shape, dtype=torch.float32),
                cu_seqlens_q=args.cu_seqlens_q, cu_seqlens_k=args.cu_seqlens_k, max_seqlen_q=args.max_seqlen_q,
                max_seqlen_k=args.max_seqlen_k, softmax_scale=args.softmax_scale, causal=args.causal,
                head_dim_v=head_dim_v, variant=self._variant, sm_count=self._device.sm_count, splits=parts,
            ),
            q.device.index or 0,
        )  # fmt: skip

        def forward(
            q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            out = empty(out_shape, dtype=dtype, device=device)
            lse = empty(lse_shape, dtype=torch.float32, device=device)
            cu_q, cu_k = args.cu_seqlens_q, args.cu_seqlens_k
            if cu_q is not None and cu_k is not None:
                cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
            bound(ready_q(q), ready_k(k), ready_v(v), out, lse, cu_q, cu_k, args.softmax_scale)
            return out, lse, None

        if parts == 1:
            return forward
        float32, join = torch.float32, self._join()

        def forward_in_parts(
            q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            part_out = empty(part_shape, dtype=float32, device=device)
            part_lse = empty(part_lse_shape, dtype=float32, device=device)
            bound(ready_q(q), ready_k(k), ready_v(v), part_out, part_lse, None, None, args.softmax_scale)
            out = empty(out_shape, dtype=dtype, device=device)
            lse = empty(lse_shape, dtype=float32, device=device)
            join(part_out, part_lse, out, lse)
            return out, lse, None

        return forward_in_parts

    def _parts(self, q: Tensor, k: Tensor, args: AttentionArgs) -> int:
        """Return how many parts each tile's keys are cut into."""
        if not _may_share(self._spec):
            return 1
        batch, tokens, heads, _ = q.shape
        rows = self._variant.consumers * self._launches.ROWS
        return self._choose_parts(
            tokens, k.shape[1], batch * heads, args.causal, self._tile_dim, rows, self._device.sm_count
        )

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        args: AttentionArgs,
        out: Tensor,
        lse: Tensor,
        rng: Tensor | None,
        dout: Tensor,
        dlse: Tensor | None,
    ) -> AttentionGrads:
        """Return the gradients; head sizes above 128 take our Triton kernels (same lse and out)."""
        if self._backward is not None:
            return self._backward(q, k, v, args, out, lse, dout, dlse)
        from vllm_accel.backends.triton import TritonAttention

        return TritonAttention(self._spec, self._device).backward(q, k, v, args, out, lse, rng, dout, dlse)


BACKEND = GluonHopperBackend()
