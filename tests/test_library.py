"""Is an optional library usable: every state that users have met, each a reason with the text of the original error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vllm_accel.backends.library import (
    Found,
    Function,
    Library,
    accepts,
    first_usable,
    forget,
    installed_version,
    look_up,
    parameter_names,
    require,
)
from vllm_accel.errors import BackendUnavailableError, Reason

GOOD = "__version__ = '1.4.2'\ndef attend(q, k, *, scale): return scale\n"
LIBRARY = Library(
    label="toy",
    functions=(Function("toylib.ops", "attend", ("q", "scale")),),
    versions=">=1.4,<2",
    version_modules=("toylib",),
    absent_hint="pip install toylib",
)

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write the files of a package ``toylib`` and make it importable."""
    forget()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def files(**sources: str) -> None:
        for path, source in sources.items():
            file = tmp_path / "toylib" / (path + ".py")
            file.parent.mkdir(exist_ok=True)
            file.write_text(source)

    yield files
    forget()
    for name in [name for name in sys.modules if name.split(".")[0] == "toylib"]:
        del sys.modules[name]


def found(library: Library = LIBRARY) -> Found:
    answer = look_up(library)
    assert isinstance(answer, Found), answer
    return answer


def refused(library: Library = LIBRARY) -> Reason:
    answer = look_up(library)
    assert isinstance(answer, Reason), answer
    return answer


def test_usable(write: Write) -> None:
    write(__init__="__version__ = '1.4.2'", ops=GOOD)
    assert found()["attend"](1, 2, scale=3) == 3
    assert found().version == "1.4.2"
    with pytest.raises(KeyError):
        found()["other"]


def test_absent(write: Write) -> None:
    reason = refused()
    assert reason.code == "not_installed"
    assert reason.text == "toy is not installed (no module toylib.ops); pip install toylib"
    with pytest.raises(BackendUnavailableError, match="no module toylib") as error:
        require("toy_backend", reason)
    assert error.value.reasons == {"toy_backend": (reason,)}


def test_blocked_on_purpose_is_absent(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "toylib", None)
    assert refused().code == "not_installed"


def test_an_empty_namespace_is_absent_and_said_so(write: Write) -> None:
    write(other="")  # toylib/ without __init__.py: `import toylib` succeeds
    reason = refused()
    assert reason.code == "not_installed"
    assert "toylib is only an empty namespace here" in reason.text


def test_placeholder(write: Write) -> None:
    write(__init__="", ops="")
    assert refused().code == "placeholder"
    assert "toylib.ops is empty" in refused().text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise ImportError('toy_cuda.so: undefined symbol: _ZN3c105ErrorC2E')", "undefined symbol: _ZN3c105ErrorC2E"),
        ('raise ImportError("libc.so.6: version `GLIBC_2.32\' not found")', "GLIBC_2.32' not found"),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart.so.12"),
        ("import toylib_cuda", "No module named 'toylib_cuda'"),
        ("raise RuntimeError('no driver\\nsecond line')", "RuntimeError: no driver"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("1 +", "SyntaxError"),
    ],
)
def test_broken_keeps_the_text(write: Write, source: str, text: str) -> None:
    write(__init__="", ops=source)
    assert refused().code == "broken"
    assert text in refused().text and refused().text.startswith("toy is installed but does not import")
    assert "second line" not in refused().text


def test_missing_function_and_parameter_name_the_version(write: Write) -> None:
    write(__init__="__version__ = '1.4.9'", ops="def other(): ...")
    assert refused().code == "missing_function"
    assert "has no attend (version 1.4.9 is installed; this adapter is written for >=1.4,<2)" in refused().text
    forget()
    del sys.modules["toylib.ops"]
    write(ops="def attend(q, k): return q  # another signature")
    assert refused().code == "missing_parameter"
    assert "attend has no parameter scale" in refused().text


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("1.4.2", True),
        ("1.4.2+cu128torch2.9", True),
        ("1.9.0b3", True),
        ("2.0", False),
        ("1.3", False),
        ("main", False),
    ],
)
def test_versions(write: Write, version: str, known: bool) -> None:
    write(__init__=f"__version__ = {version!r}", ops=GOOD)
    if known:
        assert found().version == version
    else:
        assert refused().code == "version"
        assert refused().text == f"toy: version {version} is installed; this adapter is written for >=1.4,<2"


def test_without_a_version_the_parameters_decide(write: Write) -> None:
    write(__init__="", ops=GOOD)
    assert found().version is None


def test_the_imported_module_decides_the_version_before_the_distribution(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library("toy", (), distributions=("no-such-distribution", "torch"))
    assert installed_version(library) == str(torch.__version__)
    write(__init__="__version__ = '1.5'", ops=GOOD)
    assert found().version == "1.5"


def test_the_answer_is_kept_until_forgotten(write: Write) -> None:
    assert refused().code == "not_installed"
    write(__init__="", ops=GOOD)
    assert refused().code == "not_installed"
    forget()
    assert found()["attend"]


def test_the_first_usable_form_and_else_the_most_telling_reason(write: Write) -> None:
    write(__init__="", ops="raise ImportError('undefined symbol')")
    absent = Library("toy", (Function("toylib_elsewhere", "attend"),))
    telling = first_usable(absent, LIBRARY)
    assert isinstance(telling, Reason) and telling.code == "broken"
    there = Library("toy", (Function("math", "tanh"),))
    assert isinstance(first_usable(absent, there), Found)
    only = first_usable(absent)
    assert isinstance(only, Reason) and only.code == "not_installed"


def test_names_reach_into_classes(write: Write) -> None:
    write(__init__="", ops="class Mask:\n    @classmethod\n    def from_lengths(cls, lengths): return lengths")
    library = Library("toy", (Function("toylib.ops", "Mask.from_lengths", ("lengths",)),))
    assert found(library)["Mask.from_lengths"]([1]) == [1]


def test_parameters_of_operators_functions_and_builtins() -> None:
    # What torch.library.custom_op returns, and what torch.ops holds: both look like (*args, **kwargs).
    @torch.library.custom_op("vllm_accel_test::attend", mutates_args=(), device_types="cpu")
    def attend(q: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return q * scale

    expected = {"q", "scale"}
    assert parameter_names(attend) == expected
    assert parameter_names(torch.ops.vllm_accel_test.attend) == expected
    assert parameter_names(torch.ops.vllm_accel_test.attend.default) == expected
    assert parameter_names(lambda **kwargs: kwargs) is None
    assert accepts(lambda **kwargs: kwargs, "anything")
    assert not accepts(lambda q: q, "scale")
