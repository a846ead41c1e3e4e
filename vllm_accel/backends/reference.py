"""Attention in plain PyTorch: every option, every device, O(S) extra memory forward and backward.

Queries go in chunks whose scores fit a fixed budget; the backward pass computes the scores again from the log-sum-exp
(Rabe and Staats 2021, Dao et al. 2022) instead of keeping them. fp32 inside, fp64 for fp64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vllm_accel.backends import gather
from vllm_accel.backends import reference_chunk as chunk
from vllm_accel.backends.reference_paged import PAGED_KERNEL, ReferencePagedKernel
from vllm_accel.dispatch.backend import AttentionArgs, AttentionGrads, TorchBackend
from vllm_accel.dispatch.capability import Capability, Rule
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.spec import PROMISES, AttentionSpec, Feature


def _batch_invariant_packed(spec: AttentionSpec, device: Device) -> str | None:
    packed = spec.features & (Feature.VARLEN | Feature.PAGED)
    if device.type != "cpu" and packed and Feature.BATCH_INVARIANT in spec.features:
        return "packed batch_invariant calls need the lengths on the host, which would synchronise the device"
    return None


class ReferenceBackend(TorchBackend):
    """The backend `reference`, alias `naive`."""

    name = "reference"
    capability = Capability(
        dtypes=frozenset(
            {
                torch.float16,
                torch.bfloat16,
                torch.float32,
                torch.float64,
                torch.float8_e4m3fn,
                torch.float8_e5m2,
            }
        ),
        features=functools.reduce(lambda a, b: a | b, Feature) & ~PROMISES,
        kv_dtypes=gather.KV_DTYPES,
        rules=(Rule("batch_invariant_packed", _batch_invariant_packed),),
    )

    def bind(self, spec: AttentionSpec, device: Device) -> ReferenceKernel | ReferencePagedKernel:
        """Return the kernel; one serves every dense and packed call, one every paged one."""
        return PAGED_KERNEL if Feature.PAGED in spec.features else KERNEL


class ReferenceKernel:
    """Attention by chunks of queries."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return out, lse and the seed of the dropout mask."""
        rng = None
        if args.dropout_p:
            rng = torch.randint(2**62, (2,), device=q.device)  # from the device's generator, without a host copy
        dtype = q.dtype if q.dtype.itemsize > 1 else torch.bfloat16  # FP8 queries give bf16
        if args.cu_seqlens_q is None:
            out, lse = _by_batch(chunk.forward, args, q, k, v, rng=rng)
            return out.to(dtype), lse, rng
        if q.device.type == "cpu":
            out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
            lse = out.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=chunk.compute_dtype(q.dtype))
            for rows, keys, one in _sequences(args):
                part, part_lse = chunk.forward(one, q[None, rows], k[None, keys], v[None, keys], rng=rng)
                out[rows], lse[:, rows] = part[0].to(dtype), part_lse[0]
            return out, lse, rng
        pad = chunk.Padding(args, q.shape[0], k.shape[0])
        out, lse = chunk.forward(args, pad.queries(q), pad.keys(k), pad.keys(v), rng=rng, lengths=pad.lengths)
        return pad.unpad_queries(out).to(dtype), pad.unpad_lse(lse), rng

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
        """Return the gradients from out and lse, with the scores computed again."""
        if args.cu_seqlens_q is None:
            dq, dk, dv, dbias, dsinks = _by_batch(chunk.backward, args, q, k, v, out, lse, dout, dlse, rng=rng)
        elif q.device.type == "cpu":
            dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
            dbias, dsinks = None, None
            for rows, keys, one in _sequences(args):
                part_dlse = None if dlse is None else dlse[None, :, rows]
                grads = chunk.backward(
                    one, q[None, rows], k[None, keys], v[None, keys], out[None, rows], lse[None, :, rows],
                    dout[None, rows], part_dlse, rng=rng,
                )  # fmt: skip
                dq[rows], dk[keys], dv[keys] = (g[0].to(q.dtype) for g in grads[:3])
                dsinks = grads.dsinks if dsinks is None or grads.dsinks is None else dsinks + grads.dsinks
        else:
            pad = chunk.Padding(args, q.shape[0], k.shape[0])
            grads = chunk.backward(
                args, pad.queries(q), pad.keys(k), pad.keys(v), pad.queries(out), pad.lse(lse), pad.queries(dout),
                None if dlse is None else pad.lse(dlse, fill=0.0), rng=rng, lengths=pad.lengths,
            )  # fmt: skip
            dq, dk, dv = pad.unpad_queries(grads.dq), pad.unpad_keys(grads.dk), pad.unpad_keys(grads.dv)
            dbias, dsinks = None, grads.dsinks
        bias, sinks = args.attn_bias, args.sinks
        if sinks is not None:
            dsinks = sinks.new_zeros(sinks.shape) if dsinks is None else dsinks.to(sinks.dtype)
        if dbias is not None and bias is not None:
            dbias = dbias.to(bias.dtype)
        return AttentionGrads(dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, dsinks)


def _by_batch(run: Callable[..., Any], args: AttentionArgs, *tensors: Tensor | None, rng: Tensor | None) -> Any:
    """Run a dense call at once, or sequence by sequence where its bits must not depend on the batch."""
    first = tensors[0]
    assert first is not None
    if not args.batch_invariant or first.shape[0] == 1:
        return run(args, *tensors, rng=rng)
    parts = [
        run(_row(args, b), *(None if t is None else t[b : b + 1] for t in tensors), rng=rng)
        for b in range(first.shape[0])
    ]
    if run is chunk.forward:
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    dq, dk, dv = (torch.cat([part[i] for part in parts]) for i in range(3))
    dbias = None
    if parts[0].dbias is not None and args.attn_bias is not None:
        dbias = torch.cat([part.dbias for part in parts])
        dbias = dbias.sum(0, keepdim=True) if args.attn_bias.shape[0] == 1 else dbias
    dsinks = None if parts[0].dsinks is None else torch.stack([part.dsinks for part in parts]).sum(0)
    return AttentionGrads(dq, dk, dv, dbias, dsinks)


def _row(args: AttentionArgs, b: int) -> AttentionArgs:
    """Return the arguments of one sequence of a dense batch."""

    def pick(tensor: Tensor | None, rank: int) -> Tensor | None:
        if tensor is None or tensor.dim() < rank or tensor.shape[0] == 1:
            return tensor
        return tensor[b : b + 1]

    return args._replace(
        alibi_slopes=pick(args.alibi_slopes, 2),
        attn_bias=pick(args.attn_bias, 4),
        q_descale=pick(args.q_descale, 2),
        k_descale=pick(args.k_descale, 2),
        v_descale=pick(args.v_descale, 2),
    )


def _sequences(args: AttentionArgs) -> Iterator[tuple[slice, slice, AttentionArgs]]:
    """Yield the query rows, key rows and arguments of each packed sequence; lengths are read on the host."""
    assert args.cu_seqlens_q is not None and args.cu_seqlens_k is not None
    ends_q, ends_k = args.cu_seqlens_q.tolist(), args.cu_seqlens_k.tolist()
    for b in range(len(ends_q) - 1):
        if ends_q[b] == ends_q[b + 1]:
            continue
        one = _row(args, b)._replace(cu_seqlens_q=None, cu_seqlens_k=None)
        yield slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1]), one


KERNEL = ReferenceKernel()
BACKEND = ReferenceBackend()
