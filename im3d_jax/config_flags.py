"""`--config=configs/x.py --config.a.b=value`: a command's flags together with an `ml_collections` config.

A config file holds `get_config() -> ConfigDict`. Overrides keep the type of the value that they replace and
cannot add a key, so a misspelt key is an error and not a silent default.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from recon_torch.errors import CommandParser, UserError

_PREFIX = "--config."
_ROOT = Path(__file__).parents[1]  # the repository, or site-packages, where configs/ lies beside the packages


def parse(argv: list[str], parser: CommandParser, default: str | None = None) -> tuple[Namespace, ConfigDict]:
    """Splits a command line into the parser's own flags and a locked config with its overrides applied.

    Args:
      argv: the arguments after the command's name.
      parser: holds the command's own flags; `--config` is added here.
      default: the config file when `--config` is absent; None makes `--config` compulsory.

    Raises UserError for a missing or unfit config file, an unknown key or a value of another type.
    """
    overrides, rest = _split(argv)
    parser.add_argument("--config", default=default, required=default is None, metavar="FILE",
                        help="config file; --config.a.b=value overrides one of its values"
                        + (f" (default {default})" if default else ""))  # fmt: skip
    flags = parser.parse_args(rest)
    config = load(flags.config)
    for key, text in overrides:
        override(config, key, text)
    return flags, config


def load(path: str | Path) -> ConfigDict:
    """The locked config of a file, whose path may also be relative to the repository (`configs/x.py`)."""
    candidates = [Path(path), _ROOT / path]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(f"no config file {path}; give --config=configs/NAME.py")
    spec = importlib.util.spec_from_file_location(f"im3d_config_{found.stem}", found)
    if spec is None or spec.loader is None:
        raise UserError(f"config {found} is not a Python file; give --config=configs/NAME.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config {found} has no get_config(); it must return an ml_collections.ConfigDict")
    return module.get_config().lock()


def with_overrides(config: str | Path | ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """The config of a file, or a copy of a config, with other values for some of its dotted keys.

    Raises UserError as `load` does, and for an unknown key or a value of another type.
    """
    made = config.copy_and_resolve_references() if isinstance(config, ConfigDict) else load(config)
    for key, value in overrides.items():
        override(made, key, value if isinstance(value, str) else repr(value))
    return made


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets the dotted `key` to `text`, read as the type that the value has now."""
    known = dict(_leaves(config))
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0) or ["none: the config is empty"]
        raise UserError(f"unknown config key {key!r}; the nearest is {near[0]!r}")
    *groups, leaf = key.split(".")
    for group in groups:
        config = config[group]
    config[leaf] = _read(text, known[key], key)


def as_json(config: ConfigDict) -> dict:
    """The config as JSON holds it: without tuples."""
    return json.loads(json.dumps(config.to_dict()))


def config_digest(config: ConfigDict) -> str:
    """SHA-256, in hex, of the config as JSON with sorted keys: equal configs have equal digests."""
    canonical = json.dumps(config.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _split(argv: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The `--config.key=value` (or `--config.key value`) pairs, and all other arguments."""
    overrides, rest = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(_PREFIX):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix(_PREFIX).partition("=")
        if not equals:
            value = next(arguments, None)
        if value is None:
            raise UserError(f"{argument} has no value; write {argument}=VALUE")
        overrides.append((key, value))
    return overrides, rest


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read(text: str, old: Any, key: str) -> Any:
    """`text` as a value of the type of `old`. A value that was None may become anything."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if isinstance(old, (list, tuple)) and isinstance(value, (list, tuple)):
        value = type(old)(value)
    if old is not None and type(value) is not type(old):
        raise UserError(f"config key {key!r} takes {type(old).__name__} (now {old!r}), not {text!r}")
    return value
