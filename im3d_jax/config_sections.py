"""Sections of a config as settings: what is absent, unknown or out of its range is reported by its name.

A config file may set anything, so this is checked where a config is read. Overrides on the command line are
checked by `config_flags`, and the names of backbones and their like by `registry`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

from ml_collections import ConfigDict

from recon_torch import ranges
from recon_torch.errors import UserError, quoted

T = TypeVar("T")

PARTS = ("backbone", "autoencoder", "text", "schedule")
"""The sections that name a part, whose arguments `parts` checks."""

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
    _entries(config[section], f"config.{section}", entries, takes_more=False)
    return config[section]


def named(config: ConfigDict, section: str) -> tuple[str, dict[str, Any]]:
    """(name, kwargs) of a section that names one of ours or of the user's. Raises UserError as `known`."""
    values = known(config, section, NAMED)
    require(config, *(f"{section}.{entry}" for entry in NAMED))
    if not isinstance(values.kwargs, ConfigDict):
        raise UserError(f"config.{section}.kwargs is {values.kwargs!r}; give a dictionary of arguments")
    return values.name, values.kwargs.to_dict()


def settings(config: ConfigDict, section: str, kind: type[T]) -> T:
    """The settings of a section, `kind(**section)`; an entry that the section lacks has its default.

    kind: a class of `recon_torch.ranges.settings`. Fields of such classes are sections within the section.

    Raises UserError for an unknown entry, for a value that is out of its range, and where `kind` does.
    """
    require(config, section)
    own = section == "train" and _has_own_task(config)
    return read(config[section], f"config.{section}", kind, takes_more=own)


def read(values: Any, name: str, kind: type[T], takes_more: bool = False) -> T:
    """The settings of the section that errors call `name`, see `settings`.

    takes_more: leave entries aside that `kind` does not have.
    """
    hints = ranges.hints_of(kind)
    entries = _entries(values, name, hints, takes_more)
    if absent := [entry for entry in _required(kind) if entry not in entries]:
        raise UserError(f"{name} has no {absent[0]}; set it")
    made = {
        entry: _value(entries[entry], f"{name}.{entry}", hint)
        for entry, hint in hints.items()
        if entry in entries
    }
    try:
        return kind(**made)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def check(config: ConfigDict, kind: type) -> None:
    """Raises UserError for the first entry of a whole config that is unknown or out of its range.

    Sections that are absent are left to the command that asks for them. A config that names a task of the
    user's own may have entries of the user's own, at the top and in its section `train`.
    """
    hints, own = ranges.hints_of(kind), _has_own_task(config)
    try:
        entries = _entries(config, "config", [*hints, *PARTS], takes_more=own)
    except UserError as error:
        raise UserError(f"{error}, or is this a config of another command?") from None
    for entry in (entry for entry in hints if entry in entries):
        section, name = ranges.section_of(hints[entry]), f"config.{entry}"
        if section and entries[entry] is not None:
            read(entries[entry], name, section, takes_more=own and entry == "train")
        else:
            ranges.taken(entries[entry], hints[entry], name)


def _has_own_task(config: ConfigDict) -> bool:
    """Whether `config.train.task` is a user's module, by the rule of `registry`."""
    train = config.get("train")
    task = train.get("task") if isinstance(train, ConfigDict) else None
    return isinstance(task, str) and ("." in task or ":" in task)


def _entries(values: Any, name: str, known: Iterable[str], takes_more: bool) -> dict[str, Any]:
    """The entries of a section. Raises UserError if it is none, or has an entry that is not known."""
    known = list(known)
    if not isinstance(values, ConfigDict):
        of = f" with {', '.join(known)}" if known else ""
        raise UserError(f"{name} is {quoted(values)}; it has to be a section{of}")
    unknown = [entry for entry in values if entry not in known]
    if unknown and not takes_more:
        [near] = difflib.get_close_matches(str(unknown[0]), known, n=1, cutoff=0.0)
        raise UserError(f"{name} has an unknown entry {unknown[0]!r}; the nearest is {near!r}")
    return dict(values.items())


def _required(kind: type) -> list[str]:
    """The fields of a settings class that have no default."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return [each.name for each in fields if each.default is missing and each.default_factory is missing]


def _value(value: Any, name: str, hint: Any) -> Any:
    if value is not None and (kind := ranges.section_of(hint)):
        return read(value, name, kind)
    if value is not None and (kind := ranges.sections_by_name(hint)):
        entries = _entries(value, name, (), takes_more=True)
        return {key: read(each, f"{name}.{key}", kind) for key, each in entries.items()}
    return ranges.taken(value, hint, name)
