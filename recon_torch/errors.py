"""Errors that a user can cause and mend, and what turns wrong input into their one line."""

from __future__ import annotations

import argparse
import difflib
import enum
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn, TypeVar

E = TypeVar("E", bound=enum.StrEnum)
QUOTED_CHARACTERS = 80  # how much of a wrong value a message shows
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
LONGEST_WORD = re.compile(r"\S{300,}")  # longer than any name of a file may be
MESSAGE_CHARACTERS = 600


class UserError(ValueError):
    """A mistake in the input or the set-up, not a bug.

    The message is one line that says what is wrong, where, and what to do. The command line prints that line
    alone and exits with code 2; every other exception keeps its traceback. Whatever a message repeats of a
    user's input, it stays one line that can be read: its longest words are shortened, and then the message.
    """

    def __init__(self, message: object = "") -> None:
        words = LONGEST_WORD.sub(lambda word: _ends(word.group(), 160), str(message))
        super().__init__(_ends(words, MESSAGE_CHARACTERS))


def _ends(text: str, limit: int) -> str:
    """The beginning and the end of a text that is longer than this."""
    return text if len(text) <= limit else f"{text[: limit * 3 // 4]}...{text[-limit // 4 :]}"


class NoGaussiansLeft(UserError):
    """The pruning of a fit has removed every Gaussian."""


def first_line(error: BaseException, limit: int | None = None) -> str:
    """The first line of an error's message, or the name of its type where it has no message.

    Errors of other libraries run over many lines; this is the part that fits into a line of ours.

    Args:
        limit: the most characters to return. Default: all of them.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:limit]


def quoted(value: object, limit: int = QUOTED_CHARACTERS) -> str:
    """A value as a message shows it: its repr, of which so many characters are kept."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def near(name: str, names: Iterable[str]) -> str:
    """A hint at the name that somebody may have meant, as the end of a message; "" if none is like it."""
    by_lower = {each.lower(): each for each in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.75)
    return f"; is it {quoted(by_lower[found[0]])}?" if found else ""


def is_url(text: str) -> bool:
    """Whether a text names an object in a store, as s3://BUCKET/NAME does, and no path of this machine."""
    return bool(URL.match(text))


def choice(choices: type[E], value: str, name: str) -> E:
    """The member of an enum that a string from a config or a flag stands for.

    Args:
        name: what the user set, for the error.

    Raises:
        UserError: no member has this value; the message lists those that there are.
    """
    try:
        return choices(value)
    except ValueError:
        raise UserError(f"{name} is {str(value)!r}; choose one of {', '.join(choices)}") from None


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples, and adds to a flag's help what its type says that it takes."""

    def _get_help_string(self, action: argparse.Action) -> str:
        takes = getattr(action.type, "takes", "")
        return f"{action.help}; {takes}" if takes else str(action.help)


def _path(text: str) -> Path:
    """A path on the command line.

    An empty one would stand for the working directory, which nobody named, and a URL for a folder "s3:".
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; is a variable of your shell not set?")
    if is_url(text):
        raise argparse.ArgumentTypeError(
            f"{text} is a URL, and this is a path of this machine; URLs are taken by `im3d batch` alone"
        )
    return Path(text)


class CommandParser(argparse.ArgumentParser):
    """The argument parser of one command: takes no abbreviations, raises UserError for a wrong flag."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"im3d {command}", description=description, allow_abbrev=False, formatter_class=HelpFormatter
        )
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")
