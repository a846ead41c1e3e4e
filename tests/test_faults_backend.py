"""Backends that fail in every way a backend can: the probe finds it, automatic choice avoids it, explain says so."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_accel
from faults.vllm_accel_faulty import FAULTS, VERSION, Faulty, install
from vllm_accel import attention, explain
from vllm_accel.cli import doctor, doctor_backends, doctor_caches, doctor_machine, doctor_probe
from vllm_accel.dispatch import probed, quarantine, registry
from vllm_accel.dispatch.device import detect, preset
from vllm_accel.dispatch.selection import State
from vllm_accel.probe import Outcome, census, child, parent, probe
from vllm_accel.testing import attention_oracle

CPU = torch.device("cpu")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own for verdicts."""
    monkeypatch.setenv("VLLM_ACCEL_TABLES", str(tmp_path / "tables"))
    vllm_accel.reload_settings()
    yield tmp_path / "tables"
    monkeypatch.undo()
    vllm_accel.reload_settings()


@pytest.fixture
def faulty(request: pytest.FixtureRequest) -> Iterator[Faulty]:
    """A backend with the fault that the test names, first in the order."""
    backend = Faulty(request.param)
    vllm_accel.register_backend("attention", backend, before="cpu")
    yield backend
    registry.unregister_backend("attention", backend.name)
    quarantine.release()


def outcome_of(backend: Faulty) -> Outcome:
    """Probe a backend in this process: what a child would tell, read as the parent reads it."""
    events: list[dict[str, Any]] = []

    def tell(event: str, **facts: Any) -> None:
        events.append(json.loads(json.dumps({"event": event, **facts})))

    name = ("attention", backend.name)
    tell("begin", op=name[0], name=name[1])
    if (asked := child._ask(*name, tell)) is not None:
        child._run("attention", asked, "cpu", tell)
    tell("end", op=name[0], name=name[1])
    return parent._read(name, "cpu", events, "")


def tensors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 16, 2, 32, generator=generator) for _ in range(3))


@pytest.mark.parametrize(
    ("faulty", "parts", "text"),
    [
        ("bind_raises", {"dense", "varlen", "gradients"}, "RuntimeError: no kernel for this spec"),
        ("launch_raises", {"dense", "varlen", "gradients"}, "RuntimeError: invalid configuration argument"),
        ("nan", {"dense", "varlen", "gradients"}, "is nan, the reference"),
        ("shape", {"dense", "varlen", "gradients"}, "out has shape"),
        ("gradient", {"gradients"}, "dq: element"),
        ("none", set(), ""),
    ],
    indirect=["faulty"],
)
def test_the_probe_finds_what_is_wrong_and_where(faulty: Faulty, parts: set[str], text: str) -> None:
    found = outcome_of(faulty)
    # A forward that gives another shape or NaN may fail a backward in torch's own words.
    assert set(found.broken) - {"paged", "mla"} == parts
    assert not parts or text in found.broken[sorted(parts)[0]]
    assert found.versions == (VERSION,)
    assert (found.right > 0) == (faulty.fault in ("none", "gradient"))
    assert found.died is False


@pytest.mark.parametrize(
    ("faulty", "text"),
    [("check_raises", "GLIBC_2.32 not found"), ("check_exits", "this GPU is not supported")],
    indirect=["faulty"],
)
def test_a_library_that_does_not_import_is_a_reason(faulty: Faulty, text: str) -> None:
    found = outcome_of(faulty)
    assert found.unavailable is not None
    assert found.unavailable[0] == "broken"
    assert text in found.unavailable[1]
    assert found.broken == {}


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("faulty", ["nan"], indirect=True)
def test_selection_uses_the_verdict(faulty: Faulty) -> None:
    q, k, v = tensors()
    assert explain(attention, q, k, v).chosen == faulty.name
    assert not torch.isfinite(attention(q, k, v)).any()  # the library trusts what it has no evidence against
    probed.record([outcome_of(faulty).verdict(detect(CPU))])
    selection = explain(attention, q, k, v)
    assert selection.chosen != faulty.name
    assert selection[faulty.name].state is State.QUARANTINED
    assert "the probe on " in selection[faulty.name].why
    assert "is nan, the reference" in selection[faulty.name].why
    assert "vllm-accel doctor --probe" in selection[faulty.name].why
    want, _ = attention_oracle(q, k, v)
    assert torch.allclose(attention(q, k, v).double(), want, atol=1e-5)
    # By name it still runs, and explain says what is known of it.
    named = explain(attention, q, k, v, backend=faulty.name)
    assert named.chosen == faulty.name
    assert "the probe on " in named[faulty.name].why
    assert not torch.isfinite(attention(q, k, v, backend=faulty.name)).any()
    # A probe after the repair takes the verdict away.
    faulty.fault = "none"
    probed.record([outcome_of(faulty).verdict(detect(CPU))])
    assert explain(attention, q, k, v).chosen == faulty.name


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("faulty", ["gradient"], indirect=True)
def test_a_broken_part_leaves_the_others(faulty: Faulty) -> None:
    probed.record([outcome_of(faulty).verdict(detect(CPU))])
    q, k, v = tensors()
    assert explain(attention, q, k, v).chosen == faulty.name
    trained = explain(attention, q.requires_grad_(), k, v)
    assert trained.chosen != faulty.name
    assert "(gradients)" in trained[faulty.name].why


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("faulty", ["check_kills"], indirect=True)
def test_a_library_that_ends_the_process_is_not_imported_again(faulty: Faulty) -> None:
    """The abort is real: were the verdict looked at after the import, this test would end the test run."""
    died = Outcome(
        "attention", faulty.name, "cpu", (VERSION,), broken={probed.EVERYTHING: "the process ended with SIGABRT"},
        died=True,
    )  # fmt: skip
    probed.record([died.verdict(detect(CPU))])
    q, k, v = tensors()
    assert attention(q, k, v).isfinite().all()
    state = explain(attention, q, k, v)[faulty.name]
    assert state.state is State.QUARANTINED
    assert "SIGABRT" in state.why


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("faulty", ["nan"], indirect=True)
@pytest.mark.parametrize("field", ["torch", "python", "library", "driver", "device", "versions"])
def test_a_verdict_counts_for_the_same_versions_only(faulty: Faulty, field: str) -> None:
    verdict = outcome_of(faulty).verdict(detect(CPU))
    changed: dict[str, Any] = {field: ("9.9",) if field == "versions" else "another"}
    probed.record([replace(verdict, **changed)])
    assert explain(attention, *tensors()).chosen == faulty.name


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 99, "verdicts": []}', '{"format": 1, "verdicts": [{"op": 1}]}', "[" * 100_000,
     '{"format": 1, "verdicts": [{"op": "attention", "backend": "cpu", "device": "x", "torch": "1", "python": "3",'
     ' "library": "0", "driver": "", "versions": [1], "broken": {}, "date": ""}]}'],
    ids=["empty", "cut", "list", "format", "entries", "nested", "types"],
)  # fmt: skip
def test_a_corrupt_file_of_verdicts_is_ignored_with_one_message(
    tables: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    tables.mkdir()
    (tables / "probed.json").write_text(text)
    probed.forget()
    with caplog.at_level(logging.WARNING, "vllm_accel"):
        assert attention(*tensors()).isfinite().all()
        assert attention(*tensors(), causal=True).isfinite().all()
    assert sum("probed.json is ignored" in record.getMessage() for record in caplog.records) == 1
    assert "probed.json is ignored: " in str(explain(attention, *tensors()))
    (problem,) = doctor_caches.problems(None)
    assert "probed.json is ignored: " in problem.text and problem.fix.endswith("vllm-accel doctor --probe")
    probed.record([])  # what the doctor does puts a sound file in its place
    assert doctor_caches.problems(None) == []


def test_verdicts_that_cannot_be_stored_are_a_problem(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.write_text("a file where a folder should be")
    monkeypatch.setattr(doctor_probe, "probe", lambda names, where, **_: [Outcome("attention", "sdpa_cpu", where)])
    found = doctor_probe.run([preset("cpu")], [("attention", "sdpa_cpu")], 1.0)
    (problem,) = found.problems()
    assert "could not be stored" in problem.text
    assert problem.exit_code == 1


def test_states_of_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "devices", lambda: [detect(CPU)])
    cpu = detect(CPU)
    outcomes = {
        ("attention", "sdpa_cpu"): Outcome("attention", "sdpa_cpu", "cpu", right=34, seconds=1e-3, error=1e-3),
        ("attention", "cpu"): Outcome("attention", "cpu", "cpu", right=34, seconds=5e-3, error=1e-3),
        ("attention", "reference"): Outcome("attention", "reference", "cpu", ("1",), broken={"dense": "plain: is nan"}),
        ("gemm", "reference"): Outcome("gemm", "reference", "cpu", refused=2, refusal="takes fp8 only"),
    }
    report = doctor.examine(doctor_probe.Probed({cpu: outcomes}))
    rows = {row["backend"]: row for row in report["sections"]["backends"]}
    assert rows["sdpa_cpu"]["state"] == "OK"
    assert rows["sdpa_cpu"]["max error"] == "1.0e-03"
    assert rows["cpu"]["state"] == "OK-SLOW"
    assert rows["cpu"]["reason"].startswith("5 ms for the probe's call, sdpa_cpu 1 ms")
    assert rows["reference"]["state"] == "BROKEN"
    assert rows["reference"]["reason"] == "dense: plain: is nan"
    assert rows["gemm: reference"]["state"] == "UNSUPPORTED"
    assert all(row["state"] == "OK" or (row["reason"] and row["action"]) for row in rows.values())
    texts = [problem["problem"] for problem in report["problems"]]
    assert any("prefill" in text and "runs on cpu" in text for text in texts)  # slower than it could be
    assert report["exit_code"] == 1
    lines = doctor.markdown(report)
    assert "### backends" in lines
    # The probe timed a prefill, which says nothing about training or decoding.
    every = doctor_backends._typical_work(cpu)
    others = {kind: what for kind, what in every.items() if not kind.startswith("prefill")}
    assert len(others) == len(every) - 1
    monkeypatch.setattr(doctor_backends, "_typical_work", lambda device: others)
    report = doctor.examine(doctor_probe.Probed({cpu: outcomes}))
    assert not any("runs on cpu" in problem["problem"] for problem in report["problems"])
    assert "<details><summary>caches</summary>" in lines
    assert "| sdpa_cpu | cpu | OK |" in lines


def test_products_are_probed_dense_and_by_groups() -> None:
    from vllm_accel.dispatch.gemm_spec import Form, GemmSpec
    from vllm_accel.dispatch.spec import Feature
    from vllm_accel.probe import steps

    backend = registry.get("gemm", "torch_grouped")
    outcomes: dict[str, set[bool]] = {}
    for step in steps.steps("gemm", backend, detect(CPU), CPU):
        try:
            step.run()
        except vllm_accel.UnsupportedCallError:
            outcomes.setdefault(step.part, set()).add(False)
        else:
            outcomes.setdefault(step.part, set()).add(True)
    assert outcomes["gemm"] == {False}
    assert outcomes["grouped"] == {True}
    spec = GemmSpec(Form.GROUPED_M, *(torch.float32,) * 3, 8, 8, 8, 2, Feature.GRAD)
    assert probed.parts_of("gemm", spec) == ("grouped", "gradients")
    assert probed.parts_of("gemm", replace(spec, form=Form.DENSE, features=Feature(0))) == ("gemm",)


def test_a_section_that_hangs_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    never = threading.Event()
    monkeypatch.setattr(doctor, "SECTION_SECONDS", 0.3)
    monkeypatch.setattr(doctor_backends.Examined, "of", lambda *_: doctor_backends.Examined((), ()))
    rows = doctor._section(lambda: [{"a": str(never.wait())}])
    never.set()
    assert rows[0]["note"] == "no answer within 0.3 s"


def test_children_that_die_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, with entry points as an installed package has them."""
    path = install(tmp_path, *FAULTS)
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("VLLM_ACCEL_NONSENSE", "1")  # a wrong setting is not the backend's fault
    names = [("attention", f"faulty_{fault}") for fault in ("launch_kills", "launch_hangs", "import")]
    kills, hangs, imports = probe(names, "cpu", seconds=6.0, jobs=3)
    assert kills.died
    assert kills.broken[probed.EVERYTHING].startswith("causal, bfloat16: the process ended with SIGABRT")
    assert hangs.died
    assert hangs.broken == {probed.EVERYTHING: "causal, bfloat16: no answer within 6 s"}
    assert imports.unavailable is not None
    assert "No module named 'vllm_accel_no_such_module'" in imports.unavailable[1]


def test_a_census_passes_over_what_hangs_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is without a sign of life, and does not count the start of Python and torch."""
    monkeypatch.setenv("PYTHONPATH", install(tmp_path, "check_hangs", "check_exits", "none"))
    fatal = census([("attention", f"faulty_{fault}") for fault in ("check_hangs", "check_exits", "none")], seconds=2.5)
    assert fatal == {("attention", "faulty_check_hangs"): "importing its library: no answer within 2.5 s"}


@pytest.mark.parametrize("per_event", [False, True])
def test_what_the_limit_of_a_child_counts(tmp_path: Path, per_event: bool) -> None:
    """Five signs of life, 0.5 s apart, under a limit of 1.2 s: too long in all, short enough for each."""
    path = tmp_path / "events"
    code = f"""
import time
time.sleep(1.3)
for _ in range(5):
    with open({str(path)!r}, "a") as file:
        file.write("x")
    time.sleep(0.5)
"""
    child = subprocess.Popen([sys.executable, "-S", "-c", code])
    try:
        assert parent._wait(child, path, 1.2, per_event) == (0 if per_event else None, 1.2)
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("faulty", "text"),
    [
        ("bind_raises", "failed earlier in this process: RuntimeError: no kernel for this spec"),
        ("launch_raises", "failed earlier in this process: RuntimeError: invalid configuration argument"),
        ("check_raises", "its availability check failed: OSError: GLIBC_2.32 not found"),
        ("check_exits", "its availability check failed: SystemExit: this GPU is not supported"),
    ],
    indirect=["faulty"],
)
def test_a_call_gets_over_it_is_right_and_explain_says_why(
    faulty: Faulty, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = tensors()
    want, _ = attention_oracle(q, k, v)
    with caplog.at_level(logging.WARNING, "vllm_accel"):
        for _ in range(3):
            assert torch.allclose(attention(q, k, v).double(), want, atol=1e-5)
    in_calls = faulty.fault in ("bind_raises", "launch_raises")
    assert sum("is quarantined for" in record.getMessage() for record in caplog.records) == in_calls  # once
    selection = explain(attention, q, k, v)
    assert selection.chosen != faulty.name and text in selection[faulty.name].why
    # Asked for by name, it is the error.
    with pytest.raises((RuntimeError, vllm_accel.BackendUnavailableError), match=text.rpartition(": ")[2]):
        attention(q, k, v, backend=faulty.name)


def test_an_adapter_that_exits_when_it_is_imported_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_that_exits.py").write_text("import sys\nsys.exit('wrong driver')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    key = ("attention", "exits")
    monkeypatch.setitem(registry._entries, key, registry._Entry("adapter_that_exits:BACKEND"))
    missing = registry.get(*key).unavailable_reason()
    monkeypatch.delitem(registry._loaded, key)
    assert missing is not None and missing.text == "its module does not import: SystemExit: wrong driver"


def test_the_doctor_survives_what_ends_or_hangs_a_process(tmp_path: Path) -> None:
    """Without --probe: libraries are imported in a child first, in an environment full of nonsense."""
    environ = {
        **os.environ,
        "PYTHONPATH": install(tmp_path, "check_kills", "none"),
        "HOME": "/nonexistent/jane",
        "USER": "jane",
        "TRITON_CACHE_DIR": "",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor_jane",
        "VLLM_ACCEL_TABLES": "/dev/null/tables",
        "VLLM_ACCEL_CHECK": "",
        "VLLM_ATTENTION_BACKEND": "\u2603",
        "VLLM_USE_TRITON_FLASH_ATTN": "perhaps",
        "CUDA_HOME": "/nowhere",
        "CC": "no such compiler",
    }
    command = [sys.executable, "-m", "vllm_accel.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, env=environ)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "jane" not in done.stdout
    report = json.loads(done.stdout)
    rows = {row["backend"]: row for row in report["sections"]["backends"]}
    assert rows["faulty_check_kills"]["state"] == "BROKEN"
    assert "importing its library: the process ended with SIGABRT" in rows["faulty_check_kills"]["reason"]
    assert rows["faulty_none"]["state"] == "OK"
    caches = {row["cache"]: row for row in report["sections"]["caches"]}
    assert caches["Triton"]["path"] == "set to nothing"
    assert "is not a switch" in caches["verdicts"]["path"]
    assert caches["torch.compile"]["path"] == "/tmp/torchinductor_USER"
    assert any("is not a switch; use 1, 0, true or false" in problem["problem"] for problem in report["problems"])


def test_an_import_that_hangs_is_found_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([
        ([{"event": "begin", "op": "attention", "name": "a"}, {"event": "end", "op": "attention", "name": "a"},
          {"event": "begin", "op": "attention", "name": "b"},
          {"event": "step", "part": "everything", "name": "importing its library"}], "no answer within 60 s"),
        ([{"event": "begin", "op": "attention", "name": "c"}, {"event": "end", "op": "attention", "name": "c"}], ""),
    ])  # fmt: skip
    asked = []
    monkeypatch.setattr(
        parent, "_child", lambda device, names, seconds, per_event: (asked.append(list(names)), next(answers))[1]
    )
    fatal = census([("attention", name) for name in "abc"])
    assert fatal == {("attention", "b"): "importing its library: no answer within 60 s"}
    assert asked[1] == [("attention", "c")]
