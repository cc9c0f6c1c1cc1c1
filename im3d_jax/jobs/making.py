"""How the missing assets of a batch are made: in this process, or by a cluster (`im3d_jax.cluster`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, runtime_checkable

from im3d_jax.asset import Request
from im3d_jax.jobs.lanes import Maker, make_all
from im3d_jax.jobs.outcomes import Keep, Outcome, nothing
from im3d_jax.jobs.stop import Stop

Tell = Callable[[Outcome], None]


@runtime_checkable
class Making(Protocol):
    """Makes assets and tells the outcome of each, once."""

    @property
    def draws(self) -> bool:
        """Whether it draws the pictures of a text-to-image pipeline itself, as it makes the assets."""

    def begun(self, requests: Sequence[Request], stop: Stop) -> AbstractContextManager[None]:
        """Gets ready, before anything is written. Raises UserError if nothing can be made."""

    def make_all(self, requests: Sequence[Request], stop: Stop, tell: Tell) -> None:
        """Makes the assets, within `begun`. Those that `stop` stops have no outcome."""


class InProcess(NamedTuple):
    """In lanes of this process.

    Attributes:
        load: loads the model; called only if something is missing.
        num_lanes: assets made at once. num_retries: further seeds while an asset is bad.
        keep: see `storage.Storage.keep`.
    """

    load: Callable[[], Maker]
    num_lanes: int = 1
    num_retries: int = 0
    keep: Keep = nothing

    @property
    def draws(self) -> bool:
        return False

    def begun(self, requests: Sequence[Request], stop: Stop) -> AbstractContextManager[None]:
        # The model loads later: a text-to-image pipeline that draws first needs the memory.
        return nullcontext()

    def make_all(self, requests: Sequence[Request], stop: Stop, tell: Tell) -> None:
        make_all(self.load(), requests, self.num_lanes, self.num_retries, stop, tell, self.keep)
