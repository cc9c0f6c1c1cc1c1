"""What runs in an actor: a loaded model that makes one asset after the other, and its 3D workers."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any, NamedTuple

from im3d_jax.asset import REPORT, Request, opened
from im3d_jax.asset_kinds import ASSET
from im3d_jax.cluster.events import Broken, Busy, Done
from im3d_jax.jobs import ASSETS
from im3d_jax.jobs.configs import Configs
from im3d_jax.jobs.lanes import Maker
from im3d_jax.jobs.outcomes import Keep, Outcome, explain, failure, success
from im3d_jax.jobs.pictures import draw_missing
from im3d_jax.jobs.resume import is_made
from im3d_jax.jobs.stop import Stop
from im3d_jax.jobs.storage import Storage
from im3d_jax.settings import AssetSettings
from recon_torch import outputs
from recon_torch.errors import UserError, first_line
from recon_torch.locks import InUse
from recon_torch.process import ReconstructionClient
from recon_torch.process.client import WorkerDied


class Order(NamedTuple):
    """What every actor of a job is told.

    Attributes:
        load: loads the model.
        settings: of the assets. num_retries, overwrite, config: see `jobs.batch.Batch`.
        storage: where the batch lies. token: by which an actor knows that it sees the driver's.
        num_slots: assets made at once. num_threads: of JAX and of each 3D worker; 0: as many as cores.
        has_gpu: whether the actor has a GPU, or a part of one.
        directory: the driver's working directory, to which paths are relative.
    """

    load: Callable[[], Maker]
    settings: AssetSettings
    storage: Storage
    config: Mapping[str, Any]
    directory: str
    token: str = ""
    num_retries: int = 0
    overwrite: bool = False
    num_slots: int = 1
    num_threads: int = 0
    has_gpu: bool = False


class Place(NamedTuple):
    """Where an actor runs."""

    node_id: str
    host: str
    pid: int


class AssetActor:
    """Makes assets. Ray calls its methods, several `make` at once if the order has several slots."""

    def __init__(self, order: Order, node_id: Callable[[], str]) -> None:
        """node_id: tells the node when it is called in the actor."""
        self._order, self._node_id = order, node_id
        self._idle: SimpleQueue[ReconstructionClient] = SimpleQueue()

    def place(self) -> Place:
        """Where it runs. Answers as soon as the actor has a process."""
        return Place(self._node_id(), socket.gethostname(), os.getpid())

    def load(self) -> str:
        """Loads the model and starts the 3D workers. Returns why that cannot be; "" if it is done."""
        order = self._order
        try:
            if not order.storage.sees(order.token):
                raise UserError(f"{order.storage} is not what the driver sees there; share it with all nodes")
            _prepare(order)
            self._maker = order.load()
            self._start_clients()
            return ""
        except Exception as error:
            return explain(error)[0]

    def make(self, request: Request) -> tuple[str, str, Any]:
        """Makes an asset, unless it is there. Returns an event without its actor: its kind and the rest."""
        name = request.out.name
        request = request._replace(out=self._order.storage.out / ASSETS / name)
        client = self._idle.get()
        try:
            return Done.__name__, name, self._made(request, client)
        except InUse as error:
            return Busy.__name__, name, str(error)
        except WorkerDied as error:
            return Broken.__name__, name, str(error)
        except Exception as error:
            return Done.__name__, name, _failure(request, error, self._order.storage.keep)
        finally:
            self._idle.put(client)

    def ping(self) -> None:
        """Answers, if the actor lives."""

    def _made(self, request: Request, client: ReconstructionClient) -> Outcome:
        order = self._order
        with opened(request):
            # An actor that is gone may have finished it and not lived to tell.
            configs = Configs(order.storage.out, order.settings.config_digest, order.config)
            row = next(iter(order.storage.rows([request.out.name], {})), None)
            if row and is_made(request, row, order.settings, order.num_retries, order.overwrite, configs):
                return Outcome(row.name, row.verdict, row.scores["psnr"], row.seconds["total"])
            outputs.remove(request.out, ASSET, REPORT)
            drawn, failed = draw_missing(order.settings, [request], order.storage)
            if failed:
                return failed[0]
            [request] = drawn
            show = Stop().show
            made = self._maker.make_best(request, client, num_retries=order.num_retries, show=show)
            return success(made, order.storage.keep)

    def _start_clients(self) -> None:
        """Starts the 3D workers in a thread that lives as long as the actor: they end with their thread."""
        started = threading.Event()
        errors: list[Exception] = []

        def run() -> None:
            try:
                for _ in range(self._order.num_slots):
                    self._idle.put(self._maker.start_client())
            except Exception as error:
                errors.append(error)
            started.set()
            threading.Event().wait()

        threading.Thread(target=run, daemon=True).start()
        started.wait()
        if errors:
            raise errors[0]


def _prepare(order: Order) -> None:
    """Sets what must be set before JAX starts."""
    if os.path.isdir(order.directory):  # elsewhere, paths are relative to where Ray has put the files
        os.chdir(order.directory)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if order.num_threads:
        os.environ["NPROC"] = str(order.num_threads)
    if not order.has_gpu:
        # Ray 2.60 leaves all GPUs of a node visible to actors that asked for none.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _failure(request: Request, error: Exception, keep: Keep) -> Outcome:
    """See `outcomes.failure`; where its file cannot be written either, the line is all there is."""
    try:
        return failure(request, error, keep)
    except UserError:
        return Outcome(request.out.name, error=first_line(error))
