"""The benchmarks run, leave their structure, and count right; what the numbers are is not for a test to say."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention as attention_benchmark
from benchmarks import contest, machine, shapes
from benchmarks import dispatch as dispatch_benchmark
from benchmarks.attention_calls import AUTO, BY_HAND, contestants
from benchmarks.contest import Contest, Contestant
from host import FIRST_ON_CPU
from vllm_accel.tuning import check, timing
from vllm_accel.tuning.measure import step

ROOT = Path(__file__).resolve().parent.parent
ABOUT = {"command", "date", "cpu", "cores", "gpu", "threads", "python", "torch", "cuda", "packages", "load"}


def run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dispatch(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("dispatch") / "dispatch.json"
    printed = run("benchmarks.dispatch", "--quick", "--device", "cpu", "--json", str(path))
    return printed, json.loads(path.read_text())


def test_dispatch_measures_everything(dispatch: tuple[str, dict[str, Any]]) -> None:
    printed, data = dispatch
    assert set(data["about"]) == ABOUT and data["about"]["threads"] == 1
    rows = [(section["title"], row) for section in data["sections"] for row in section["rows"]]
    errors = {row["name"]: row["error"] for _, row in rows if row["error"]}
    assert all("is not installed here" in text for text in errors.values()), errors
    for title, row in rows:
        assert title in printed and row["name"] in printed
        if not row["error"]:
            assert 0 < row["result"]["base"] < row["result"]["ours"] * 20, row
    assert {row["bound"] for _, row in rows if row["bound"] and not row["goal"]} == {1.3, 1.5, 2.5, 4.0, 5.0, 8.0}
    assert {row["bound"] for _, row in rows if row["goal"]} == {1.0}
    assert any(row["shows"] == "ratio" for _, row in rows)


def test_dispatch_sees_what_it_measures(dispatch: tuple[str, dict[str, Any]]) -> None:
    nothing = {
        row["name"]: row["result"]["ours"]
        for section in dispatch[1]["sections"]
        if section["title"] == "a kernel that does nothing"
        for row in section["rows"]
    }
    (miss,) = (s["rows"][0]["result"]["ours"] for s in dispatch[1]["sections"] if s["title"].startswith("miss"))
    # Orders of magnitude that hold on a machine ten times slower: a hit is some microseconds, a miss costs more.
    assert nothing["exact hit"] < 20
    assert nothing["exact hit"] < miss


def test_check_returns_one_where_a_bound_is_missed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def always(device: torch.device, rounds: int, quick: bool) -> list[dispatch_benchmark.Section]:
        row = dispatch_benchmark.Row("slow", "slow", "fast", 0.5)
        built = Contest(
            {"rotation": [(0, 0, 0)] * 4},
            {"slow": Contestant("sum(range(2000))"), "fast": Contestant("pass")},
        )
        return [dispatch_benchmark.Section("made up", lambda: built, [row], 3)]

    monkeypatch.setattr(dispatch_benchmark, "sections", always)
    assert dispatch_benchmark.main(["--device", "cpu", "--check"]) == 1
    assert "MISSED" in capsys.readouterr().out
    assert dispatch_benchmark.main(["--device", "cpu"]) == 0


def test_a_section_that_raises_becomes_text(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken() -> Contest:
        raise RuntimeError("no compiler here")

    row = dispatch_benchmark.Row("compiled", "attention", "sdpa", 1.0)
    sections = [dispatch_benchmark.Section("compiled", broken, [row], 3)]
    monkeypatch.setattr(dispatch_benchmark, "sections", lambda *_: sections)
    assert dispatch_benchmark.main(["--device", "cpu", "--check"]) == 1
    assert "RuntimeError: no compiler here" in capsys.readouterr().out


def test_contestants_take_turns_and_differences_are_of_one_round() -> None:
    turns: list[str] = []
    names = {"rotation": [(1, 2, 3)], "turns": turns}
    both = {name: Contestant(f"turns.append({name!r})", passes=1) for name in "ab"}
    taken = contest.run(Contest(names, both), 6, torch.device("cpu"))
    assert {name: len(rounds) for name, rounds in taken.items()} == {"a": 6, "b": 6}
    rounds = turns[2:]  # the first call of each is for its own sake
    assert [sorted(rounds[i : i + 2]) for i in range(0, 12, 2)] == [["a", "b"]] * 6
    assert set(rounds[::2]) == {"a", "b"}  # neither always goes first
    result = contest.compare([5.0, 15.0, 4.0], [4.0, 10.0, 3.5])
    assert (result.ours, result.base, result.over, result.over_min) == (5.0, 4.0, 1.0, 0.5)
    assert result.ratio == 1.25 and not result.base_disturbed
    assert contest.compare([9.0, 9.0], [1.0, 3.0]).base_disturbed
    assert not contest.compare([90.0, 90.0], [1.0, 3.0]).base_disturbed  # no matter beside 90


def test_a_coarse_clock_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert contest.is_fine(time.perf_counter)
    monkeypatch.setattr(time, "thread_time", lambda: int(time.perf_counter() * 100) / 100)
    with contest.threads(1):
        assert contest.clock() is time.perf_counter


@pytest.fixture(scope="module")
def attention_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("attention") / "attention.json"
    printed = run("benchmarks.attention", "--quick", "--rounds", "2", "--json", str(path))
    return printed, json.loads(path.read_text())


def test_attention_measures_every_backend_on_every_shape(attention_run: tuple[str, dict[str, Any]]) -> None:
    printed, data = attention_run
    assert set(data["about"]) == ABOUT and data["dtype"] == "float32"
    assert [report["shape"]["name"] for report in data["shapes"]] == [shape.name for shape in shapes.QUICK_SHAPES]
    for report in data["shapes"]:
        assert report["shape"]["name"] in printed
        paged = report["shape"]["block_size"] > 0  # PyTorch has nothing for a paged cache
        expected = {AUTO, "reference"} if paged else {AUTO, BY_HAND, "reference", "sdpa_cpu"}
        assert expected <= {result["name"] for result in report["results"]}
        assert report["chosen"] == FIRST_ON_CPU and "platform" not in report["refused"]
        assert report["matmul_tflops"] > 0 and report["copy_gbs"] > 0
        for result in report["results"]:
            assert result["seconds"] > 0 and result["tflops"] > 0 and len(result["rounds"]) == 2, result
            assert (result["gbs"] is not None) == (report["shape"]["kind"] == "decode")


def test_attention_reports_a_backend_that_raises_or_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def with_bad(shape: shapes.Shape, inputs: shapes.Inputs) -> Any:
        calls, refused, chosen = contestants(shape, inputs)

        def raises(inputs: shapes.Inputs) -> torch.Tensor:
            raise RuntimeError("no kernel image")

        return {**calls, "raises": raises, "wrong": lambda i: calls[BY_HAND](i) * 1.01}, refused, chosen

    monkeypatch.setattr(attention_benchmark, "contestants", with_bad)
    assert attention_benchmark.main(["--quick", "--rounds", "1", "--shapes", "causal"]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: no kernel image" in printed and "wrong" in printed and "AssertionError" in printed
    assert f"attention() = {FIRST_ON_CPU}" in printed


def test_attention_leaves_out_who_is_not_wanted_and_warms_up_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[Any] = []
    monkeypatch.setattr(attention_benchmark, "warmup", lambda call, *tensors, **options: warmed.append(options))
    path = tmp_path / "a.json"
    given = ["--quick", "--rounds", "1", "--shapes", "causal", "--json", str(path)]
    assert attention_benchmark.main([*given, "--without", "reference,by hand"]) == 0 and not warmed
    data = json.loads(path.read_text())
    assert {r["name"] for report in data["shapes"] for r in report["results"]} == {AUTO, "sdpa_cpu", FIRST_ON_CPU}
    assert attention_benchmark.main([*given, "--backends", "sdpa", "--without", "hand", "--warm"]) == 0
    data = json.loads(path.read_text())
    assert {r["name"] for report in data["shapes"] for r in report["results"]} == {"sdpa_cpu"}
    assert [options["causal"] for options in warmed] == [True] * len(data["shapes"])


def test_a_shape_that_does_not_fit_becomes_text(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(shapes.Shape, "make", full)
    assert attention_benchmark.main(["--quick", "--shapes", "decode"]) == 1
    assert "tried to allocate 1 TiB" in capsys.readouterr().out


@pytest.mark.parametrize("shape", shapes.QUICK_SHAPES, ids=lambda shape: shape.name)
def test_check_catches_one_wrong_element(shape: shapes.Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = shape.make(torch.float32, torch.device("cpu"))
    truth = check.parts(shape, inputs)
    found = step(contestants(shape, inputs)[0][AUTO], shape, inputs)()
    check.verify(found, truth)
    monkeypatch.setitem(check._MAX_SCORES, "cpu", 64)  # the same truth, computed block by block
    for whole, blocks in zip(truth, check.parts(shape, inputs), strict=True):
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(whole.want, blocks.want, strict=True))
    for i, tensor in enumerate(found):
        bad = [t.detach().clone() for t in found]
        bad[i][(truth[-1].rows if i < 2 else truth[-1].keys)][..., -1] += 0.01 * tensor.abs().max().item()
        with pytest.raises(AssertionError, match=("out", "dq", "dk", "dv")[i]):
            check.verify(bad, truth)


def test_operations_and_bytes_are_those_of_the_literature() -> None:
    square = shapes.Shape("s", "prefill", batch=2, seqlen_q=1024, seqlen_k=1024, heads=8, kv_heads=8, causal=False)
    assert square.flops() == 4 * 2 * 8 * 1024**2 * 128
    causal = shapes.Shape("c", "prefill", batch=2, seqlen_q=1024, seqlen_k=1024, heads=8, kv_heads=8)
    assert causal.flops() == square.flops() / 2
    train = shapes.Shape("t", "train", batch=2, seqlen_q=1024, seqlen_k=1024, heads=8, kv_heads=8)
    assert train.flops() == causal.flops() * 3.5
    packed = shapes.Shape("p", "prefill", lengths=((1024, 1024),) * 2, heads=8, kv_heads=8)
    assert packed.flops() == causal.flops()
    decode = shapes.Shape("d", "decode", batch=3, seqlen_q=1, seqlen_k=500, heads=8, kv_heads=2)
    assert decode.flops() == 4 * 3 * 8 * 500 * 128
    assert decode.bytes(torch.bfloat16) == 2 * 3 * (2 * 500 * 2 * 128 + 2 * 8 * 128)


def test_every_list_of_shapes_has_every_kind_and_unique_names() -> None:
    for listed in (shapes.CPU_SHAPES, shapes.GPU_SHAPES, shapes.QUICK_SHAPES):
        assert {shape.kind for shape in listed} == {"prefill", "decode", "train"}
        assert any(shape.lengths for shape in listed)
        assert len({shape.name for shape in listed}) == len(listed)
    assert shapes.named(shapes.CPU_SHAPES, "decode, train") == tuple(
        shape for shape in shapes.CPU_SHAPES if "decode" in shape.name or "train" in shape.name
    )
    with pytest.raises(ValueError, match="no shape matches 'nothing'"):
        shapes.named(shapes.CPU_SHAPES, "nothing")


def test_slow_contestants_get_fewer_rounds_and_failures_end_only_themselves() -> None:
    class Clock:
        def seconds(self, call: Any, times: int) -> float:
            return float(call())

        def peak(self, call: Any) -> int | None:
            return 5

    calls = {"slow": lambda: 1.0, "quick": lambda: 1e-3, "fails": lambda: 1 / 0}
    found = timing.in_turns(calls, Clock(), 9)
    assert {name: len(timed.rounds) for name, timed in found.items()} == {"slow": 2, "quick": 9, "fails": 0}
    assert found["fails"].error.startswith("ZeroDivisionError") and found["fails"].seconds is None
    assert found["quick"].seconds == 1e-3 and found["quick"].peak == 5


def test_nobody_always_follows_the_same_contestant() -> None:
    class Clock:
        def __init__(self) -> None:
            self.order: list[str] = []

        def seconds(self, call: Any, times: int) -> float:
            self.order.append(call())
            return 1e-3

        def peak(self, call: Any) -> int | None:
            return 0

    orders = []
    for _ in range(2):
        clock = Clock()
        timing.in_turns({name: lambda name=name: name for name in "abcd"}, clock, 7)  # type: ignore[misc]
        orders.append(clock.order[4:])
    assert orders[0] == orders[1] and all(set(orders[0][at : at + 4]) == set("abcd") for at in range(0, 28, 4))
    followers = {pair for pair in itertools.pairwise(orders[0]) if pair[0] != pair[1]}
    assert all(len({before for before, after in followers if after == name}) == 3 for name in "abcd")


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine, "load", lambda: 1.5)
    assert machine.busy(0.5, own=1) is None
    assert "load average 3.0 on 4 cores" in (machine.busy(3.0, own=1) or "")
    monkeypatch.setattr(machine, "load", lambda: 5.0)
    assert "load average 4.0" in (machine.busy(0.5, own=1) or "")


def test_make_bench_runs() -> None:
    files = ("benchmarks/bench_attention.py", "benchmarks/bench_varlen.py")
    out = run("pytest", *files, "-v", "--benchmark-disable", "-k", "test_hit or test_packed or test_prefill")
    for name in ("test_hit PASSED", "test_hit_of_nothing PASSED", "test_prefill[sdpa_cpu] PASSED", "test_packed[sdpa"):
        assert name in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
@pytest.mark.parametrize("module", ["attention --gpu", "gemm --gpu", "selection --gpu", "lengths --device cuda",
                                    "dispatch --device cuda", "shared_prefix --device cuda",
                                    "first_calls"])  # fmt: skip
def test_a_gpu_that_is_not_there_is_wrong_use(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *arguments = module.split()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(arguments)
    assert ended.value.code == 2 and "cuda is no device here" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "said"), [
    ("lengths --device cpu --sizes 8,2", "--sizes takes H,HKV,D"), ("lengths --device cpu --sizes 8,0,64", "--sizes"),
    ("memory --cases nope", "no such case: nope"), ("selection --count 0", "--count takes at least 1"),
    ("attention --shapes nope", "no shape matches"), ("first_calls --shapes nope", "no shape matches"),
    ("gemm --shapes nope", "--shapes nope"),
])  # fmt: skip
def test_wrong_arguments_of_benchmarks_are_wrong_use(
    module: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = module.split()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err
