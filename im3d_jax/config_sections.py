"""Sections of a config as settings: what is absent, unknown or of another type is reported by its name.

A config file may set anything, so this is checked where a config is read. Overrides on the command line are
checked by `config_flags`, and the names of backbones and their like by `registry`.
"""

from __future__ import annotations

import difflib
import numbers
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from ml_collections import ConfigDict

from recon_torch.errors import UserError

T = TypeVar("T")

NAMED = ("name", "kwargs")
"""The entries of a section that names a backbone, an autoencoder or a text encoder."""


def require(config: ConfigDict, *keys: str) -> None:
    """Raises UserError for the first of these dotted keys that the config does not have."""
    for key in keys:
        place: Any = config
        for part in key.split("."):
            if not isinstance(place, ConfigDict) or part not in place:
                raise UserError(f"the config has no {key}; set it, or begin with a config that has it")
            place = place[part]


def known(config: ConfigDict, section: str, entries: Iterable[str]) -> ConfigDict:
    """The section `section`. Raises UserError if it is none, or has an entry that is not among `entries`."""
    require(config, section)
    values, entries = config[section], list(entries)
    if not isinstance(values, ConfigDict):
        raise UserError(f"config.{section} is {values!r}; it has to be a section with {', '.join(entries)}")
    for entry in values:
        if entry not in entries:
            [near] = difflib.get_close_matches(entry, entries, n=1, cutoff=0.0)
            raise UserError(f"config.{section} has an unknown entry {entry!r}; the nearest is {near!r}")
    return values


def named(config: ConfigDict, section: str) -> tuple[str, dict[str, Any]]:
    """(name, kwargs) of a section that names one of ours or of the user's. Raises UserError as `known`."""
    values = known(config, section, NAMED)
    require(config, *(f"{section}.{entry}" for entry in NAMED))
    if not isinstance(values.kwargs, ConfigDict):
        raise UserError(f"config.{section}.kwargs is {values.kwargs!r}; give a dictionary of arguments")
    return values.name, values.kwargs.to_dict()


def settings(config: ConfigDict, section: str, kind: type[T]) -> T:
    """The settings of a section, `kind(**section)`; an entry that the section lacks has its default.

    kind: a dataclass whose annotations are numbers, strings, enums, tuples of these, or unions.

    Raises UserError for an unknown entry, for a value of another type, and where `kind` does.
    """
    hints = typing.get_type_hints(kind)
    values = known(config, section, hints)
    for entry, value in values.items():
        if not _fits(value, hints[entry]):
            raise UserError(f"config.{section}.{entry} is {value!r}; it takes {_told(hints[entry])}")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"config.{section}: {error}") from None


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of an annotated type. As in Python, an int will do for a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(each, arguments[0]) for each in value)
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, hint)


def _told(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
