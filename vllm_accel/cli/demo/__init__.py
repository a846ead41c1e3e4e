"""Run real models through vllm_accel on this machine: the choice explained, the numbers compared, the times drawn.

Every comparison is with the same model on PyTorch's ``F.scaled_dot_product_attention``. What is not installed is
skipped with one line; the exit code is 1 where numbers disagree or a step fails.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vllm_accel.cli import console, explain
from vllm_accel.cli.demo.timing import Timed
from vllm_accel.cli.machine import local_devices
from vllm_accel.dispatch.device import Device

Step = Callable[[Device, Path, bool], bool]


class Missing(Exception):
    """Raise when a step needs a package that is not installed; the text says which, and how to get it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration. Exit code 0, 1 where numbers disagree or a step fails, 2 for wrong use."""
    parser = argparse.ArgumentParser(prog="python -m vllm_accel.cli.demo", description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="where demo.png goes")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions")
    given = parser.parse_args(argv)
    start = time.perf_counter()
    out = console.console()
    device = local_devices()[0]
    built = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "no GPU"
    )
    out.print(console.plain(f"vllm_accel on {device}, torch {torch.__version__} built with {built}", "bold"))
    all_well, skipped = True, 0
    for title, step in _STEPS:
        out.rule(console.plain(title, "bold"), align="left")
        try:
            all_well &= step(device, given.out, given.quick)
        except Missing as missing:
            out.print(console.plain(f"skipped: {missing}", "yellow"))
            skipped += 1
        except Exception as error:  # the other steps still have something to show
            out.print(console.plain(f"FAILED: {type(error).__name__}: {error}", "bold red"))
            all_well = False
    well = f"{skipped} of {len(_STEPS)} steps skipped" if skipped else "All numbers agree"
    seconds = time.perf_counter() - start
    out.print(console.plain(f"{well if all_well else 'NOT ALL WELL, see above'}; {seconds:.0f} s in all."))
    return 0 if all_well else 1


def require(*packages: str) -> None:
    """Raise `Missing` unless every package imports."""
    import importlib

    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            hint = "pip install 'vllm-accel[demo]'"
            raise Missing(f"{name} does not import ({error}); {hint} brings it") from None


def report_times(name: str, timed: Timed) -> None:
    """Print two medians and their ratio, whichever way it goes."""
    ours, theirs = timed.seconds["vllm_accel"], timed.seconds["sdpa"]
    verdict = f"{theirs / ours:.2f}x the speed of sdpa" if ours <= theirs else f"{ours / theirs:.2f}x the TIME of sdpa"
    how = f"medians of {timed.rounds}, in turns after a warm-up"
    text = f"{name}: vllm_accel {ours * 1e3:.1f} ms, sdpa {theirs * 1e3:.1f} ms ({how}): {verdict}"
    console.console().print(console.plain(text))


def _choices(device: Device, out: Path, quick: bool) -> bool:
    from vllm_accel import attention
    from vllm_accel import explain as ask

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for kind, seqlen_q in (("prefill of 4096 tokens", 4096), ("decode, one token over 4096", 1)):
        shapes = ((1, seqlen_q, 32, 128), (1, 4096, 8, 128), (1, 4096, 8, 128))
        q, k, v = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        explain.show(ask(attention, q, k, v, causal=True, device=device), kind)
    return True


def _embed(device: Device, out: Path, quick: bool) -> bool:
    from vllm_accel.cli.demo.embed import run

    return run(device, rounds=1 if quick else 7)


def _generate(device: Device, out: Path, quick: bool) -> bool:
    from vllm_accel.cli.demo.generate import FULL, QUICK, run

    return run(device, QUICK if quick else FULL)


def _plot(device: Device, out: Path, quick: bool) -> bool:
    from vllm_accel.cli.demo.plot import run

    return run(device, out, quick)


_STEPS: tuple[tuple[str, Step], ...] = (
    ("1. Which backend runs, and why", _choices),
    ("2. Real sentences through MiniLM", _embed),
    ("3. Generation with a small Llama", _generate),
    ("4. Time against sequence length", _plot),
)
