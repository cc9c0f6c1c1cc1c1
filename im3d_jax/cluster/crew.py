"""A crew of Ray actors: resources, placement and death.

Actors end with their driver. They are never restarted by Ray: what a lost actor had in hand is the
dispatcher's to give again, and a new actor takes its place wherever there is room.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from im3d_jax.asset import Request
from im3d_jax.cluster.actor import AssetActor, Order, Place
from im3d_jax.cluster.events import Broken, Busy, Done, Event, Lost, Ready, Refused
from recon_torch.errors import UserError, first_line

try:
    import ray
    import ray.exceptions
except ImportError:
    raise UserError('--ray needs Ray; install it with pip install "im3d[cluster]"') from None

NODES_PERIOD_S = 2.0
"""How often the nodes of the cluster are looked at."""

PING_PERIOD_S = 10.0
"""How often an idle actor is asked whether it lives."""

DOUBT_S = 30.0
"""When an actor cannot be reached, its node may be gone; Ray needs so long to be sure."""

MAX_STARTS = 3
"""How often a cluster of this machine is started if Ray's processes take too long to."""

KNOCK_S = 10.0
"""How long the head may take to accept a connection."""

NODE_ID = "ray.io/node-id"


class Needs(NamedTuple):
    """What an actor needs, and how many there may be.

    Attributes:
        cpus, gpus: of each actor. labels: that its node must have.
        max_actors: the most actors, also asked of an autoscaler; 0: as many as the nodes have room for.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    labels: Mapping[str, str] = {}
    max_actors: int = 0

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        labels = "".join(f", labelled {key}={value}" for key, value in self.labels.items())
        return f"{self.cpus:g} CPUs{gpus}{labels}"

    def room(self, node: Mapping[str, Any]) -> int:
        """How many actors fit on a node of `ray.nodes()` that has nothing else to do."""
        if not node["Alive"] or any(node["Labels"].get(key) != value for key, value in self.labels.items()):
            return 0
        asked = (("CPU", self.cpus), ("GPU", self.gpus))
        shares = [math.floor(node["Resources"].get(name, 0) / each + 1e-9) for name, each in asked if each]
        return min(shares, default=0)


@dataclass(eq=False)
class Member:
    """An actor of the crew.

    Attributes:
        handle: Ray's. node: its name; "" while it waits for one. node_id: Ray's name of it.
        is_ready: whether it has loaded the model. pinged: when it last was.
    """

    handle: Any
    node: str = ""
    node_id: str = ""
    is_ready: bool = False
    pinged: float = 0.0


class Call(NamedTuple):
    """A method that an actor runs."""

    actor: str
    method: str


@contextmanager
def connected(address: str, num_cpus: int | None = None) -> Iterator[None]:
    """Within this the process is a driver of the cluster, of one in this machine for "local".

    A process that has called `ray.init` already keeps its cluster.

    num_cpus: that a local cluster has to give; None: the machine's.

    Raises UserError if there is none.
    """
    if ray.is_initialized():
        yield
        return
    _knock(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _init(address, num_cpus)
    except Exception as error:  # Ray has no class for these: also a plain Exception comes from it
        raise UserError(f"no Ray cluster at {address!r}: {first_line(error, 200)}") from None
    finally:
        # Ray 2.60 puts a handler of its own in place of the batch's, which ends assets cleanly.
        signal.signal(signal.SIGTERM, on_sigterm)
    # Ray 2.60 prints what raylets say on stdout, whatever `log_to_driver` is. What of it is about the job's
    # own actors comes with their death.
    ray._private.worker._worker_logs_enabled = False  # noqa: SLF001
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises UserError if nobody listens at HOST:PORT, which Ray 2.60 would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster at {address!r}: {first_line(error, 200)}") from None


def _init(address: str, num_cpus: int | None) -> None:
    """Connects. Ray gives its own processes 30 s to start, which a busy machine may exceed."""
    is_local = address == "local"
    if is_local:
        # By default Ray 2.60 runs workers at niceness 15: whatever else this machine does would come first.
        os.environ.setdefault("RAY_worker_niceness", "0")
    for left in reversed(range(MAX_STARTS if is_local else 1)):
        try:
            ray.init(
                address=address,
                num_cpus=num_cpus,
                include_dashboard=False if is_local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or not left:
                raise
            ray.shutdown()


class RayCrew:
    """See `events.Crew`. Within a process there is one at a time."""

    def __init__(self, order: Order, needs: Needs, clock: Callable[[], float] = time.monotonic) -> None:
        """Within `connected`."""
        self._needs, self._clock = needs, clock
        # No object of Ray's: Ray 2.60 ends a driver, with code 1, that misses one as its node goes down.
        self._order = order
        self._slots = order.num_slots
        self._members: dict[str, Member] = {}
        self._calls: dict[Any, Call] = {}
        self._doubted: dict[str, tuple[float, str]] = {}  # actor -> (until when, the error)
        self._happened: list[Event] = []
        self._excluded: set[str] = set()  # ids of nodes
        self._names: dict[str, str] = {}  # id of a node -> its name
        self._num_started = 0
        self._nodes: list[dict[str, Any]] = []
        self._looked = -math.inf

    # ---- The contract ----

    def scale(self, wanted: int) -> None:
        room = sum(map(self._needs.room, self._usable()))
        # One actor is asked for even if there is no room: an autoscaler makes room for what waits.
        target = min(wanted, self._needs.max_actors or max(room, 1))
        for _ in range(target - len(self._members)):
            self._start()
        now = self._clock()
        busy = {call.actor for call in self._calls.values()}
        for actor, member in self._members.items():
            if member.is_ready and actor not in busy and now - member.pinged > PING_PERIOD_S:
                member.pinged = now
                self._call(actor, "ping")

    def events(self, timeout_s: float) -> Sequence[Event]:
        calls = list(self._calls)
        if self._happened or not calls:
            timeout_s, pause_s = 0.0, 0.0 if self._happened else timeout_s
            time.sleep(pause_s)
        if calls:
            done, _ = ray.wait(calls, num_returns=1, timeout=timeout_s)
            more, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
            for ref in {*done, *more}:
                if ref in self._calls:
                    self._hear(ref, self._calls.pop(ref))
        self._settle_doubts()
        happened, self._happened = self._happened, []
        return happened

    def give(self, actor: str, request: Request) -> None:
        self._call(actor, "make", request)

    def end(self, actor: str, error: str) -> None:
        if actor in self._members:
            self._lose(actor, error)

    def exclude(self, node: str) -> None:
        self._excluded |= {node_id for node_id, name in self._names.items() if name == node}
        for actor, member in list(self._members.items()):
            if member.node == node:
                self._lose(actor, "its node is out of use")
            elif not member.node:  # it might be placed there
                self._drop(actor)

    def waits_for(self, excluded: Collection[str]) -> str:
        unready = [member for member in self._members.values() if not member.is_ready]
        loading = [member.node for member in unready if member.node]
        if loading:
            return f"{len(loading)} actors to load the model on {', '.join(sorted(set(loading))[:3])}"
        alive = [node for node in self._nodes if node["Alive"]]
        if unready and any(map(self._needs.room, self._usable())):
            # Ray does not tell an actor whose process starts from one for which there is no room.
            return f"{len(unready)} actors to start, each on a node with {self._needs} free"
        if excluded and any(map(self._needs.room, alive)):
            return ""
        cpus, gpus = (sum(node["Resources"].get(name, 0) for node in alive) for name in ("CPU", "GPU"))
        return f"a node with {self._needs}; there are {len(alive)} nodes with {cpus:g} CPUs and {gpus:g} GPUs"

    def close(self) -> None:
        """Ends all actors."""
        for actor in list(self._members):
            self._drop(actor)

    # ---- Actors ----

    def _start(self) -> None:
        self._num_started += 1
        actor = f"actor {self._num_started}"
        selector = dict(self._needs.labels)
        if self._excluded:
            selector[NODE_ID] = f"!in({','.join(sorted(self._excluded))})"
        handle = (
            ray.remote(AssetActor)
            .options(
                num_cpus=self._needs.cpus,
                num_gpus=self._needs.gpus,
                label_selector=selector or None,
                max_restarts=0,
                max_concurrency=self._slots + 1,  # one more for `ping`
                scheduling_strategy="SPREAD",
            )
            .remote(self._order, _node_id)
        )
        self._members[actor] = Member(handle)
        self._call(actor, "place")

    def _call(self, actor: str, method: str, *arguments: Any) -> None:
        ref = getattr(self._members[actor].handle, method).remote(*arguments)
        self._calls[ref] = Call(actor, method)

    def _drop(self, actor: str) -> None:
        """Ends an actor and forgets it."""
        member = self._members.pop(actor)
        self._doubted.pop(actor, None)
        self._calls = {ref: call for ref, call in self._calls.items() if call.actor != actor}
        ray.kill(member.handle, no_restart=True)

    def _lose(self, actor: str, error: str, with_node: bool = False) -> None:
        node = self._members[actor].node
        self._drop(actor)
        self._happened.append(Lost(actor, node, error, with_node))

    # ---- What is heard ----

    def _hear(self, ref: Any, call: Call) -> None:
        actor, method = call
        try:
            answer = ray.get(ref)
        except ray.exceptions.ActorUnavailableError as error:
            self._doubt(actor, first_line(error, 200))
            return
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            self._hear_of_death(actor, error)
            return
        except Exception as error:  # what an actor itself does not catch, as an import that fails
            self._refuse(actor, first_line(getattr(error, "cause", None) or error, 200))
            return
        if method == "place":
            self._place(actor, answer)
        elif method == "load":
            self._loaded(actor, answer)
        elif method == "make":
            kind, name, rest = answer
            kinds = {each.__name__: each for each in (Done, Broken, Busy)}
            self._happened.append(kinds[kind](actor, name, rest))

    def _place(self, actor: str, place: Place) -> None:
        member = self._members[actor]
        member.node_id, member.node = place.node_id, self._name(place)
        if place.node_id in self._excluded:
            self._drop(actor)
        else:
            self._call(actor, "load")

    def _name(self, place: Place) -> str:
        """The name of a node: its host, and a part of its id if another node has that host."""
        if place.node_id not in self._names:
            is_taken = place.host in self._names.values()
            self._names[place.node_id] = f"{place.host}/{place.node_id[:6]}" if is_taken else place.host
        return self._names[place.node_id]

    def _loaded(self, actor: str, problem: str) -> None:
        member = self._members[actor]
        if problem:
            self._refuse(actor, problem)
        else:
            member.is_ready, member.pinged = True, self._clock()
            self._happened.append(Ready(actor, member.node, self._slots))

    def _refuse(self, actor: str, problem: str) -> None:
        node = self._members[actor].node
        self._drop(actor)
        self._happened.append(Refused(actor, node, problem))

    # ---- Death ----

    def _hear_of_death(self, actor: str, error: Exception) -> None:
        text = " ".join(str(error).split())
        reason = text.partition("Worker exit detail: ")[2].partition(". ")[0] or first_line(error, 200)
        member = self._members[actor]
        is_node = bool(member.node_id) and not self._is_alive(member.node_id)
        self._lose(actor, reason, with_node=is_node or "node has died" in text)

    def _doubt(self, actor: str, error: str) -> None:
        """An actor does not answer. Whatever it is, it is ended, and later one knows whether its node is."""
        ray.kill(self._members[actor].handle, no_restart=True)
        self._doubted.setdefault(actor, (self._clock() + DOUBT_S, error))

    def _settle_doubts(self) -> None:
        for actor, (until, error) in list(self._doubted.items()):
            if not self._is_alive(self._members[actor].node_id):
                self._lose(actor, error, with_node=True)
            elif self._clock() > until:
                self._lose(actor, error)

    # ---- Nodes ----

    def _look(self) -> list[dict[str, Any]]:
        if self._clock() - self._looked > NODES_PERIOD_S:
            self._nodes, self._looked = ray.nodes(), self._clock()
        return self._nodes

    def _usable(self) -> list[dict[str, Any]]:
        return [node for node in self._look() if node["Alive"] and node["NodeID"] not in self._excluded]

    def _is_alive(self, node_id: str) -> bool:
        return any(node["NodeID"] == node_id and node["Alive"] for node in self._look())


def _node_id() -> str:
    """Ray's name of the node on which this is called."""
    return ray.get_runtime_context().get_node_id()
