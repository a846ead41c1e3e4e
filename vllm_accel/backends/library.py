"""Is an optional library usable? Do the functions we call import, with the parameters we use, at a version we know.

Looking for a package is not enough: the registry's flash-attn-3 is an empty placeholder, with flash-attn-4 alone
``import flash_attn`` succeeds as an empty namespace, and a shared object built for another torch fails at import.
Each of these is a `Reason` with the text of the original error, never an exception.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

from vllm_accel.errors import BackendUnavailableError, Reason


@dataclass(frozen=True, slots=True)
class Function:
    """Something that an adapter calls.

    Attributes:
        module: where it is imported from.
        name: in that module; dots reach into classes (``"BlockDiagonalMask.from_seqlens"``).
        parameters: the ones that the adapter passes by keyword; a release without one of them is refused.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Library:
    """What an adapter needs of an optional library.

    Attributes:
        label: how sentences name it, for example ``"flash-attn 2"``.
        functions: what is called. Each is found by its `Function.name` in `Found`.
        versions: releases that the adapter was written for, as a PEP 440 specifier; empty for any.
        version_modules: imported modules whose ``__version__`` is asked first: it is what really runs.
        distributions: installed distributions whose version is asked next.
        absent_hint: appended where it is not installed, one fix.
    """

    label: str
    functions: tuple[Function, ...]
    versions: str = ""
    version_modules: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()
    absent_hint: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A usable library: its functions by name, and its version where it has one."""

    functions: Mapping[str, Callable[..., Any]]
    version: str | None

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Return a function by the name it was asked for. Raises KeyError for a name that was not."""
        return self.functions[name]


@functools.lru_cache(maxsize=64)
def look_up(library: Library) -> Found | Reason:
    """Import the functions of a library once per process; the same answer from then on, until `forget`."""
    functions: dict[str, Callable[..., Any]] = {}
    for function in library.functions:
        module = _import(function.module, library)
        if isinstance(module, Reason):
            return module
        got = _check(function, module, library)
        if isinstance(got, Reason):
            return got
        functions[function.name] = got
    version = installed_version(library)
    if library.versions and version is not None and not matches(version, library.versions):
        text = f"{library.label}: version {version} is installed; this adapter is written for {library.versions}"
        return Reason("version", text)
    return Found(MappingProxyType(functions), version)


def first_usable(*libraries: Library) -> Found | Reason:
    """Look several forms of one library up, in order; without any, return the most telling reason."""
    reasons: list[Reason] = []
    for library in libraries:
        found = look_up(library)
        if isinstance(found, Found):
            return found
        reasons.append(found)
    return next((reason for reason in reasons if reason.code != "not_installed"), reasons[0])


def require(backend: str, found: Found | Reason) -> Found:
    """Return a usable library. Raises BackendUnavailableError with the reason otherwise."""
    if isinstance(found, Found):
        return found
    raise BackendUnavailableError(f"{backend} cannot be bound", {backend: (found,)})


def forget() -> None:
    """Drop what was found, so that the next question imports again. For tests, and after an install."""
    look_up.cache_clear()


def accepts(function: Callable[..., Any], parameter: str) -> bool:
    """Tell whether a function takes a parameter by that name (a release may or may not have it)."""
    names = parameter_names(function)
    return names is None or parameter in names


def parameter_names(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the parameters of a Python function or a registered torch operator; None if it takes any keyword.

    ``inspect.signature`` of an operator (flash-attn registers its functions with ``torch.library.custom_op``) is
    ``(*args, **kwargs)``, so an operator is asked for its schema.
    """
    for overload in (function, getattr(function, "default", None), getattr(function, "_opoverload", None)):
        arguments = getattr(getattr(overload, "_schema", None), "arguments", None)
        if arguments is not None:
            return frozenset(argument.name for argument in arguments)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature cannot be asked
        return None
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def installed_version(library: Library) -> str | None:
    """Return the version of what is imported, else of what is installed, else None."""
    for name in library.version_modules:
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            return version
    for name in library.distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def matches(version: str, specifier: str) -> bool:
    """Tell whether a version, pre-releases included, is in a PEP 440 specifier; no for one that does not parse."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        # Local parts ("+cu128torch2.9") say how a wheel was built, not what it does.
        public = Version(version).public
    except InvalidVersion:
        return False
    return SpecifierSet(specifier).contains(public, prereleases=True)


def _import(name: str, library: Library) -> ModuleType | Reason:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            return Reason("not_installed", _absent(name, library))
        return Reason("broken", f"{library.label} is installed but does not import: {_text(error)}")
    except (Exception, SystemExit) as error:  # somebody else's module may raise anything, OSError of dlopen included
        return Reason("broken", f"{library.label} is installed but does not import: {_text(error)}")


def _absent(name: str, library: Library) -> str:
    """Say that a module is not there, and what stands in its place where that misleads."""
    text = f"{library.label} is not installed (no module {name})"
    root = sys.modules.get(name.partition(".")[0])
    if root is not None and hasattr(root, "__path__") and getattr(root, "__file__", None) is None:
        text += f"; {root.__name__} is only an empty namespace here, which another package brings"
    return f"{text}; {library.absent_hint}" if library.absent_hint else text


def _check(function: Function, module: ModuleType, library: Library) -> Callable[..., Any] | Reason:
    try:
        got: Callable[..., Any] = operator.attrgetter(function.name)(module)
    except AttributeError:
        if not any(not name.startswith("_") for name in vars(module)):
            text = f"{library.label}: the module {module.__name__} is empty, a placeholder and not the library"
            return Reason("placeholder", text)
        return Reason("missing_function", f"{library.label}: {module.__name__} has no {function.name}{_at(library)}")
    names = parameter_names(got)
    missing = [] if names is None else [name for name in function.parameters if name not in names]
    if missing:
        text = f"{library.label}: {function.name} has no parameter {', '.join(missing)}{_at(library)}"
        return Reason("missing_parameter", text)
    return got


def _at(library: Library) -> str:
    version = installed_version(library)
    wanted = f"; this adapter is written for {library.versions}" if library.versions else ""
    return (f" (version {version} is installed{wanted})") if version else ""


def _text(error: BaseException) -> str:
    """Return the first line and the kind of an error; the loader's message names the symbol or the GLIBC it lacks."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
