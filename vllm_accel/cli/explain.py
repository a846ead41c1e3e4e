"""Say which backend a call would run, and why not the others; launches nothing.

The tensors lie on the meta device, so a call of any size can be asked about on any machine.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from vllm_accel.cli import console, explain_gemm
from vllm_accel.cli.machine import named_device

DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32, "fp64": torch.float64, "float64": torch.float64,
    "fp8": torch.float8_e4m3fn, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8,
}  # fmt: skip

NOTHING_RUNS = 1

#: Options that mean nothing for a matrix product, with their value where they are not given.
_ATTENTION_ONLY: dict[str, object] = {
    "q": None, "kv_heads": None, "kv_len": None, "head_dim_v": None, "window": None, "softcap": 0.0, "dropout": 0.0,
    "causal": False, "alibi": False, "mask": False, "sinks": False, "lse": False, "varlen": False,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``vllm-accel explain``."""
    add = parser.add_argument
    add("--op", choices=("attention", *explain_gemm.PRODUCTS), default="attention")
    add("--q", metavar="B,Sq,H,D", help="shape of q")
    add("--kv-heads", type=int, metavar="HKV", help="key heads; default H")
    add("--kv-len", type=int, metavar="SK", help="key length; default Sq")
    add("--head-dim-v", type=int, metavar="DV", help="head size of v; default D")
    explain_gemm.add_arguments(parser)
    add("--dtype", choices=tuple(DTYPES), default="bf16", metavar="DTYPE", help=", ".join(DTYPES))
    add("--causal", action="store_true")
    add("--window", metavar="L,R", help="keys seen to the left and right of the diagonal, -1 for unlimited")
    add("--softcap", type=float, default=0.0, metavar="X")
    add("--alibi", action="store_true", help="with ALiBi slopes")
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument("--bias", action="store_true", help="with an additive attn_bias; for products: with a bias")
    mask.add_argument("--mask", action="store_true", help="with a boolean attn_bias")
    add("--sinks", action="store_true", help="with attention sinks")
    add("--dropout", type=float, default=0.0, metavar="P")
    add("--grad", action="store_true", help="q, k and v (a and b) require gradients")
    add("--lse", action="store_true", help="return the log-sum-exp too")
    add("--deterministic", action="store_true")
    add("--batch-invariant", action="store_true")
    add("--varlen", action="store_true", help="the same sequences packed, without padding")
    add("--backend", metavar="NAME[,NAME]", help="ask for these, in order")
    add("--device", metavar="NAME", help="another GPU, such as h100, t4, rtx4090, mi300x; default: this machine's")
    add("--json", action="store_true", help="print data instead of a table")


def run(given: argparse.Namespace) -> int:
    """Print the choice. Exit code 0, 1 if nothing can run the call, 2 for wrong values."""
    from vllm_accel import explain

    try:
        fn, args, kwargs = _attention_call(given) if given.op == "attention" else _gemm_call(given)
        if given.backend is not None:
            kwargs["backend"] = tuple(part.strip() for part in given.backend.split(",") if part.strip())
        selection = explain(fn, *args, device=named_device(given.device), **kwargs)
    except (ValueError, TypeError) as error:
        return console.wrong_use("explain", error)
    if given.json:
        console.print_json(selection.as_dict())
    else:
        show(selection)
    return 0 if selection.chosen else NOTHING_RUNS


def show(selection: Any, title: str = "") -> None:
    """Print a selection as a table for people."""
    out = console.console()
    if title:
        out.print(console.plain(title, "bold"))
    out.print(console.plain(f"{selection.spec}\non {selection.device}"))
    line = console.plain(f"-> {selection.chosen or 'no backend'}", "bold green" if selection.chosen else "bold red")
    out.print(line, console.plain(f"[{selection.decided_by}]"))
    timed = any(c.estimate for c in selection.candidates)
    rows = [
        (c.name, "chosen" if c.name == selection.chosen else c.state.value, *([c.time] if timed else []), c.why)
        for c in selection.candidates
    ]
    out.print(console.table(("backend", "state", *(["time"] if timed else []), "why"), rows))
    if selection.assumed:
        out.print(console.plain("This machine has no such device: every package is taken as installed."))
    for text in selection.remarks():
        out.print(console.plain(text))


def _attention_call(given: argparse.Namespace) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from vllm_accel import attention, attention_varlen

    if given.q is None:
        raise ValueError("--q B,Sq,H,D is needed, for example --q 1,4096,32,128")
    for name in ("mnk", "experts", "top_k", "scaling"):
        if getattr(given, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --op gemm and the other products")
    batch, seqlen_q, heads, head_dim = _ints("--q", given.q, "B,Sq,H,D", 4)
    seqlen_k = seqlen_q if given.kv_len is None else given.kv_len
    kv_heads = heads if given.kv_heads is None else given.kv_heads
    head_dim_v = head_dim if given.head_dim_v is None else given.head_dim_v
    for name, value in (("--kv-len", seqlen_k), ("--kv-heads", kv_heads), ("--head-dim-v", head_dim_v)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    dtype = DTYPES[given.dtype]
    rows = ((batch * seqlen_q,), (batch * seqlen_k,)) if given.varlen else ((batch, seqlen_q), (batch, seqlen_k))
    q, k, v = (
        _meta(*lead, n, d, dtype=dtype, grad=given.grad)
        for lead, n, d in ((rows[0], heads, head_dim), (rows[1], kv_heads, head_dim), (rows[1], kv_heads, head_dim_v))
    )
    kwargs: dict[str, Any] = {
        "causal": given.causal,
        "softcap": given.softcap,
        "dropout_p": given.dropout,
        "return_lse": given.lse,
        "deterministic": given.deterministic,
        "batch_invariant": given.batch_invariant,
    }
    if given.window is not None:
        kwargs["window_size"] = tuple(_ints("--window", given.window, "L,R", 2, least=-1))
    if given.alibi:
        kwargs["alibi_slopes"] = _meta(heads, dtype=torch.float32)
    if given.sinks:
        kwargs["sinks"] = _meta(heads, dtype=torch.float32)
    if given.bias or given.mask:
        if given.varlen:
            raise ValueError("packed sequences take no attn_bias: leave out --bias, --mask or --varlen")
        shape = (1, 1, seqlen_q, seqlen_k)
        kwargs["attn_bias"] = _meta(*shape, dtype=torch.bool if given.mask else dtype)
    if not given.varlen:
        return attention, (q, k, v), kwargs
    ends = _meta(batch + 1, dtype=torch.int32)
    kwargs |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends if seqlen_q == seqlen_k else torch.empty_like(ends)}
    kwargs |= {"max_seqlen_q": seqlen_q, "max_seqlen_k": seqlen_k}
    return attention_varlen, (q, k, v), kwargs


def _gemm_call(given: argparse.Namespace) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if given.mnk is None:
        raise ValueError(f"--op {given.op} needs --mnk M,N,K, for example --mnk 4096,4096,4096")
    for name, unset in _ATTENTION_ONLY.items():
        if getattr(given, name) not in (unset, None):
            raise ValueError(f"--{name.replace('_', '-')} belongs to --op attention")
    return explain_gemm.call(given, DTYPES[given.dtype], _ints("--mnk", given.mnk, "M,N,K", 3))


def _meta(*shape: int, dtype: torch.dtype, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _ints(option: str, text: str, form: str, count: int, least: int = 1) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != count or any(number < least for number in numbers):
        raise ValueError(f"{option} takes {form}, {count} whole numbers of at least {least}, not {text!r}")
    return numbers
