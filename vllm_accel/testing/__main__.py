"""``python -m vllm_accel.testing``: hold the backends of this machine against the oracle, on any device."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_accel.dispatch import device as devices
from vllm_accel.dispatch import registry
from vllm_accel.testing.cases import CASES, Case
from vllm_accel.testing.cases_paged import PAGED_CASES
from vllm_accel.testing.conformance import check_backend
from vllm_accel.testing.conformance_paged import check_paged_backend

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def main(argv: Sequence[str] | None = None) -> int:
    """Run every conformance case on the chosen backends and report; exit status 1 if anything failed.

    Raises:
        SystemExit: from argparse, for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m vllm_accel.testing", description=__doc__)
    parser.add_argument("--where", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--backends", default="", help="names, comma separated; default: all that are available")
    parser.add_argument("--dtypes", default="bf16,fp16,fp32", help=f"of {', '.join(_DTYPES)}")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the results here")
    given = parser.parse_args(argv)
    dtypes = given.dtypes.split(",")
    if unknown := [name for name in dtypes if name not in _DTYPES]:
        parser.error(f"--dtypes {given.dtypes}: {unknown[0]!r} is not one of {', '.join(_DTYPES)}")
    if not any(given.cases in _label(case) for case in (*CASES, *PAGED_CASES)):
        parser.error(f"--cases {given.cases}: no case has that in its name")
    try:
        where = torch.device(given.where)
        torch.empty(1, device=where)
        named = given.backends.split(",") if given.backends else ()
        names = registry.resolve("attention", named) if named else registry.names("attention")
    except (ValueError, RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        parser.error(str(error))
    results = [row for name in names for row in _run(name, where, dtypes, given.cases)]
    if given.json:
        given.json.write_text(json.dumps({"about": _about(where), "results": results}, indent=1) + "\n")
    failed = [row for row in results if row["outcome"] == "failed"]
    for row in failed:
        sys.stdout.write(f"FAILED {row['backend']} {row['case']} {row['dtype']}: {row['detail']}\n")
    sys.stdout.write(f"{len(results) - len(failed)} passed, {len(failed)} failed\n")
    return 1 if failed else 0


def _run(name: str, where: torch.device, dtypes: list[str], only: str) -> list[dict[str, str]]:
    backend = registry.get("attention", name)
    missing = backend.unavailable_reason()
    if missing is not None:
        sys.stdout.write(f"{name}: not available: {missing.text}\n")
        return [{"backend": name, "case": "", "dtype": "", "outcome": "unavailable", "detail": missing.text}]
    rows = []
    for dtype in dtypes:
        counts = {"ran": 0, "refused": 0, "failed": 0}
        every: tuple[Any, ...] = (*CASES, *PAGED_CASES)
        for case in every:
            label = _label(case)
            if only not in label:
                continue
            outcome, detail = _check(backend, case, _DTYPES[dtype], where)
            counts[outcome] += 1
            rows.append({"backend": name, "case": label, "dtype": dtype, "outcome": outcome, "detail": detail})
        summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        sys.stdout.write(f"{name} {backend.version()} {dtype}: {summary}\n")
        sys.stdout.flush()
    return rows


def _label(case: Any) -> str:
    return str(case.name) if isinstance(case, Case) else f"paged_{case.name}"


def _check(backend: Any, case: Any, dtype: torch.dtype, where: torch.device) -> tuple[str, str]:
    check: Any = check_backend if isinstance(case, Case) else check_paged_backend
    try:
        outcome = check(backend, case, dtype=dtype, where=where)
    except Exception as error:  # a backend may raise anything, and the next case still counts
        return "failed", f"{type(error).__name__}: {error}"[:600]
    return ("ran", "") if outcome.ran else ("refused", "; ".join(reason.text for reason in outcome.reasons))


def _about(where: torch.device) -> dict[str, str]:
    return {
        "device": str(devices.detect(where)),
        "cpu": devices.cpu_name(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        # A file by its name: its folder is this machine's.
        "command": " ".join(
            [
                "python -m vllm_accel.testing",
                *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]),
            ]
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
