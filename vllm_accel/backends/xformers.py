"""The backend `xformers`: attention of the package of that name, see `fmha` for everything."""

from __future__ import annotations

from vllm_accel.backends.fmha import FmhaBackend, library

LIBRARY = library(
    "xFormers",
    "xformers.ops.fmha",
    # 0.0.28 is the first whose operators say how their log-sum-exp is laid out.
    versions=">=0.0.28,<0.1",
    version_modules=("xformers",),
    distributions=("xformers",),
    absent_hint="pip install xformers, in the release made for this torch",
)

BACKEND = FmhaBackend("xformers", LIBRARY)
