"""`vllm-accel recommend`: the document's groups, the wheel's name, and honest checks, for any machine and GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_accel.cli import main
from vllm_accel.cli.advice import PACKAGES, group_for
from vllm_accel.cli.machine import Machine, carries
from vllm_accel.cli.recommend import recommend, wheel_name, wheel_url
from vllm_accel.dispatch.device import PRESETS, Device, preset

CUDA_12 = Machine("2.8.0", (12, 8), None, "cp312", "linux_x86_64", True, ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90"))
CUDA_13 = Machine(
    "2.13.0", (13, 0), None, "cp312", "linux_x86_64", True, ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100")
)
OLD = Machine("2.4.0", (11, 2), None, "cp310", "linux_x86_64", False)
NO_CUDA = Machine("2.13.0", None, None, "cp311", "linux_x86_64", True)


def commands(device: str, machine: Machine = CUDA_12, key: str = "commands") -> list[str]:
    return [entry["command"] for entry in recommend(preset(device), machine)[key]]


def checked(advice: dict[str, Any]) -> dict[str, bool | None]:
    return {check["name"]: check["met"] for check in advice["checks"]}


@pytest.mark.parametrize("device", ["a100", "h100"])
def test_best_performance(device: str) -> None:
    assert commands(device)[1:] == [
        "pip install flash-attn --no-build-isolation",
        "pip install triton",
        "pip install nvidia-cutlass",
    ]


@pytest.mark.parametrize("device", ["rtx3090", "rtx4090", "rtx3080", "rtx4080"])
def test_consumer_gpu(device: str) -> None:
    assert commands(device)[1:] == ["pip install flash-attn --no-build-isolation", "pip install xformers"]


def test_older_gpus_get_xformers_and_no_flash_attention() -> None:
    assert commands("t4") == ["pip install xformers"]
    assert commands("v100")[-1] == "pip install xformers"
    for device in ("t4", "v100"):
        met = checked(recommend(preset(device), CUDA_12))
        assert met["FlashAttention: GPU"] is False
        assert met["xFormers: GPU"] is True


def test_production_on_h100_adds_tensorrt_llm() -> None:
    (entry,) = recommend(preset("h100"), CUDA_12)["production"]
    assert entry["package"] == "tensorrt-llm"
    assert any("stub" in note for note in entry["notes"])
    assert commands("a100", key="production") == []


def test_v100_gets_a_torch_that_carries_it() -> None:
    advice = recommend(preset("v100"), CUDA_13)
    assert "the cu126 build" in advice["commands"][0]["command"]
    assert '"torch<2.15"' in advice["commands"][0]["command"]
    assert checked(advice)["torch for this GPU"] is False
    assert any("carries no code for sm_70" in note for note in advice["notes"])
    assert checked(recommend(preset("v100"), CUDA_12))["torch for this GPU"] is True
    assert any("no sm_70 code" in note for note in advice["notes"]), "the xformers wheel does not carry sm_70"


def test_flash_attn_is_never_recommended_bare() -> None:
    """The wheel comes first, and the build says that it takes hours."""
    for device in PRESETS:
        entries = recommend(preset(device), CUDA_12)["commands"]
        keys = [entry["package"] for entry in entries]
        if "flash-attn" in keys:
            assert keys.index("flash-attn-wheel") < keys.index("flash-attn")
            build = entries[keys.index("flash-attn")]
            assert "--no-build-isolation" in build["command"]
            assert any("hours" in note for note in build["notes"])


def test_wheel_name_follows_torch_cuda_python_and_abi() -> None:
    expected = "flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"
    assert wheel_name(CUDA_12, 12) == expected
    assert "cu11torch2.4cxx11abiFALSE-cp310-cp310" in wheel_name(OLD, 11)
    url = wheel_url(expected)
    assert url.startswith(
        "https://github.com/Dao-AILab/flash-attention/releases/download/v2.8.3/flash_attn-2.8.3%2Bcu12"
    )
    assert commands("a100")[0] == f"pip install {url}"
    assert "+cu13torch2.13cxx11abiTRUE" in wheel_name(CUDA_13, 13)


def test_wheel_notes_are_honest() -> None:
    notes = recommend(preset("a100"), CUDA_13)["commands"][0]["notes"]
    assert any("Expect none for torch 2.13" in note for note in notes)
    assert not any("Expect none" in note for note in recommend(preset("a100"), CUDA_12)["commands"][0]["notes"])
    notes = recommend(preset("a100"), NO_CUDA)["commands"][0]["notes"]
    assert any("no CUDA" in note and "cu13torch2.13" in note for note in notes)


def test_minimum_cuda_is_checked_against_torch() -> None:
    old = checked(recommend(preset("a100"), OLD))
    assert old["FlashAttention: CUDA"] is False
    assert old["xFormers: CUDA"] is False
    between = Machine("2.4.0", (11, 5), None, "cp310", "linux_x86_64", False)
    assert checked(recommend(preset("a100"), between))["FlashAttention: CUDA"] is False
    assert checked(recommend(preset("a100"), between))["xFormers: CUDA"] is True
    assert checked(recommend(preset("a100"), CUDA_12))["FlashAttention: CUDA"] is True
    assert checked(recommend(preset("a100"), NO_CUDA))["FlashAttention: CUDA"] is None


def test_xformers_would_replace_an_older_torch() -> None:
    advice = recommend(preset("t4"), CUDA_12)
    assert checked(advice)["xFormers 0.0.35: torch"] is False
    assert any("replaces your torch" in note for note in advice["commands"][0]["notes"])


def test_every_device_gets_an_answer() -> None:
    for name in PRESETS:
        advice = recommend(preset(name), NO_CUDA)
        assert advice["why"]
        assert json.loads(json.dumps(advice)) == advice
    assert commands("cpu") == commands("mps") == []
    assert group_for(Device("cuda", platform="cuda", compute_capability=(12, 0), arch="sm_120")).packages == ()
    assert group_for(Device("cuda", platform="cuda", compute_capability=(6, 1), arch="sm_61")).packages == ()
    assert group_for(Device("cuda", platform="cuda", compute_capability=(8, 9), arch="sm_89")) is group_for(
        preset("rtx4090")
    )
    b200 = [entry["package"] for entry in recommend(preset("b200"), CUDA_13)["commands"]]
    assert b200[0] == "flash-attn-4"
    assert "pre-release" in PACKAGES["flash-attn-4"].notes[0]


def test_what_no_backend_uses_yet_says_so() -> None:
    """A package is not sold for a backend that this version does not have."""
    from vllm_accel.dispatch import registry

    for device in PRESETS:
        for entry in recommend(preset(device), CUDA_12)["commands"]:
            for name in entry["used_by"]:
                op, _, short = name.partition(":")
                assert short in registry.names(op)
            assert bool(entry["used_by"]) != any("No backend of this version" in note for note in entry["notes"])


def test_architectures() -> None:
    assert carries((), (8, 0)) is None
    assert carries(("sm_80",), (8, 6)) is True  # same major version, newer minor
    assert carries(("sm_86",), (8, 0)) is False
    assert carries(("sm_80", "compute_80"), (9, 0)) is True  # PTX is compiled by the driver
    assert carries(("sm_75", "sm_80"), (7, 0)) is False
    assert carries(("sm_90a",), (9, 0)) is True
    assert carries(("sm_100", "sm_120"), (12, 0)) is True
    assert carries(("gfx942",), (9, 0)) is False


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "--device", "t4", "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert [entry["command"] for entry in advice["commands"]] == ["pip install xformers"]
    assert advice["source"].endswith("For V100/T4")
    assert main(["recommend", "--device", "rtx4090"]) == 0
    text = capsys.readouterr().out
    assert "flash_attn-2.8.3" in text
    assert "hours" in text
    assert "\n  pip install xformers\n" in text
    assert main(["recommend"]) == 0
    assert capsys.readouterr().out
    assert main(["recommend", "--device", "rtx9999"]) == 2
    assert capsys.readouterr().err.startswith("vllm-accel recommend: device 'rtx9999' is not known; known: v100, t4")


@pytest.mark.parametrize(
    ("device", "runs"),
    [
        ("h200", ["cublas", "triton", "triton", "triton"]),
        ("rtx4090", ["cublas", "triton", "triton", "triton"]),
        ("t4", ["cublas", "reference", "reference", "reference"]),
        ("cpu", ["cpu"] * 4),
        ("mps", ["reference"] * 4),
    ],
)
def test_products_of_a_layer(device: str, runs: list[str]) -> None:
    rows = recommend(preset(device), CUDA_12)["products"]
    assert [row["runs"] for row in rows] == runs
    assert rows[0]["product"] == ("dense, fp16" if device == "t4" else "dense, bf16")
    masked = [row for row in rows if "once for each of 8 groups" in row["about"]]
    assert len(masked) == (3 if device == "t4" else 0)


def test_deep_gemm_is_named_where_it_runs() -> None:
    for device, named in (("h200", True), ("b200", False), ("a100", False)):
        optional = recommend(preset(device), CUDA_12)["optional"]
        assert ("deep-gemm" in [entry["package"] for entry in optional]) is named


def test_a_wrong_setting_is_wrong_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("vllm_accel.dispatch.settings._current", None)
    monkeypatch.setenv("VLLM_ACCEL_CHECK", "perhaps")
    assert main(["recommend", "--device", "h200"]) == 2
    assert "is not a switch" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["recommend", "--device", "h200"]) == 0
    assert "tokens by expert, FP8 by blocks of 128" in capsys.readouterr().out
