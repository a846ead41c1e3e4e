"""Run the tests in two processes side by side: ``python tests/run.py [arguments of pytest]``.

Triton decides for a whole process whether it interprets kernels on the CPU or compiles them, when they are decorated.
So tests/interpreted runs with TRITON_INTERPRET=1 and everything else without; both get all the arguments, and either
may find nothing to do. The interpreted tests report when the others have finished. The exit code is the worse one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

PASSED, NOTHING_COLLECTED = 0, 5  # pytest.ExitCode


def main(arguments: Sequence[str]) -> int:
    """Return pytest's exit code for both processes together."""
    command = [sys.executable, "-m", "pytest", *arguments]
    # A cache of its own: --lf and --ff of the one would forget the failures of the other.
    own = [*command, "-o", f"cache_dir={os.path.join('.pytest_cache', 'interpreted')}"]
    if sys.stdout.isatty():
        own.append("--color=yes")
    with tempfile.TemporaryFile() as output:
        interpreted = subprocess.Popen(
            own, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=_environ("1")
        )
        try:
            plain = subprocess.run(command, env=_environ("0"), check=False).returncode
            both = (plain, interpreted.wait())
        finally:
            interpreted.terminate()  # what Ctrl-C has left
            interpreted.wait()
            output.seek(0)
            sys.stdout.write("\nTriton kernels, interpreted (TRITON_INTERPRET=1):\n")
            sys.stdout.flush()
            sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    return combined(*both)


def combined(*codes: int) -> int:
    """Return the exit code for several processes: nothing collected counts only if it is so in all of them."""
    told = [abs(code) for code in codes if code != NOTHING_COLLECTED]
    return max(told) if told else NOTHING_COLLECTED


def _environ(interpret: str) -> dict[str, str]:
    return {**os.environ, "TRITON_INTERPRET": interpret}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
