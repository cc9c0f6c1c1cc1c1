"""Makes the assets of a batch on a Ray cluster, in the place of `jobs.making.InProcess`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from im3d_jax.asset import Request
from im3d_jax.cluster.actor import Order
from im3d_jax.cluster.crew import Needs, RayCrew, connected
from im3d_jax.cluster.dispatch import Dispatch
from im3d_jax.cluster.watch import Watch
from im3d_jax.jobs.batch import Batch
from im3d_jax.jobs.lanes import Maker
from im3d_jax.jobs.making import Tell
from im3d_jax.jobs.outcomes import Outcome, failure
from im3d_jax.jobs.stop import Stop
from im3d_jax.jobs.storage import Disk, Storage
from im3d_jax.settings import AssetSettings
from recon_torch.errors import UserError


class Cluster(NamedTuple):
    """What a job asks of a cluster.

    Attributes:
        address: of its head, "auto", or "local" for one in this machine.
        needs: of each actor. min_actors: with which the job begins.
        asset_timeout_s: the longest that an asset may take; 0: told from the assets so far.
        patience_s: how long the job waits for actors.
    """

    address: str
    needs: Needs = Needs()
    min_actors: int = 1
    asset_timeout_s: float = 0.0
    patience_s: float = 600.0


class OnCluster:
    """See `jobs.making.Making`."""

    draws = True

    def __init__(
        self,
        cluster: Cluster,
        load: Callable[[], Maker],
        settings: AssetSettings,
        batch: Batch,
        num_lanes: int = 1,
        storage: Storage | None = None,
    ) -> None:
        """
        Args:
            load: loads the model; called in each actor. num_lanes: assets that an actor makes at once.
            storage: where the batch lies; default: in `batch.out`.
        """
        self._cluster = cluster
        self._storage = (storage or Disk(batch.out)).anywhere()
        self._order = Order(
            load,
            settings,
            self._storage,
            dict(batch.config),
            directory=os.getcwd(),
            num_retries=batch.num_retries,
            overwrite=batch.overwrite,
            num_slots=num_lanes,
            num_threads=int(cluster.needs.cpus),
            has_gpu=cluster.needs.gpus > 0,
        )

    @contextmanager
    def begun(self, requests: Sequence[Request], stop: Stop) -> Iterator[None]:
        """Connects, and waits until actors have loaded the model and see where the batch lies."""
        cluster = self._cluster
        stop.in_lanes = True  # from now on signals are looked at
        with connected(cluster.address), self._storage.token() as token:
            crew = RayCrew(self._order._replace(token=token), cluster.needs)
            try:
                self._dispatch = Dispatch(
                    crew,
                    self._give_up,
                    stop,
                    asset_timeout_s=cluster.asset_timeout_s,
                    patience_s=cluster.patience_s,
                    min_actors=cluster.min_actors,
                )
                self._dispatch.start(len(requests))
                yield
            finally:
                crew.close()

    def make_all(self, requests: Sequence[Request], stop: Stop, tell: Tell) -> None:
        # Nodes may have other working directories.
        whole = [request._replace(out=request.out.absolute()) for request in requests]
        watch = Watch(self._dispatch)

        def tell_both(outcome: Outcome) -> None:
            watch.tell(outcome)
            tell(outcome)

        self._dispatch.run(whole, tell_both, watch.look)

    def _give_up(self, request: Request, reason: str) -> Outcome:
        return failure(request, UserError(reason), self._storage.keep)
