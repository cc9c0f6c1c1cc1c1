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

    def module(self, name: str) -> ModuleType:
        """The module of a name. Raises UserError if there is none."""
        return self._import(self._place(name)[0])

    def find(self, name: str) -> Callable[..., Any]:
        """What a name stands for: a class or a function. Raises UserError if there is no such thing."""
        path, attribute = self._place(name)
        module = self._import(path)
        if not hasattr(module, attribute):
            raise UserError(f"{self.key}: {path} has no {attribute}, which its contract asks for")
        return getattr(module, attribute)

    def make(self, name: str, kwargs: Mapping[str, Any]) -> Any:
        """What a name makes of the arguments `kwargs`.

        Raises UserError for an unknown name, and for arguments that it does not take or that are missing.
        """
        make = self.find(name)
        unknown, absent = _wrong_arguments(make, kwargs)
        if unknown:
            raise UserError(f"{self.key}: {name} takes no argument {', '.join(unknown)}; remove it")
        if absent:
            raise UserError(f"{self.key}: {name} needs the argument {', '.join(absent)}; add it")
        return make(**kwargs)

    def build(self, name: str, kwargs: Mapping[str, Any], contract: type) -> Any:
        """What a name makes of the arguments `kwargs`, with all that the protocol `contract` lists.

        Raises UserError as `make` does, and for members of the contract that are missing.
        """
        made = self.make(name, kwargs)
        if lacking := missing_members(made, contract):
            raise UserError(
                f"{self.key}: {name} lacks {', '.join(lacking)} of the {contract.__name__} contract"
            )
        return made

    def _place(self, name: str) -> tuple[str, str]:
        """(module, attribute) of a name."""
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
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name and not f"{path}.".startswith(f"{error.name}."):
                raise UserError(f"{self.key}: {path} needs the module {error.name}; install it") from error
            raise UserError(
                f"{self.key}: no module {path}; give one of {', '.join(self.ours)} or your own"
            ) from None


def missing_members(thing: object, contract: type) -> list[str]:
    """The members of a protocol that `thing` does not have."""
    return sorted(name for name in get_protocol_members(contract) if not hasattr(thing, name))


def _wrong_arguments(make: Callable[..., Any], kwargs: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(arguments that `make` has no parameter for, its parameters that have no argument and no default)."""
    parameters = inspect.signature(make).parameters
    named = {
        name: each
        for name, each in parameters.items()
        if each.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    unknown = [] if takes_any else sorted(set(kwargs) - set(named))
    absent = [name for name, each in named.items() if each.default is each.empty and name not in kwargs]
    return unknown, absent
