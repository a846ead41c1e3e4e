"""Holds the fakes against the real operators on a GPU: ``python tests/fakes/check_on_gpu.py``.

Runs every operator that is present (ATen's always are; flash-attn 2 and 3, flash-attn-4 where installed) on the GPU and
its fake on copies on the CPU, and compares all results, gradients included. Where the fake gives NaN it says "do not
rely on this": what the GPU gave there is printed, not judged. ``--self`` compares the fakes with themselves on a CPU,
which checks this script. Exits with 1 if anything differs.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fakes import aten, flash_attn_2_ops, flash_attn_3, flash_attn_4

SELF = "--self" in sys.argv
DEVICE = "cpu" if SELF else "cuda"
BF16, INF = torch.bfloat16, float("inf")
Call = tuple[str, str, Callable[..., Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def rand(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def qkv(seqlen_q: int, seqlen_k: int, heads_k: int = 4, dim: int = 64, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    shapes = ((2, seqlen_q, 4, dim), (2, seqlen_k, heads_k, dim), (2, seqlen_k, heads_k, dim))
    return tuple(rand(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))


def packed(heads_k: int = 4) -> tuple[Tensor, ...]:
    return tuple(x.flatten(0, 1)[:n] for x, n in zip(qkv(80, 130, heads_k), (150, 240, 240), strict=True))


CU_Q = torch.tensor([0, 70, 70, 140], dtype=torch.int32)
CU_K = torch.tensor([0, 90, 100, 230], dtype=torch.int32)
MAX = (70, 130)
LENGTHS = ((100, 150), (150, 100), (1, 150), (100, 100))
WINDOWS = ((-1, -1), (20, -1), (-1, 20), (20, 10), (0, 0), (99, 120))


def moved(x: Any, device: str) -> Any:
    if isinstance(x, Tensor):
        return x.to(device) if x.dim() == 4 and x.stride(-2) == 0 else _same_strides(x, device)
    return type(x)(moved(y, device) for y in x) if isinstance(x, tuple | list) else x


def _same_strides(x: Tensor, device: str) -> Tensor:
    """Move a tensor with its strides: an operator's fast path must not become another one."""
    if x.is_contiguous():
        return x.to(device)
    base = torch.empty(
        x.storage_offset() + x.untyped_storage().size() // x.element_size(), dtype=x.dtype, device=device
    )
    view = base.as_strided(x.shape, x.stride())
    return view.copy_(x) if 0 not in x.stride() else x.to(device)


def fitting(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Leave out arguments that this version does not have; None if one of them mattered."""
    schema = getattr(getattr(function, "default", None), "_schema", None)
    known = {a.name for a in schema.arguments} if schema else set(inspect.signature(function).parameters)
    unknown = {name: value for name, value in arguments.items() if name not in known}
    return (
        None
        if any(value is not None for value in unknown.values())
        else {k: arguments[k] for k in arguments if k in known}
    )


def aten_op(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (aten.OPERATORS[name] if SELF else getattr(torch.ops.aten, name)), aten.OPERATORS[name]


def aten_calls() -> Iterator[Call]:
    real, fake = aten_op("_flash_attention_forward")
    for heads_k in (4, 2):
        for seqlen_q, seqlen_k in LENGTHS:
            for left, right in WINDOWS:
                for causal in (False, True):
                    case = f"{seqlen_q}x{seqlen_k} heads_k={heads_k} window=({left}, {right}) causal={causal}"
                    options = {"window_size_left": left, "window_size_right": right, "scale": 0.1}
                    arguments = (*qkv(seqlen_q, seqlen_k, heads_k), None, None, seqlen_q, seqlen_k, 0.0, causal, False)
                    yield "aten flash", case, real, fake, arguments, options
        lengths = (CU_Q, CU_K, *MAX)
        yield "aten flash", f"packed heads_k={heads_k}", real, fake, (*packed(heads_k), *lengths, 0.0, True, False), {}
    slopes = {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 1.0])}
    for causal in (False, True):
        case, arguments = f"alibi causal={causal}", (*qkv(100, 150), None, None, 100, 150, 0.0, causal, False)
        yield "aten flash", case, real, fake, arguments, slopes
    real, fake = aten_op("_efficient_attention_forward")
    none = (None, None, None, None)
    for seqlen_q, seqlen_k in LENGTHS:
        for kind, window in ((0, None), (1, None), (2, None), (1, 20), (2, 20)):
            for dtype in (BF16, torch.float32):
                arguments = (*qkv(seqlen_q, seqlen_k, dtype=dtype), None, *none, 0.0, kind, True)
                case = f"{seqlen_q}x{seqlen_k} mask={kind} window={window} {dtype}"
                yield "aten efficient", case, real, fake, arguments, {"window_size": window}
    bias = rand(2, 4, 100, 152)[..., :150]
    holes = bias.clone()
    holes[:, :, 3], holes[:, :, 70:, 5] = -INF, -INF
    for case, value in (
        ("bias", bias),
        ("bias, empty row", holes),
        ("expanded bias", bias[:1, :1].expand(2, 4, -1, -1)),
    ):
        yield "aten efficient", case, real, fake, (*qkv(100, 150), value, *none, 0.0, 0, True), {}
    flat = tuple(x[None] for x in packed())
    for kind in (0, 1, 2):
        yield "aten efficient", f"packed mask={kind}", real, fake, (*flat, None, CU_Q, CU_K, *MAX, 0.0, kind, True), {}
    real, fake = aten_op("_scaled_dot_product_cudnn_attention")
    for heads_k in (4, 2):
        for seqlen_q, seqlen_k in LENGTHS:
            for causal in (False, True):
                tensors = (x.transpose(1, 2) for x in qkv(seqlen_q, seqlen_k, heads_k))
                case = f"{seqlen_q}x{seqlen_k} heads_k={heads_k} causal={causal}"
                yield "aten cudnn", case, real, fake, (*tensors, None, True, 0.0, causal), {}
    for case, value in (("bias", bias), ("bias, empty row", holes)):
        tensors = (x.transpose(1, 2) for x in qkv(100, 150))
        yield "aten cudnn", case, real, fake, (*tensors, value, True), {}


def module_calls() -> Iterator[Call]:
    for path, fake_module in (
        ("flash_attn.flash_attn_interface", flash_attn_2_ops),
        ("flash_attn_interface", flash_attn_3),
        ("flash_attn.cute.interface", flash_attn_4),
    ):
        try:
            module = fake_module if SELF else importlib.import_module(path)
        except Exception as error:
            say(f"{path}: not tried, {type(error).__name__}: {error}")
            continue
        for heads_k in (4, 2):
            for seqlen_q, seqlen_k in LENGTHS:
                for left, right in WINDOWS:
                    for causal in (False, True):
                        case = f"{seqlen_q}x{seqlen_k} heads_k={heads_k} window=({left}, {right}) causal={causal}"
                        yield from _module_case(
                            path, case, module, fake_module, qkv(seqlen_q, seqlen_k, heads_k), causal, left, right
                        )


def _module_case(path, case, module, fake, inputs, causal, left, right) -> Iterator[Call]:  # type: ignore[no-untyped-def]
    shared = {"softmax_scale": 0.1, "causal": causal}
    if fake is flash_attn_4:
        window = {"window_size_left": None if left < 0 else left, "window_size_right": None if right < 0 else right}
        yield path, case, module._flash_attn_fwd, fake._flash_attn_fwd, inputs, {**shared, **window, "return_lse": True}
        return
    window = {"window_size_left": left, "window_size_right": right}
    if fake is flash_attn_3:
        yield path, case, module._flash_attn_forward, fake._flash_attn_forward, inputs, {**shared, **window}
        return
    rest = {"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None, "return_softmax": False}
    yield path, case, module._flash_attn_forward, fake._flash_attn_forward, inputs, {**shared, **window, **rest}


def backward_of(call: Call, result: Any) -> Call | None:
    """The backward of an ATen call, from the results of its forward."""
    family, case, _, _, a, o = call
    scale = {"scale": o.get("scale")}
    dout = None if result[0] is None else rand(*result[0].shape, dtype=a[0].dtype, seed=7)
    if family == "aten flash" and "alibi_slopes" not in o:
        real, fake = aten_op("_flash_attention_backward")
        window = {key: o.get(key) for key in ("window_size_left", "window_size_right")}
        arguments = (dout, *a[:3], *result[:2], *a[3:7], 0.0, a[8], result[2], result[3])
        return f"{family} backward", case, real, fake, arguments, {**scale, **window}
    if family == "aten efficient":
        real, fake = aten_op("_efficient_attention_backward")
        lengths = (*a[4:6], result[4], a[7] or result[5])
        arguments = (dout, *a[:4], result[0], *lengths, result[1], 0.0, *result[2:4], a[9], a[3] is not None)
        return f"{family} backward", case, real, fake, arguments, {**scale, "window_size": o.get("window_size")}
    if family == "aten cudnn" and "empty row" not in case:
        real, fake = aten_op("_scaled_dot_product_cudnn_attention_backward")
        arguments = (dout, *a[:3], *result[:2], *result[6:8], a[3], None, None, *result[4:6], 0.0, len(a) > 6 and a[6])
        return f"{family} backward", case, real, fake, arguments, scale
    return None


def compare(mine: Any, theirs: Any) -> list[str]:
    """Say where two tuples of results differ, and what lies where the fake gives NaN."""
    notes = []
    for i, (fake, real) in enumerate(zip(mine, theirs, strict=False)):
        if not (isinstance(fake, Tensor) and isinstance(real, Tensor) and fake.is_floating_point() and fake.numel()):
            continue
        if fake.shape != real.shape:
            notes.append(f"DIFFERS result {i}: shape {tuple(real.shape)}, fake {tuple(fake.shape)}")
            continue
        a, b = fake.double().cpu(), real.double().cpu()
        known = ~a.isnan()
        bound = 0.02 * (1 + a[known & a.isfinite()].abs().max().item()) if bool((known & a.isfinite()).any()) else 0.0
        near = (a == b) | ((a - b).abs() <= bound)
        wrong = known & ~near
        if bool(wrong.any()):
            at = tuple(int(x) for x in wrong.nonzero()[0])
            notes.append(
                f"DIFFERS result {i} in {int(wrong.sum())} of {a.numel()}: at {at} {b[at]:.5g}, fake {a[at]:.5g}"
            )
        if not bool(known.all()):
            unknown = b[~known]
            zeros = f"{(unknown == 0).double().mean():.0%} zeros, {unknown.isnan().double().mean():.0%} NaN"
            notes.append(f"undefined by the fake, result {i}: {int((~known).sum())} values, really {zeros}")
    return notes


def run(call: Call) -> tuple[Any, list[str]]:
    _, _, real, fake, arguments, options = call
    chosen = fitting(real, options)
    if chosen is None:
        return None, ["not tried: this version has no such argument"]
    results: list[Any] = []
    for function, device in ((fake, "cpu"), (real, DEVICE)):
        try:
            moved_options = {key: moved(value, device) for key, value in chosen.items()}
            results.append(function(*moved(arguments, device), **moved_options))
            if device == "cuda":
                torch.cuda.synchronize()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            results.append(error)
    mine, theirs = (x if isinstance(x, Exception | tuple) else (x,) for x in results)
    if isinstance(mine, Exception) != isinstance(theirs, Exception):
        return None, [f"DIFFERS: {theirs if isinstance(theirs, Exception) else 'ran'!s:.200}, fake: {mine!s:.200}"]
    return (None, []) if isinstance(mine, Exception) else (mine, compare(mine, theirs))


def main() -> int:
    differences = total = 0
    calls = [*aten_calls(), *module_calls()]
    for call in calls:
        result, notes = run(call)
        reports = [(call, notes)]
        if result is not None and call[0].startswith("aten"):
            following = backward_of(call, result)
            if following is not None:
                reports.append((following, run(following)[1]))
        for (family, case, *_), lines in reports:
            total += 1
            differences += any(line.startswith("DIFFERS") for line in lines)
            for line in lines:
                say(f"{family}, {case}: {line}")
    where = DEVICE if SELF else torch.cuda.get_device_name()
    say(f"{total} calls, {differences} differ, on {where}, torch {torch.__version__}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
