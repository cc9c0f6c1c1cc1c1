"""Python code of the user that runs here: config files, and the modules that a config names.

A mistake in it is reported in one line, with the file and the line of code in which it is.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from recon_torch.errors import UserError, first_line

IsTheirs = Callable[[Path], bool]
"""Whether a file is the user's, and not a library's."""


@contextmanager
def mistakes_in_one_line(before: str, code: str, is_theirs: IsTheirs, advice: str) -> Iterator[None]:
    """Turns whatever the user's code raises within this context into a UserError of one line.

    The error that was raised is its cause, so that a caller in Python sees both tracebacks.

    Args:
        before: the beginning of the line.
        code: what stands for the place of an error that no line of the user's has raised.
        is_theirs: tells the user's files; the innermost line in one of them is the place of an error.
        advice: the end of the line, which says what to do.
    """
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}" if error.filename else code
        raise UserError(f"{before}{place}: {error.msg}; {advice}") from error
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        message = f"{place_of(error, code, is_theirs)}: {kind}: {_message(error)}; {advice}"
        raise UserError(f"{before}{message}") from error


def place_of(error: BaseException, code: str, is_theirs: IsTheirs) -> str:
    """The innermost line of the user's files at which an error was raised; `code` if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if is_theirs(Path(frame.filename).resolve())]
    return f"{theirs[-1].filename}, line {theirs[-1].lineno}" if theirs else code


def _message(error: BaseException) -> str:
    """The first line of an error; of ml_collections, whose message may be no more than the missing key."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else first_line(error)
    while len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    text = text.splitlines()[0].split(" Other fields present")[0] if text else type(error).__name__
    is_key = isinstance(error, AttributeError | KeyError) and text.isidentifier()
    return f"the config has no key {text!r}" if is_key else text
