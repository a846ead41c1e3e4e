"""The script for a GPU, as far as it runs without one: its workers, its lists, its checks on the CPU."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import operator
import os
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_triton, shapes
from benchmarks import gpu_triton_sanitizer as watching
from benchmarks import gpu_triton_tasks as work
from benchmarks import gpu_triton_tiles as tiling
from benchmarks.tile_problem import Where
from benchmarks.workers import NO_TIME, STOPPED, Done, Task, run_all
from vllm_accel.dispatch.device import detect
from vllm_accel.kernels.gluon import forward_sm90_launch
from vllm_accel.kernels.gluon.parts import choose_parts
from vllm_accel.kernels.triton import paged_launch, splits, toolchain
from vllm_accel.kernels.triton.launch import Launch
from vllm_accel.testing import Case, PagedCase
from vllm_accel.testing.outcome import Outcome

META = Where(torch.device("meta"), "sm_90")


#: What tasks call here is of the standard library: their processes need not import torch.
LOST = "raise RuntimeError('CUDA error: an illegal memory access was encountered')"


def test_a_task_that_fails_hangs_or_dies_costs_itself_alone() -> None:
    tasks = [
        Task("one", operator.add, (1, 1)), Task("error", int, ("x",)), Task("death", os._exit, (3,)),
        Task("hang", time.sleep, (600,), limit=1.0), Task("poison", exec, (LOST,)), Task("two", operator.add, (2, 2)),
    ]  # fmt: skip
    seen: list[str] = []
    done = {d.task.name: d for d in run_all(tasks, 2, time.monotonic() + 120, lambda d: seen.append(d.task.name))}
    assert sorted(seen) == sorted(t.name for t in tasks)
    assert (done["one"].value, done["two"].value) == (2, 4)
    assert done["error"].error.startswith("ValueError: invalid literal")
    assert done["death"].error == "its process ended with 3"
    assert done["hang"].error == "killed after 1 s"
    assert "illegal memory access" in done["poison"].error


def test_the_deadline_holds_for_what_runs_and_for_what_waits() -> None:
    tasks = [Task("hang", time.sleep, (600,)), Task("after", operator.add, (1, 1))]
    start = time.monotonic()
    done: list[Done] = run_all(tasks, 1, start + 1)
    assert time.monotonic() - start < 30
    assert [d.error for d in done] == [STOPPED, NO_TIME]


def test_every_name_in_the_lists_exists() -> None:
    known = {shape.name for shape in shapes.GPU_SHAPES}
    assert {*gpu_triton.FORWARD_SHAPES, *gpu_triton.BACKWARD_SHAPES} <= known
    for task in gpu_triton.conformance_tasks():
        if task.call is work.conformance:
            _, paged, name, dtype = task.args
            assert name in (work.paged_cases() if paged else work.dense_cases()) and dtype in work.DTYPES
    assert set(gpu_triton._FP32) <= set(work.dense_cases())
    known = {*work.dense_cases(), *(f"paged_{name}" for name in work.paged_cases())}
    watched = {
        check: [which.partition(":") for c, which in watching.CHECKS if c == check] for check, _ in watching.CHECKS
    }
    for target, _, names in itertools.chain(*watched.values()):
        assert set(names.split(",")) <= known and target.partition("@")[0] in ("triton", "gluon_hopper")
    # A process each, so that what one reports is one case's; and what they report of the backward kernels too.
    assert all(target.startswith("gluon_hopper") for target, _, _ in watched["racecheck"])
    backward = {name for _, _, name in watched["racecheck"]} - {case.name for case in work.PART_CASES}
    assert all(work.dense_cases()[name].grad for name in backward)
    assert {name for _, _, name in watched["racecheck"]} <= {
        name for _, _, names in watched["memcheck"] for name in names.split(",")
    }


@pytest.mark.parametrize("name", tiling.problems())
def test_every_candidate_makes_launches_of_the_call_that_is_timed(name: str) -> None:
    problem = tiling.problems()[name]
    tiles = tiling.candidates(problem, "sm_90")
    assert 2 <= len(tiles) <= 6 and (problem.flops > 0) != (problem.bytes > 0)
    data = problem.timed(META)
    for tile in tiles:
        launches = data.launches(tile)
        assert launches[0].num_warps == getattr(tile, "num_warps", 4)  # of a Gluon variant: those of one partition


@pytest.mark.parametrize("case", work.LONG_CASES[::4], ids=lambda case: case.name)
def test_the_longer_cases_are_cases(case: Case) -> None:
    assert work.conformance("reference", False, case.name, "fp32", "cpu")["outcome"] == "ran"


@pytest.mark.parametrize("case", work.LONG_PAGED_CASES[::5], ids=lambda case: case.name)
def test_the_longer_paged_cases_are_cases(case: PagedCase) -> None:
    assert work.conformance("reference", True, case.name, "fp32", "cpu")["outcome"] == "ran"


@pytest.mark.parametrize("case", work.COMBINED_CASES[::7], ids=lambda case: case.name)
def test_the_combined_cases_are_cases(case: Case) -> None:
    assert work.conformance("reference", False, case.name, "fp32", "cpu")["outcome"] == "ran"


@pytest.mark.parametrize("ptxas", ["ours", "Triton's"])
def test_a_case_can_be_assembled_by_either(ptxas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = object()
    monkeypatch.setattr(toolchain, "hopper_ptxas", lambda: sound)
    seen = []

    def check(*args: object) -> dict[str, str]:
        seen.append(toolchain.hopper_ptxas() is sound)
        raise RuntimeError

    monkeypatch.setattr(work, "conformance", check)
    with pytest.raises(RuntimeError):
        work.assembled(False, "everything", "bf16", ptxas)
    assert seen == [ptxas == "ours"]
    assert toolchain.hopper_ptxas() is sound
    assert len({t.name for t in gpu_triton.everything_tasks()}) == 8 + len(work.COMBINED_CASES)


@pytest.mark.parametrize("lie", ["paged", "dense", "packed"])
def test_ways_to_share_keys_are_timed(lie: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, without a launch: what each way launches, and the row that comes of it."""
    launched = []
    monkeypatch.setattr(tiling, "SPLIT_CALLS", {"small": tiling.Decode([4096] * 4, lie=lie)})
    monkeypatch.setattr(tiling, "_graph", lambda launches: launched.append(launches) or (lambda: None))
    monkeypatch.setattr(tiling.tile_problems, "random_tensor", lambda shape, dtype, *_: torch.empty(shape, dtype=dtype))
    row = tiling.time_splits("small", Where(torch.device("cpu"), "sm_90"))
    assert all(r["seconds"] and r["of_copy"] and not r["error"] for r in row["results"])
    names = {r["way"]: [launch.fn.__name__ for launch in n] for r, n in zip(row["results"], launched, strict=True)}
    assert all(n == ["stream_attention"] for n in names.values())
    programs = {r["way"]: r["programs"] for r in row["results"]}
    assert programs["one team a sequence"] == 4 * 8
    assert programs["busy places"] < min(programs["all places"], programs["twice the busy places"])


def test_chunks_are_timed_with_their_keys_shared_out_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(tiling, "CHUNK_CALLS", {"small": tiling.Chunk(1, 10, 5000, 4, 2)})
    monkeypatch.setattr(tiling, "captured", lambda call: called.append(call) or (lambda: None))
    row = tiling.time_chunk("small", Where(torch.device("cpu"), "sm_90"))
    assert (row["tiles"], row["chosen"], len(called)) == (4, "shared", 2)
    assert [r["way"] for r in row["results"]] == ["whole", "shared"] and all(r["seconds"] for r in row["results"])


def test_a_graph_keeps_the_tensors_that_it_writes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200 partial results that were freed after the capture made the replay an illegal memory access."""
    replayed: list[str] = []
    graph = SimpleNamespace(replay=lambda: replayed.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tiling, "run", lambda launch: None)
    part = torch.empty(8)
    alive = weakref.ref(part)
    replay = tiling._graph((Launch(None, (1, 1, 1), (part,), {}, 4, 2),))
    del part
    replay()
    assert replayed == ["replay"] and alive() is not None
    del replay
    assert alive() is None


def test_a_wrong_number_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_accel.backends import reference

    real = reference.ReferenceKernel.forward
    monkeypatch.setattr(
        reference.ReferenceKernel, "forward", lambda *a, **k: (r := real(*a, **k)) and (r[0] * 1.1, *r[1:])
    )
    found = work.conformance("reference", False, "plain", "fp32", "cpu")
    assert found["outcome"] == "failed" and "out" in found["detail"]


def test_peers_and_backwards_on_the_cpu() -> None:
    row = work.peers("quick_paged", quick=True)
    assert {r["name"] for r in row["results"] if r["seconds"]} >= {"reference"} and not row["error"]
    row = work.backwards("quick_train", quick=True)
    right = {r["name"] for r in row["results"] if r["seconds"] and r["tflops"]}
    assert right >= {"sdpa_cpu", "torch sdpa by hand"} and "reference" not in right


def test_tiny_cases_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    watching.tiny("reference@3:causal,paged_decode", "cpu")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["causal", "paged_decode"]


def test_a_case_may_tell_a_backend_of_few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in ("check_backend", "check_paged_backend"):
        monkeypatch.setattr(work, name, lambda *a, device, **k: seen.append(device.sm_count) or Outcome(True))
    watching.tiny("reference@3:causal,paged_decode", "cpu")
    watching.tiny("reference:causal", "cpu")
    assert seen == [3, 3, detect(torch.device("cpu")).sm_count]


@pytest.mark.parametrize("case", work.TURN_CASES, ids=lambda case: case.name)
def test_blocks_of_threads_take_several_tiles_where_they_are_watched(case: Case) -> None:
    """What the sanitizer is to see: rings are used again, and dense tiles of 64 channels come one after the other."""
    inputs = case.make(torch.bfloat16)
    q, k, v = inputs.q, inputs.k, inputs.v
    cu_q, cu_k = (inputs.options.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k"))
    variant = forward_sm90_launch.VARIANTS[case.head_dim]
    lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]))
    launch = forward_sm90_launch.forward_launch(
        q, k, v, q, lse, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=300, max_seqlen_k=333, softmax_scale=0.1,
        causal=True, head_dim_v=case.head_dim, variant=variant, sm_count=3,
    )  # fmt: skip
    assert launch.constexprs["PERSISTENT"] == (case.head_dim == 64 and not case.varlen)
    assert not launch.constexprs["PERSISTENT"] or launch.args[-1] >= 3 * launch.grid[0]
    assert variant.bn * (variant.stages - 1) < 333, "a ring's last slot is used"


@pytest.mark.parametrize("case", work.PART_CASES, ids=lambda case: case.name)
def test_keys_are_cut_into_parts_where_they_are_watched(case: Case) -> None:
    variant = forward_sm90_launch.VARIANTS[case.head_dim]
    rows = variant.consumers * forward_sm90_launch.ROWS
    causal = case.options.get("causal", False)
    made = choose_parts(case.seqlen_q, case.seqlen_k, case.num_heads, causal, case.head_dim, rows, 3)
    assert made > 1
    assert work.conformance("reference", False, case.name, "fp32", "cpu")["outcome"] == "ran"


@pytest.mark.parametrize("case", work.STREAM_CASES, ids=lambda case: case.name)
def test_the_cases_of_a_stream_are_shared_out(case: PagedCase) -> None:
    """Few sequences have several teams each, many fewer teams than there are of them, and a chunk several parts."""
    made = paged_plan(case, 4 if "many" in case.name else 132)
    if "chunk" in case.name:
        assert made.search and made.num_splits > 1
    else:
        assert made.teams and (made.teams < len(case.lengths)) == ("many" in case.name)
    assert work.conformance("reference", True, case.name, "fp32", "cpu")["outcome"] == "ran"


def paged_plan(case: PagedCase, sm_count: int) -> splits.Work:
    """Return the one launch that attends of a case, on a GPU like an H200 with so many multiprocessors."""
    inputs = case.make(torch.bfloat16)
    defaults: dict[str, Any] = {"window_size": (-1, -1), "batch_invariant": False, "sinks": None, "causal": False}
    args: Any = SimpleNamespace(**{**defaults, **inputs.options})
    (made,) = splits.plan_work(
        paged_launch.sizes_of(inputs.q, inputs.v_cache, args),
        lambda rows, form: paged_launch.choose_tile(
            "sm_90", rows, case.head_dim, case.head_dim_v, inputs.q.dtype, inputs.k_cache.dtype, False, form
        ),
        splits.Gpu(sm_count),
    )
    return made


def run_of(tmp_path: Path, budget: float) -> gpu_triton.Run:
    return gpu_triton.Run(tmp_path, argparse.Namespace(jobs=4, only="", budget=budget), "sm_90", {})


def test_the_last_step_takes_all_the_time_that_is_left(tmp_path: Path) -> None:
    run = run_of(tmp_path, 100.0)
    now = time.monotonic()
    assert 20 < run.left(0.25) - now < 30
    run.last = True
    assert 90 < run.left(0.25) - now <= 101


def test_racecheck_watches_each_case_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    ran = "echo \"'outcome': 'ran'\""
    tool.write_text(
        f'#!/bin/sh\necho "$@"\ncase "$*" in *racecheck*head_128*) exit 9;; *racecheck*gqa*) exit 4;; esac\n'
        f'case "$*" in *memcheck*varlen_d64) ;; *) for c in $(echo "${{*##*:}}" | tr , " "); do {ran}; done;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(watching.shutil, "which", lambda name: str(tool))
    gpu_triton.sanitizer(run_of(tmp_path, 100.0))
    rows = {r["name"]: r for r in json.loads((tmp_path / "triton_sanitizer.json").read_text())["results"]}
    assert list(rows) == [f"{check} {which}" for check, which in watching.CHECKS]
    assert {name: row["outcome"] for name, row in rows.items() if row["outcome"] != "clean"} == {
        "racecheck gluon_hopper:head_128": "errors", "racecheck gluon_hopper:gqa": "exit status 4",
        "memcheck gluon_hopper@3:turns_varlen_d64": "clean, but not every case ran and was right",
    }  # fmt: skip
    assert "--tiny gluon_hopper:varlen_tail" in rows["racecheck gluon_hopper:varlen_tail"]["detail"]
    gpu_triton.sanitizer(run_of(tmp_path, 10.0))
    rows = json.loads((tmp_path / "triton_sanitizer.json").read_text())["results"]
    assert {r["outcome"] for r in rows} == {"no time left"}


def test_each_race_is_told_once() -> None:
    report = """
========= Error: Race reported between Read access at attention_dq+0x1e0 in backward.py:388
=========     and Write access at attention_dq+0x9ce0 in backward.py:388 [17 hazards]
=========     and Write access at attention_dq+0x120d0 in backward.py:437 [34 hazards]
=========
========= Error: Race reported between Read access at attention_dq+0x1f0 in backward.py:388
=========     and Write access at attention_dq+0x9cf0 in backward.py:388 [49 hazards]
"""
    first = "Read attention_dq backward.py:388 / Write attention_dq backward.py"
    assert watching.races(report) == [f"{first}:388", f"{first}:437"]
    assert watching.races("========= RACECHECK SUMMARY: 0 hazards displayed") == []


def test_dry_run_and_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_triton.main(["--dry-run", "--steps", "peers,tiles"]) == 0
    text = capsys.readouterr().out
    assert "paged16_b32_4k" in text and "gluon_d128_8192_full" in text and "conformance" not in text
    for wrong in (["--steps", "nothing"], [], ["--out"]):
        if wrong or not torch.cuda.is_available():
            with pytest.raises(SystemExit):
                gpu_triton.main(wrong)
