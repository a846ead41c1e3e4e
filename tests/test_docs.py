"""The pages under docs/ say what the program does: every row of their tables is run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from vllm_accel import Device, attention, explain
from vllm_accel.cli import build_parser, main
from vllm_accel.cli.doctor_settings import EFFECTS, FOREIGN
from vllm_accel.dispatch import registry
from vllm_accel.dispatch.device import PRESETS
from vllm_accel.dispatch.selection import State
from vllm_accel.dispatch.settings import NAMES

DOCS = Path(__file__).parent.parent / "docs"

#: The set-up and troubleshooting lines of "Acceleration Libraries for vLLM", in its order.
DOCUMENT = (
    "pip install flash-attn --no-build-isolation",
    "NVIDIA GPUs: Ampere (A100, RTX 30xx) or newer",
    "CUDA 11.8+",
    "Works automatically in vLLM if installed",
    "A100, H100, RTX 4090, RTX 4080",
    "RTX 3090, RTX 3080",
    "V100, T4 (use xFormers instead)",
    "pip install xformers",
    "CUDA 11.3+",
    "Works on older GPUs (V100, T4)",
    "Fallback for Flash Attention",
    "pip install triton",
    "Enable Triton Flash Attention",
    "export VLLM_USE_TRITON_FLASH_ATTN=1",
    "Disable if causing issues",
    "export VLLM_USE_TRITON_FLASH_ATTN=0",
    "pip install nvidia-cutlass",
    "Requires NVIDIA NGC account",
    "See: https://github.com/NVIDIA/TensorRT-LLM",
    "Included with CUDA toolkit",
    "Automatically used by PyTorch",
    "Enable Tensor Cores",
    "export CUBLAS_WORKSPACE_CONFIG=:4096:8",
    "A100/H100: flash-attn, triton, nvidia-cutlass",
    "RTX 3090/4090: flash-attn, xformers",
    "V100/T4: xformers",
    "Production: flash-attn, triton, nvidia-cutlass",
    "consider TensorRT-LLM for H100",
    "Flash Attention not working",
    "Check GPU compatibility (needs Ampere+)",
    "Verify CUDA version (11.8+)",
    "Try xFormers as fallback",
    "Triton compilation errors",
    "Clear cache, `rm -rf ~/.triton/cache`",
    "Disable if needed, `export VLLM_USE_TRITON_FLASH_ATTN=0`",
    "Import errors",
    "pip uninstall flash-attn xformers triton",
    "Import errors: `pip install flash-attn --no-build-isolation`",
    "Import errors: `pip install xformers --no-build-isolation`",
    "Import errors: `pip install triton`",
)


def table(page: str, first_column: str) -> list[list[str]]:
    """Return the rows of the table whose header starts with that column."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ROWS = table("troubleshooting.md", "the document says")


@pytest.fixture(scope="module")
def doctor_names() -> set[str]:
    """Every name that the doctor's report has on this machine: sections, and the first column of each."""
    from vllm_accel.cli.doctor import examine

    sections = json.loads(json.dumps(examine()))["sections"]
    return {*sections, *(next(iter(row.values())) for rows in sections.values() for row in rows)}


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages are about what a backend supports, not about what this machine has."""
    from vllm_accel.ops import explain as module

    monkeypatch.setattr(module, "assumes_available", lambda device: True)


@pytest.mark.parametrize("line", DOCUMENT)
def test_every_line_of_the_document_has_a_row(line: str) -> None:
    assert any(line in row[0] for row in ROWS), f"no row of docs/troubleshooting.md serves: {line}"


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:50])
def test_what_a_row_names_exists(
    row: list[str], doctor_names: set[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no reason wraps
    (thing,) = code(row[1])
    if not thing.startswith("vllm-accel "):
        assert thing in NAMES or thing in FOREIGN
        return
    arguments = thing.split()[1:]
    build_parser().parse_args(arguments)
    if "--clear-triton-cache" in arguments:
        return  # tests/test_doctor.py runs it, on a directory of its own
    if arguments[0] == "doctor":
        assert code(row[2])
        assert set(code(row[2])) <= doctor_names
        return
    assert main(arguments) == 0
    assert code(row[2])[0] in capsys.readouterr().out


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_every_command_on_a_page_parses(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    commands = re.findall(r"`vllm-accel ([a-z][^`]*)`", text)
    for command in commands:
        build_parser().parse_args(command.split())


def test_every_setting_is_explained() -> None:
    """The page and the doctor know every setting, and no setting that does not exist."""
    assert {code(row[0])[0] for row in table("troubleshooting.md", "variable")} == set(NAMES)
    assert set(EFFECTS) == set(NAMES)


def test_cublas_workspace_is_not_sold_as_tensor_cores() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert "`CUBLAS_WORKSPACE_CONFIG` does not turn Tensor Cores on" in text
    assert "does not turn Tensor Cores on" in FOREIGN["CUBLAS_WORKSPACE_CONFIG"]


def compatible(backend: str, device: Device) -> bool:
    """Tell whether a backend can run a plain causal prefill in fp16 on a device."""
    q = torch.empty(1, 1024, 32, 128, dtype=torch.float16, device="meta")
    state = explain(attention, q, q, q, causal=True, device=device, backend=None)[backend].state
    return state in (State.CHOSEN, State.ABLE, State.HELD_BACK)


@pytest.mark.usefixtures("everything_installed")
def test_the_compatibility_table_is_what_the_library_declares() -> None:
    rows = table("support.md", "backend")
    header = next(
        line
        for line in (DOCS / "support.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| backend |")
    )
    gpus = [cell.strip() for cell in header.strip("|").split("|")][1:]
    assert set(gpus) == set(PRESETS)
    expected = [
        [f"`{name}`", *("yes" if compatible(name, PRESETS[gpu]) else "" for gpu in gpus)]
        for name in registry.names("attention")
    ]
    written = "\n".join(f"| {' | '.join(row)} |" for row in expected)
    plain = [[row[0], *(cell.rstrip("*+") for cell in row[1:])] for row in rows]
    assert plain == expected, f"docs/support.md should say:\n{written}"


def test_the_document_agrees_with_the_compatibility_table() -> None:
    """FlashAttention: A100, H100, 4090, 4080, 3090, 3080 yes; V100, T4 no, xFormers instead."""
    rows = {code(row[0])[0]: row[1:] for row in table("support.md", "backend")}
    header = next(
        line
        for line in (DOCS / "support.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| backend |")
    )
    gpus = [cell.strip() for cell in header.strip("|").split("|")][1:]
    flash = dict(zip(gpus, rows["flash_attn_2"], strict=True))
    xformers = dict(zip(gpus, rows["xformers"], strict=True))
    for gpu in ("a100", "h100", "rtx4090", "rtx4080", "rtx3090", "rtx3080"):
        assert flash[gpu].startswith("yes")
    for gpu in ("v100", "t4"):
        assert flash[gpu] == ""
        assert xformers[gpu].startswith("yes")


def test_the_recommended_set_ups_are_those_of_the_program() -> None:
    from vllm_accel.cli.advice import group_for

    for row in table("support.md", "GPU"):
        (gpu,) = code(row[0])
        group = group_for(PRESETS[gpu])
        assert code(row[1]) == [key for key in group.packages if key != "flash-attn-wheel"]
        assert code(row[2]) == [*group.production, *group.optional]
