"""``python -m benchmarks.gpu_triton --out DIR``: what our Triton and Gluon kernels have to show on a GPU.

Steps, in order of value; each writes its file as it goes, and what fails costs itself alone:

    everything    the cases that ptxas 12.8 makes wrong on Hopper, with it and with the one that is taken instead, and
                  other large combinations of options
    conformance   every case of `vllm_accel.testing` and longer ones against float64, in processes on all cores;
                  beside it every tile that `tiles` will time is compiled and checked
    peers         forward and decode against every other backend that runs here (`benchmarks.attention`)
    splits        decodes and chunks by how their keys are shared out, chosen and otherwise, as CUDA graphs
    backward      backward passes alone, against the same
    tiles         a few tiles and variants for each of the main calls, as CUDA graphs
    memory        peak bytes by sequence length
    sanitizer     compute-sanitizer's memcheck and racecheck on tiny cases (`benchmarks.gpu_triton_sanitizer`)

The last step takes all the time that is left, the others a share of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_triton_sanitizer as watching
from benchmarks import gpu_triton_tasks as work
from benchmarks import gpu_triton_tiles as tiling
from benchmarks import machine, shapes
from benchmarks.workers import NO_TIME, STOPPED, Done, Task, run_all

STEPS = ("everything", "conformance", "peers", "splits", "backward", "tiles", "memory", "sanitizer")
FORWARD_SHAPES = (
    "prefill_8k_full", "prefill_8k_causal", "paged16_b32_4k", "paged64_b32_4k", "paged16_b16_16k", "paged64_b16_16k",
    "paged16_b1_16k", "paged64_b1_16k", "prefill_d64_4k_full", "prefill_d64_4k_causal", "prefill_d256_4k_causal",
    "decode_b32_4k", "decode_b1_16k", "varlen_mix_16k", "prefill_1k_causal", "decode_b16_16k", "chunk_512_of_16k",
)  # fmt: skip
BACKWARD_SHAPES = (
    "train_4k_causal_d64",
    "train_4k_full_d64",
    "train_4k_causal",
    "train_4k_full",
    "train_8k_causal_gqa",
    "train_varlen_16k",
    "train_varlen_16k_d64",
)
#: Cases that are also run in fp32, whose tiles are other ones.
_FP32 = (
    "plain",
    "causal",
    "gqa",
    "window",
    "softcap",
    "alibi",
    "bias_grad",
    "sinks",
    "varlen",
    "decode",
    "long_full_d64",
)


def conformance_tasks() -> list[Task]:
    """Return every backend, case and dtype, most telling first; what `everything` runs is not among them."""
    made = []
    for dtype in ("bf16", "fp16", "fp32"):
        for backend in ("triton", "gluon_hopper"):
            named = [(False, n) for n in work.dense_cases() if not n.startswith("combined")] + [
                (True, n) for n in work.paged_cases()
            ]
            for paged, name in named:
                if (dtype == "fp32" and (backend != "triton" or name not in _FP32)) or (paged and backend != "triton"):
                    continue
                label = f"{backend} {'paged_' if paged else ''}{name} {dtype}"
                made.append(Task(label, work.conformance, (backend, paged, name, dtype)))
        if dtype == "bf16":
            made += [Task("write_kv", work.kv_writes), Task("merge", work.merges)]
    return made


def candidate_tasks(arch: str) -> list[Task]:
    """Return the compilation and check of every tile that is timed later."""
    return [
        Task(f"{name} {index}", tiling.prepare, (name, index))
        for name, problem in tiling.problems().items()
        for index in range(len(tiling.candidates(problem, arch)))
    ]


class Run:
    """One run: where results go, and how much time is left."""

    def __init__(self, out: Path, given: argparse.Namespace, arch: str, facts: dict[str, Any]) -> None:
        self.out, self.jobs, self.arch, self.facts = out, given.jobs, arch, facts
        self.only, budget = [word for word in given.only.split(",") if word], given.budget
        self.start, self.end = time.monotonic(), time.monotonic() + budget
        self.alive: dict[str, list[int]] = {}
        self.last = False  # no step comes after the one that runs

    def chosen(self, tasks: list[Task]) -> list[Task]:
        """Return the tasks whose name has one of the words of --only in it; all of them without words."""
        return [task for task in tasks if not self.only or any(word in task.name for word in self.only)]

    def left(self, share: float = 1.0) -> float:
        """Return the deadline after a share of the time that is left; of the last step all of it."""
        now = time.monotonic()
        return now + max(0.0, self.end - now) * (1.0 if self.last else share)

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write the results of a step."""
        data = {"about": self.facts, "results": rows}
        (self.out / f"triton_{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def _row(done: Done) -> dict[str, Any]:
    row = {"name": done.task.name, "seconds_in_all": round(done.seconds, 2)}
    if done.error:
        return row | {"outcome": "not run" if done.error in (NO_TIME, STOPPED) else "failed", "detail": done.error}
    return row | done.value if isinstance(done.value, dict) else row | {"value": done.value}


def conformance(run: Run) -> None:
    """Check everything in parallel, tiles for later included."""
    rows: list[dict[str, Any]] = []
    tiles: list[dict[str, Any]] = []

    def report(done: Done) -> None:
        row = _row(done)
        mine = done.task.call is not tiling.prepare
        (rows if mine else tiles).append(row)
        if not mine and not done.error:
            name, index = done.task.args
            run.alive.setdefault(name, []).append(index)
        if row.get("outcome") == "failed":
            run.say(f"FAILED {done.task.name}: {row['detail'][:200]}")
        if len(rows) % 40 == 0:
            run.write("conformance", rows)

    # fp16 and fp32 say little that bf16 does not, so the tiles come before them.
    checks = run.chosen(conformance_tasks())
    first = [t for t in checks if not t.name.endswith(("fp16", "fp32"))]
    tasks = [*first, *run.chosen(candidate_tasks(run.arch)), *[t for t in checks if t not in first]]
    run_all(tasks, run.jobs, run.left(0.45), report)
    run.write("conformance", rows)
    run.write("candidates", tiles)
    counts = {kind: sum(r.get("outcome") == kind for r in rows) for kind in ("ran", "refused", "failed", "not run")}
    run.say(f"conformance: {counts}; tiles: {sum(map(len, run.alive.values()))} of {len(tiles)} are right")


def everything_tasks() -> list[Task]:
    """Return the cases `everything` with either ptxas, and the combinations with ours."""
    both = itertools.product(("ours", "Triton's"), (False, True), ("bf16", "fp16"))
    made = [
        Task(f"{'paged_' if paged else ''}everything {dtype}, {ptxas} ptxas", work.assembled,
             (paged, "everything", dtype, ptxas))
        for ptxas, paged, dtype in both
    ]  # fmt: skip
    return made + [Task(c.name, work.assembled, (False, c.name, "bf16", "ours")) for c in work.COMBINED_CASES]


def everything(run: Run) -> None:
    """Say of each case whether it is right; with Triton's own ptxas 12.8 `everything` is expected not to be."""
    rows: list[dict[str, Any]] = []

    def report(done: Done) -> None:
        rows.append(_row(done))
        run.write("everything", rows)
        run.say(f"{done.task.name}: {rows[-1]['outcome']} {rows[-1].get('detail', '')[:120]}")

    run_all(run.chosen(everything_tasks()), run.jobs, run.left(0.2), report)


def _one_by_one(run: Run, step: str, tasks: list[Task], share: float, show: Callable[[dict[str, Any]], str]) -> None:
    """Run timed tasks in one process, one after the other, and write after each."""
    rows: list[dict[str, Any]] = []

    def report(done: Done) -> None:
        rows.append(_row(done))
        run.write(step, rows)
        run.say(f"{done.task.name}: {done.error or show(rows[-1])}")

    run_all(run.chosen(tasks), 1, run.left(share), report)


def _contest(row: dict[str, Any]) -> str:
    """Return contestants of a shape, fastest first, with what they reached."""
    timed = sorted((r for r in row["results"] if r["seconds"]), key=lambda r: r["seconds"])
    words = [f"{r['name']} {r['seconds'] * 1e3:.3f} ms {_share(r)}" for r in timed]
    words += [f"{r['name']}: {r['error'][:120]}" for r in row["results"] if r.get("error")]
    return "; ".join(words) + (f" {row['error']}" if row.get("error") else "")


def _share(row: dict[str, Any]) -> str:
    tflops = f"{row['tflops']:.0f} TF" if row.get("tflops") else ""
    return f"({row['of_copy']:.0%} of copy)" if row.get("of_copy") else f"({tflops})"


def _tiles(row: dict[str, Any]) -> str:
    timed = sorted((r for r in row["results"] if r["seconds"]), key=lambda r: r["seconds"])
    return "; ".join(f"{list(r['tile'].values())} {r['seconds'] * 1e6:.0f} us {_share(r)}" for r in timed)


def peers(run: Run) -> None:
    """Time forward shapes against the other backends."""
    _one_by_one(run, "peers", [Task(n, work.peers, (n,)) for n in FORWARD_SHAPES], 0.45, _contest)


def splits(run: Run) -> None:
    """Time decodes and chunks by how their keys are shared out."""
    tasks = [Task(name, tiling.time_splits, (name,)) for name in tiling.SPLIT_CALLS]
    tasks += [Task(name, tiling.time_chunk, (name,)) for name in tiling.CHUNK_CALLS]

    def show(row: dict[str, Any]) -> str:
        timed = [r for r in row["results"] if r["seconds"]]
        return "; ".join(f"{r['way']} {r['seconds'] * 1e6:.0f} us {_share(r)}".removesuffix(" ()") for r in timed)

    _one_by_one(run, "splits", tasks, 0.3, show)


def backward(run: Run) -> None:
    """Time backward passes against the other backends."""
    _one_by_one(run, "backward", [Task(n, work.backwards, (n,)) for n in BACKWARD_SHAPES], 0.35, _contest)


def tiles(run: Run) -> None:
    """Time the tiles that were found right (all, if that step did not run)."""
    tasks = []
    for name, problem in tiling.problems().items():
        right = sorted(run.alive.get(name, [])) if run.alive else range(len(tiling.candidates(problem, run.arch)))
        if right:
            tasks.append(Task(name, tiling.time_tiles, (name, tuple(right))))
    _one_by_one(run, "tiles", tasks, 0.7, _tiles)


def memory(run: Run) -> None:
    """Measure peaks at doubling lengths."""
    tasks = [
        Task(f"{backend} d{d}", work.memory, (backend, (2048, 4096, 8192, 16384), d))
        for backend, d in (("triton", 64), ("triton", 128), ("gluon_hopper", 128))
    ]
    _one_by_one(run, "memory", tasks, 0.5, lambda row: ", ".join(
        f"{r['seqlen']}: {r['forward'] / 2**20:.1f} / {r['train'] / 2**20:.1f} MiB" for r in row["value"]))  # fmt: skip


def sanitizer(run: Run) -> None:
    """Run tiny cases under compute-sanitizer, in processes of their own, as many at a time as there are jobs."""
    rows = watching.not_run()

    def report(row: dict[str, Any]) -> None:
        run.write("sanitizer", rows)
        run.say(f"{row['name']}: {row['outcome']} {row.get('seconds', '')} {'; '.join(row.get('races', ()))}".rstrip())

    watching.watch(rows, run.jobs, run.end, report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; return 1 if a case of conformance failed.

    Raises:
        SystemExit: from argparse, for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_triton", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="a directory for the results")
    parser.add_argument("--budget", type=float, default=300.0, metavar="SECONDS", help="for all steps together")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"comma separated, of {', '.join(STEPS)}")
    parser.add_argument("--only", default="", metavar="WORDS", help="tasks with one of these in their name, by comma")
    parser.add_argument("--jobs", type=int, default=machine.cores(), help="processes that check (all cores)")
    parser.add_argument("--dry-run", action="store_true", help="list what would run, and stop")
    parser.add_argument("--tiny", metavar="BACKEND[@SMS]:CASES", help="run these here, for compute-sanitizer")
    given = parser.parse_args(argv)
    wanted = given.steps.split(",")
    if unknown := [step for step in wanted if step not in STEPS]:
        parser.error(f"no step {unknown[0]!r}; there are {', '.join(STEPS)}")
    if given.dry_run:
        return _list(wanted)
    if not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run lists what would run on one")
    if given.tiny:
        watching.tiny(given.tiny)
        return 0
    if given.out is None:
        parser.error("--out DIR is needed")
    given.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers: as many as cores are at work
    facts = machine.about("benchmarks.gpu_triton", torch.device("cuda"))
    print(machine.describe(facts), flush=True)
    run = Run(given.out, given, tiling.here().arch, facts)
    steps = [step for step in STEPS if step in wanted]
    for step in steps:
        run.last = step == steps[-1]
        try:
            {"everything": everything, "conformance": conformance, "peers": peers, "splits": splits,
             "backward": backward, "tiles": tiles, "memory": memory, "sanitizer": sanitizer}[step](run)  # fmt: skip
        except Exception as error:  # the next step is worth having all the same
            run.say(f"{step} ended: {type(error).__name__}: {error}")
    path = given.out / "triton_conformance.json"
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    return 1 if any(row.get("outcome") == "failed" for row in rows) else 0


def _list(wanted: Sequence[str]) -> int:
    known = {shape.name for shape in shapes.GPU_SHAPES}
    listed: dict[str, list[str]] = {
        "everything": [t.name for t in everything_tasks()],
        "conformance": [t.name for t in (*conformance_tasks(), *candidate_tasks("sm_90"))],
        "peers": [n for n in FORWARD_SHAPES if n in known], "backward": [n for n in BACKWARD_SHAPES if n in known],
        "splits": [*tiling.SPLIT_CALLS, *tiling.CHUNK_CALLS], "tiles": list(tiling.problems()),
        "memory": ["triton", "gluon_hopper"],
        "sanitizer": [f"{check} {which}" for check, which in watching.CHECKS],
    }  # fmt: skip
    for step, names in itertools.compress(listed.items(), [step in wanted for step in listed]):
        print(f"{step} ({len(names)}): {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
