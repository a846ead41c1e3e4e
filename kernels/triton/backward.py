"""Launch the backward pass of attention: from checked tensors to gradients.

Algorithm: Dao 2023, "FlashAttention-2", in two forms.

* split: `backward_dkv` (dK and dV, by tiles of keys) and `backward_dq` (dQ, by tiles of rows). Seven products per
  tile, no atomics, the same bits on every run.
* fused: one pass over the tiles of keys that also adds into an fp32 dQ. Five products per tile.

Both start from delta (`backward_delta`). The gradient of a bias is a kernel of its own (`backward_bias`), and so is
that of the sinks. Extra memory: delta, and for the fused form dQ in fp32; nothing is quadratic but a bias gradient
of full size. Grids depend on shapes alone, nothing is read back: a CUDA graph may capture it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_accel.kernels.triton import backward_launch as launches
from vllm_accel.kernels.triton.backward_launch import Problem, block_of
from vllm_accel.kernels.triton.launch import Bound, Launch
from vllm_accel.kernels.triton.tiles import Tile, lookup


class Gradients(NamedTuple):
    """Gradients in the dtypes of the inputs; None where the input was not given or needs none."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    dsinks: Tensor | None


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rng: Tensor | None,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    tiles: Mapping[str, Tile],
    softmax_scale: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    attn_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    bias_grad: bool = False,
    sinks_grad: bool = False,
    tf32: bool = False,
) -> Gradients:
    """Return the gradients of an attention call (Dao 2023), given what the forward pass returned.

    Args:
        q ... dlse: see `Problem`. A dout whose innermost stride is not 1 is copied.
        tiles: of `choose_tiles`; with an entry "fused" that form runs, and the bits of dq differ from run to run.
        bias_grad: also compute that of attn_bias, which has to be floating. sinks_grad: that of sinks; takes the split
            form, whose dQ kernel has what it needs.
        tf32: products of fp32 inputs may be rounded to TF32.
    """
    left, right = window_size
    problem = Problem(
        q, k, v, out, lse.contiguous(), rng, dout if dout.stride(-1) == 1 else dout.contiguous(),
        None if dlse is None else dlse.to(torch.float32).contiguous(),
        cu_seqlens_q, cu_seqlens_k, alibi_slopes, attn_bias, sinks, q_descale, k_descale, v_descale,
        max_seqlen_q, max_seqlen_k, softmax_scale, (left, 0 if causal else right), softcap, dropout_p, tf32,
    )  # fmt: skip
    delta = torch.empty_like(problem.lse)
    start(launches.delta_launch(problem, delta))
    # Rows of no sequence are written by no program: their gradient is the 0 that is here from the start.
    new = torch.empty_like if cu_seqlens_q is None else torch.zeros_like
    dk, dv = (new(t, memory_format=torch.contiguous_format) for t in (k, v))
    row_dot = torch.zeros_like(delta) if sinks_grad else None
    if "fused" in tiles and row_dot is None:
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        start_tile(lambda tile: launches.dkv_launch(problem, delta, dk, dv, dq, tile), tiles["fused"])
        dq = dq.to(q.dtype)
    else:
        dq = new(q, memory_format=torch.contiguous_format)
        start_tile(lambda tile: launches.dkv_launch(problem, delta, dk, dv, None, tile), tiles["dkv"])
        start_tile(lambda tile: launches.dq_launch(problem, delta, dq, row_dot, tile), tiles["dq"])
    dbias = bias_gradient(problem, delta, tiles["bias"]) if bias_grad else None
    dsinks = None
    if row_dot is not None and sinks is not None:
        dsinks = torch.empty_like(sinks, memory_format=torch.contiguous_format)
        start(launches.sinks_launch(problem, row_dot, dsinks))
    return Gradients(dq, dk, dv, dbias, dsinks)


def start(launch: Launch, made_of: tuple[Tile, Callable[[Tile], Launch]] | None = None) -> None:
    """Launch. Once a kernel of the kind is compiled it is called directly (see `launch.Bound`): 20 us less each."""
    tensors = tuple(itertools.takewhile(lambda a: a is None or isinstance(a, Tensor), launch.args))
    floats = tuple(itertools.takewhile(lambda a: isinstance(a, float), launch.args[len(tensors) :]))
    Bound(launch, made_of)(tensors, floats)


def start_tile(make: Callable[[Tile], Launch], tile: Tile) -> None:
    """Launch with a tile, or the next smaller one that fits the device; tensors and floats must not depend on it."""
    start(make(tile), (tile, make))


def choose_tiles(
    arch: str, dtype: torch.dtype, head_dim: int, head_dim_v: int, *, deterministic: bool, heavy: bool = False
) -> dict[str, Tile]:
    """Return the tiles of a kind of call: "dkv", "dq" and "bias", and "fused" where that form is the better one.

    Args:
        arch: of `tiles.lookup`. deterministic: never "fused".
        heavy: the logits need more registers (softcap, ALiBi, bias or dropout).
    """
    size = f"{'fp32_' if dtype is torch.float32 else ''}d{max(block_of(head_dim), block_of(head_dim_v))}"

    def find(kind: str) -> Tile:
        key = f"{kind}_{size}"
        return lookup("backward", arch, [f"{key}_heavy", key] if heavy else [key])

    found = {kind: find(kind) for kind in ("dkv", "dq", "bias")}
    if not deterministic:
        with contextlib.suppress(LookupError):  # the table has an entry only where five products beat seven
            found["fused"] = find("fused")
    return found


def bias_gradient(problem: Problem, delta: Tensor, tile: Tile) -> Tensor:
    """Run the kernel that computes the gradient of attn_bias, and add its parts."""
    assert problem.attn_bias is not None
    bias = problem.attn_bias
    parts = launches.bias_parts(problem, tile)
    dtype = bias.dtype if parts == 1 else torch.float32
    sums = torch.empty((parts, *bias.shape), dtype=dtype, device=bias.device)
    start_tile(lambda tile: launches.bias_launch(problem, delta, sums, tile), tile)
    return sums[0] if parts == 1 else sums.sum(0).to(bias.dtype)
