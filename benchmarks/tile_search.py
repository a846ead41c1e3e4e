"""Search the tiles of the Triton kernels for the GPU at hand, or list what compiles for another.

Every candidate is compiled first, on all cores: what spills registers or takes too much shared memory is out. What
is left has to give the oracle's result on a small call with odd lengths; only then is it timed, as a CUDA graph between
two events with a cold L2 cache, in turns with the others. The median over rounds counts, and over calls their product.

Each entry is written as soon as it is found, so that the search may be interrupted; the next one goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import machine, tile_table
from benchmarks.crosscompile import ARCHS, SHARED_LIMIT, Compiled, compile_launch
from benchmarks.tile_problem import Data, Entry, Where
from benchmarks.tile_problems import HEAD_DIMS, KERNELS, entries
from vllm_accel.dispatch.device import Device, detect
from vllm_accel.kernels.triton import tiles
from vllm_accel.kernels.triton.launch import run
from vllm_accel.kernels.triton.tiles import Tile
from vllm_accel.tuning import timing

#: After one round, what is this much slower than the fastest is out; then so many rounds decide.
CLOSE, ROUNDS = 1.25, 7
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


@dataclass(slots=True)
class Candidate:
    """A tile on its way: compiled (or why not), then timed (or why not)."""

    tile: Tile
    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""
    rounds: list[list[float]] = field(default_factory=list)

    @property
    def score(self) -> float:
        """Return the geometric mean over calls of the median seconds; infinity if it was not timed."""
        if not self.rounds:
            return math.inf
        medians = [sorted(seconds)[len(seconds) // 2] for seconds in self.rounds]
        return math.exp(sum(map(math.log, medians)) / len(medians))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return 0, or 1 if an entry got no tile."""
    given = _parser().parse_args(argv)
    if given.arch is None and not torch.cuda.is_available():
        _parser().error("no GPU here: name one with --arch, which implies --compile-only")
    device = detect(torch.device("cuda")) if given.arch is None else None
    arch = tiles.nearest(given.arch or (device.arch if device else ""), ARCHS)
    every = entries(given.kernel or tuple(KERNELS), given.head_dims)
    chosen = [e for e in every if given.keys in e.key and (not e.archs or arch in e.archs)]
    if not chosen:
        _parser().error(f"no entry has {given.keys!r} in its name")
    if given.compile_only or device is None:
        return _list(chosen, arch, given.jobs)
    return _search(chosen, device, given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tile_search", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kernel", action="append", choices=tuple(KERNELS), help="a table; again for more (all)")
    parser.add_argument("--head-dims", type=_integers, default=HEAD_DIMS, help="such as 64,128 (64,128,256)")
    parser.add_argument("--keys", default="", help="only entries with this in their name, such as d128_causal")
    parser.add_argument("--budget", type=_seconds, default=math.inf, help="start no entry after so long, such as 120s")
    parser.add_argument("--write", action="store_true", help=f"write the tables to {tiles.user_directory()}")
    parser.add_argument("--again", action="store_true", help="search entries that this GPU already has in that table")
    parser.add_argument("--arch", help="a GPU that is not here, such as sm_90; lists what compiles for it")
    parser.add_argument("--compile-only", action="store_true", help="time nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compile so many at a time (all cores)")
    return parser


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _seconds(text: str) -> float:
    return float(text.removesuffix("s")) if not text.endswith("m") else 60 * float(text[:-1])


# --- compiling --------------------------------------------------------------------------------------------------------


def compile_all(chosen: Sequence[Entry], arch: str, jobs: int) -> Iterator[tuple[Entry, list[Candidate]]]:
    """Compile every candidate of every entry, and yield the entries as they are done, in order."""
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(console=console, transient=True, disable=not sys.stdout.isatty()))
        bar = progress.add_task("compiling", total=sum(len(e.candidates) for e in chosen))
        pool: ProcessPoolExecutor | None = None
        if jobs > 1:  # spawn: a process with CUDA in it must not fork
            pool = stack.enter_context(ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for entry in chosen:
            progress.update(bar, description=f"compiling {entry.kernel} {entry.key}")
            if pool is None:
                made = []
                for tile in entry.candidates:
                    made.append(_compile(entry, tile, arch))
                    progress.advance(bar)
            else:
                tasks: list[Future[Candidate]] = [
                    pool.submit(_compile_named, entry.kernel, entry.key, tile, arch) for tile in entry.candidates
                ]
                for _ in as_completed(tasks):
                    progress.advance(bar)
                made = [task.result() for task in tasks]
            yield entry, made


def _compile_named(kernel: str, key: str, tile: Tile, arch: str) -> Candidate:
    """Compile in another process, that gets names: tensors and kernels do not travel."""
    dims = [int(part) for part in key.replace("d", " ").replace("_", " ").split() if part.isdigit()]
    entry = next(e for e in entries([kernel], dims) if e.key == key)
    return _compile(entry, tile, arch)


def _compile(entry: Entry, tile: Tile, arch: str) -> Candidate:
    made = Candidate(tile)
    where = Where(torch.device("meta"), arch)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where ptxas fails, Triton prints all of the PTX
            data = entry.timed(where)[0]
            parts = [compile_launch(launch, arch) for launch in data.launches(tile)]
    except Exception as error:  # a tile that the compiler refuses is a result
        made.error = f"{type(error).__name__}: {_last_line(error)}"
        return made
    worst: Compiled = max(parts, key=lambda part: part.shared)
    made.registers, made.shared = max(part.registers for part in parts), worst.shared
    made.spills = sum(part.spills for part in parts)
    if made.shared > SHARED_LIMIT[arch]:
        made.error = f"{made.shared} B of shared memory; {arch} has {SHARED_LIMIT[arch]}"
    return made


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "fatal" in line or "rror" in line]
    return (lines or [str(error).strip().split("\n")[0]])[0][:160]


def survivors(made: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that compile and spill least: none, where there is one without spills."""
    good = [c for c in made if not c.error]
    least = min((c.spills for c in good), default=0)
    return [c for c in good if c.spills == least]


def _list(chosen: Sequence[Entry], arch: str, jobs: int) -> int:
    missing = 0
    for entry, made in compile_all(chosen, arch, jobs):
        kept = survivors(made)
        missing += not kept
        table = Table(
            "tile", "registers", "spills", "shared", "blocks / SM", "", title=f"{entry.kernel} {entry.key}, {arch}"
        )
        for c in sorted(made, key=lambda c: (bool(c.error), c.spills, c.shared)):
            numbers = (str(c.registers), str(c.spills), str(c.shared), _resident(c, arch)) if c.registers else ("",) * 4
            table.add_row(_text(c.tile), *numbers, c.error or ("candidate" if c in kept else "spills"))
        console.print(table)
    return 1 if missing else 0


def _resident(c: Candidate, arch: str) -> str:
    """Return how many blocks an NVIDIA multiprocessor holds at a time, as `assert_fits` counts."""
    if arch.startswith("gfx"):
        return ""
    by_registers = 65536 // (c.tile.num_warps * 32 * -(-c.registers // 8) * 8)
    return str(min(by_registers, (SHARED_LIMIT[arch] + 1024) // (c.shared + 1024)))


def _text(tile: Tile) -> str:
    limit = f", {tile.maxnreg} registers" if tile.maxnreg else ""
    return f"{tile.block_m} x {tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages{limit}"


# --- timing -----------------------------------------------------------------------------------------------------------


def _search(chosen: Sequence[Entry], device: Device, given: argparse.Namespace) -> int:
    about = machine.about("benchmarks.tile_search", torch.device("cuda", device.index))
    console.print(machine.describe(about))
    where = Where(torch.device("cuda", device.index), device.arch, device.sm_count)
    arch = tiles.nearest(device.arch, ARCHS)
    todo = [
        e
        for e in chosen
        if given.again or not given.write or not tile_table.is_done(e.kernel, e.key, device.arch, about)
    ]
    if len(todo) < len(chosen):
        console.print(f"{len(chosen) - len(todo)} entries were found before on this GPU (--again searches them too)")
    start, missing = time.monotonic(), 0
    results = compile_all(todo, arch, given.jobs)
    for number, (entry, made) in enumerate(results):
        kept = survivors(made)
        best = _fastest(entry, kept, where)
        missing += best is None
        console.print(_report(entry, best, kept, device.arch))
        if best is not None and given.write:
            tile_table.write(entry.kernel, entry.key, best.tile, device.arch, about, best.score)
        if time.monotonic() - start > given.budget and number + 1 < len(todo):
            left = len(todo) - number - 1
            console.print(f"the time is up; {left} entries are left (with --write, the next search goes on there)")
            break
    if given.write:
        tiles.forget()
    return 1 if missing else 0


def _fastest(entry: Entry, kept: list[Candidate], where: Where) -> Candidate | None:
    """Check and time candidates; return the fastest, None if none is right."""
    small = entry.check(where)
    for c in kept:
        _guarded(c, lambda c=c: _check(small, c.tile))  # type: ignore[misc]
    alive = [c for c in kept if not c.error]
    calls = entry.timed(where) if alive else []
    for rounds in (1, ROUNDS):
        fastest = min((c.score for c in alive), default=math.inf)
        alive = [c for c in alive if rounds == 1 or c.score <= CLOSE * fastest]
        measured = [_time(data, alive, where, rounds) for data in calls]
        for i, c in enumerate(alive):
            c.rounds = [times[i] for times in measured] if not c.error else []
        alive = [c for c in alive if not c.error]
    return min(alive, key=lambda c: c.score, default=None)


def _time(data: Data, alive: list[Candidate], where: Where, rounds: int) -> list[list[float]]:
    """Return the seconds of each round for each candidate; one that fails gets its error, and none."""
    ready: dict[str, Callable[[], Any]] = {}
    for i, c in enumerate(alive):
        _guarded(c, lambda i=i, c=c: ready.update({str(i): _call(data, c.tile, where)}))  # type: ignore[misc]
    found = timing.in_turns(ready, timing.clock(where.device), rounds)
    for name, timed in found.items():
        alive[int(name)].error = timed.error
    return [found[str(i)].rounds if str(i) in found else [] for i in range(len(alive))]


def _check(data: Data, tile: Tile) -> None:
    for launch in data.launches(tile):
        run(launch)
    data.verify()


def _call(data: Data, tile: Tile, where: Where) -> Callable[[], Any]:
    """Return what runs the launches of a tile: on a GPU a graph, so that no Python is in their time."""
    launches = data.launches(tile)

    def go() -> None:
        for launch in launches:
            run(launch)

    if where.device.type != "cuda":
        return go
    go()  # compiled and loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        go()
    return graph.replay


def _guarded(c: Candidate, step: Any) -> None:
    if c.error:
        return
    try:
        step()
    except (Exception, AssertionError) as error:  # reported in the table
        c.error = timing.text_of(error)


def _report(entry: Entry, best: Candidate | None, kept: list[Candidate], arch: str) -> str:
    wrong = [c for c in kept if c.error]
    tail = f"; {len(wrong)} failed: {wrong[0].error}" if wrong else ""
    if best is None:
        return f"{entry.kernel} {entry.key}: no tile of {len(entry.candidates)} is right and runs{tail}"
    try:
        now = tiles.lookup(entry.kernel, arch, [entry.key])
        before = next((c for c in kept if c.tile == now), None)
        than = f", the table's {_text(now)}: " + (f"{before.score * 1e6:.0f} us" if before and before.rounds else "out")
    except LookupError:
        than = ", not in the table"
    return f"{entry.kernel} {entry.key}: {_text(best.tile)}: {best.score * 1e6:.0f} us{than}{tail}"


if __name__ == "__main__":
    sys.exit(main())
