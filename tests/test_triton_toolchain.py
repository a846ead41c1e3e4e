"""What the toolchain check finds, on machines faked by PATH, by directories, and by programs that pose as ptxas."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton

from vllm_accel.kernels.triton import toolchain


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in toolchain.VARIABLES:
        if name not in ("HOME", "PATH"):
            monkeypatch.delenv(name, raising=False)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    program(bin_ / "gcc", "")
    include = tmp_path / "include"
    include.mkdir()
    (include / "Python.h").write_text("")
    monkeypatch.setenv("PATH", str(bin_))
    monkeypatch.setenv("CPATH", str(include))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    toolchain.forget()
    yield
    toolchain.forget()


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def found(arch: str | None = "sm_90") -> dict[str, str]:
    return {p.code: str(p) for p in toolchain.problems(arch)}


def noted(arch: str | None = "sm_90") -> dict[str, str]:
    return {p.code: str(p) for p in toolchain.notes(arch)}


@pytest.mark.parametrize("arch", [None, "sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_a_whole_toolchain_has_no_problems(arch: str | None) -> None:
    assert found(arch) == {}
    assert noted(arch) == {}


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin" / "gcc").rename(tmp_path / "bin" / "cc")
    toolchain.forget()
    assert set(found()) == {"c_compiler"}  # Triton looks for gcc and clang, never for cc
    assert "neither gcc nor clang is on PATH; apt-get install gcc" in found()["c_compiler"]
    program(tmp_path / "bin" / "clang", "")
    toolchain.forget()
    assert found() == {}
    assert toolchain.compiler() == str(tmp_path / "bin" / "clang")


@pytest.mark.parametrize("value", ["gcc-99", "", "ccache gcc"])
def test_a_compiler_that_does_not_exist(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", value)
    assert f"CC={value!r} is not a program" in found()["c_compiler"]


def test_the_compiler_that_triton_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ask Triton: it runs what `compiler` returned."""
    from triton.runtime import build

    seen = []
    monkeypatch.setattr(build.subprocess, "check_call", lambda command, **_: seen.append(command[0]))
    for own in (None, "clang"):
        if own:
            program(tmp_path / "bin" / own, "")
            monkeypatch.setenv("CC", own)
        build._build("x", "x.c", str(tmp_path), [], [], [], [])
        assert shutil.which(seen[-1]) == toolchain.compiler()


def test_no_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda **_: {"include": str(tmp_path / "nowhere")})
    assert found() == {}
    assert toolchain.headers() == tmp_path / "include"
    monkeypatch.delenv("CPATH")
    assert set(found()) == {"python_headers"}
    assert f"Python.h is not in {tmp_path}/nowhere; apt-get install python3-dev" in found()["python_headers"]


def fake_ptxas(path: Path, release: str = "12.4", archs: str = "'sm_80','sm_90','sm_90a'") -> Path:
    shown = f"Cuda compilation tools, release {release}, V{release}.1"
    return program(path, f'case "$1" in --version) echo "{shown}";; *) echo "Allowed values: {archs}.";; esac')


@pytest.mark.parametrize(
    ("arch", "variable", "problem"),
    [
        ("sm_90", "TRITON_PTXAS_PATH", None),
        ("sm_80", "TRITON_PTXAS_PATH", None),
        ("sm_89", "TRITON_PTXAS_PATH", "does not know sm_89; set TRITON_PTXAS_PATH"),
        ("sm_121", "TRITON_PTXAS_BLACKWELL_PATH", "does not know sm_121a; set TRITON_PTXAS_BLACKWELL_PATH"),
        ("sm_100", "TRITON_PTXAS_PATH", None),  # Triton takes its other one
        ("gfx942", "TRITON_PTXAS_PATH", None),
        (None, "TRITON_PTXAS_PATH", None),
    ],
)
def test_a_ptxas_that_is_too_old(
    arch: str | None, variable: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fake_ptxas(tmp_path / "ptxas")
    monkeypatch.setenv(variable, str(path))
    assert found(arch).get("ptxas") is None if problem is None else problem in found(arch)["ptxas"]
    if problem is not None:
        assert f"ptxas 12.4 ({path})" in found(arch)["ptxas"]


def test_a_ptxas_that_names_no_architecture_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(fake_ptxas(tmp_path / "ptxas", archs="")))
    assert found("sm_89") == {}


@pytest.mark.parametrize("text", ["exit 1", "echo no release here"])
def test_a_ptxas_that_does_not_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Triton, the one in its package takes its place."""
    path = program(tmp_path / "ptxas", text)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(path))
    assert found() == {}
    assert f"TRITON_PTXAS_PATH={path} is no ptxas that runs" in noted()["ptxas"]
    taken = toolchain.ptxas("sm_90")
    assert taken is not None
    assert Path(taken.path).is_relative_to(Path(triton.__file__).parent)
    assert taken.release == triton.knobs.nvidia.ptxas.version


def test_a_ptxas_that_may_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_ptxas(tmp_path / "ptxas")
    path.chmod(0o644)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(path))
    with pytest.raises(PermissionError):
        _ = triton.knobs.nvidia.ptxas
    assert f"TRITON_PTXAS_PATH={path} cannot be executed" in found()["ptxas"]


def test_no_ptxas_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = SimpleNamespace(__file__=str(tmp_path / "triton" / "__init__.py"), __version__="3.7.1")
    monkeypatch.setitem(sys.modules, "triton", gone)
    assert set(found()) == {"ptxas"}
    assert "no ptxas that runs; reinstall triton, or set TRITON_PTXAS_PATH" in found()["ptxas"]
    assert found("gfx942") == {}


def test_ptxas_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    real = subprocess.run
    monkeypatch.setattr(toolchain.subprocess, "run", lambda *a, **k: (runs.append(a), real(*a, **k))[1])
    for arch in ("sm_90", "sm_80", None, "sm_90"):
        assert found(arch) == {}
    assert len(runs) == 4  # --version and --help, of Triton's two


def test_a_second_look_is_cheap() -> None:
    toolchain.problems("sm_90")
    fastest = 1.0
    for _ in range(50):
        start = time.perf_counter()
        toolchain.problems("sm_90")
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 1e-3


def _fail(error: Exception) -> Callable[[str], None]:
    def import_module(name: str) -> None:
        raise error

    return import_module


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "not_installed", "No module named 'triton'"),
        (ModuleNotFoundError("No module named 'numpy'", name="numpy"), "broken", "No module named 'numpy'"),
        (ImportError("libtriton.so: undefined symbol: x"), "broken", "ImportError: libtriton.so: undefined symbol: x"),
        (OSError("GLIBC_2.38 not found"), "broken", "OSError: GLIBC_2.38 not found"),
    ],
)
def test_a_triton_that_does_not_import(error: Exception, code: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", _fail(error))
    assert set(found()) == {code}
    assert text in found()[code]
    assert noted() == {}


@pytest.mark.parametrize(
    ("version", "problem", "note"),
    [
        ("3.5.1", True, False), ("2.3.0", True, False), ("3.6.0", False, False), ("3.7.1+git12", False, False),
        ("3.9.0", False, True), ("4.0.0", False, True),
    ],
)  # fmt: skip
def test_the_version_of_triton(version: str, problem: bool, note: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert (f"triton {version} is installed" in found().get("version", "")) is problem
    assert (f"triton {version} is newer" in noted().get("version", "")) is note


@pytest.mark.parametrize(("value", "problem"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_interpreter_is_not_for_gpus(value: str, problem: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert triton.knobs.runtime.interpret is problem
    assert ("interpreter" in found()) is problem


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ask Triton, in a process of its own: it reads TRITON_HOME when it is imported."""
    code = "import triton; print(triton.knobs.cache.dir)"
    for variables in ({}, {"TRITON_HOME": str(tmp_path)}, {"TRITON_CACHE_DIR": "here"}, {"TRITON_HOME": ""}):
        monkeypatch.delenv("TRITON_CACHE_DIR")
        monkeypatch.delenv("TRITON_HOME", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert Path(told.stdout.strip()) == toolchain.cache_dir()
        monkeypatch.setenv("TRITON_CACHE_DIR", "")
    assert toolchain.cache_dir() is None
    assert "TRITON_CACHE_DIR is set to nothing" in found()["cache"]


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    # Root may write everywhere; a read-only file system denies root as well.
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and real(path, mode))
    for inside in ("", "a/b"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(locked / inside))
        assert f"{locked} is read-only for this user" in found()["cache"]
    assert not list(locked.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_this_user_cannot_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.joinpath("locked").mkdir(mode=0o555)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "locked" / "cache"))
    assert "read-only" in found()["cache"]


def test_a_cache_below_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert f"{tmp_path}/file is not a directory" in found()["cache"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "dangling"))
    assert f"{tmp_path}/dangling is not a directory" in found()["cache"]


@pytest.mark.parametrize(("free", "files", "problem"), [(63, 9, True), (65, 9, False), (999, 0, True)])
def test_a_full_disk(free: int, files: int, problem: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_files=9, f_favail=files))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free * 1024**2))
    assert ("MiB of free space" in found().get("cache", "")) is problem


def test_the_check_writes_nothing(tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert found() == {}
    assert sorted(tmp_path.rglob("*")) == before


MOUNTS = """\
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:40 / /home rw,nosuid shared:5 master:2 - nfs4 server:/home rw,vers=4.2
31 22 0:41 / /home/jane/fast rw - xfs /dev/sdb rw
32 22 0:42 / /mnt/with\\040space rw - fuse.sshfs host:/x rw
33 22 0:43 / /over rw - ext4 /dev/sdc rw
34 22 0:44 / /over rw - lustre mgs:/fs rw
35 22 0:45 / /merged rw - fuse.fuse-overlayfs overlay rw
a line that says nothing
"""


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/var/cache/x", "ext4", False),
        ("/home/jane/.triton/cache", "nfs4", True),
        ("/home/jane/fast/cache", "xfs", False),
        ("/homework", "ext4", False),
        ("/mnt/with space/x", "fuse.sshfs", True),
        ("/over/x", "lustre", True),
        ("/merged/x", "fuse.fuse-overlayfs", False),
    ],
)
def test_the_file_system(path: str, kind: str, network: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(toolchain, "existing", lambda given: given)  # none of these exists here
    assert toolchain.file_system(Path(path), str(mounts)) == kind
    assert toolchain.is_network(kind) is network
    assert toolchain.file_system(Path(path), str(tmp_path / "nowhere")) == ""


def test_a_cache_on_a_network_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "file_system", lambda path: "nfs4")
    assert found() == {}
    assert "on a network file system (nfs4)" in noted()["cache"]
    assert "set TRITON_CACHE_DIR to a directory on a local disk" in noted()["cache"]


def test_the_file_system_of_this_machine(tmp_path: Path) -> None:
    told = shutil.which("stat", path=os.defpath)
    assert told is not None
    shown = subprocess.run([told, "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    # stat cannot tell ext4 from ext2.
    assert toolchain.file_system(tmp_path / "not" / "there").rstrip("4fs") in shown.replace("overlayfs", "overlay")
