"""``python -m benchmarks.support_matrix [--write]``: the tables of what runs where, from capabilities and evidence.

What a backend *declares* is asked of its capability, for a plain causal prefill in fp16 (a plain product for GEMM). It
*ran* on a GPU if a conformance file in ``benchmarks/results`` says so. Our own kernels are *compiled* for GPUs that are
not there by the test suite (`benchmarks.crosscompile`), which checks registers and shared memory and no numbers; the
numbers come from Triton's interpreter. Without --write the pages are only compared, and the exit status is 1 if one is
not current.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.crosscompile import ARCHS
from benchmarks.report.files import read
from benchmarks.report.table import outcomes
from vllm_accel.dispatch import registry
from vllm_accel.dispatch.device import PRESETS, Device

ROOT = Path(__file__).parent.parent
RAN, COMPILED, DECLARED = "yes*", "yes+", "yes"
#: Backends whose kernels the test suite compiles for every architecture of `ARCHS`.
_OURS = ("triton", "gluon_hopper")
BEGIN, END = "<!-- made by `python -m benchmarks.support_matrix --write` -->", "<!-- end -->"

#: README's columns: heading and the described devices behind it.
GROUPS: dict[str, tuple[str, ...]] = {
    "V100, T4": ("v100", "t4"),
    "A100, RTX 30, RTX 40": ("a100", "rtx3080", "rtx3090", "rtx4080", "rtx4090"),
    "H100, H200": ("h100", "h200"),
    "B200": ("b200",),
    "MI300X": ("mi300x",),
    "CPU": ("cpu",),
}


def evidence(folder: Path = ROOT / "benchmarks" / "results") -> dict[str, set[str]]:
    """Return, for each described device, the backends that a file says ran there, right; "gemm:x" for products."""
    ran: dict[str, set[str]] = {name: set() for name in PRESETS}
    for source in read([folder])[0]:
        if not source.checked:
            continue
        for name, device in PRESETS.items():
            if source.on_cpu if device.type == "cpu" else source.hardware == device.name:
                ran[name] |= {backend for backend, outcome in outcomes(source) if outcome == "ran"}
    return ran


def declares(op: str, name: str, device: Device) -> bool:
    """Tell whether a backend can run a plain causal prefill (or product) in fp16 on a device, if it is installed."""
    from vllm_accel import attention
    from vllm_accel.dispatch.selection import State
    from vllm_accel.dispatch.selector import Question, select
    from vllm_accel.ops.explain import explain

    if op != "attention":
        return not registry.get(op, name).capability.device_reasons(device)
    q = torch.empty(1, 1024, 32, 128, dtype=torch.float16, device="meta")
    spec = explain(attention, q, q, q, causal=True, device=device).spec
    candidate = select(Question(op, spec, device, assume_available=True))[name]
    return candidate.state in (State.CHOSEN, State.ABLE, State.HELD_BACK)


def cell(op: str, name: str, gpu: str, ran: dict[str, set[str]]) -> str:
    """Return what a table says of one backend on one described device."""
    device = PRESETS[gpu]
    if not declares(op, name, device):
        return ""
    if (name if op == "attention" else f"{op}:{name}") in ran[gpu]:
        return RAN
    if op == "attention" and name in _OURS and device.arch in ARCHS:
        return COMPILED
    return DECLARED


def full(op: str) -> str:
    """Return the table of every backend of an operation on every described device."""
    ran = evidence()
    head = ["backend", *PRESETS]
    rows = [[f"`{name}`", *(cell(op, name, gpu, ran) for gpu in PRESETS)] for name in registry.names(op)]
    return _markdown(head, rows)


def short() -> str:
    """Return README's table: the best that is known of each kind of device."""
    ran = evidence()
    order = (RAN, COMPILED, DECLARED, "")
    rows = []
    for name in registry.names("attention"):
        cells = []
        for gpus in GROUPS.values():
            found = {gpu: cell("attention", name, gpu, ran) for gpu in gpus}
            best = min(found.values(), key=order.index)
            some = len({bool(value) for value in found.values()}) > 1
            where = ", ".join(gpu for gpu, value in found.items() if value == best)
            cells.append(f"{best} ({where})" if best and (some or (best == RAN and len(gpus) > 1)) else best)
        if any(cells):
            rows.append([f"`{name}`", *cells])
    return _markdown(["backend", *GROUPS], rows)


def pages() -> dict[Path, list[str]]:
    """Return the tables of each page, in the order of their marks."""
    return {ROOT / "docs" / "support.md": [full("attention"), full("gemm")], ROOT / "README.md": [short()]}


def renewed(text: str, tables: Sequence[str]) -> str:
    """Return a page with its tables replaced.

    Raises:
        ValueError: the page has another number of marks.
    """
    parts = text.split(BEGIN)
    if len(parts) != len(tables) + 1 or any(END not in part for part in parts[1:]):
        raise ValueError(f"needs {len(tables)} pairs of marks, {BEGIN} and {END}")
    made = parts[0]
    for table, part in zip(tables, parts[1:], strict=True):
        made += f"{BEGIN}\n\n{table}\n\n{END}{part.partition(END)[2]}"
    return made


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Write or compare the pages; return 1 if one was not current.

    Raises:
        SystemExit: from argparse, for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.support_matrix", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the tables into the pages")
    given = parser.parse_args(argv)
    stale = []
    for path, tables in pages().items():
        old = path.read_text(encoding="utf-8")
        if (new := renewed(old, tables)) != old:
            stale.append(path.name)
            if given.write:
                path.write_text(new, encoding="utf-8")
    print(f"{'written' if given.write else 'not current'}: {', '.join(stale)}" if stale else "every page is current")
    return 1 if stale and not given.write else 0


if __name__ == "__main__":
    sys.exit(main())
