"""Names in configs: one of ours, or an importable module of your own.

    config.backbone.name = "emu_video"              one of ours
    config.backbone.name = "my_pkg.my_model"        your module, which has a `Model`
    config.backbone.name = "my_pkg.models:Small"    anything in your module, under a name of its own

The same rule holds for backbones, tasks, autoencoders, text encoders and schedules.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from typing_extensions import get_protocol_members

from im3d_jax import user_code
from recon_torch import ranges
from recon_torch.errors import UserError


@dataclass(frozen=True)
class Registry:
    """The things of one kind that a config may name.

    Attributes:
        key: of the config's entry that holds the name; errors begin with it.
        attribute: what a user's module holds, where the name does not say.
        ours: our names, each with its "module:attribute", which is imported when it is asked for.
    """

    key: str
    attribute: str
    ours: Mapping[str, str]

    def module(self, name: Any) -> ModuleType:
        """The module of a name. Raises UserError if there is none."""
        return self._import(self._place(name)[0])

    def find(self, name: Any) -> Callable[..., Any]:
        """What a name stands for: a class or a function. Raises UserError if there is no such thing."""
        path, attribute = self._place(name)
        module = self._import(path)
        if not hasattr(module, attribute):
            raise UserError(f"{self.key}: {path} has no {attribute}, which its contract asks for")
        found = getattr(module, attribute)
        if not callable(found):
            kind = type(found).__name__
            raise UserError(
                f"{self.key}: {path}:{attribute} is of type {kind}; it has to be a class or function"
            )
        return found

    def make(self, name: Any, kwargs: Mapping[str, Any]) -> Any:
        """What a name makes of the arguments `kwargs`. Raises UserError as `check` does."""
        return self.check(name, kwargs)(**kwargs)

    def check(self, name: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
        """What a name stands for, which can be called with the arguments `kwargs`.

        Raises UserError for an unknown name, for arguments that it does not take or that are missing, and for
        those that are out of the range that it states, see `recon_torch.ranges`.
        """
        make = self.find(name)
        unknown, absent = _wrong_arguments(make, kwargs)
        if unknown:
            raise UserError(f"{self.key}: {name} takes no argument {', '.join(unknown)}; remove it")
        if absent:
            raise UserError(f"{self.key}: {name} needs the argument {', '.join(absent)}; add it")
        ranges.check_arguments(make, kwargs, self.section)
        return make

    @property
    def section(self) -> str:
        """Where a config has the arguments."""
        section, _, entry = self.key.rpartition(".")
        return f"{section}.kwargs" if entry == "name" else section

    def build(self, name: Any, kwargs: Mapping[str, Any], contract: type) -> Any:
        """What a name makes of the arguments `kwargs`, with all that the protocol `contract` lists.

        Raises UserError as `make` does, and for members of the contract that are missing.
        """
        made = self.make(name, kwargs)
        if isinstance(made, type):
            raise UserError(f"{self.key}: {name} returns the class {made.__name__}; return an object of it")
        if lacking := missing_members(made, contract):
            raise UserError(
                f"{self.key}: {name} lacks {', '.join(lacking)} of the {contract.__name__} contract"
            )
        return made

    def _place(self, name: Any) -> tuple[str, str]:
        """(module, attribute) of a name."""
        if not isinstance(name, str):
            raise UserError(f"{self.key} is {name!r}; give a name, such as {next(iter(self.ours))!r}")
        place = self.ours.get(name, name)
        path, _, attribute = place.partition(":")
        if name not in self.ours and "." not in name and ":" not in name:
            near = difflib.get_close_matches(name, self.ours, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(self.ours)}."
            raise UserError(
                f"{self.key}: no {name!r}; {hint} Your own is named by its module, my_pkg.my_module"
            )
        return path, attribute or self.attribute

    def _import(self, path: str) -> ModuleType:
        package = path.partition(".")[0]
        absent = UserError(f"{self.key}: no module {path}; give one of {', '.join(self.ours)} or your own")
        if not all(part.isidentifier() for part in path.split(".")):
            raise absent
        with user_code.mistakes_in_one_line(
            f"{self.key}: ",
            path,
            is_theirs=lambda file: package in (*file.parts, file.stem),
            advice=f"correct it (`python -m {path}` shows the traceback)",
        ):
            try:
                return importlib.import_module(path)
            except ModuleNotFoundError as error:
                if not error.name or f"{path}.".startswith(f"{error.name}."):
                    raise absent from None
                raise UserError(f"{self.key}: {path} needs the module {error.name}; install it") from error


def missing_members(thing: object, contract: type) -> list[str]:
    """The members of a protocol that `thing` does not have, and its methods that `thing` cannot call."""
    members = get_protocol_members(contract)
    methods = {name for name in members if inspect.isfunction(getattr(contract, name, None))}
    absent = {name for name in members if not hasattr(thing, name)}
    return sorted(absent | {name for name in methods - absent if not callable(getattr(thing, name))})


def _wrong_arguments(make: Callable[..., Any], kwargs: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(arguments that `make` has no parameter for, its parameters that have no argument and no default)."""
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # of classes that are written in C, which check their arguments themselves
        return [], []
    named = {
        name: each
        for name, each in parameters.items()
        if each.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    unknown = [] if takes_any else sorted(set(kwargs) - set(named))
    absent = [name for name, each in named.items() if each.default is each.empty and name not in kwargs]
    return unknown, absent
