"""`vllm-accel explain` and the program around it, as a user calls them. The other commands have files of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_accel
from host import FIRST_ON_CPU
from vllm_accel.cli import main
from vllm_accel.dispatch.selection import State


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
    assert answer["call"] == "gemm float16, M ~4096, N ~512, K ~64: bias"


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["--op", "grouped_gemm"], "rows in groups: M ~4096, N ~512, K ~64, E 8: b column-major"),
        (["--op", "grouped_gemm", "--experts", "3", "--batch-invariant", "--bias"], "E 3: bias, batch_invariant"),
        (["--op", "scaled_gemm", "--scaling", "1x128,128x128"], "gemm float8_e4m3fn -> bfloat16, M ~4096"),
        (["--op", "scaled_gemm", "--experts", "4", "--dtype", "int8"], "grouped_gemm int8 -> bfloat16"),
        (["--op", "fused_moe", "--top-k", "3", "--grad"], "fused_moe bfloat16, 4096 tokens to 3 of 8 experts"),
    ],
)  # fmt: skip
def test_explain_products(capsys: pytest.CaptureFixture[str], arguments: list[str], call: str) -> None:
    assert main(["explain", *arguments, "--mnk", "4096,512,64", "--json", "--device", "cpu"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["op"] == "gemm" and call in answer["call"] and answer["chosen"] in ("cpu", "reference")


def test_explain_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--q", "1,64,8,64", "--causal", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "on cpu" in text
    assert f"-> {FIRST_ON_CPU} [shipped order" in text
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
        (["--q", "1,64,8,64", "--dtype", "int4"], "argument --dtype: invalid choice"),
        (["--q", "1,64,8,64", "--bias", "--mask"], "not allowed with argument"),
        (["--q", "1,64,8,64", "--varlen", "--bias"], "packed sequences take no attn_bias"),
        (["--q", "1,64,8,64", "--mnk", "1,2,3"], "--mnk belongs to --op gemm"),
        (["--op", "gemm"], "--op gemm needs --mnk M,N,K"),
        (["--op", "gemm", "--mnk", "1,2,3", "--q", "1,2,3,4"], "--q belongs to --op attention"),
        (["--op", "gemm", "--mnk", "1,2,3", "--experts", "4"], "--experts does not go with --op gemm"),
        (["--op", "grouped_gemm", "--mnk", "1,2,3", "--scaling", "row,row"], "--scaling does not go with"),
        (["--op", "scaled_gemm", "--mnk", "1,2,3", "--scaling", "row"], "--scaling takes A,B"),
        (["--op", "fused_moe", "--mnk", "1,2,3", "--experts", "0"], "--experts must be at least 1"),
        (["--q", "1,64,8,64", "--experts", "4"], "--experts belongs to --op gemm"),
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
    assert main(["doctor", "--yes"]) == 2
    assert "--yes belongs to --clear-triton-cache" in capsys.readouterr().err
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


def test_a_name_that_is_like_no_other_gets_no_hint_and_every_name_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--q", "1,64,8,64", "--backend", "nope"]) == 2
    err = capsys.readouterr().err
    assert "did you mean" not in err
    names = err.rpartition("Valid: ")[2].strip().split(", ")
    assert "triton" in names and len(set(names)) == len(names)


@pytest.mark.parametrize("seconds", ["0", "-3", "inf", "nan"])
def test_a_probe_without_time_is_wrong_use(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It would find everything broken, and choice would remember that."""
    assert main(["doctor", "--probe", "--seconds", seconds]) == 2
    assert f"--seconds takes a time above 0, not {seconds}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtypes", "bf16,half"], "'half' is not one of fp16"),
        (["--where", "moon"], "moon"),
        (["--backends", "refrence"], "did you mean 'reference'?"),
        (["--cases", "no_such_case"], "no case has that in its name"),
    ],
)
def test_wrong_use_of_the_conformance_command(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_accel.testing.__main__ import main as conformance

    with pytest.raises(SystemExit) as ended:
        conformance(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err
