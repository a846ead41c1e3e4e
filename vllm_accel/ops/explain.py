"""`explain`: which backend a call would run, and why not the others. Launches nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from vllm_accel.dispatch import device as devices
from vllm_accel.dispatch import override
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.selection import Selection
from vllm_accel.dispatch.selector import Question, assumes_available, select
from vllm_accel.ops import attention as attention_ops
from vllm_accel.ops import gemm as gemm_ops
from vllm_accel.ops import gemm_arguments, gemm_run, moe_arguments, run
from vllm_accel.ops import mla as mla_ops
from vllm_accel.ops import moe as moe_ops
from vllm_accel.ops import paged as paged_ops
from vllm_accel.ops.arguments import Options, describe
from vllm_accel.ops.extras import Extras, needs_grad, with_four_dims
from vllm_accel.ops.paged_arguments import PagedOptions, PagedTensors, describe_paged

_Described = tuple[Any, Any, tuple[str, ...] | None, str]


def explain(fn: Callable[..., Any], *args: Any, device: Device | str | None = None, **kwargs: Any) -> Selection:
    """Say which backend ``fn(*args, **kwargs)`` would run, and the reasons against every other one.

    Walks the same code as the call, under the same settings and `use_backend` contexts, and launches nothing.

    Args:
        fn: a public call: `attention`, `attention_varlen`, `attention_paged`, `attention_mla`, `gemm`,
            `grouped_gemm`, `scaled_gemm` or `fused_moe`.
        *args, **kwargs: its arguments; tensors may be on the ``meta`` device, which stands for this machine's GPU.
        device: judge for another device: a `Device`, or a short name such as ``"h100"``, ``"t4"``, ``"mi300x"``.
            Where this machine has no such device, packages are taken as installed and the result says so.

    Returns:
        A `Selection`: chosen, candidates with reasons, what decided. ``print`` it, or use it as data.

    Raises:
        TypeError: fn is not a call that this library dispatches. ValueError, TypeError: wrong arguments, as the call.
    """
    describer = _DESCRIBE.get(fn)
    if describer is None:
        known = ", ".join(sorted(f.__name__ for f in _DESCRIBE))
        raise TypeError(f"explain takes one of {known}, not {fn!r}")
    bound = inspect.signature(fn).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    spec, sizes, asked, asked_by = describer(given)
    first: torch.Tensor = next(value for value in given.values() if isinstance(value, torch.Tensor))
    where = _device(device, first.device)
    question = Question(
        op="gemm" if fn in _PRODUCTS else "attention",
        spec=spec,
        device=where,
        asked=asked,
        asked_by=asked_by,
        assume_available=assumes_available(where),
    )
    return select(question, sizes)


def _device(device: Device | str | None, of_tensor: torch.device) -> Device:
    if isinstance(device, Device):
        return device
    if device is None:
        # A meta tensor stands for one on the accelerator of this machine, where there is one.
        elsewhere = of_tensor.type == "meta" and torch.cuda.is_available()
        return devices.detect(torch.device("cuda") if elsewhere else of_tensor)
    if device in devices.PRESETS or not _is_torch_name(device):
        return devices.preset(device)
    return devices.detect(torch.device(device))


def _is_torch_name(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def _attention(given: dict[str, Any]) -> _Described:
    options = Options(*(given[name] for name in Options._fields))
    bias = with_four_dims(given.get("attn_bias"))
    extras = Extras(*(bias if name == "attn_bias" else given.get(name) for name in Extras._fields))
    lengths = (given["max_seqlen_q"], given["max_seqlen_k"]) if "max_seqlen_q" in given else None
    q, k, v = given["q"], given["k"], given["v"]
    grad = needs_grad(q, k, v, extras)
    max_q, max_k = lengths or (None, None)
    described = describe(q, k, v, extras, options, max_q, max_k, grad)
    asked, asked_by = run.asked_for(given["backend"], override.variable("attention").get())
    return run.FAMILY.make_spec(described.kind), described.sizes, asked, asked_by


def _paged(given: dict[str, Any]) -> _Described:
    mla = "kv_cache" in given
    k_cache: Any = given.get("k_cache")
    v_cache: Any = given.get("v_cache")
    if mla:
        k_cache, v_cache = mla_ops.views(given["kv_cache"], given["head_dim_v"])
        given = {**given, "k_descale": given["kv_descale"], "v_descale": given["kv_descale"]}
    tensors = PagedTensors(**{name: given.get(name) for name in PagedTensors._fields})  # type: ignore[arg-type]
    options = PagedOptions(**{name: given[name] for name in PagedOptions._fields[:-1]}, mla=mla)
    described = describe_paged(given["q"], k_cache, v_cache, tensors, options)
    asked, asked_by = run.asked_for(given["backend"], override.variable("attention").get())
    return run.FAMILY.make_spec(described.kind), described.sizes, asked, asked_by


def _gemm(given: dict[str, Any]) -> _Described:
    args, options = gemm_ops.arguments(**{name: value for name, value in given.items() if name != "backend"})
    grad = gemm_run.needs_grad(given["a"], given["b"], args.bias)
    described = gemm_arguments.describe(given["a"], given["b"], args, options, grad)
    asked, asked_by = gemm_run.asked_for(given["backend"], override.variable("gemm").get())
    return gemm_arguments.spec_of(described.kind), described.sizes, asked, asked_by


def _moe(given: dict[str, Any]) -> _Described:
    x, w_gate_up, w_down = given["x"], given["w_gate_up"], given["w_down"]
    rest = {name: value for name, value in given.items() if name not in ("x", "backend")}
    args, options = moe_ops.arguments(**rest)
    grad = gemm_run.needs_grad(x, w_gate_up, w_down, args.topk_weights, args.bias_gate_up, args.bias_down)
    described = moe_arguments.describe_moe(x, w_gate_up, w_down, args, options, grad)
    asked, asked_by = gemm_run.asked_for(given["backend"], override.variable("gemm").get())
    return gemm_arguments.spec_of(described.kind), described.sizes, asked, asked_by


_DESCRIBE: dict[Callable[..., Any], Callable[[dict[str, Any]], _Described]] = {
    attention_ops.attention: _attention,
    attention_ops.attention_varlen: _attention,
    paged_ops.attention_paged: _paged,
    mla_ops.attention_mla: _paged,
    gemm_ops.gemm: _gemm,
    gemm_ops.grouped_gemm: _gemm,
    gemm_ops.scaled_gemm: _gemm,
    moe_ops.fused_moe: _moe,
}
#: Calls of the operation "gemm"; the others are attention.
_PRODUCTS = (gemm_ops.gemm, gemm_ops.grouped_gemm, gemm_ops.scaled_gemm, moe_ops.fused_moe)
