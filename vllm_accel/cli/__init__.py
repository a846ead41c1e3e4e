"""The program ``vllm-accel``: explain a choice, examine a machine, recommend what to install, measure backends."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

OK, WRONG_USE = 0, 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes ``-1,0`` as a value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Python before 3.13 takes only a lone negative number as a value, so `--window -1,0` looked like an option.
        self._negative_number_matcher = re.compile(r"^-\d[\d.,-]*$")

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with exit code 2."""
        self.exit(WRONG_USE, f"{self.prog}: {message}\n")


def build_parser() -> Parser:
    """Return the parser of the whole program; every command stores the function that runs it as ``run``."""
    from vllm_accel import __version__
    from vllm_accel.cli import doctor, explain, recommend, tune

    parser = Parser(prog="vllm-accel", description=__doc__)
    parser.add_argument("--version", action="version", version=f"vllm-accel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, module in (("explain", explain), ("doctor", doctor), ("recommend", recommend), ("tune", tune)):
        summary = str(module.__doc__).split("\n")[0]
        sub = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    Args:
        argv: the arguments after the program's name; None takes those of this process.
    """
    try:
        given = build_parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int] = given.run
        code = run(given)
        sys.stdout.flush()  # a closed pipe shows here, and not when Python leaves
        return code
    except SystemExit as leave:  # --help, --version and wrong use
        return leave.code if isinstance(leave.code, int) else OK
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
        return OK
