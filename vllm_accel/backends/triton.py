"""Our own attention in Triton: NVIDIA GPUs from sm_80 on and AMD's MI200 and MI300, with every option of the library.

The kernels are in ``kernels/triton``. They take the tensors as they are: any strides but an innermost 1, any head size
up to 256, masks, biases and factors broadcast in place, packed rows past the last sequence whatever they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads
from vllm_accel.dispatch.capability import Capability, Guard, Rule
from vllm_accel.dispatch.device import Device, detect
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.errors import Reason

if TYPE_CHECKING:
    from vllm_accel.kernels.triton.launch import Launch
    from vllm_accel.kernels.triton.tiles import Tile
    from vllm_accel.ops.arguments import AttentionSizes

Forward = Callable[[Tensor, Tensor, Tensor, AttentionArgs], tuple[Tensor, "Tensor | None", "Tensor | None"]]

#: Features whose logits need more registers, and so other tiles.
_HEAVY = (
    Feature.SOFTCAP
    | Feature.ALIBI
    | Feature.BIAS
    | Feature.MASK
    | Feature.DROPOUT
    | Feature.WINDOW_LEFT
    | Feature.WINDOW_RIGHT
    | Feature.Q_DESCALE
    | Feature.K_DESCALE
)
_TENSOR_FIELDS = AttentionArgs._fields.index("max_seqlen_q")
#: A launch has at most this many blocks along its first axis.
_MAX_BLOCKS = 2**31 - 1
_LEAST_ROWS = 16  # of a tile: what tl.dot takes
#: The widest tiles in the tables.
_MAX_HEAD_DIM, _MAX_PAGED_HEAD_DIM = 256, 512


def _dropout(spec: AttentionSpec, device: Device) -> str | None:
    if Feature.DROPOUT in spec.features and Feature.BATCH_INVARIANT in spec.features:
        return "the dropout mask of a sequence depends on its place in the batch"
    return None


def _head_dim(spec: AttentionSpec, device: Device) -> str | None:
    largest = max(spec.head_dim, spec.head_dim_v)
    if Feature.MLA in spec.features:
        latent, rope = spec.head_dim_v, spec.head_dim - spec.head_dim_v
        if latent > _MAX_PAGED_HEAD_DIM or not 0 < rope <= 64:
            return f"does MLA with up to 512 latent and 1 to 64 rotary channels; this call has {latent} and {rope}"
    elif largest > (limit := _MAX_PAGED_HEAD_DIM if Feature.PAGED in spec.features else _MAX_HEAD_DIM):
        return f"head sizes up to {limit}; this call has {largest}"
    return None


def _blocks(spec: AttentionSpec, sizes: AttentionSizes) -> str | None:
    if Feature.PAGED in spec.features:
        return None
    blocks = -(-sizes.seqlen_q // _LEAST_ROWS) * spec.num_heads * (sizes.batch + 1)
    if blocks > _MAX_BLOCKS:
        return f"a launch has at most {_MAX_BLOCKS} blocks; this call may need {blocks}"
    return None


def _compile_seconds(spec: AttentionSpec) -> float:
    """Return what compiling a kind of call takes; later processes find it on disk.

    An H200, `python -m benchmarks.first_calls --jobs 8`, 2026-11-30: 1.3 to 1.9 s for a forward, dense, packed or over
    pages; 3.8 and 4.2 s with gradients, which take three to five more kernels. Calls with three options and more, and
    the decode of today, were compiled without a GPU only, on two cores: in 2.3 to 3.1 s and 1.1 to 1.7 s, where a plain
    forward took 1 s.
    """
    if Feature.GRAD in spec.features:
        return 4.0
    return 3.0 if (spec.features & _HEAVY).value.bit_count() > 2 else 1.9


class TritonBackend:
    """The backend `triton`."""

    name = "triton"
    capability = Capability(
        platforms=frozenset({"cuda", "rocm"}),
        # Compiled for 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0 (tests/test_triton_forward_compile.py); the others take the
        # tiles of the relative that is named in kernels/triton/tiles.py.
        compute_capabilities=frozenset({(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}),
        archs=frozenset({"gfx90a", "gfx942"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        kv_dtypes=frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.int8}),
        features=Feature.VARLEN
        | Feature.PAGED
        | Feature.MLA
        | Feature.GRAD
        | Feature.LSE
        | Feature.LSE_GRAD
        | Feature.CAUSAL
        | Feature.WINDOW_LEFT
        | Feature.WINDOW_RIGHT
        | Feature.SCALE
        | Feature.SOFTCAP
        | Feature.ALIBI
        | Feature.BIAS
        | Feature.MASK
        | Feature.BIAS_GRAD
        | Feature.SINKS
        | Feature.SINKS_GRAD
        | Feature.DROPOUT
        | Feature.Q_DESCALE
        | Feature.K_DESCALE
        | Feature.V_DESCALE
        | Feature.DETERMINISTIC
        | Feature.BATCH_INVARIANT
        | Feature.GQA
        | Feature.VALUE_DIM,
        first_call_seconds=_compile_seconds,
        rules=(Rule("head_dim", _head_dim), Rule("dropout_position", _dropout)),
        guards=(Guard("grid", _blocks),),
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
        """Say why Triton cannot compile here: not importable, no C compiler, an assembler that is too old, no cache."""
        from vllm_accel.kernels.triton.toolchain import problems

        arch = detect(torch.device("cuda", torch.cuda.current_device())).arch if torch.cuda.is_available() else None
        return next((Reason(p.code, p.text) for p in problems(arch)), None)

    def bind(self, spec: AttentionSpec, device: Device) -> Any:
        """Return the kernel for calls of this kind: dense and packed, or paged."""
        if Feature.PAGED in spec.features:
            from vllm_accel.backends.triton_paged import bind_paged

            return bind_paged(spec, device)
        return TritonAttention(spec, device)


class TritonAttention:
    """Dense and packed attention of one kind of call on one kind of device."""

    def __init__(self, spec: AttentionSpec, device: Device) -> None:
        # Imported here: declaring a backend must not import Triton (0.5 s).
        from vllm_accel.kernels.triton import forward_launch
        from vllm_accel.kernels.triton.launch import Bound

        self._launches, self._bound = forward_launch, Bound
        self._spec, self._device = spec, device
        self._heavy = bool(spec.features & _HEAVY)
        self._tile = forward_launch.choose_tile(
            device.arch, spec.dtype, spec.head_dim, spec.head_dim_v,
            causal=Feature.CAUSAL in spec.features, heavy=self._heavy,
        )  # fmt: skip
        self._by_tma = forward_launch.by_tma(
            device.arch, spec.dtype, spec.head_dim, spec.head_dim_v, heavy=self._heavy,
            packed=Feature.VARLEN in spec.features, invariant=Feature.BATCH_INVARIANT in spec.features,
        )  # fmt: skip
        if self._by_tma:
            self._tma_tile = forward_launch.choose_tile(
                device.arch, spec.dtype, spec.head_dim, spec.head_dim_v, causal=False, heavy=False, tma=True
            )
        self._fp32_products = spec.dtype is torch.float32 and device.platform == "cuda"
        # Stand in for what a launch is described with before it exists.
        self._lse = torch.empty(0, dtype=torch.float32, device="meta")
        self._rng = torch.empty(0, dtype=torch.int64, device="meta")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return out, lse (None unless needed) and the key of the dropout mask."""
        return self.prepare(q, k, v, args)(q, k, v, args)

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> Forward:
        """Return `forward` for calls with these sizes, strides and options; tensors and floats may differ."""
        from vllm_accel.backends.triton_decode import prepare_shared, shares_keys

        if shares_keys(self._spec, q, k, v, args, self._device.sm_count):
            return prepare_shared(self._spec, self._device, q, tidy(args))
        return self.prepare_whole(q, k, v, args)

    def prepare_whole(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> Forward:
        """Return `forward` by the kernel whose programs have all keys of their queries."""
        if not self._fp32_products:
            return self._bind(q, k, v, args, tf32=False)
        # The switch may be turned between two calls of one plan. The other way is bound by the call that needs it: what
        # is bound and not launched yet holds the tensors it was described with.
        ways: dict[bool, Forward] = {}

        def forward(
            q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            tf32 = tf32_allowed()
            way = ways.get(tf32)
            if way is None:
                way = ways[tf32] = self._bind(q, k, v, args, tf32)
            return way(q, k, v, args)

        return forward

    def _bind(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, tf32: bool) -> Forward:
        launches = self._launches
        worth = self._by_tma and launches.worth_tma(q, k, args.causal, self._tile.block_m, self._device.sm_count)
        if not worth or not launches.describable(q, k, v):
            return self._bind_way(q, k, v, args, tf32, tma=False)
        ways: dict[bool, Forward] = {}

        def forward(
            q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            tma = not (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15
            way = ways.get(tma)
            if way is None:  # bound by the call that needs it, as above
                way = ways[tma] = self._bind_way(q, k, v, args, tf32, tma)
            return way(q, k, v, args)

        return forward

    def _bind_way(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, tf32: bool, tma: bool) -> Forward:
        lse = self._lse if args.need_lse else None
        rng = self._rng if args.dropout_p else None
        described = tidy(args)
        tile = self._tma_tile if tma else self._tile

        def launch(tile: Tile) -> Launch:
            made: Launch = self._launches.forward_launch(q, k, v, q, lse, rng, described, tile, tf32, tma)
            return made

        return _prepared(self._bound(made_of=(tile, launch)), q, v, args)

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
        """Return the gradients."""
        from vllm_accel.kernels.triton import backward

        spec, args = self._spec, tidy(args)
        tiles = backward.choose_tiles(
            self._device.arch, spec.dtype, spec.head_dim, spec.head_dim_v,
            deterministic=args.deterministic or args.batch_invariant, heavy=self._heavy,
        )  # fmt: skip
        tensors: dict[str, Any] = dict(zip(AttentionArgs._fields, args[:_TENSOR_FIELDS], strict=False))
        grads = backward.backward(
            q, k, v, out, lse, rng, dout, dlse, tiles=tiles, **tensors, softmax_scale=args.softmax_scale,
            max_seqlen_q=args.max_seqlen_q, max_seqlen_k=args.max_seqlen_k, causal=args.causal,
            window_size=args.window_size, softcap=args.softcap, dropout_p=args.dropout_p,
            bias_grad=Feature.BIAS_GRAD in spec.features, sinks_grad=Feature.SINKS_GRAD in spec.features,
            tf32=self._fp32_products and tf32_allowed(),
        )  # fmt: skip
        return AttentionGrads(*grads)


def _prepared(bound: Any, q: Tensor, v: Tensor, args: AttentionArgs) -> Forward:
    """Return the function that a plan calls: allocate, launch."""
    *lead, tokens, heads, _ = q.shape
    out_shape = (*lead, tokens, heads, v.shape[-1])
    lse_shape = (*lead, heads, tokens) if args.need_lse else None
    dtype, device, empty = q.dtype, q.device, torch.empty
    dropout, untidy = bool(args.dropout_p), any(t is not None and not t.is_contiguous() for t in _small(args))

    def forward(q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if untidy:
            args = tidy(args)
        out = empty(out_shape, dtype=dtype, device=device)
        lse = empty(lse_shape, dtype=torch.float32, device=device) if lse_shape is not None else None
        # Drawn on the device from torch's generator: reproducible, no synchronisation, and new numbers in every
        # replay of a CUDA graph.
        rng = torch.randint(2**62, (2,), device=device) if dropout else None
        bound((q, k, v, out, lse, *args[:_TENSOR_FIELDS], rng), (args.softmax_scale, args.softcap, args.dropout_p))
        return out, lse, rng

    return forward


def _small(args: AttentionArgs) -> tuple[Tensor | None, ...]:
    """Return the tensors that the kernels read as contiguous: all but the bias, whose strides they take."""
    return (
        args.cu_seqlens_q, args.cu_seqlens_k, args.alibi_slopes, args.sinks, args.q_descale, args.k_descale,
        args.v_descale,
    )  # fmt: skip


def tidy(args: AttentionArgs) -> AttentionArgs:
    """Return the arguments with the small tensors contiguous, and windows that no sum of positions overflows with."""
    changes: dict[str, Any] = {}
    if any(t is not None and not t.is_contiguous() for t in _small(args)):
        names = ("cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sinks", "q_descale", "k_descale", "v_descale")
        changes = {name: tensor.contiguous() for name in names if (tensor := getattr(args, name)) is not None}
    left, right = args.window_size
    widest = args.max_seqlen_q + args.max_seqlen_k
    if left > widest or right > widest:
        changes["window_size"] = (min(left, widest), min(right, widest))
    return args._replace(**changes) if changes else args


def tf32_allowed() -> bool:
    """Tell whether torch lets fp32 products round to TF32; IEEE where it cannot say (it raises on mixed settings)."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:
        return False


BACKEND = TritonBackend()
