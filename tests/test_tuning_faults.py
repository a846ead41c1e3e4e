"""What can go wrong around a measured table: nothing measured is lost, calls stay right, and somebody is told."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tables import CPU, choice, row, spec_of, table, write
from vllm_accel import attention, explain, reload_settings
from vllm_accel.cli import doctor_caches, main
from vllm_accel.dispatch import measured
from vllm_accel.dispatch import settings as settings_module
from vllm_accel.dispatch.device import detect
from vllm_accel.dispatch.table_file import parse, update
from vllm_accel.testing.oracle import attention_oracle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="POSIX files, signals and limits")
SHAPES = (
    '[{"kind": "prefill", "dtype": "fp32", "heads": 2, "kv_heads": 2, "head_dim": 16, "seqlen_q": 16, "seqlen_k": 16}]'
)


@pytest.fixture(autouse=True)
def _own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_ACCEL_TABLES", str(tmp_path / "tables"))
    reload_settings()
    yield
    monkeypatch.undo()
    settings_module._current = None
    measured.forget()


@pytest.fixture
def shapes(tmp_path: Path) -> str:
    path = tmp_path / "shapes.json"
    path.write_text(SHAPES)
    return str(path)


def _right() -> None:
    q = torch.randn(1, 16, 2, 16)
    want, _ = attention_oracle(q, q, q, causal=True)
    torch.testing.assert_close(attention(q, q, q, causal=True), want.float(), atol=1e-5, rtol=1e-5)


def _python(code: str, tables: Path, **kwargs: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "VLLM_ACCEL_TABLES": str(tables)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **kwargs,
    )  # fmt: skip


def test_a_full_disk_keeps_the_old_table_and_says_so(tmp_path: Path, shapes: str) -> None:
    path = write(table(row(spec_of(64), reference=1e-4)))
    before = path.read_text()
    # A limit on the size of files fails in the same write as a full disk does.
    code = f"""
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from vllm_accel.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
        sys.exit(main(["tune", "--device", "cpu", "--shapes", {shapes!r}]))
    """
    process = _python(code, path.parent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "cannot be written" in err and "what it held is still there" in err
    assert path.read_text() == before and not list(path.parent.glob("*.tmp")) + list(path.parent.glob(".*.tmp"))


def test_a_full_disk_in_the_middle_keeps_what_was_measured_before(
    monkeypatch: pytest.MonkeyPatch, shapes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    path = write(table(row(spec_of(64), reference=1e-4)))
    calls.clear()
    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["tune", "--device", "cpu", "--shapes", shapes]) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(parse(path.read_text()).rows) == 1
    _right()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in ("/proc/vllm_accel", str(tmp_path / "file" / "tables")):
        monkeypatch.setenv("VLLM_ACCEL_TABLES", folder)
        reload_settings()
        assert main(["tune", "--device", "cpu", "--shapes", shapes]) == 1
        told = capsys.readouterr()
        assert "cannot be written" in told.err and "1x16" not in told.out
        _right()


def test_a_corrupt_table_is_put_aside_and_measuring_goes_on(
    shapes: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(table(row(spec_of(64), reference=1e-4)))
    path.write_text(path.read_text()[:-40])
    measured.forget()
    with caplog.at_level(logging.WARNING, "vllm_accel"):
        _right()
        assert "nothing measured" in choice().decided_by
        assert f"note: {path} is ignored: " in str(choice())
    assert caplog.text.count("is ignored") == 1 and path.name in caplog.text
    (problem,) = doctor_caches.problems(detect(CPU))
    assert (
        problem.text.startswith(f"{path} is ignored: ")
        and problem.fix == "Delete it, or measure again: vllm-accel tune"
    )
    assert main(["tune", "--device", "cpu", "--shapes", shapes]) == 0
    assert f"it is now {path.name}.unreadable" in capsys.readouterr().out
    assert len(parse(path.read_text()).rows) == 1 and path.with_name(f"{path.name}.unreadable").exists()
    assert "ignored" not in str(choice()) and doctor_caches.problems(detect(CPU)) == []


def test_a_folder_in_place_of_the_table_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    measured.user_file(detect(CPU)).mkdir(parents=True)
    measured.forget()
    with caplog.at_level(logging.WARNING, "vllm_accel"):
        _right()
    assert "is ignored" in caplog.text


_WRITER = """
    import sys
    from dataclasses import replace
    sys.path.insert(0, "tests")
    from tables import row, spec_of, table
    from vllm_accel.dispatch import measured
    from vllm_accel.dispatch.device import detect
    from vllm_accel.dispatch.table_file import update
    import torch
    path = measured.user_file(detect(torch.device("cpu")))
    base = spec_of(8)
    specs = [replace(base, seqlen_k=8 + n) for n in range({start}, {stop})]
    print("ready", flush=True)
    sys.stdin.read()
    for n, spec in enumerate(specs):
        update(path, table(row(spec, reference=1e-4 + n * 1e-6)))
        print(n, flush=True)
"""


def test_two_processes_that_tune_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [
        _python(_WRITER.format(start=a, stop=b), tmp_path / "tables", stdin=subprocess.PIPE, cwd=_root())
        for a, b in ((0, 40), (40, 80))
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdin is not None
        assert writer.stdout.readline() == "ready\n", writer.communicate()
    for writer in writers:  # both start now
        writer.stdin.close()  # type: ignore[union-attr]
        writer.stdin = None
    for writer in writers:
        _, err = writer.communicate(timeout=60)
        assert writer.returncode == 0, err
    found = parse(measured.user_file(detect(CPU)).read_text())
    assert {r.spec.seqlen_k for r in found.rows} == set(range(8, 88)) and len(found.rows) == 80


def test_kill_in_the_middle_of_writes_leaves_a_whole_table(tmp_path: Path) -> None:
    path = measured.user_file(detect(CPU))
    for pause in (0.0, 0.017):
        writer = _python(_WRITER.format(start=0, stop=4000), tmp_path / "tables", stdin=subprocess.PIPE, cwd=_root())
        assert writer.stdout is not None and writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
        writer.stdin.close()
        writer.stdin = None
        said = [writer.stdout.readline() for _ in range(3)]
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=60)
        assert said == ["0\n", "1\n", "2\n"]
        rows = parse(path.read_text()).rows  # whole
        assert {8, 9, 10} <= {r.spec.seqlen_k for r in rows}
    update(path, table(row(spec_of(999), reference=1e-4)))  # the lock of the dead is gone
    assert spec_of(999) in {r.spec for r in parse(path.read_text()).rows}


@pytest.mark.parametrize("value", ["\x01\x7f", "a" * 5000, "~nobody-here/x", "-rf", "   ", "/dev/null", "file://x"])
def test_nonsense_in_the_environment_costs_the_table_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("VLLM_ACCEL_TABLES", value)
    monkeypatch.setenv("XDG_CACHE_HOME", "\x02")
    reload_settings()
    _right()
    q = torch.empty(1, 16, 2, 16, device="meta")
    found = explain(attention, q, q, q, device="cpu")
    assert found.chosen and any(value in text for text in found.settings)


def _root() -> Path:
    return Path(__file__).resolve().parents[1]
