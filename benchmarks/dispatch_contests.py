"""The contests of `python -m benchmarks.dispatch`: which statements run against which.

The baseline "direct" is the leanest way to run the same kernel: the very callable and arguments that the cached plan
holds. Tensors rotate, so that no contestant works on data that is warmer than the others'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import Contest, Contestant
from vllm_accel import attention, attention_varlen
from vllm_accel.dispatch.backend import AttentionArgs
from vllm_accel.dispatch.plan import Plan
from vllm_accel.dispatch.spec import bucket
from vllm_accel.ops.run import PLANS

N_TENSORS = 8
#: Tiny on purpose: one token block of a small layer, so that the kernel hides as little as possible of the call.
TINY = {"batch": 1, "seqlen": 4, "heads": 2, "head_dim": 64}
LAYERS = 24
_CALL = "attention(q, k, v, causal=True)"
_DIRECT = "forward(q, k, v, args)"


def qkv(device: torch.device, number: int = N_TENSORS, grad: bool = False, **sizes: int) -> list[tuple[Tensor, ...]]:
    """Return `number` triples of (B, S, H, D) tensors in fp32 on a CPU, bf16 on a GPU."""
    s = {**TINY, **sizes}
    shape = (s["batch"], s["seqlen"], s["heads"], s["head_dim"])
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def draw() -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)

    return [(draw(), draw(), draw()) for _ in range(number)]


def plan_of(call: Callable[[], Any]) -> Plan:
    """Return the plan that a call makes and runs."""
    PLANS.clear()
    call()
    (plan,) = PLANS.last.values()
    return plan


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with torch's own function as a model's author would write it for (B, S, H, D) tensors."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def exact_hit(device: torch.device) -> Contest:
    """attention(), its kernel called directly, torch's function by hand, and what other libraries wrap around it."""
    rotation = qkv(device)
    with torch.no_grad():
        plan = plan_of(lambda: attention(*rotation[0], causal=True))
    names: dict[str, Any] = {"rotation": rotation, "attention": attention, "forward": plan.forward, "args": plan.args}
    contestants = {
        "direct": Contestant(_DIRECT),
        "attention": Contestant(_CALL),
        "sdpa by hand": Contestant(
            "sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)"
        ),
    }
    names["sdpa"] = F.scaled_dot_product_attention
    _add_transformers(names, contestants)
    _add_diffusers(names, contestants)
    return Contest(names, contestants)


def _add_transformers(names: dict[str, Any], contestants: dict[str, Contestant]) -> None:
    """Add the function behind attn_implementation="sdpa"; its (B, H, S, D) tensors are transposed beforehand."""
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except Exception:  # not installed, or broken on this machine: the row is left out
        return
    module: Any = torch.nn.Module()
    module.is_causal = True
    names |= {"hf": sdpa_attention_forward, "module": module}
    names["heads_first"] = [tuple(t.transpose(1, 2) for t in triple) for triple in names["rotation"]]
    contestants["transformers"] = Contestant("hf(module, q, k, v, None, scaling=0.125)", over="heads_first")


def _add_diffusers(names: dict[str, Any], contestants: dict[str, Contestant]) -> None:
    try:
        from diffusers.models.attention_dispatch import dispatch_attention_fn
    except Exception:
        return
    names["diffusers"] = dispatch_attention_fn
    contestants["diffusers"] = Contestant("diffusers(q, k, v, is_causal=True)")


def trivial_hits(device: torch.device) -> Contest:
    """Exact hits of several kinds of call, with a kernel that does nothing (call inside `trivial.installed`)."""
    rotation = qkv(device)
    q = rotation[0][0]
    batch, seqlen, heads, _ = q.shape
    packed = [tuple(t.flatten(0, 1) for t in triple) for triple in rotation]
    cu = torch.tensor([0, seqlen // 2, seqlen], dtype=torch.int32, device=device)
    with torch.no_grad():
        plan = plan_of(lambda: attention(*rotation[0], causal=True))
    names: dict[str, Any] = {
        "rotation": rotation,
        "mixed": [pair for both in zip(rotation, qkv(device, seqlen=seqlen + 3), strict=True) for pair in both],
        "packed": packed,
        "attention": attention,
        "varlen": attention_varlen,
        "forward": plan.forward,
        "args": plan.args,
        "sinks": torch.zeros(heads, device=device),
        "bias": torch.zeros(batch, 1, 1, seqlen, device=device),
        "lengths": {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen},
    }
    contestants = {
        "direct": Contestant(_DIRECT),
        "attention": Contestant(_CALL),
        "by name": Contestant("attention(q, k, v, causal=True, backend='trivial')"),
        "two shapes in turn": Contestant(_CALL, over="mixed"),
        "return_lse": Contestant("attention(q, k, v, causal=True, return_lse=True)"),
        "sinks": Contestant("attention(q, k, v, causal=True, sinks=sinks)"),
        "attn_bias": Contestant("attention(q, k, v, attn_bias=bias)"),
        "varlen": Contestant("varlen(q, k, v, causal=True, **lengths)", over="packed"),
    }
    return Contest(names, contestants)


def with_options(device: torch.device) -> Contest:
    """Hits of packed calls and calls with optional tensors over the kernel that really runs them."""
    rotation = qkv(device)
    batch, seqlen, heads, _ = rotation[0][0].shape
    cu = torch.tensor([0, seqlen // 2, seqlen], dtype=torch.int32, device=device)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen}
    packed = [tuple(t.flatten(0, 1) for t in triple) for triple in rotation]
    bias, sinks = torch.zeros(batch, 1, 1, seqlen, device=device), torch.zeros(heads, device=device)
    names: dict[str, Any] = {"rotation": rotation, "packed": packed, "attention": attention, "sinks": sinks}
    names |= {"varlen": attention_varlen, "bias": bias, "lengths": lengths}
    contestants: dict[str, Contestant] = {}
    for name, call, given, over in (
        ("sinks", "attention(q, k, v, causal=True, sinks=sinks)", {"sinks": sinks}, "rotation"),
        ("attn_bias", "attention(q, k, v, attn_bias=bias)", {"attn_bias": bias}, "rotation"),
        ("varlen", "varlen(q, k, v, causal=True, **lengths)", {"cu_seqlens_q": cu, "cu_seqlens_k": cu}, "packed"),
    ):
        scope = {**names, **dict(zip("qkv", names[over][0], strict=True))}
        with torch.no_grad():
            plan = plan_of(functools.partial(eval, call, scope))
        args: AttentionArgs = plan.args._replace(**given)
        names |= {f"forward_{name}": plan.forward, f"args_{name}": args}
        contestants[f"direct {name}"] = Contestant(f"forward_{name}(q, k, v, args_{name})", over=over)
        contestants[name] = Contestant(call, over=over)
    return Contest(names, contestants)


def bucket_hit(device: torch.device, number: int) -> Contest:
    """One query against a key length that no plan has seen, of a kind that was chosen before: `number` lengths."""
    longest = 320
    first = longest - number
    assert bucket(first) == bucket(longest - 1), "every length must fall into one quarter octave"
    ((_, keys, values),) = qkv(device, 1, seqlen=longest, heads=1, head_dim=16)
    ((q, _, _),) = qkv(device, 1, seqlen=1, heads=1, head_dim=16)
    rotation = [(q, keys[:, :n], values[:, :n]) for n in range(first, longest)]
    with torch.no_grad():
        plan = plan_of(lambda: attention(*rotation[0], causal=True))
    names = {"rotation": rotation, "attention": attention, "forward": plan.forward, "args": plan.args}
    contestants = {"direct": Contestant(_DIRECT, passes=1), "attention": Contestant(_CALL, passes=1)}
    return Contest(names, contestants, before_slice=PLANS.clear)


def decode_loop(device: torch.device, steps: int) -> Contest:
    """A growing decode, 24 layers of one shape per step, beside the same number of calls at the middle length."""
    first = 516  # up to 1015: torch's CPU kernel takes two blocks of 512 keys at all of these, so its time is linear
    caches = qkv(device, LAYERS, seqlen=first + steps, heads=1, head_dim=16)
    queries = [triple[0] for triple in qkv(device, LAYERS, seqlen=1, heads=1, head_dim=16)]

    def step(length: int) -> list[tuple[Tensor, ...]]:
        return [(q, k[:, :length], v[:, :length]) for q, (_, k, v) in zip(queries, caches, strict=True)]

    growing = [views for n in range(steps) for views in step(first + n)]
    constant = [views for _ in range(steps) for views in step(first + steps // 2)]
    with torch.no_grad():
        plan = plan_of(lambda: attention(*constant[0], causal=True))
    names = {"growing": growing, "constant": constant, "attention": attention}
    names |= {"forward": plan.forward, "args": plan.args}
    contestants = {
        "growing": Contestant(_CALL, over="growing", passes=1),
        "constant": Contestant(_CALL, over="constant", passes=1),
        "direct": Contestant(_DIRECT, over="growing", passes=1),
    }
    return Contest(names, contestants, before_slice=PLANS.clear)


class ByHand(torch.autograd.Function):
    """The leanest differentiable wrapper around a kernel: what a careful author would write for one kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Any, args: AttentionArgs) -> Tensor:
        """Run the kernel and keep what its backward needs."""
        out: Tensor
        out, lse, _ = kernel.forward(q, k, v, args)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.args = kernel, args
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Run the kernel's backward."""
        q, k, v, out, lse = ctx.saved_tensors
        grads = ctx.kernel.backward(q, k, v, ctx.args, out, lse, None, dout, None)
        return grads.dq, grads.dk, grads.dv, None, None


def gradients(device: torch.device) -> Contest:
    """Recorded forward, and forward with backward, over a hand-written autograd function around the same kernel."""
    rotation = qkv(device, grad=True)
    plan = plan_of(lambda: attention(*rotation[0], causal=True))
    names = {
        "rotation": rotation, "attention": attention, "by_hand": ByHand.apply, "kernel": plan.kernel,
        "args": plan.args, "grad": torch.autograd.grad, "ones": torch.ones_like(rotation[0][0]),
    }  # fmt: skip
    contestants = {
        "direct": Contestant("by_hand(q, k, v, kernel, args)"),
        "attention": Contestant(_CALL),
        "direct backward": Contestant("grad(by_hand(q, k, v, kernel, args), (q, k, v), ones)"),
        "attention backward": Contestant("grad(attention(q, k, v, causal=True), (q, k, v), ones)"),
    }
    return Contest(names, contestants, grad=True)


def compiled(device: torch.device, compiler: str) -> Contest:
    """The operator inside a compiled function beside torch's own attention compiled in the same way."""
    rotation = qkv(device)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q, k, v, causal=True)

    names: dict[str, Any] = {"rotation": rotation}
    names["ours"] = torch.compile(ours, fullgraph=True, backend=compiler)
    names["theirs"] = torch.compile(by_hand, fullgraph=True, backend=compiler)
    contestants = {"attention": Contestant("ours(q, k, v)"), "sdpa by hand": Contestant("theirs(q, k, v)")}
    return Contest(names, contestants)
