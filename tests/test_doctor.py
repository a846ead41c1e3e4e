"""`vllm-accel doctor`: it says what runs, reports what is broken, never fails, and clears Triton's cache alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_accel
from vllm_accel.cli import console, doctor, doctor_backends, doctor_machine, doctor_settings, main
from vllm_accel.dispatch import registry
from vllm_accel.dispatch.backend import TorchBackend
from vllm_accel.dispatch.capability import Capability
from vllm_accel.dispatch.device import Device, cpu_name, preset
from vllm_accel.dispatch.selection import Candidate, Selection, State
from vllm_accel.dispatch.spec import PLAIN, Feature
from vllm_accel.errors import Reason
from vllm_accel.kernels.triton import toolchain

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
    assert [row["work"].split()[0] for row in verdict] == [
        "prefill",
        "decode",
        "training",
        "matrix",
        "tokens",
        "mixture",
    ]
    q = torch.empty(1, 4096, 32, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 4096, 8, 128, dtype=torch.bfloat16, device="meta")
    device = doctor_machine.devices()[0]
    assert verdict[0]["runs"] == vllm_accel.explain(vllm_accel.attention, q, k, k, causal=True, device=device).chosen
    assert rows(report, "torch")["version"]["value"] == str(torch.__version__)
    assert rows(report, "system")["Python"]["value"].endswith(sys.version.split()[0])
    assert "glibc" in rows(report, "system")
    assert rows(report, "system")["CPU"]["value"] == cpu_name()
    assert {"C compiler", "Python.h", "triton", "ptxas", "nvcc", "ninja", "Triton cache"} <= set(
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
        ("VLLM_USE_TRITON_FLASH_ATTN", "1", 1, "has no effect: there is no GPU here"),
    ],
)
def test_doctor_reports_a_wrong_setting(
    setting: pytest.MonkeyPatch, variable: str, value: str, code: int, text: str
) -> None:
    setting.setattr(doctor_settings, "_has_gpu", lambda: False)
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


def test_a_wrong_setting_hides_no_state(setting: pytest.MonkeyPatch) -> None:
    """Then every call raises, and no selection says what runs on this device."""
    setting.setattr(doctor_machine, "devices", lambda: [preset("cpu")])
    want = {name: row["state"] for name, row in rows(doctor.examine(), "backends").items()}
    setting.setenv("VLLM_ACCEL_CHECK", "perhaps")
    setting.setattr("vllm_accel.dispatch.settings._current", None)
    report = doctor.examine()
    assert {name: row["state"] for name, row in rows(report, "backends").items()} == want
    assert want["sdpa_flash"] == want["gemm: cutlass"] == "UNSUPPORTED"
    (problem,) = report["problems"]
    assert "VLLM_ACCEL_CHECK='perhaps' is not a switch" in problem["problem"]


def test_a_setting_that_switches_everything_off_is_named(setting: pytest.MonkeyPatch) -> None:
    setting.setattr(doctor_machine, "devices", lambda: [preset("cpu")])
    setting.setenv("VLLM_ACCEL_DISABLED_BACKENDS", "cpu,sdpa_cpu,reference")
    report = doctor.examine()
    text = report["problems"][0]["problem"]
    assert (
        text.startswith("VLLM_ACCEL_DISABLED_BACKENDS leaves nothing that can run prefill") and "products" not in text
    )
    assert report["exit_code"] == 2


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
    for name in (ENTRY_A, ENTRY_B):
        (path / name).mkdir(parents=True)
        (path / name / "kernel.cubin").write_text("x" * 1024**2)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "keep").write_text("x")
    (path / ENTRY_A / "link").symlink_to(tmp_path / "outside")
    (path / ENTRY_A / "kernel.ptx").symlink_to(tmp_path / "outside" / "keep")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(path))
    return path


CLEAR = ["doctor", "--clear-triton-cache", "--yes"]


def test_clearing_removes_tritons_entries(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CLEAR) == 0
    assert "Removed 2 compiled kernels (2.0 MiB)" in capsys.readouterr().out
    assert list(cache.iterdir()) == []
    assert (cache.parent / "outside" / "keep").exists()  # no link was followed
    assert main(CLEAR) == 0
    assert "Nothing to clear" in capsys.readouterr().out


def test_clearing_asks(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(CLEAR[:2]) == 2  # nobody to ask
    assert "nothing was removed" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(CLEAR[:2]) == 2
    assert (cache / ENTRY_A).is_dir()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(CLEAR[:2]) == 0
    assert not (cache / ENTRY_A).exists()


def _untouched(cache: Path) -> bool:
    return all((cache / name / "kernel.cubin").is_file() for name in (ENTRY_A, ENTRY_B))


@pytest.mark.parametrize("kind", ["folder", "file", "link", "link to nothing", "short name"])
def test_clearing_refuses_a_directory_with_anything_else_in_it(
    kind: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = cache / ("notes" if kind in ("folder", "file") else "B" * (51 if kind == "short name" else 52))
    if kind in ("folder", "short name"):
        other.mkdir()
    elif kind == "file":
        other.write_text("mine")
    else:  # planted by someone else, under a name that looks like Triton's
        other.symlink_to(cache.parent / ("outside" if kind == "link" else "nowhere"))
    assert main(CLEAR) == 2
    error = capsys.readouterr().err
    assert f"holds what is not Triton's ({other.name!r})" in error
    assert "nothing was removed" in error
    assert _untouched(cache)
    assert (cache.parent / "outside" / "keep").exists()


def test_clearing_refuses_a_symbolic_link(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = cache.parent / "link"
    link.symlink_to(cache)
    for spelled in (link, f"{link}/", f"{link}/."):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(spelled))
        assert main(CLEAR) == 2
        assert "is a symbolic link" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_CACHE_DIR")
    home = cache.parent / "home"
    home.mkdir()
    (home / ".triton").symlink_to(cache.parent)
    monkeypatch.setenv("TRITON_HOME", str(home))
    assert main(CLEAR) == 2
    assert "is a symbolic link" in capsys.readouterr().err
    assert _untouched(cache)


def test_clearing_refuses_a_home_and_a_root(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "people" / "jane").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(cache / "people" / "jane"))
    for place in ("/", str(cache), str(cache / "people"), str(cache / "people" / "jane"), f"{cache}/people/jane/.."):
        monkeypatch.setenv("TRITON_CACHE_DIR", place)
        assert main(CLEAR) == 2
        assert "is your home directory or above it" in capsys.readouterr().err
    assert _untouched(cache)


def test_clearing_refuses_what_is_no_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    assert main(CLEAR) == 2
    assert "is not a directory" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    assert main(CLEAR) == 2
    assert "TRITON_CACHE_DIR is set to nothing" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_clearing_says_what_it_could_not_remove(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.rmtree

    def rmtree(path: Path) -> None:
        if path.name == ENTRY_A:
            raise PermissionError(13, "Permission denied", str(path))
        real(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert main(CLEAR) == 1
    told = capsys.readouterr()
    assert "Removed 1 compiled kernels (1.0 MiB)" in told.out
    assert "1 could not be removed: PermissionError" in told.err


def test_a_cache_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert main(CLEAR) == 0
    assert tools()["Triton cache"].startswith(f"{tmp_path}/.triton/cache (does not exist; ")


def tools(device: Device | None = None) -> dict[str, str]:
    return {row["tool"]: row["found"] for row in doctor_machine.toolchain_rows(device)}


def test_the_toolchain_names_the_cache_and_its_place(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "free_space", lambda place: 5 * 1024**3)
    monkeypatch.setattr(toolchain, "file_system", lambda path: "nfs4")
    assert tools()["Triton cache"] == f"{cache} (2 entries; 5120 MiB free on nfs4 (network))"
    assert "is on a network file system (nfs4)" in tools()["Triton: note"]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != cache)
    toolchain.forget()
    assert "NOT writable, 5120 MiB free" in tools()["Triton cache"]
    toolchain.forget()


def test_the_toolchain_says_whether_ptxas_knows_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert ", knows sm_90 (" in tools(preset("h100"))["ptxas"]
    assert ", knows sm_100 (" in tools(preset("b200"))["ptxas"]
    newer = replace(preset("b200"), arch="sm_199")
    assert ", does NOT know sm_199 (" in tools(newer)["ptxas"]
    assert "does not know sm_199a" in tools(newer)["Triton cannot compile"]
    assert "knows" not in tools(preset("mi300x"))["ptxas"]
    assert "knows" not in tools()["ptxas"]


def test_the_toolchain_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found = tools()
    assert found["C compiler"].startswith("MISSING: apt-get install gcc")
    assert "neither gcc nor clang is on PATH" in found["Triton cannot compile"]


def test_the_toolchain_names_another_triton_than_torch_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "triton_version", lambda: "3.9.0")
    asked = ['triton==3.7.1; platform_system == "Linux"', 'triton==1.0; extra == "other"', "numpy"]
    monkeypatch.setattr(doctor_machine.metadata, "requires", lambda name: asked)
    monkeypatch.setattr(doctor_machine.platform, "system", lambda: "Linux")
    assert doctor_machine._triton() == f"3.9.0; torch {torch.__version__} asks for ==3.7.1"
    monkeypatch.setattr(toolchain, "triton_version", lambda: "3.7.1")
    assert doctor_machine._triton() == "3.7.1"
    monkeypatch.setattr(toolchain, "triton_version", lambda: None)
    assert doctor_machine._triton() == "not installed"
