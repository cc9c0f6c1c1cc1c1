"""What a user can cause and mend, as one exception, and a command-line parser that speaks it."""

from __future__ import annotations

import argparse
from typing import NoReturn


class UserError(ValueError):
    """A mistake in the input or the set-up, not a bug.

    The message is one line that says what is wrong, where, and what to do. The command line prints that line
    alone and exits with code 2; every other exception keeps its traceback.
    """


class NoGaussiansLeft(UserError):
    """A fit whose pruning has taken every Gaussian."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser for one command: no abbreviations; a wrong flag is a `UserError`, not a usage."""

    def __init__(self, command: str, description: str) -> None:
        # Raw, because examples keep their lines.
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"im3d {command}", description=description, allow_abbrev=False, formatter_class=formatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")
