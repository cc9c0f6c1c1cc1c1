"""The ranges of settings and of flags: stated beside the defaults, and checked before anything is loaded.

    @settings
    class TurntableSettings:
        num_frames: Annotated[int, Range(1, 10_000)] = 48
        fill: Annotated[float, Range(above=0, most=1)] = 0.7

    parser.add_argument("--seed", type=Flag(Seed), default=0)

A settings class with a number that has no range is an error when it is defined. Making one with a value that
is out of its range raises UserError with the field, its value and the range. Infinity and NaN are in no
range.
"""

from __future__ import annotations

import argparse
import enum
import numbers
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, TypeVar

from recon_torch.errors import UserError, quoted

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Finite numbers: from `least` or above `above`, to `most` or below `below`. One of each is given."""

    least: float | int | None = None
    most: float | int | None = None
    above: float | int | None = None
    below: float | int | None = None

    def __post_init__(self) -> None:
        if (self.least is None) == (self.above is None) or (self.most is None) == (self.below is None):
            raise TypeError(f"{self!r} needs one lower and one upper end")

    def __contains__(self, number: Any) -> bool:
        # Comparisons with NaN are false.
        low = self.least <= number if self.least is not None else self.above is None or self.above < number
        high = number <= self.most if self.most is not None else self.below is None or number < self.below
        return bool(low and high)

    def __str__(self) -> str:
        """Such as "from 1 to 100", or "above 0 and at most 1"."""
        low = _short(self.above if self.least is None else self.least)
        high = _short(self.below if self.most is None else self.most)
        if self.above is not None and self.below is not None:
            return f"between {low} and {high}"
        if self.least is not None and self.most is not None:
            return f"from {low} to {high}"
        at_low, at_high = self.least is not None, self.most is not None
        return f"{'at least' if at_low else 'above'} {low} and {'at most' if at_high else 'below'} {high}"


def _short(end: float | int | None) -> str:
    assert end is not None
    return f"{end:.0f}" if end == round(end) and abs(end) < 1e10 else f"{end:g}"


LOOPBACK = "127.0.0.1"
"""Where servers listen unless they are told otherwise: on this machine alone."""

MAX_SEED = 2**31 - 1
"""Seeds that count up from here stay below 2^32, from where on JAX takes the remainder."""

Seed = Annotated[int, Range(0, MAX_SEED)]

Pixels = Annotated[int, Range(8, 4096)]
NumViews = Annotated[int, Range(1, 1024)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(above=0, most=1e6)]
Weight = Annotated[float, Range(0, 1e6)]
Steps = Annotated[int, Range(1, 1_000_000)]
Count = Annotated[int, Range(0, 1_000_000_000)]
Every = Annotated[int, Range(1, 1_000_000_000)]
ElevationDeg = Annotated[float, Range(above=-90, below=90)]
AzimuthDeg = Annotated[float, Range(-360, 360)]
FovDeg = Annotated[float, Range(1, 170)]
NumAssets = Annotated[int, Range(1, 100_000)]
NumRetries = Annotated[int, Range(0, 1000)]
Port = Annotated[int, Range(0, 65535)]
BatchSize = Annotated[int, Range(1, 1_000_000)]


# ---- Classes of settings ----


@typing.dataclass_transform(frozen_default=True)
def settings(kind: type[T]) -> type[T]:
    """Makes a frozen dataclass that checks its fields when it is made, before its own `__post_init__`.

    Strings become members of the enums that they name, and lists become tuples.

    Raises TypeError for a field that states no range.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    for name, hint in hints.items():
        if bare := next(unlimited(hint), None):
            raise TypeError(f"{kind.__name__}.{name} states no range of its {bare}")
    own = kind.__dict__.get("__post_init__")

    def check(self: Any) -> None:
        for name, hint in hints.items():
            object.__setattr__(self, name, taken(getattr(self, name), hint, name))
        if own:
            own(self)

    kind.__post_init__ = check  # type: ignore[attr-defined]
    kind.__ranges__ = hints  # type: ignore[attr-defined]
    return dataclass(frozen=True)(kind)


def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of a settings class by the names of its fields, ranges included."""
    return kind.__ranges__  # type: ignore[attr-defined]


def section_of(hint: Any) -> type | None:
    """The settings class that an annotation stands for, alone or besides None; else None."""
    found = [each for each in _alternatives(hint) if hasattr(each, "__ranges__")]
    return found[0] if found else None


def sections_by_name(hint: Any) -> type | None:
    """The settings class of an annotation `Mapping[str, ...]`, alone or besides None; else None."""
    maps = [each for each in _alternatives(hint) if typing.get_origin(each) is Mapping]
    return section_of(typing.get_args(maps[0])[1]) if maps else None


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def unlimited(hint: Any) -> Iterator[str]:
    """The names of the types within an annotation whose values could be anything, such as "int"."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        base, *metadata = typing.get_args(hint)
        if not any(isinstance(each, Range) for each in metadata):
            yield from unlimited(base)
    elif origin is not None:
        for each in typing.get_args(hint):
            if each is not ...:
                yield from unlimited(each)
    elif not _is_limited(hint):
        yield getattr(hint, "__name__", str(hint))


def _is_limited(hint: Any) -> bool:
    """Whether a plain type has no values that a range would exclude."""
    return hint in (str, bool, types.NoneType) or _is_enum(hint) or hasattr(hint, "__ranges__")


# ---- Values ----


def taken(value: Any, hint: Any, name: str) -> Any:
    """The value as an annotated type holds it. Raises UserError with name, value and range if it does not."""
    fitting, made = _fit(value, hint)
    if not fitting:
        raise UserError(f"{name} is {quoted(value)}; give {told(hint)}")
    return made


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], section: str) -> None:
    """Raises UserError for the first argument that is not of its parameter's type, or out of its range.

    Types that are not numbers, text, enums, or sequences and unions of these are left to the function, and
    so are parameters that say no type.

    section: what errors call the arguments together.
    """
    hints = arguments_of(function)
    for name, value in arguments.items():
        if name in hints and _is_plain(hints[name]):
            taken(value, hints[name], f"{section}.{name}")


def arguments_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of what a function takes, or of the arguments of a class, ranges included."""
    is_class = isinstance(function, type)
    annotated: Any = function.__init__ if is_class and not is_dataclass(function) else function
    try:
        return typing.get_type_hints(annotated, include_extras=True)
    except (NameError, TypeError, AttributeError):  # of a user's code, which need not be importable names
        return {}


def _is_plain(hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _is_plain(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType, tuple, list, Sequence):
        return all(each is ... or _is_plain(each) for each in typing.get_args(hint))
    return hint in (int, float, str, bool, types.NoneType) or _is_enum(hint)


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """(whether a value is of an annotated type, the value as that type). An int will do for a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        fitting, made = _fit(value, arguments[0])
        return fitting and all(made in each for each in arguments[1:] if isinstance(each, Range)), made
    if origin in (typing.Union, types.UnionType):
        # An enum comes before the plain string that stands for it.
        enums = [each for each in arguments if _is_enum(each)]
        options = enums + [each for each in arguments if each is not str or not enums]
        return next((found for found in (_fit(value, each) for each in options) if found[0]), (False, value))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        if not isinstance(value, list | tuple):
            return False, value
        found = [_fit(each, arguments[0]) for each in value]
        return all(fitting for fitting, _ in found), tuple(made for _, made in found)
    return _fit_plain(value, hint)


def _fit_plain(value: Any, hint: Any) -> tuple[bool, Any]:
    if _is_enum(hint):
        return (True, hint(value)) if isinstance(value, str) and value in list(hint) else (False, value)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        fitting = isinstance(value, kind) and not isinstance(value, bool)
        return fitting, _number(value, hint) if fitting else value
    if hint is str:
        return isinstance(value, str) and "\0" not in value, value
    if hint is Any or not isinstance(hint, type):
        return True, value
    return isinstance(value, hint), value


def _number(value: Any, kind: type) -> Any:
    """The number as a plain int or float; as it is where it is too large for a float."""
    try:
        return kind(value)
    except OverflowError:
        return value


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.StrEnum)


def told(hint: Any) -> str:
    """What an annotated type takes, in words, such as "a whole number from 1 to 100"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [str(each) for each in arguments[1:] if isinstance(each, Range)]
        return " ".join([told(arguments[0]), *ranges])
    if origin in (typing.Union, types.UnionType):
        has_enum = any(_is_enum(each) for each in arguments)
        parts = [told(each) for each in arguments if each is not str or not has_enum]
        return ", or ".join(parts)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "sections by name"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a tuple, each of it {told(arguments[0])}"
    if _is_enum(hint):
        return f"one of {', '.join(str(each) or repr('') for each in hint)}"
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    words |= {types.NoneType: "None"}
    if hint in words:
        return words[hint]
    return "a section" if hasattr(hint, "__ranges__") else getattr(hint, "__name__", str(hint))


# ---- Flags ----


@dataclass(frozen=True)
class Flag:
    """The `type` of a flag of a command that takes a number: a callable for `add_argument`.

    Attributes:
        hint: what it takes, `Annotated[int, Range(...)]` or a float; besides None, a flag may be left out.
    """

    hint: Any

    def __post_init__(self) -> None:
        if next(unlimited(self.hint), None):
            raise TypeError(f"{self.hint} states no range")

    def __call__(self, text: str) -> Any:
        kind = typing.get_args(self.hint)[0]
        try:
            number = kind(text)
        except ValueError:
            number = text
        if not _fit(number, self.hint)[0]:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not {self.takes}")
        return number

    @property
    def takes(self) -> str:
        """What `--help` says of it."""
        return told(self.hint)


def whole(least: int, most: int) -> Flag:
    """The `type` of a flag that takes whole numbers from `least` to `most`."""
    return Flag(Annotated[int, Range(least, most)])


def real(*ends: float | int, **named_ends: float | int) -> Flag:
    """The `type` of a flag that takes numbers of a `Range` with these ends."""
    return Flag(Annotated[float, Range(*ends, **named_ends)])
