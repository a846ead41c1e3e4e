"""`vllm-accel doctor`: it says what runs, reports what is broken, never fails, and clears Triton's cache alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_accel
from vllm_accel.cli import console, doctor, doctor_backends, doctor_machine, doctor_settings, main
from vllm_accel.dispatch import registry
from vllm_accel.dispatch.backend import TorchBackend
from vllm_accel.dispatch.capability import Capability
from vllm_accel.dispatch.device import preset
from vllm_accel.dispatch.selection import Candidate, Selection, State
from vllm_accel.dispatch.spec import PLAIN, Feature
from vllm_accel.errors import Reason

ENTRY_A, ENTRY_B = "A" * 52, "ab" * 32


def program(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    root = Path(__file__).parent.parent
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=root, env={**os.environ, **environ}
    )


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Set variables as a fresh process would see them; what was read is forgotten before and after."""
    monkeypatch.setattr("vllm_accel.dispatch.settings._current", None)
    yield monkeypatch
    monkeypatch.undo()
    vllm_accel.reload_settings()


def rows(report: dict[str, Any], section: str) -> dict[str, dict[str, str]]:
    """Return a section's rows by their first column."""
    return {next(iter(row.values())): row for row in report["sections"][section]}


class Fake(TorchBackend):
    """A backend that is not there, is broken, or explodes when it is asked."""

    def __init__(self, name: str, reason: Reason | Exception | None) -> None:
        self.name = name
        self._reason = reason
        self.capability = Capability(dtypes=frozenset({torch.bfloat16}), features=PLAIN | Feature.CAUSAL | Feature.GQA)

    def unavailable_reason(self) -> Reason | None:
        if isinstance(self._reason, Exception):
            raise self._reason
        return self._reason

    def bind(self, spec: Any, device: Any) -> Any:
        raise AssertionError("the doctor launches nothing")


@pytest.fixture
def fakes() -> Iterator[None]:
    made = [
        Fake("fake_absent", Reason("not_installed", "fake is not installed")),
        Fake("fake_broken", Reason("broken", "fake.so: undefined symbol: c10::Error")),
        Fake("fake_explodes", OSError("GLIBC_2.32 not found")),
        Fake("fake_works", None),
    ]
    for backend in made:
        vllm_accel.register_backend("attention", backend)
    yield
    for backend in made:
        registry.unregister_backend("attention", backend.name)


def test_doctor_in_a_process_of_its_own_with_a_bad_environment() -> None:
    done = program(
        "-m", "vllm_accel.cli", "doctor", "--json",
        VLLM_ACCEL_ATENTION_BACKEND="x", VLLM_ATTENTION_BACKEND="FLASH_ATTN", CUBLAS_WORKSPACE_CONFIG=":4096:8",
        XFORMERS_SOMETHING="1", HOME="/home/somebody", TRITON_CACHE_DIR="/home/somebody/cache",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "somebody" not in done.stdout
    report = json.loads(done.stdout)
    assert report["problems"][0]["problem"].startswith("VLLM_ACCEL_ATENTION_BACKEND is not a setting; did you mean")
    others = rows(report, "other variables")
    assert others["VLLM_ATTENTION_BACKEND"]["effect"].startswith("not read here: VLLM_ACCEL_ATTENTION_BACKEND is")
    assert "does not turn Tensor Cores on" in others["CUBLAS_WORKSPACE_CONFIG"]["effect"]
    assert "not started" in others["CUBLAS_WORKSPACE_CONFIG"]["effect"]
    assert others["XFORMERS_SOMETHING"]["effect"] == "xFormers' own; not read here"
    assert others["TRITON_CACHE_DIR"]["value"] == "~/cache"
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("fakes")
def test_doctor_gives_every_backend_a_state_a_reason_and_an_action() -> None:
    report = doctor.examine()
    backends = rows(report, "backends")
    assert set(backends) == {*registry.names("attention"), *(f"gemm: {name}" for name in registry.names("gemm"))}
    assert backends["fake_absent"]["state"] == "ABSENT"
    assert backends["fake_broken"]["state"] == "BROKEN"
    assert "undefined symbol: c10::Error" in backends["fake_broken"]["reason"]
    assert backends["fake_explodes"]["state"] == "BROKEN"
    assert "GLIBC_2.32 not found" in backends["fake_explodes"]["reason"]
    assert backends["fake_works"]["state"] == "OK"
    assert backends["fake_works"]["version"] == str(torch.__version__)
    states = {"OK", "ABSENT", "BROKEN", "UNSUPPORTED", "QUARANTINED", "DISABLED"}
    for row in backends.values():
        assert row["state"] in states
        assert row["state"] == "OK" or (row["reason"] and row["action"])
    assert report["exit_code"] == 1
    assert any("fake_broken" in p["problem"] and "VLLM_ACCEL_DISABLED_BACKENDS" in p["fix"] for p in report["problems"])


def test_doctor_says_what_runs_here() -> None:
    report = doctor.examine()
    verdict = report["sections"]["verdict"]
    assert [row["work"].split()[0] for row in verdict] == ["prefill", "decode", "training", "matrix"]
    q = torch.empty(1, 4096, 32, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 4096, 8, 128, dtype=torch.bfloat16, device="meta")
    device = doctor_machine.devices()[0]
    assert verdict[0]["runs"] == vllm_accel.explain(vllm_accel.attention, q, k, k, causal=True, device=device).chosen
    assert rows(report, "torch")["version"]["value"] == str(torch.__version__)
    assert rows(report, "system")["Python"]["value"].endswith(sys.version.split()[0])
    assert "glibc" in rows(report, "system")
    assert {"C compiler", "Python.h", "triton", "ptxas", "nvcc", "ninja", "Triton cache"} == set(
        rows(report, "toolchain")
    )
    packages = rows(report, "packages")
    assert packages["torch"]["version"] == str(torch.__version__)
    named = f"{packages.keys()} {packages['not installed']['note']}"
    for name in (
        "flash-attn",
        "flash-attn-3",
        "flash-attn-4",
        "xformers",
        "mslk",
        "flashinfer-python",
        "vllm",
        "diffusers",
    ):
        assert name in named


def test_doctor_on_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4, described: half precision without bf16, and FlashAttention refused with the reason."""
    monkeypatch.setattr(doctor_machine, "devices", lambda: [preset("t4"), preset("cpu")])
    report = doctor.examine()
    assert report["sections"]["verdict"][0]["work"].startswith("prefill (float16")
    assert rows(report, "device")["cuda:0"]["arch"] == "sm_75"
    assert rows(report, "device")["cuda:0"]["shared memory per block"] == "64 KiB"
    flash = rows(report, "backends")["flash_attn_2"]
    assert flash["state"] == "UNSUPPORTED"
    assert "Tesla T4 is sm_75" in flash["reason"]
    requirements = rows(report, "requirements")
    assert requirements["FlashAttention: GPU"]["met"] == "no"
    assert requirements["xFormers: GPU"]["met"] == "yes"


def test_doctor_flags_gpus_of_different_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor_machine.device_rows([preset("rtx4090"), preset("rtx3090"), preset("cpu")])
    assert all(row["note"].startswith("GPUs of different kinds") for row in found)
    assert "note" not in doctor_machine.device_rows([preset("rtx4090"), preset("cpu")])[0]


@pytest.mark.parametrize(
    ("variable", "value", "code", "text"),
    [
        ("VLLM_ACCEL_ATTENTION_BACKEND", "flash_atn", 2, "did you mean 'flash_attn'?"),
        ("VLLM_ACCEL_NOISE", "1", 2, "VLLM_ACCEL_NOISE is not a setting"),
        ("VLLM_USE_TRITON_FLASH_ATTN", "2", 2, "is not a switch; use 1, 0, true or false"),
        ("VLLM_ACCEL_LIFT_KNOWN_BAD", "no-such-row", 2, "no known-bad row 'no-such-row'"),
        ("VLLM_USE_TRITON_FLASH_ATTN", "1", 1, "has no effect: this version has no Triton attention backend"),
    ],
)
def test_doctor_reports_a_wrong_setting(
    setting: pytest.MonkeyPatch, variable: str, value: str, code: int, text: str
) -> None:
    setting.setattr(doctor_settings, "_has_triton", lambda: False)
    setting.setenv(variable, value)
    report = doctor.examine()
    assert report["exit_code"] == code
    assert any(text in problem["problem"] for problem in report["problems"])
    assert rows(report, "settings")[variable]["value"] == value


def test_doctor_reports_a_request_that_cannot_be_met(setting: pytest.MonkeyPatch) -> None:
    setting.setattr(doctor_machine, "devices", lambda: [preset("cpu")])
    setting.setenv("VLLM_ACCEL_ATTENTION_BACKEND", "flash_attn_3")
    setting.setenv("VLLM_ACCEL_DISABLED_BACKENDS", "sdpa_cpu")
    report = doctor.examine()
    assert report["exit_code"] == 2
    assert "VLLM_ACCEL_ATTENTION_BACKEND: flash_attn_3" in report["problems"][0]["problem"]
    assert rows(report, "backends")["sdpa_cpu"]["state"] == "DISABLED"


def test_doctor_says_what_changed_since_it_was_read(setting: pytest.MonkeyPatch) -> None:
    vllm_accel.reload_settings()
    setting.setenv("VLLM_ACCEL_CHECK", "1")
    report = doctor.examine()
    assert "changed since it was read" in rows(report, "settings")["VLLM_ACCEL_CHECK"]["effect"]
    assert report["exit_code"] >= 1


def test_nothing_works_is_exit_code_three() -> None:
    refused = Candidate("reference", State.UNSUPPORTED, (Reason("platform", "not here"),))
    selection = Selection("attention", "spec", preset("cpu"), None, (refused,), "shipped order")
    (problem,) = doctor_backends.Examined((("prefill", selection),), ()).problems()
    assert problem.exit_code == 3
    unasked = Candidate("reference", State.NOT_ASKED)
    selection = Selection("attention", "spec", preset("cpu"), None, (refused, unasked), "backend=: x")
    (problem,) = doctor_backends.Examined((("prefill", selection),), ()).problems()
    assert problem.exit_code == 2


def test_a_section_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(doctor_machine, "torch_rows", fail)
    monkeypatch.setattr(doctor_machine, "devices", fail)
    monkeypatch.setattr(doctor_settings, "problems", fail)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", fail)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "could not be made" in text
    assert text.count("RuntimeError: no /proc here") >= 3
    assert "VERDICT" in text


def test_one_unreadable_flag_is_one_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("mixed old and new API")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", fail)
    values = {row["torch"]: row["value"] for row in doctor_machine.torch_rows(preset("cpu"))}
    assert values["float32 matmul precision"] == "could not be read: RuntimeError: mixed old and new API"
    assert values["version"] == str(torch.__version__)


def test_no_private_path_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/data/people/jane")
    assert console.hide("/data/people/jane/.triton/cache") == "~/.triton/cache"
    assert console.hide("/data/people/janet/x") == "/data/people/janet/x"
    assert console.hide("see /home/kim/a and /Users/lee/b") == "see ~/a and ~/b"
    assert console.hide_all({"a": ["/home/kim"]}) == {"a": ["~"]}
    monkeypatch.setenv("HOME", "/")
    assert console.hide("/usr/bin/cc") == "/usr/bin/cc"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    for name in (ENTRY_A, ENTRY_B, "notes"):
        (path / name).mkdir(parents=True)
        (path / name / "kernel.cubin").write_text("x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    (path / ("B" * 52)).symlink_to(outside)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(path))
    return path


def test_clearing_removes_tritons_entries_only(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--clear-triton-cache", "--yes"]) == 0
    assert "Removed 2 compiled kernels" in capsys.readouterr().out
    assert sorted(path.name for path in cache.iterdir()) == ["B" * 52, "notes"]
    assert (cache.parent / "outside" / "keep").exists()
    assert main(["doctor", "--clear-triton-cache", "--yes"]) == 0
    assert "Nothing to clear" in capsys.readouterr().out


def test_clearing_asks(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--clear-triton-cache"]) == 2  # nobody to ask
    assert "nothing was removed" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["doctor", "--clear-triton-cache"]) == 2
    assert (cache / ENTRY_A).is_dir()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(["doctor", "--clear-triton-cache"]) == 0
    assert not (cache / ENTRY_A).exists()


def test_clearing_refuses_a_symbolic_link(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = cache.parent / "link"
    link.symlink_to(cache)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(link))
    assert main(["doctor", "--clear-triton-cache", "--yes"]) == 2
    assert "is a symbolic link" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_CACHE_DIR")
    home = cache.parent / "home"
    home.mkdir()
    (home / ".triton").symlink_to(cache.parent)
    monkeypatch.setenv("TRITON_HOME", str(home))
    assert main(["doctor", "--clear-triton-cache", "--yes"]) == 2
    assert (cache / ENTRY_A).is_dir()


def test_a_cache_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert main(["doctor", "--clear-triton-cache", "--yes"]) == 0
    found = {row["tool"]: row["found"] for row in doctor_machine.toolchain_rows()}
    assert found["Triton cache"] == f"{tmp_path}/.triton/cache (does not exist)"
