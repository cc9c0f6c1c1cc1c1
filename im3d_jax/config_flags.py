"""A command's flags together with an `ml_collections` config: `--config=configs/x.py --config.a.b=value`.

A config file has a function `get_config()` that returns a ConfigDict. An override keeps the type of the value
that it replaces and cannot add a key, so a misspelt key is an error and not a silent default.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
from ml_collections import ConfigDict

from im3d_jax import config_help, config_sections, user_code
from im3d_jax.config_kinds import ModelConfig
from recon_torch.errors import QUOTED_CHARACTERS, CommandParser, UserError, quoted

HELP = "--help-config"
_PREFIX = "--config."
_ROOT = Path(__file__).parents[1]  # the repository, or site-packages, where configs/ lies beside the packages


def parse(
    argv: list[str], parser: CommandParser, default: str | None = None, kind: type = ModelConfig
) -> tuple[Namespace, ConfigDict]:
    """Splits a command line into the parser's own flags and a locked config with its overrides applied.

    Args:
        argv: the arguments after the command's name.
        parser: knows the command's own flags; `--config` and `--help-config` are added here.
        default: the config file if `--config` is absent; None makes `--config` compulsory.
        kind: the settings class of the entries that the config may have.

    Raises UserError for a config file that cannot be loaded, an unknown key, and a value of another type or
    out of its range.
    """
    overrides, rest = _split(argv)
    _add_flags(parser, default)
    if HELP in rest:  # it needs no other flags, also those that are compulsory
        with_config = CommandParser("", "")
        _add_flags(with_config, default)
        config = _load_with(with_config.parse_known_args(rest)[0].config, overrides)
        print("\n".join(config_help.lines(config, kind)))
        raise SystemExit(0)
    flags = parser.parse_args(rest)
    config = _load_with(flags.config, overrides)
    config_sections.check(config, kind)
    return flags, config


def _add_flags(parser: CommandParser, default: str | None) -> None:
    parser.add_argument("--config", default=default, required=default is None, metavar="FILE",
                        help="config file, which is run as Python; --config.a.b=value overrides a value of it"
                        + (f" (default {default})" if default else ""))  # fmt: skip
    parser.add_argument(HELP, action="store_true", help="list the config's entries and what each takes")


def _load_with(path: str, overrides: Sequence[tuple[str, str]]) -> ConfigDict:
    config = load(path)
    for key, text in overrides:
        override(config, key, text)
    return config


def load(path: str | Path) -> ConfigDict:
    """The locked config of a file, whose path may also be relative to the repository (`configs/x.py`).

    The file may import its neighbours, as `import base` or `from its_directory import base`, wherever the
    command runs. Raises UserError if there is no such file, if it has no `get_config()`, and for mistakes in
    it, with the line in which they are.
    """
    candidates = [Path(path), _ROOT / path]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        shipped = [f"configs/{each.name}" for each in sorted((_ROOT / "configs").glob("[!_]*.py"))]
        near = difflib.get_close_matches(str(path), shipped, n=1)
        hint = f"did you mean {near[0]}?" if near else "give the path of a .py file, such as configs/tiny.py"
        raise UserError(f"no config file {str(path)!r}; {hint}")
    spec = importlib.util.spec_from_file_location(f"im3d_config_{found.stem}", found)
    if spec is None or spec.loader is None:
        raise UserError(f"config {found} is not a Python file; give --config=configs/NAME.py")
    module = importlib.util.module_from_spec(spec)
    with _neighbours_importable(found.resolve().parent), _mistakes_in_one_line(found):
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    if not isinstance(config, ConfigDict):
        missing = "get_config() does not return one" if hasattr(module, "get_config") else "no get_config()"
        raise UserError(f"config {found} has to return an ml_collections.ConfigDict: it has {missing}")
    return config.lock()


@contextmanager
def _neighbours_importable(directory: Path) -> Iterator[None]:
    """Puts a config's directory, and the one above it, first on Python's path while the config is loaded.

    Modules that were found there are forgotten afterwards: another config may have a neighbour of that name.
    """
    places = [str(directory), str(directory.parent)]
    before = set(sys.modules)
    sys.path[:0] = places
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for place in places:
            sys.path.remove(place)
        for name in set(sys.modules) - before:
            if _lies_in(sys.modules[name], directory) and directory != _ROOT / "configs":
                del sys.modules[name]


def _lies_in(module: ModuleType, directory: Path) -> bool:
    """Whether a module is a file in this directory, or the package that the directory is."""
    file = getattr(module, "__file__", None)
    places = getattr(module, "__path__", None)  # torch.classes has one that is no list
    is_package = isinstance(places, Iterable) and str(directory) in places
    return is_package or (file is not None and Path(file).parent == directory)


@contextmanager
def _mistakes_in_one_line(file: Path) -> Iterator[None]:
    """Turns what a mistake in a config raises into a UserError with the file, the line and the mistake."""
    directory = file.resolve().parent

    def is_theirs(each: Path) -> bool:
        return each.parent in (directory, _ROOT / "configs")

    with user_code.mistakes_in_one_line("config ", str(file), is_theirs, "correct it"):
        try:
            yield
        except ModuleNotFoundError as error:
            raise UserError(
                f"config {user_code.place_of(error, str(file), is_theirs)}: no module {error.name!r} in"
                f" {directory} and {directory.parent} or on Python's path; correct the import, install the"
                " module or add its directory to PYTHONPATH"
            ) from error


def with_overrides(config: Any, overrides: Any) -> ConfigDict:
    """The config of a file, or a copy of a config, with other values for some of its dotted keys.

    Args:
        config: the path of the file, or a ConfigDict.
        overrides: values by dotted keys; a string is read as on the command line.

    Raises UserError as `load` does, and for an unknown key or a value of another type.
    """
    if not isinstance(config, str | Path | ConfigDict):
        raise UserError(f"a config is a file's path or a ConfigDict, not {quoted(config)}")
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise UserError(
            f"overrides are a dictionary by dotted names, {{'video.num_steps': 20}}, not {quoted(overrides)}"
        )
    made = config.copy_and_resolve_references() if isinstance(config, ConfigDict) else load(config)
    for key, value in overrides.items():
        value = value.item() if isinstance(value, np.generic) else value
        override(made, key, value if isinstance(value, str) else repr(value))
    return made


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets the dotted `key` to `text`, read as the type that the value has now.

    Raises UserError for a key that the config does not have, and for a value of another type.
    """
    known = dict(_leaves(config))
    if inside := [each for each in known if each.startswith(f"{key}.")]:
        raise UserError(
            f"unknown config key {key!r}: it is a section; set an entry of it, such as {inside[0]!r}"
        )
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0) or ["none: the config is empty"]
        raise UserError(f"unknown config key {key!r}; the nearest is {near[0]!r}")
    *groups, leaf = key.split(".")
    for group in groups:
        config = config[group]
    value = _read(text, known[key], key)
    try:
        config[leaf] = value
    except TypeError:  # raised for a placeholder, which is None and has a type nevertheless
        kind = config.get_ref(leaf).get_type().__name__
        raise UserError(f"config key {key!r} takes {kind} (now {known[key]!r}), not {quoted(text)}") from None


def as_json(config: ConfigDict) -> dict:
    """The config as JSON holds it, with lists in place of tuples. Raises UserError for other values."""
    return json.loads(json.dumps(config.to_dict(), default=_refuse))


def config_digest(config: ConfigDict) -> str:
    """The SHA-256, in hex, of the config as JSON with sorted keys: equal configs have equal digests."""
    canonical = json.dumps(config.to_dict(), sort_keys=True, separators=(",", ":"), default=_refuse)
    return hashlib.sha256(canonical.encode()).hexdigest()


def facts(config: ConfigDict) -> dict[str, str]:
    """The config by dotted key as short texts, which differ where configs do; see `training.hosts.agree`."""
    found = {}
    for key, value in _flat(as_json(config)):
        text = json.dumps(value, sort_keys=True)
        is_short = len(text) <= QUOTED_CHARACTERS
        found[f"config.{key}"] = text if is_short else hashlib.sha256(text.encode()).hexdigest()[:12]
    return found


def difference(before: Mapping[str, Any], now: Mapping[str, Any], most: int) -> str:
    """Such as "config.fit.seed 0, now 7": the entries in which two configs as JSON differ.

    most: name so many of them, and count the others.
    """
    both = dict(_flat(before)), dict(_flat(now))
    changed = sorted(key for key in both[0] | both[1] if both[0].get(key, "") != both[1].get(key, ""))
    shown = [[quoted(each[key]) if key in each else "absent" for each in both] for key in changed[:most]]
    named = [f"config.{key} {old}, now {new}" for key, (old, new) in zip(changed, shown, strict=False)]
    more = f"; and {len(changed) - most} more" if len(changed) > most else ""
    return "; ".join(named) + more


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all values of a config as JSON."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _refuse(value: object) -> NoReturn:
    raise UserError(f"the config has {quoted(value)}; its values are numbers, strings, None and tuples")


def _split(argv: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The `--config.key=value` (or `--config.key value`) pairs, and all other arguments."""
    overrides, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(_PREFIX):
            rest.append(argument)
            continue
        key, equals, text = argument.removeprefix(_PREFIX).partition("=")
        value = text if equals else next(arguments, None)
        if value is None:
            raise UserError(f"{argument} has no value; write {argument}=VALUE")
        overrides.append((key, value))
    return overrides, rest


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all values of a config."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read(text: str, old: Any, key: str) -> Any:
    """Reads `text` as a value of the type of `old`. A value that is None may become anything."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # the last two for long text
        # As Python writes numbers that no range has, so that the error names the range.
        value = float(text) if re.fullmatch(r"[+-]?(inf|infinity|nan)", text.lower()) else text
    if isinstance(old, float) and type(value) is int:
        value = _float(value)
    if isinstance(old, (list, tuple)) and isinstance(value, (list, tuple)):
        value = type(old)(_items(value, old, text, key))
    if old is not None and type(value) is not type(old):
        raise UserError(f"config key {key!r} takes {type(old).__name__} (now {old!r}), not {quoted(text)}")
    return value


def _float(number: int) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf  # which no range has


def _items(values: Sequence[Any], old: Sequence[Any], text: str, key: str) -> list[Any]:
    """The items of a tuple or list that replaces `old`: of the type of those, if they have one type."""
    kinds = {type(item) for item in old}
    if kinds == {float}:
        values = [_float(item) if type(item) is int else item for item in values]
    if len(kinds) == 1 and not {type(item) for item in values} <= kinds:
        kind = kinds.pop().__name__
        raise UserError(f"config key {key!r} takes items of type {kind} (now {old!r}), not {quoted(text)}")
    return list(values)
