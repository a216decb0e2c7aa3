"""A program that is run here as Python would run it, and watched while it trains."""

import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from gradclip.torch.ledger import Ledger
from gradclip.torch.observing import Enough, observing


class Ended(NamedTuple):
    """How the script came to its end."""

    how: str
    error: BaseException | None = None


class Program(NamedTuple):
    """What is run: a file, or a module by the name that `python -m` takes."""

    name: str
    is_module: bool = False

    def placed(self) -> "Program":
        """Name a file by its whole path, since a script may change its folder."""
        return self if self.is_module else Program(str(Path(self.name).resolve()))

    def folder(self) -> Path:
        """Return where Python looks first for what the program imports."""
        return Path.cwd() if self.is_module else Path(self.name).parent

    def run(self) -> None:
        """Run it as Python does."""
        if self.is_module:
            runpy.run_module(self.name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(self.name, run_name="__main__")


def examine(
    program: Program, arguments: Sequence[str], steps: int
) -> tuple[Ledger, Ended]:
    """Run a program as Python would, until one optimizer has made so many steps.

    Args:
        program: The file, or the module.
        arguments: What it finds in `sys.argv`.
        steps: How many steps are watched.

    Returns:
        What was seen, and how it ended.
    """
    ledger, program = Ledger(), program.placed()
    folder = program.folder()
    with started_as(program, arguments), observing(ledger, steps, folder):
        try:
            program.run()
        except Enough:
            return ledger, Ended(f"was ended after step {steps}")
        except SystemExit as error:
            if error.code not in (None, 0):
                return ledger, Ended(f"exited with {error.code}", error)
        except KeyboardInterrupt as error:
            return ledger, Ended("was interrupted", error)
        except Exception as error:
            return ledger, Ended(f"failed with {type(error).__name__}", error)
    return ledger, Ended("ran to its end")


@contextmanager
def started_as(program: Program, arguments: Sequence[str]) -> Iterator[None]:
    """Let a program find the arguments and the import path that Python gives it."""
    before = sys.argv, sys.path[:]
    sys.argv = [program.name, *arguments]
    # run_path adds a folder or an archive to the path, but not that of a plain file.
    sys.path.insert(0, str(program.folder()))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before


def output_apart() -> TextIO:
    """Return the output, to which nobody else in this process writes from now on.

    What a program prints goes to the errors: also what it prints when Python ends,
    and what other processes and libraries print that it starts and calls.
    """
    sys.stdout.flush()
    apart = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return apart


def without_us(error: BaseException) -> BaseException:
    """Return an error whose traceback begins in the program, if it gets there."""
    ours = __file__, runpy.run_path.__code__.co_filename, "<frozen importlib"
    here = error.__traceback__
    while here and here.tb_frame.f_code.co_filename.startswith(ours):
        here = here.tb_next
    return error.with_traceback(here)
