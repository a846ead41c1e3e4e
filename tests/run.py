"""Run the tests in two processes side by side: ``python tests/run.py [arguments of pytest]``.

Three groups; tests/conftest.py says which test is in which. While the others run, first the kernels that Triton
compiles for GPUs that are not here, then those that it interprets on the CPU: TRITON_INTERPRET=1 holds for a whole
process, because Triton decides when kernels are decorated. Every group gets all the arguments and may find nothing to
do. The two groups behind report when the others have finished. The exit code is the worst one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import IO

PASSED, NOTHING_COLLECTED = 0, 5  # pytest.ExitCode
FRONT = "others"
BEHIND = {"compiled": "Triton kernels, compiled:", "interpreted": "Triton kernels, interpreted (TRITON_INTERPRET=1):"}


class Behind(threading.Thread):
    """Run groups one after another, each into a file of its own."""

    def __init__(self, arguments: Sequence[str], files: dict[str, IO[bytes]]) -> None:
        super().__init__(daemon=True)
        self.arguments, self.files = arguments, files
        self.codes: list[int] = []
        self._running: subprocess.Popen[bytes] | None = None
        self._lock, self._stopped = threading.Lock(), False

    def run(self) -> None:
        """Run the groups; the codes are complete once the thread has ended."""
        # Caches of their own: --lf and --ff of one group would forget the failures of another.
        for group, file in self.files.items():
            own = [*self.arguments, "-o", f"cache_dir={os.path.join('.pytest_cache', group)}"]
            if sys.stdout.isatty():
                own.append("--color=yes")
            with self._lock:
                if self._stopped:
                    return
                self._running = subprocess.Popen(
                    command(own), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environ(group)
                )
            self.codes.append(self._running.wait())

    def stop(self) -> None:
        """End what Ctrl-C has left."""
        with self._lock:
            self._stopped = True
            if self._running is not None:
                self._running.terminate()
        self.join()


def main(arguments: Sequence[str]) -> int:
    """Return pytest's exit code for all groups together."""
    files = {group: tempfile.TemporaryFile() for group in BEHIND}  # noqa: SIM115 - closed with the process
    behind = Behind(arguments, files)
    behind.start()
    try:
        front = subprocess.run(command(arguments), env=environ(FRONT), check=False).returncode
        behind.join()
    finally:
        behind.stop()
        for group, file in files.items():
            file.seek(0)
            sys.stdout.write(f"\n{BEHIND[group]}\n")
            sys.stdout.flush()
            sys.stdout.buffer.write(file.read())
            sys.stdout.flush()
    return combined(front, *behind.codes)


def command(arguments: Sequence[str]) -> list[str]:
    """Return the command line of one group."""
    return [sys.executable, "-m", "pytest", *arguments]


def environ(group: str) -> dict[str, str]:
    """Return the environment of one group."""
    return {**os.environ, "TEST_GROUP": group, "TRITON_INTERPRET": str(int(group == "interpreted"))}


def combined(*codes: int) -> int:
    """Return the exit code for several processes: nothing collected counts only if it is so in all of them."""
    told = [abs(code) for code in codes if code != NOTHING_COLLECTED]
    return max(told) if told else NOTHING_COLLECTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
