"""Paged and latent attention in our own Triton kernels: what `triton` does for a spec with Feature.PAGED."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends.triton import tf32_allowed
from vllm_accel.dispatch.backend import PagedArgs
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import AttentionSpec, Feature
from vllm_accel.kernels.triton import paged_launch, splits
from vllm_accel.kernels.triton.launch import Bound, Launch
from vllm_accel.kernels.triton.tiles import Tile

#: Prepared calls that are kept: one per shape, and a decode that grows has a new one per quarter octave.
_KEPT = 256
_NO_OPTIONS = (None,) * 5


def bind_paged(spec: AttentionSpec, device: Device, num_splits: int = 0) -> TritonPaged:
    """Return the kernel for paged calls of this kind, MLA included.

    Args:
        num_splits: forced, for tests and measurements; 0 chooses by the device.
    """
    return TritonPaged(spec, device, num_splits)


class Prepared:
    """A call whose sizes, strides and options are known: it allocates, and launches."""

    __slots__ = ("_device", "_dtype", "_launches", "_lse_shape", "_native_e4m3", "_nowhere", "_out_shape", "_scratch")

    def __init__(
        self, launches: list[tuple[Bound, Bound | None]], scratch: int, out: Tensor, lse: Tensor | None, native: bool,
        grows: bool,
    ) -> None:  # fmt: skip
        self._launches, self._scratch, self._native_e4m3 = launches, scratch, native
        # Kernels are the same whether there are partial results or not: they have an address in any case.
        self._nowhere = torch.empty(1, dtype=torch.float32, device=out.device) if grows else None
        self._out_shape, self._dtype, self._device = out.shape, out.dtype, out.device
        self._lse_shape = None if lse is None else lse.shape

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, where: paged_launch.Where, options: paged_launch.Options,
        softmax_scale: float, softcap: float,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return out and lse (None unless it is needed)."""
        device, shape = self._device, self._lse_shape
        out = torch.empty(self._out_shape, dtype=self._dtype, device=device)
        lse = None if shape is None else torch.empty(shape, dtype=torch.float32, device=device)
        part = torch.empty(self._scratch, dtype=torch.float32, device=device) if self._scratch else self._nowhere
        native = self._native_e4m3
        tensors = paged_launch.attention_tensors(q, k_cache, v_cache, out, lse, part, where, options, native)
        for attention, combine in self._launches:
            attention(tensors, (softmax_scale, softcap))
            if combine is not None and part is not None:
                combine(paged_launch.combine_tensors(out, lse, part, where, options[1]))
        return out, lse


class TritonPaged:
    """Paged attention of one kind. Launches are prepared once per shape; a call allocates, and launches them."""

    def __init__(
        self, spec: AttentionSpec, device: Device, num_splits: int = 0, lie: paged_launch.Lie = "paged"
    ) -> None:
        """Args: lie: how keys lie (see `triton_decode`)."""
        self._lie = lie
        # Ampere has no instruction for e4m3 and Triton refuses the type there; e5m2 is the upper half of a float16.
        self._chip = paged_launch.chip_of(device.arch)
        self._mla = Feature.MLA in spec.features
        self._fp32_products = spec.dtype is torch.float32 and device.platform == "cuda"
        self._num_splits = num_splits
        self._gpu = splits.Gpu(device.sm_count or 64, device.shared_memory_per_block or splits.Gpu(0).shared)
        self._out_dtype = torch.bfloat16 if spec.dtype.itemsize == 1 else spec.dtype
        kind = (spec.head_dim, spec.head_dim_v, spec.dtype, spec.kv_dtype, self._mla)

        def tile_for(rows: int, form: str) -> Tile:
            return paged_launch.choose_tile(device.arch, rows, *kind, form)

        self._tile_for: Callable[[int, str], Tile] = tile_for
        self._prepared: dict[Any, Prepared] = {}

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs) -> tuple[Tensor, Tensor | None]:
        """Compute out and lse; see `dispatch.backend.PagedKernel`."""
        kinds: tuple[Any, ...] = _NO_OPTIONS
        options = paged_launch.options_of(args)
        if any(t is not None for t in options):
            options = paged_launch.contiguous(options)
            kinds = tuple([None if t is None else (t.dim(), t.dtype) for t in options])
        table = args.block_table
        tf32 = self._fp32_products and tf32_allowed()
        key = (
            q.shape, q.stride(), k_cache.shape, k_cache.stride(), v_cache.shape, v_cache.stride(), table.shape,
            table.stride(0), args.max_seqlen_q, args.max_seqlen_k, args.causal, args.window_size, args.softcap != 0.0,
            args.need_lse, args.batch_invariant, kinds, tf32, q.device,
        )  # fmt: skip
        prepared = self._prepared.get(key)
        if prepared is None:
            alibi, sinks, q_by, k_by, v_by = options
            tidy = args._replace(alibi_slopes=alibi, sinks=sinks, q_descale=q_by, k_descale=k_by, v_descale=v_by)
            prepared = self.prepare(q, k_cache, v_cache, tidy, tf32)
            if len(self._prepared) >= _KEPT:
                self._prepared.clear()
            self._prepared[key] = prepared
        where = paged_launch.where_of(args)
        return prepared(q, k_cache, v_cache, where, options, args.softmax_scale, args.softcap)

    def prepare(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, args: PagedArgs, tf32: bool = False) -> Prepared:
        """Return what computes calls with these sizes, strides and options, whose small tensors are contiguous."""
        tokens, heads = q.shape[:2]
        out = torch.empty((tokens, heads, v_cache.shape[3]), dtype=self._out_dtype, device=q.device)
        lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device) if args.need_lse else None
        sizes = paged_launch.sizes_of(q, v_cache, args, mla=self._mla, lie=self._lie)
        works = splits.plan_work(sizes, self._tile_for, self._gpu, self._num_splits)
        scratch = splits.scratch(works, sizes)
        grows = works[-1].grows
        part = torch.empty(max(scratch, 1), dtype=torch.float32, device=q.device) if scratch or grows else None
        launches: list[tuple[Bound, Bound | None]] = []
        for work in works:

            def make(tile: Tile, work: splits.Work = work) -> Launch:
                return paged_launch.attention_launch(
                    splits.with_tile(work, tile, sizes), q, k_cache, v_cache, out, lse, part, args,
                    chip=self._chip, mla=self._mla, tf32=tf32, lie=self._lie,
                )  # fmt: skip

            joined = None
            if work.split and not work.teams and part is not None:
                joined = Bound(paged_launch.combine_launch(work, out, lse, part, args, self._lie))
            launches.append((Bound(made_of=(work.tile, make)), joined))
        return Prepared(launches, scratch, out, lse, self._chip.native_e4m3, grows)
