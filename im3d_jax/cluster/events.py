"""What the actors of a crew tell the driver, and the contract between the two."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from im3d_jax.asset import Request
from im3d_jax.jobs.outcomes import Outcome


class Ready(NamedTuple):
    """An actor has loaded the model and can make `slots` assets at once."""

    actor: str
    node: str
    slots: int = 1


class Done(NamedTuple):
    """An asset was made, was found made, or has failed."""

    actor: str
    name: str
    outcome: Outcome


class Broken(NamedTuple):
    """An asset's 3D worker has died as often as it may. The actor goes on with another worker."""

    actor: str
    name: str
    error: str


class Busy(NamedTuple):
    """Another process makes this asset: an actor of an earlier driver that has not ended yet."""

    actor: str
    name: str
    error: str


class Lost(NamedTuple):
    """An actor is gone, and whatever it had in hand with it.

    with_node: its whole node is gone, as spot machines are, which speaks against no asset.
    """

    actor: str
    node: str
    error: str
    with_node: bool = False


class Refused(NamedTuple):
    """An actor cannot work on its node: weights are missing there, or it does not share the directory."""

    actor: str
    node: str
    error: str


Event = Ready | Done | Broken | Busy | Lost | Refused


@runtime_checkable
class Crew(Protocol):
    """Actors that come and go. A node is named as a person would know it, and uniquely."""

    def scale(self, wanted: int) -> None:
        """Starts actors where there is room, until there are as many as can be used."""

    def events(self, timeout_s: float) -> Sequence[Event]:
        """What has happened since the last call; waits for something for so long."""

    def give(self, actor: str, request: Request) -> None:
        """Lets a ready actor make an asset."""

    def end(self, actor: str, error: str) -> None:
        """Ends an actor at once; a `Lost` with this error follows."""

    def exclude(self, node: str) -> None:
        """Starts no further actors on a node and ends those that are there; a `Lost` of each follows."""

    def waits_for(self, excluded: Collection[str]) -> str:
        """Why there is no actor, in words for the user."""
