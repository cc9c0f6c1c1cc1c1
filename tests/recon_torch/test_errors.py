"""Errors in one line."""

import enum
from pathlib import Path

import pytest

from recon_torch.errors import CommandParser, UserError, choice, first_line


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one line"), "one line"),
        (RuntimeError("\nfirst\nsecond"), "first"),
        (KeyError(), "KeyError"),
        (OSError("  \n "), "OSError"),
    ],
)
def test_first_line_of_an_error(error, expected):
    assert first_line(error) == expected


def test_first_line_is_cut_at_its_limit():
    assert first_line(ValueError("a long message"), 6) == "a long"


def test_a_choice_is_made_by_value():
    assert choice(Colour, "red", "--colour") is Colour.RED
    assert choice(Colour, Colour.BLUE, "--colour") is Colour.BLUE


def test_a_wrong_choice_is_refused_with_all_choices():
    with pytest.raises(UserError, match="--colour is 'green'; choose one of red, blue"):
        choice(Colour, "green", "--colour")


def test_a_wrong_flag_is_a_users_error():
    parser = CommandParser("fit", "Fits things.")
    with pytest.raises(UserError, match="unrecognized arguments: --nonsense; see `im3d fit --help`"):
        parser.parse_args(["--nonsense"])


@pytest.mark.parametrize("value", ["A" * 5000, "a b " * 5000])
def test_a_message_that_repeats_a_long_value_is_shortened(value):
    told = str(UserError(f"/where/it/is.json: fl_x is {value!r}; give a number"))
    assert len(told) <= 603 and told.startswith("/where/it/is.json: fl_x is ")
    assert told.endswith("give a number") and "..." in told


def test_paths_are_not_shortened():
    path = "/".join(["folder"] * 40)
    assert str(UserError(f"{path}: no")) == f"{path}: no"


def test_an_empty_path_is_refused_where_the_working_directory_would_stand_for_it():
    parser = CommandParser("probe", "for this test")
    parser.add_argument_group("output").add_argument("--out", type=Path)
    assert parser.parse_args(["--out", "."]).out == Path(".")
    for argv in (["--out", ""], ["--out="]):
        with pytest.raises(UserError, match="argument --out: the path is empty"):
            parser.parse_args(argv)
