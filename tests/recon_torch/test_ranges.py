"""Ranges of settings and flags: what is in them, what an error says, and that no number goes without one."""

from __future__ import annotations

import argparse
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pytest

from recon_torch import ranges
from recon_torch.errors import CommandParser, UserError
from recon_torch.ranges import Flag, Range, Seed, settings

Number = Annotated[float, Range(above=0, most=1)]
Whole = Annotated[int, Range(1, 5)]


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Plain:
    """A dataclass whose fields state no ranges."""

    count: int = 1


@settings
class Inner:
    count: Whole = 1


@settings
class Outer:
    share: Number = 0.5
    shares: Number | tuple[Number, ...] = 0.5
    steps: tuple[Whole, ...] = (1,)
    limit: Whole | None = None
    colour: Colour | str = Colour.RED
    name: str = ""
    flag: bool = False
    inner: Inner = Inner()
    by_name: Mapping[str, Inner] | None = None


INSIDE = {
    Range(1, 3): [1, 2, 3, 1.5],
    Range(above=1, most=3): [1.001, 3],
    Range(least=1, below=3): [1, 2.999],
    Range(above=-1, below=1): [0, -0.999],
}
OUTSIDE = {
    Range(1, 3): [0, 3.001, -math.inf, math.inf, math.nan, 10**400],
    Range(above=1, most=3): [1, 3.5, math.nan],
    Range(least=1, below=3): [0.999, 3, math.inf],
    Range(above=-1, below=1): [-1, 1, math.nan],
}


@pytest.mark.parametrize("each", INSIDE, ids=str)
def test_a_range_has_its_ends_and_nothing_beyond(each):
    assert all(number in each for number in INSIDE[each])
    assert not any(number in each for number in OUTSIDE[each])


def test_a_range_is_told_in_words():
    told = [str(each) for each in INSIDE]
    assert told == ["from 1 to 3", "above 1 and at most 3", "at least 1 and below 3", "between -1 and 1"]
    assert str(Range(0.05, 1e6)) == "from 0.05 to 1000000" and str(Range(0, 1e12)) == "from 0 to 1e+12"


@pytest.mark.parametrize("ends", [{}, {"least": 1}, {"most": 1}, {"least": 1, "above": 0, "most": 2}])
def test_a_range_has_two_ends(ends):
    with pytest.raises(TypeError, match="one lower and one upper end"):
        Range(**ends)


def test_good_values_are_held_in_their_types():
    made = Outer(share=np.float32(0.25), shares=[1, 0.5], steps=[np.int64(3)], colour="blue", limit=5)
    assert made == Outer(share=0.25, shares=(1.0, 0.5), steps=(3,), colour=Colour.BLUE, limit=5)
    assert type(made.share) is float and made.colour is Colour.BLUE and type(made.steps[0]) is int


WRONG = [
    ("share", 0, "share is 0; give a number above 0 and at most 1"),
    ("share", math.nan, "share is nan; give a number above"),
    ("share", True, "share is True"),
    ("share", "0.5", "share is '0.5'"),
    ("shares", (0.5, 2), r"shares is \(0.5, 2\); give a number .*, or a tuple, each of it a number above 0"),
    ("steps", (1, 6), r"steps is \(1, 6\); give a tuple, each of it a whole number from 1 to 5"),
    ("steps", 3, "steps is 3; give a tuple"),
    ("steps", (1.0,), r"steps is \(1.0,\)"),
    ("limit", 6, "limit is 6; give a whole number from 1 to 5, or None"),
    ("limit", 10**400, r"limit is 1000.*\.\.\.; give a whole number"),
    ("colour", "green", "colour is 'green'; give one of red, blue"),
    ("colour", 1, "colour is 1; give one of red, blue"),
    ("name", "a\0b", "name is 'a.*b'; give text"),
    ("name", None, "name is None; give text"),
    ("flag", 1, "flag is 1; give True or False"),
    ("inner", {"count": 1}, "inner is {'count': 1}; give a section"),
]


@pytest.mark.parametrize("field, value, message", WRONG)
def test_a_wrong_value_is_named_with_its_field_and_range(field, value, message, user_error):
    with user_error(f"^{message}"):
        Outer(**{field: value})


def test_what_an_error_quotes_is_short(user_error):
    with user_error(r"^name is .{80}\.\.\.; give text$"):
        Outer(name="\0" * 100_000)


@pytest.mark.parametrize(
    "hint, bare",
    [
        (int, "int"),
        (float | None, "float"),
        (tuple[int, ...], "int"),
        (Annotated[int, "a comment"], "int"),
        (Any, "Any"),
        (Mapping[str, float], "float"),
        (Sequence[Whole | float], "float"),
        (dict, "dict"),
        (Plain, "Plain"),
    ],
)
def test_a_field_without_a_range_is_an_error_when_its_class_is_defined(hint, bare):
    with pytest.raises(TypeError, match=f"Loose.field states no range of its {bare}"):
        settings(type("Loose", (), {"__annotations__": {"field": hint}}))
    with pytest.raises(TypeError, match="states no range"):
        Flag(hint)


def test_a_class_may_check_more_than_ranges(user_error):
    def check(self):
        if self.most < self.least:
            raise UserError("most is below least")

    fields = {"__annotations__": {"least": Whole, "most": Whole}, "least": 1, "most": 5}
    pair = settings(type("Pair", (), fields | {"__post_init__": check}))
    with user_error("most is below least"):
        pair(least=3, most=2)
    with user_error("least is 9"):  # the ranges come first
        pair(least=9, most=2)


def test_arguments_of_a_function_are_checked_where_they_say_what_they_take(user_error):
    def function(count: Whole, other, anything: Mapping[str, Any], plain: int = 0):
        pass

    ranges.check_arguments(function, {"count": 5, "other": math.nan, "anything": 3}, "config.part")
    with user_error("config.part.count is 6; give a whole number from 1 to 5"):
        ranges.check_arguments(function, {"count": 6}, "config.part")
    with user_error("config.part.plain is 0.5; give a whole number"):
        ranges.check_arguments(function, {"plain": 0.5}, "config.part")


def test_a_flag_takes_what_is_in_its_range(user_error):
    parser = CommandParser("probe", "for this test")
    parser.add_argument("--seed", type=Flag(Seed), default=0, help="of it all")
    parser.add_argument("--share", type=ranges.real(above=0, most=1), help="%(default)s")
    flags = parser.parse_args(["--seed", "7", "--share=1e-3"])
    assert (flags.seed, flags.share) == (7, 1e-3)
    for text in ("-1", "2147483648", "1e3", "nan", "x", "9" * 5000):
        with user_error(
            r"--seed: '.{,80}'?(\.\.\.)? is not a whole number from 0 to 2147483647; see `im3d probe"
        ):
            parser.parse_args([f"--seed={text}"])
    assert "of it all; a whole number from 0 to 2147483647" in " ".join(parser.format_help().split())
    assert isinstance(parser.parse_args([]), argparse.Namespace)
