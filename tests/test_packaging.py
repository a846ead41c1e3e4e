"""What an installed vllm_accel contains, for each way of installing it.

`vllm_accel/kernels` is a symbolic link to `kernels/`, which has no `__init__.py` (see kernels/README.md).
Every claim is checked on a copy of the tree with a probe added, installed by pip; nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

# Stands for a kernel with a C++ source beside it. In the copy only: the test is about any kernel.
PROBE = {
    "kernels/probe/__init__.py": "from vllm_accel.kernels.probe.launch import VALUE\n",
    "kernels/probe/launch.py": "VALUE = 17\n",
    "kernels/probe/probe.cpp": "// source\n",
    "kernels/probe/tiles/probe.json": "{}\n",
}
NOT_COPIED = {"build", "dist", "benchmarks", "docs", "examples", "vllm_accel.egg-info"}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        # The C++ kernels take half a minute each time; tests/test_cpu_build.py builds them.
        env={**os.environ, "BUILD_CPU_KERNELS": "0", **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_tree(target: Path) -> Path:
    """Copy what is packaged, stale caches included, with the link as a link; add the probe."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        compiled = {name for name in names if name.endswith(".so")}
        top = {name for name in names if name.startswith(".")} | NOT_COPIED
        return compiled | top if Path(folder) == ROOT else compiled

    shutil.copytree(ROOT, target, symlinks=True, ignore=ignored)
    for name, text in PROBE.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return target


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build as for a release (the source archive, the wheel out of it) and a wheel from the tree."""
    base = tmp_path_factory.mktemp("packaging")
    tree = copy_tree(base / "tree")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", base / "dist", tree, cwd=base)
    run(*build, "--wheel", "--outdir", base / "direct", tree, cwd=base)
    return base


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_kernels_is_a_link_to_a_folder_without_init() -> None:
    link = ROOT / "vllm_accel" / "kernels"
    assert os.readlink(link) == os.path.join("..", "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_has_the_package_and_nothing_else(distributions: Path) -> None:
    names = wheel_names(only(distributions / "dist", "*.whl"))
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"vllm_accel", info}
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_wheel_has_every_source_file(distributions: Path) -> None:
    names = wheel_names(only(distributions / "dist", "*.whl"))
    tree = distributions / "tree"
    sources = {f"vllm_accel/{name}" for name in PROBE} | {"vllm_accel/py.typed"}
    for folder, prefix in ((tree / "vllm_accel", "vllm_accel"), (tree / "kernels", "vllm_accel/kernels")):
        sources |= {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
    sources |= {f"vllm_accel/data/{path.name}" for path in (tree / "vllm_accel" / "data").glob("*.json")}
    sources |= {f"vllm_accel/{path.relative_to(tree).as_posix()}" for path in (tree / "kernels").rglob("*.json")}
    assert sources <= names


def test_wheel_from_the_source_archive_equals_the_wheel_from_the_tree(distributions: Path) -> None:
    released, direct = (only(distributions / folder, "*.whl") for folder in ("dist", "direct"))
    assert wheel_names(released) == wheel_names(direct)
    with zipfile.ZipFile(released) as a, zipfile.ZipFile(direct) as b:
        assert {i.filename: i.CRC for i in a.infolist()} == {i.filename: i.CRC for i in b.infolist()}


def test_source_archive_has_files_where_the_tree_has_a_link(distributions: Path) -> None:
    with tarfile.open(only(distributions / "dist", "*.tar.gz")) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers()}
    assert members["vllm_accel/kernels/probe/launch.py"].isfile()
    assert not [member.name for member in members.values() if member.issym()]


def requirements(text: list[str] | None, *, extra: str | None = None) -> set[str]:
    """Names required: without an extra, or by one extra."""
    parsed = [Requirement(line) for line in text or []]
    wanted = "extra ==" if extra is None else f'extra == "{extra}"'
    return {r.name for r in parsed if (wanted in str(r.marker)) == (extra is not None)}


def metadata(distributions: Path) -> importlib.metadata.Distribution:
    """Read the wheel's metadata, as pip would."""
    target = distributions / "unpacked"
    if not target.exists():
        with zipfile.ZipFile(only(distributions / "dist", "*.whl")) as archive:
            archive.extractall(target)
    (found,) = importlib.metadata.distributions(name="vllm-accel", path=[str(target)])
    return found


def test_extras_are_complete_and_none_of_them_names_torch(distributions: Path) -> None:
    found = metadata(distributions)
    extras = set(found.metadata.get_all("Provides-Extra") or [])
    libraries = {"flash-attn", "xformers", "triton", "flashinfer", "cutlass", "transformers"}
    assert extras == libraries | {"plot", "demo", "test", "dev"}
    assert requirements(found.requires) == {"torch", "rich", "packaging"}
    for extra in extras:
        assert "torch" not in requirements(found.requires, extra=extra), extra


def test_makefile_installs_extras_that_exist(distributions: Path) -> None:
    # pip installs nothing, and only warns, for an extra that it does not find.
    (line,) = re.findall(r"^EXTRAS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(line.split(",")) <= set(metadata(distributions).metadata.get_all("Provides-Extra") or [])


def test_constraints_name_one_version_of_each_package_for_each_python() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for python in ("3.10", "3.11", "3.12", "3.13"):
        held = [p.name for p in pins if p.marker is None or p.marker.evaluate({"python_version": python})]
        assert len(held) == len(set(held))
        assert {"torch", "triton", "numpy", "pytest", "ruff", "mypy", "setuptools"} <= set(held)
    assert [str(p) for p in pins if p.name == "torch"] == ["torch==2.13.0"]


def test_console_script_points_at_the_command_line(distributions: Path) -> None:
    scripts = {e.name: e.value for e in metadata(distributions).entry_points if e.group == "console_scripts"}
    assert scripts == {"vllm-accel": "vllm_accel.cli:main"}


# What a user can do after installing: import the package, and a kernel through it.
USER = """
import importlib.util, json
import vllm_accel
from vllm_accel.kernels.probe import VALUE
import vllm_accel.kernels.probe.launch as launch
kernels = importlib.util.find_spec("kernels")
print(json.dumps({
    "value": VALUE,
    "package": vllm_accel.__file__,
    "launch": launch.__file__,
    "kernels": list(kernels.submodule_search_locations or []) if kernels else [],
    "tests": importlib.util.find_spec("test_packaging") is not None,
}))
"""
HUGGING_FACE = "NAME = 'the package called kernels'\n"


def fresh_environment(base: Path) -> tuple[Path, Path]:
    """Create an environment without pip; return its interpreter and its site-packages."""
    venv.create(base / "env", with_pip=False, symlinks=os.name != "nt")
    paths = sysconfig.get_paths("venv", vars={"base": str(base / "env"), "platbase": str(base / "env")})
    return Path(paths["scripts"]) / "python", Path(paths["purelib"])


def lend_setuptools(base: Path) -> dict[str, str]:
    """Put the setuptools of this environment, and nothing else of it, on the path of a build."""
    lent = base / "lent"
    lent.mkdir()
    files = importlib.metadata.distribution("setuptools").files or []
    site = Path(str(importlib.metadata.distribution("setuptools").locate_file("")))
    for top in {file.parts[0] for file in files if ".." not in file.parts}:
        if (site / top).exists() and not top.endswith(".pth"):
            (lent / top).symlink_to(site / top)
    return {"PYTHONPATH": str(lent)}


def install(base: Path, *what: str | Path) -> tuple[Path, Path]:
    python, site = fresh_environment(base)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps")
    run(*pip, "--no-build-isolation", *what, cwd=base, env=lend_setuptools(base))
    # torch and the other requirements, after what was installed. No .pth file in that folder is read, so an
    # editable install in this environment stays out of sight.
    (site / "zz_torch.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python, site


@pytest.mark.parametrize("how", ["wheel", "editable", "editable-strict"])
def test_installed_package_imports_and_leaves_the_name_kernels_alone(
    how: str, distributions: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    if how == "wheel":
        python, site = install(tmp_path, only(distributions / "dist", "*.whl"))
    else:
        copy_tree(tree)
        strict = ["--config-settings", "editable_mode=strict"] if how == "editable-strict" else []
        python, site = install(tmp_path, *strict, "-e", tree)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    seen = json.loads(run(python, "-c", USER, cwd=elsewhere))
    assert seen["value"] == 17
    home = site if how == "wheel" else tree
    assert Path(seen["package"]).is_relative_to(home)
    assert Path(seen["launch"]).is_relative_to(home)
    assert not seen["tests"]
    assert not [place for place in seen["kernels"] if Path(place).is_relative_to(tmp_path)]

    # Hugging Face's package wins, also from the root of a checkout, where our folder is first on the path.
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(HUGGING_FACE)
    for folder in (elsewhere, tree if tree.exists() else ROOT):
        name = run(python, "-c", "import kernels; print(kernels.NAME)", cwd=folder)
        assert name.strip() == "the package called kernels"
