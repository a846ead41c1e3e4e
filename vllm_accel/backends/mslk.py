"""The backend `mslk`: the home of xFormers' attention since 2026, see `fmha` for everything."""

from __future__ import annotations

from vllm_accel.backends.fmha import FmhaBackend, library

LIBRARY = library(
    "MSLK",
    "mslk.attention.fmha",
    versions=">=1.0,<2",
    version_modules=("mslk",),
    distributions=("mslk-cuda", "mslk"),
    absent_hint="pip install mslk-cuda, in the release made for this torch",
)

BACKEND = FmhaBackend("mslk", LIBRARY)
