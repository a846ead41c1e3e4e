"""Measure attention() with every backend that can run here, over sequence lengths, and draw it."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_accel.cli import console
from vllm_accel.cli.demo import require
from vllm_accel.cli.demo.timing import medians
from vllm_accel.dispatch.device import Device, cpu_model
from vllm_accel.dispatch.selection import State

BY_HAND = "F.scaled_dot_product_attention by hand"
#: A series ends before a call that would take longer, so that the demonstration stays under a minute.
SLOWEST_SECONDS = 0.7

Series = dict[str, list[tuple[int, float]]]


def run(device: Device, out: Path, quick: bool) -> bool:
    """Measure, write ``demo.png`` into `out`, and say where it is."""
    require("matplotlib")
    heads, kv_heads, head_dim = (8, 2, 64) if device.type == "cpu" else (32, 8, 128)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    lengths = [64, 128, 256] if quick else [64, 128, 256, 512, 1024, 2048] if device.type == "cpu" else [
        256, 512, 1024, 2048, 4096, 8192, 16384
    ]  # fmt: skip
    backends, chosen = able(device, heads, kv_heads, head_dim, dtype, lengths[-1])
    series = measure(device, backends, heads, kv_heads, head_dim, dtype, lengths, rounds=2 if quick else 7)
    path = out / "demo.png"
    out.mkdir(parents=True, exist_ok=True)
    shape = (
        f"causal, batch 1, {heads} heads over {kv_heads} key heads of {head_dim}, {str(dtype).removeprefix('torch.')}"
    )
    draw(series, chosen, f"{processor(device)}, torch {torch.__version__}, {datetime.date.today()}", shape, path)
    printer = console.console()
    rows = [
        (name, *(f"{dict(points)[n] * 1e3:.2f}" if n in dict(points) else "" for n in lengths))
        for name, points in series.items()
    ]
    printer.print(console.table(["milliseconds", *(f"{n} tokens" for n in lengths)], rows))
    printer.print(console.plain(f"drawn in {path}"))
    return True


def able(
    device: Device, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, length: int
) -> tuple[list[str], str | None]:
    """Return the backends that can run the work, and the one that automatic choice takes."""
    from vllm_accel import attention, explain

    q = torch.empty(1, length, heads, head_dim, dtype=dtype, device="meta")
    k = torch.empty(1, length, kv_heads, head_dim, dtype=dtype, device="meta")
    selection = explain(attention, q, k, k, causal=True, device=device)
    states = (State.CHOSEN, State.ABLE, State.HELD_BACK)
    return [c.name for c in selection.candidates if c.state in states], selection.chosen


def measure(
    device: Device,
    backends: list[str],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    lengths: list[int],
    rounds: int,
) -> Series:
    """Return the median seconds of a call by series and length; a series that has become too slow ends."""
    from rich.progress import Progress

    from vllm_accel import attention

    series: Series = {name: [] for name in (*backends, BY_HAND)}
    printer = console.console()
    bar = Progress(console=printer, transient=True, disable=not printer.is_terminal)
    with bar as progress, torch.no_grad():
        task = progress.add_task("measuring", total=len(lengths))
        for length in lengths:
            q = torch.randn(1, length, heads, head_dim, dtype=dtype, device=device.type)
            k, v = (torch.randn(1, length, kv_heads, head_dim, dtype=dtype, device=device.type) for _ in range(2))
            calls: dict[str, Callable[[], Any]] = {
                name: functools.partial(attention, q, k, v, causal=True, backend=name)
                for name in backends
                if not _too_slow(series[name], length)
            }
            if not _too_slow(series[BY_HAND], length):
                calls[BY_HAND] = functools.partial(by_hand, q, k, v)
            for name, seconds in medians(calls, device.type, rounds, budget=1.5).seconds.items():
                series[name].append((length, seconds))
            progress.advance(task)
    return series


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call PyTorch's function on the same (B, S, H, D) tensors, as model code does."""
    grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _too_slow(points: list[tuple[int, float]], length: int) -> bool:
    """Foretell a call from the last one: the work grows with the square of the length."""
    return bool(points) and points[-1][1] * (length / points[-1][0]) ** 2 > SLOWEST_SECONDS


def draw(series: Series, chosen: str | None, machine: str, shape: str, path: Path) -> None:
    """Write the plot as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(10, 5.4), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    axes = figure.add_subplot()
    order = sorted((name for name in series if series[name]), key=lambda name: -series[name][-1][1])
    for i, name in enumerate(order):
        lengths, seconds = zip(*series[name], strict=True)
        style: dict[str, Any] = {"color": f"C{i}"}
        if name == BY_HAND:  # drawn last: it often lies on the line of the backend that it calls itself
            style = {"color": "black", "linestyle": "--", "zorder": 3}
        label = f"{name}\n(automatic choice)" if name == chosen else name.replace(" by hand", "\nby hand")
        width = 2.6 if name == chosen else 1.6
        milliseconds = [s * 1e3 for s in seconds]
        axes.plot(lengths, milliseconds, marker="o", markersize=4.5, linewidth=width, label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({length for points in series.values() for length, _ in points})
    axes.set_xticks(ticks, [str(length) for length in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel("time of one call (milliseconds, median)")
    axes.set_title(f"vllm_accel.attention, forward\n{machine}\n{shape}", fontsize=10.5)
    axes.grid(which="major", alpha=0.35)
    axes.grid(which="minor", alpha=0.12)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelspacing=0.9)
    figure.savefig(path, dpi=150)


def processor(device: Device) -> str:
    """Name the hardware: the GPU, or the CPU as the system calls it, with the threads in use."""
    if device.type != "cpu":
        return device.name or device.type
    return f"{cpu_model()}, {torch.get_num_threads()} threads"
