"""The tuner: problems, what is measured and kept, resuming, and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tables import CPU, Toy, choice, row, spec_of, table, write
from vllm_accel import register_backend, reload_settings
from vllm_accel.cli import main
from vllm_accel.cli.tune import budget, line
from vllm_accel.dispatch import built, measured, quarantine, registry, warm
from vllm_accel.dispatch import settings as settings_module
from vllm_accel.dispatch.cost import GPU, fitted
from vllm_accel.dispatch.device import detect, preset
from vllm_accel.dispatch.estimate import distance_of, estimates
from vllm_accel.dispatch.spec import Feature
from vllm_accel.dispatch.table_file import Row, Timing, parse
from vllm_accel.tuning import attention, build, core, families, grid, timing, trial, tune
from vllm_accel.tuning.attention import AttentionProblem
from vllm_accel.tuning.gemm import GemmProblem, Product
from vllm_accel.tuning.problem import contestants
from vllm_accel.tuning.shape import Shape
from vllm_accel.tuning.tune import Job

SMALL = Shape("small", "prefill", seqlen_q=24, seqlen_k=24, heads=4, kv_heads=2, head_dim=16)
PAGED = Shape("paged", "prefill", lengths=((3, 40), (1, 17)), heads=4, kv_heads=2, head_dim=16, block_size=8)
TRAIN = Shape("train", "train", seqlen_q=24, seqlen_k=24, heads=2, kv_heads=2, head_dim=16)
OTHERS = "cpu,sdpa_cpu"


@pytest.fixture(autouse=True)
def _own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_ACCEL_TABLES", str(tmp_path / "tables"))
    monkeypatch.setattr(measured, "_SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(trial, "ROUNDS", 3)
    reload_settings()
    yield
    monkeypatch.undo()
    settings_module._current = None
    warm._warm.clear()
    trial._called.clear()
    measured.forget()
    built.forget()
    quarantine.release()


@pytest.fixture
def toy() -> Iterator[Any]:
    names = []

    def add(name: str, **kwargs: Any) -> Toy:
        backend = Toy(name, **kwargs)
        register_backend("attention", backend)
        names.append(name)
        return backend

    yield add
    for name in names:
        registry.unregister_backend("attention", name)


def problem(shape: Shape = SMALL, dtype: torch.dtype = torch.float32) -> AttentionProblem:
    return AttentionProblem(shape, dtype)


def tuned(*problems: AttentionProblem, seconds: float = 60.0, **job: Any) -> tuple[tune.Done, list[Any]]:
    told: list[Any] = []
    path = measured.user_file(detect(CPU))
    done = tune.tune(
        Job(tuple(("attention", p) for p in problems), CPU, path, seconds, rounds=3, **job),
        lambda problem, found, text: told.append((problem, found, text)),
    )
    measured.forget()
    return done, told


@pytest.mark.parametrize("shape", [SMALL, PAGED, TRAIN], ids=lambda s: s.name)
def test_every_backend_is_checked_and_timed(shape: Shape) -> None:
    found = trial.measure(problem(shape), CPU, rounds=3)
    able = contestants(problem(shape).explain(problem(shape).make(CPU)))
    assert {"reference", "sdpa_cpu"} <= set(found.row.times) == set(able) and not found.row.failed
    assert all(timing.seconds > 0 and timing.noise >= 0 for timing in found.row.times.values())
    longest = [max(column) for column in zip(*shape.sequences, strict=True)]
    assert {timing.at for timing in found.row.times.values()} == {(len(shape.sequences), *longest)}
    assert found.versions["sdpa_cpu"] == str(torch.__version__)
    again = trial.measure(problem(shape), CPU, rounds=3)  # by now no first call of its kind
    assert all(timing.new_length is not None for timing in again.row.times.values())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs thread affinity")
def test_the_host_is_timed_on_the_fastest_core(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, at = {2, 5, 9}, []
    speeds = {2: 3e-3, 5: 1e-3, 9: 2e-3}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: at.append(set(cores)))
    monkeypatch.setattr(core, "_loop", lambda: speeds[next(iter(at[-1]))])
    with core.fastest_core():
        assert at == [{2}, {5}, {9}, {5}]
    assert at[-1] == allowed

    def forbidden(pid: int, cores: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    with core.fastest_core():
        at.append({0})
    assert at[-1] == {0}


def test_a_loop_of_python_takes_time() -> None:
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with core.fastest_core():
        assert 1e-5 < core._loop() < 0.1
        assert before is None or len(os.sched_getaffinity(0)) == 1
    assert before is None or os.sched_getaffinity(0) == before


def test_a_wrong_or_failing_backend_gets_no_time_and_its_reason(toy: Any) -> None:
    toy("wrong", wrong=0.05)
    toy("raising", raises="no kernel\nimage")
    toy("right")
    done, told = tuned(problem())
    row_ = told[0][1].row
    assert done.measured == 1 and "right" in row_.times and not {"wrong", "raising"} & set(row_.times)
    assert "AssertionError" in row_.failed["wrong"] and row_.failed["raising"] == "RuntimeError: no kernel image"
    kept = parse(measured.user_file(detect(CPU)).read_text())
    assert kept.rows[0].failed == row_.failed and "raising FAILED" in line(*told[0])
    # They are the last choice from now on, and explain says why.
    found = problem().explain(problem().make(CPU))
    assert [c.name for c in found.candidates if c.name in ("right", "wrong")] == ["right", "wrong"]
    assert "no kernel image" in found["raising"].why


def test_what_is_hopeless_is_timed_once_and_then_left_out(toy: Any) -> None:
    slow = toy("slow", sleep=0.06)
    toy("quick")
    tuned(problem())
    assert slow.runs == 3  # the check, one time, and once more to be sure
    longer = problem(Shape("longer", "prefill", seqlen_q=32, seqlen_k=32, heads=4, kv_heads=2, head_dim=16))
    done, told = tuned(problem(), longer)
    assert done.measured == 1 and slow.runs == 3 and told[0][1].row.times
    assert "slow" not in told[0][1].row.times


def test_what_is_known_is_not_measured_again(toy: Any) -> None:
    one = toy("one")
    assert tuned(problem(), problem(TRAIN))[0] == tune.Done(2, 0)
    assert tuned(problem(), problem(TRAIN))[0] == tune.Done(0, 0)
    assert tuned(problem(), again=True)[0].measured == 1
    one.release = "1.1"  # its times are stale now
    assert tuned(problem())[0].measured == 1
    toy("two")
    done, told = tuned(problem())
    assert done.measured == 1 and "two" in told[0][1].row.times
    assert tuned(problem(), driver="99.0")[0].measured == 1


def test_the_budget_ends_the_run_and_another_one_goes_on() -> None:
    shapes = [
        Shape(f"s{n}", "prefill", seqlen_q=n, seqlen_k=n, heads=2, kv_heads=2, head_dim=16) for n in (8, 16, 32, 64)
    ]
    problems_ = [problem(shape) for shape in shapes]
    first, _ = tuned(*problems_, seconds=0.01)
    assert first.measured >= 1 and first.left == 4 - first.measured > 0
    second, _ = tuned(*problems_)
    assert second.measured == first.left and second.left == 0


def test_what_was_measured_decides(toy: Any) -> None:
    toy("slow", sleep=0.02)
    toy("quick")
    tuned(problem())
    found = problem().explain(problem().make(CPU))
    assert "measured table" in found.decided_by
    times = {c.name: c.estimate.seconds for c in found.candidates if c.estimate}
    assert times["slow"] > 0.019 and found[found.chosen].estimate.seconds < 0.01


@pytest.mark.parametrize("product", [
    Product("dense", 33, 48, 64), Product("grouped", 70, 48, 64, 4), Product("row", 32, 48, 128, scaling="row"),
    Product("blocks", 32, 256, 256, 2, scaling="128x128"), Product("columns", 32, 48, 256, scaling="1x128"),
], ids=lambda p: p.name)  # fmt: skip
def test_products_are_checked_and_timed(product: Product) -> None:
    p = GemmProblem(product, torch.bfloat16)
    found = trial.measure(p, CPU, rounds=2)
    assert len(found.row.times) >= 2 and not found.row.failed and found.row.op == "gemm"
    inputs = p.make(CPU)
    truth, right = p.truth(inputs), p.step(inputs, "reference")()[0]
    p.verify([right], truth)
    wrong = right.clone()
    wrong[-1, -1] += right.abs().max() * 0.1
    with pytest.raises(AssertionError):
        p.verify([wrong], truth)
    assert families.parsed(json.loads(json.dumps(p.to_json()))) == ("gemm", p)
    assert missing_meta(p) == found.row.spec


def missing_meta(p: GemmProblem) -> Any:
    return p.explain(p.make(torch.device("meta")), detect(CPU)).spec


def test_a_host_that_drifts_is_timed_over_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(timing.CudaClock):
        """A device that takes 10 us, and a host that takes more with every round."""

        def __init__(self) -> None:
            self._host = {}

        def peak(self, call: timing.Call) -> int | None:
            return None

        def seconds(self, call: timing.Call, times: int) -> float:
            on_host = self._host.setdefault(id(call), [])
            on_host.append((len(on_host) or 100) * 1e-5)  # the first call is no round
            return 1e-5

        def warm(self, call: timing.Call) -> float | None:
            return None

    monkeypatch.setattr(timing, "clock", lambda device: Clock())
    found = trial.measure(problem(), CPU, rounds=5)
    for name in ("cpu", "sdpa_cpu", "reference"):
        if name in found.row.times and found.row.times[name].host is not None:
            made = found.row.times[name]
            assert made.host == made.seconds == pytest.approx(3e-5) and made.cold == pytest.approx(1e-5)
            assert made.noise == pytest.approx(trial.noise_of([1e-5, 2e-5, 3e-5, 4e-5, 5e-5]))
            break
    else:
        pytest.fail("nothing was timed in turns")


def test_noise_is_half_of_the_middle_half() -> None:
    assert trial.noise_of([1.0, 1.0, 1.0, 1.0]) == 0.0
    assert trial.noise_of([0.9, 1.0, 1.1]) == pytest.approx(0.1)
    assert trial.noise_of([1.0, 1.0]) == trial.noise_of([5.0]) == 0.25


def test_out_of_memory_is_no_failure(monkeypatch: pytest.MonkeyPatch, toy: Any) -> None:
    hungry = toy("hungry")

    def forward(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    hungry.forward = forward
    found = trial.measure(problem(), CPU, rounds=3)
    assert "hungry" not in found.row.times and "hungry" not in found.row.failed


def test_a_broken_context_ends_the_run_and_is_noted(monkeypatch: pytest.MonkeyPatch, toy: Any) -> None:
    toy("poison", raises="CUDA error: an illegal memory access was encountered")

    def wait(device: torch.device) -> None:
        if toy_ran():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def toy_ran() -> bool:
        return registry.get("attention", "poison").runs > 0

    monkeypatch.setattr(trial, "wait", wait)
    with pytest.raises(trial.PoisonedError, match="poison broke the CUDA context"):
        tuned(problem())
    kept = parse(measured.user_file(detect(CPU)).read_text())
    assert "illegal memory access" in kept.rows[0].failed["poison"]


def test_slow_compilers_are_built_first_and_eligible_in_another_process(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "compiled"
    cache.mkdir()
    compiler = toy("compiler", first_call_seconds=5.0)
    compiler.compile_cache = lambda: cache
    asked: list[build.Task] = []

    def compile_all(tasks: Any, device: torch.device, seconds: float) -> list[build.Outcome]:
        asked.extend(tasks)
        (cache / "KERNEL").write_text("code")
        return [build.Outcome(task, 9.0) for task in tasks]

    monkeypatch.setattr(build, "run", compile_all)
    spec = problem().explain(problem().make(CPU)).spec
    where = detect(CPU)
    assert not warm.is_warm("attention", "compiler", spec, where)
    done, _ = tuned(problem(), problem(TRAIN))
    assert done.built == 2 and {task.backend for task in asked} == {"compiler"}
    warm._warm.clear()  # as in a new process
    built.forget()
    assert warm.is_warm("attention", "compiler", spec, where)
    longer = problem(Shape("l", "prefill", seqlen_q=500, seqlen_k=500, heads=4, kv_heads=2, head_dim=16))
    assert all(reason.code != "first_call" for reason in longer.explain(longer.make(CPU))["compiler"].reasons)
    # Not for another kind of call, nor when anything that the kernels depend on has changed.
    other = problem(SMALL, torch.float64).explain(problem(SMALL, torch.float64).make(CPU)).spec
    assert not warm.is_warm("attention", "compiler", other, where)
    for change, undo in (
        (lambda: setattr(compiler, "release", "2.0"), lambda: setattr(compiler, "release", "1.0")),
        (lambda: (cache / "KERNEL").unlink(), lambda: (cache / "KERNEL").write_text("code")),
        (
            lambda: setattr(compiler, "compile_cache", lambda: tmp_path),
            lambda: setattr(compiler, "compile_cache", lambda: cache),
        ),
    ):
        change()
        assert not warm.is_warm("attention", "compiler", spec, where)
        undo()
        assert warm.is_warm("attention", "compiler", spec, where)
    built.file_of(where).write_text('{"format": 1, "built": [{"op": "attention"}]}')
    built.forget()
    assert not warm.is_warm("attention", "compiler", spec, where)


def test_a_compiler_whose_first_call_stays_long_is_not_eligible_later(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = toy("compiler", first_call_seconds=5.0, sleep=0.05)
    (tmp_path / "KERNEL").write_text("code")
    compiler.compile_cache = lambda: tmp_path
    looked: list[float] = []

    def slow_load(tasks: Any, device: torch.device, seconds: float) -> list[build.Outcome]:
        looked.append(seconds)
        return [build.Outcome(task, 3.0) for task in tasks]

    monkeypatch.setattr(build, "run", slow_load)
    monkeypatch.setattr(tune, "MAX_FIRST_CALL_SECONDS", 0.01)  # the first call here is longer than that
    done, _ = tuned(problem())
    assert done.measured == 1 and len(looked) == 2  # before, and once more at the end
    warm._warm.clear()
    assert not built.file_of(detect(CPU)).exists()
    found = problem().explain(problem().make(CPU))["compiler"]
    assert [reason.code for reason in found.reasons] == ["first_call"]


def test_first_calls_are_made_in_processes_of_their_own() -> None:
    spec = problem().explain(problem().make(CPU)).spec
    tasks = [build.Task("attention", name, problem(), spec) for name in ("reference", "sdpa_cpu", "flash_attn_2")]
    found = {outcome.task.backend: outcome for outcome in build.run(tasks, CPU, 60.0, workers=2)}
    assert found["reference"].seconds > 0 and found["sdpa_cpu"].seconds > 0
    assert found["flash_attn_2"].seconds is None and "flash_attn_2" in found["flash_attn_2"].error
    late = build.run(tasks[:1], CPU, 0.01)
    assert late == [build.Outcome(tasks[0])]


@pytest.mark.parametrize("device", ["cpu", "h200", "t4", "mi300x"])
def test_the_grid_is_unique_fits_and_reads_back(device: str) -> None:
    where = preset(device)
    pairs = families.problems(tuple(families.TUNED), where)
    assert len({p.name for _, p in pairs}) == len(pairs) > 80
    first = [p.shape for op, p in pairs[:60] if op == "attention"]
    kinds = {(shape.kind, bool(shape.lengths), bool(shape.block_size)) for shape in first}
    assert {("prefill", False, False), ("decode", False, False), ("train", False, False)} <= kinds
    assert ("decode", True, True) in kinds and ("prefill", True, False) in kinds
    for op, p in pairs:
        assert op == "gemm" or grid.fits(p, where)
        assert families.parsed(json.loads(json.dumps(p.to_json()))) == (op, p)


def test_between_points_of_the_grid_something_is_near() -> None:
    where = preset("h200")
    known = [p.explain(p.make(torch.device("meta")), where).spec for p in grid.attention_grid(where)]
    for batch, length in ((1, 200), (3, 700), (8, 3000), (6, 1500), (2, 12000)):
        shape = Shape("x", "prefill", batch=batch, seqlen_q=length, seqlen_k=length)
        p = problem(shape, torch.bfloat16)
        spec = p.explain(p.make(torch.device("meta")), where).spec
        assert any(distance_of(spec, other) is not None for other in known), shape


@pytest.mark.parametrize("by_query_heads", [True, False])
def test_the_grid_tells_whether_keys_are_read_for_each_query_head(by_query_heads: bool) -> None:
    # An H200: a kernel that reads keys once for each query head was expected at half of its time with seven heads a key
    # head, since every decode of the grid had four.
    def device_time(spec: Any) -> float:
        heads = spec.num_heads if by_query_heads else spec.num_kv_heads * 4
        return 5e-6 + 1e-10 * spec.batch * heads * spec.seqlen_k

    def spec_for(p: AttentionProblem) -> Any:
        return p.explain(p.make(torch.device("meta")), where).spec

    where = preset("h200")
    bf16 = [p for p in grid.attention_grid(where) if p.shape.kind == "decode" and p.dtype is torch.bfloat16]
    known = [spec_for(p) for p in bf16 if not p.shape.lengths and p.shape.head_dim == 128]
    model = fitted([(spec, device_time(spec)) for spec in known])
    assert model is not None
    rows = [Row("attention", spec, {"toy": Timing(device_time(spec), 0.0)}) for spec in known]
    asked = spec_for(
        problem(Shape("x", "decode", batch=42, seqlen_q=1, seqlen_k=653, heads=28, kv_heads=4), torch.bfloat16)
    )
    found = estimates(asked, rows, {"toy": model}, GPU)["toy"]
    assert found.seconds == pytest.approx(device_time(asked), rel=0.05)


def test_a_padded_batch_is_checked_with_its_mask() -> None:
    given = {"kind": "prefill", "dtype": "fp32", "batch": 3, "seqlen_q": 20, "seqlen_k": 20, "heads": 2, "kv_heads": 2,
             "head_dim": 16, "causal": False, "padded": True}  # fmt: skip
    found = attention.parse(given)
    assert "padded" in found.name and found.to_json() == {"op": "attention", "name": found.name, **given}
    inputs = found.make(CPU)
    mask = inputs.options["attn_bias"]
    assert mask.shape == (3, 1, 1, 20) and [int(m.sum()) for m in mask] == [20, 14, 18]
    assert Feature.MASK in found.explain(inputs).spec.features
    truth = found.truth(inputs)
    found.verify(found.step(inputs, None)(), truth)
    with pytest.raises(AssertionError, match="sequence 2"):
        found.verify(found.step(inputs._replace(options={"causal": False}), None)(), truth)


def test_ragged_lengths_are_of_several_sizes() -> None:
    lengths = grid.ragged(16, 512, 4096)
    assert lengths[0] == (512, 4096) and len(set(lengths)) == 16
    assert all(1 <= q <= k <= 4096 and k >= 1024 for q, k in lengths) and grid.ragged(4, 1, 100)[2][0] == 1


@pytest.mark.parametrize(("data", "said"), [
    ({"kind": "prefill"}, "dtype None"),
    ({"kind": "decode", "dtype": "bf16", "seqlen_q": 1, "seqlen_k": 8, "colour": 1}, "'colour' is not one of"),
    ({"kind": "sleep", "dtype": "bf16", "seqlen_q": 1, "seqlen_k": 8}, "'sleep' is not prefill"),
    ({"kind": "decode", "dtype": "bf16", "seqlen_q": "1", "seqlen_k": 8}, "seqlen_q has to be int"),
    ({"op": "paged", "kind": "decode", "dtype": "bf16", "lengths": [[1, 8]]}, "needs block_size"),
    ({"kind": "prefill", "dtype": "bf16", "seqlen_q": 8, "seqlen_k": 8, "padded": True}, "not causal"),
    ({"op": "sort"}, "op one of"),
    ([], "is an object"),
], ids=str)  # fmt: skip
def test_shapes_in_a_file_are_checked(data: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([{"kind": "prefill", "dtype": "fp32", "seqlen_q": 8, "seqlen_k": 8}, data]))
    with pytest.raises(ValueError, match=f"shape 1: .*{said}"):
        families.read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="has to be a list"):
        families.read(path)


def test_shapes_without_a_name_are_named_by_what_they_are() -> None:
    found = attention.parse({"kind": "decode", "dtype": "bf16", "batch": 4, "seqlen_q": 1, "seqlen_k": 2048})
    assert found.name == "decode bf16 4x1/2048 32:8x128 causal"
    assert problem(PAGED).to_json()["op"] == "paged" and "paged 8" in attention.label(PAGED, torch.float16)


@pytest.mark.parametrize(("text", "seconds"), [("120s", 120), ("2m", 120), ("1.5h", 5400), ("7", 7), (" 3 min ", 180)])
def test_budgets(text: str, seconds: float) -> None:
    assert budget(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5s", "0s", "5 parsecs", "1e3s"])
def test_wrong_budgets(text: str) -> None:
    with pytest.raises(ValueError, match="--budget takes"):
        budget(text)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--op", "sort"], "'sort' is not one of attention, paged, gemm"),
    (["--budget", "long"], "--budget takes a time"),
    (["--shapes", "absent.json"], "absent.json"),
    (["--shapes", "x.json", "--op", "paged"], "no meaning"),
    (["--device", "h100"], "h100 is not a device of this machine"),
    (["--pin"], "no table of cpu"),
    (["--unpin"], "there is no"),
    (["--pin", "--unpin"], "not allowed with"),
], ids=str)  # fmt: skip
def test_wrong_use_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "h100" in arguments and torch.cuda.is_available():
        return
    assert main(["tune", *arguments] if "--device" in arguments else ["tune", "--device", "cpu", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def _shapes_file(path: Path, *lengths: int) -> Path:
    sizes = {"kind": "prefill", "dtype": "fp32", "heads": 2, "kv_heads": 2, "head_dim": 16}
    path.write_text(json.dumps([{**sizes, "seqlen_q": n, "seqlen_k": n} for n in lengths]))
    return path


def test_the_command_measures_says_so_pins_and_unpins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = _shapes_file(tmp_path / "shapes.json", 16, 64)
    command = ["tune", "--device", "cpu", "--shapes", str(shapes)]
    assert main([*command, "--budget", "60s"]) == 0
    out = capsys.readouterr().out
    assert "2 shapes measured, none left" in out and "prefill fp32 1x16 2:2x16 causal: " in out
    path = measured.user_file(detect(CPU))
    kept = parse(path.read_text())
    assert len(kept.rows) == 2 and kept.provenance["command"].startswith("vllm-accel") and not kept.pinned
    assert main(["tune", "--device", "cpu", "--pin"]) == 0
    before = path.read_text()
    assert parse(before).pinned and "pinned: 2 shapes" in capsys.readouterr().out
    assert main([*command, "--again"]) == 2 and "--unpin" in capsys.readouterr().err and path.read_text() == before
    assert main(["tune", "--device", "cpu", "--unpin"]) == 0 and not parse(path.read_text()).pinned
    assert main(["explain", "--q", "1,64,2,16", "--causal", "--dtype", "fp32", "--device", "cpu"]) == 0
    assert "measured" in capsys.readouterr().out


def test_pinning_takes_the_shipped_rows_along(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    toy("one")
    write(table(row(spec_of(1024), one=1e-6)), measured.shipped_file(detect(CPU)))
    write(table(row(spec_of(64), one=1e-6)))
    assert main(["tune", "--device", "cpu", "--pin"]) == 0
    assert choice(1024)["one"].estimate.exact and choice(64)["one"].estimate.exact
    assert len(parse(measured.user_file(detect(CPU)).read_text()).rows) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_leaves_what_was_measured(tmp_path: Path) -> None:
    shapes = _shapes_file(tmp_path / "shapes.json", *range(16, 400, 8))
    command = [sys.executable, "-m", "vllm_accel.cli", "tune", "--device", "cpu", "--shapes", str(shapes)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "VLLM_ACCEL_TABLES": str(tmp_path / "mine")},
    )  # fmt: skip
    path = tmp_path / "mine" / f"{measured.table_name(detect(CPU))}.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and parse(path.read_text()).rows):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "interrupted; what was measured is in the table\n"
    assert parse(path.read_text()).rows


def test_the_clock_of_a_cpu_counts_calls() -> None:
    calls = []
    seconds = timing.CpuClock().seconds(lambda: calls.append(time.sleep(0.001)), 5)
    assert len(calls) == 5 and 0.001 <= seconds < 0.1
