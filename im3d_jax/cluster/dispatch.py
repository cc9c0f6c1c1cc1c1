"""Which actor gets which asset, and what is tried again: a scheduler that knows no Ray.

Every asset is in one of three places: it waits, an actor has it in hand, or its outcome is told. It leaves
the hand of an actor by an outcome or by the end of the actor, and is told once.

    fails                       is tried once more, on another node; its second failure is its outcome
    loses its actor             goes to another actor; after `MAX_STRIKES` it is put aside
    takes longer than the limit the same, and its actor is ended
    loses its actor's node      goes to another actor, as often as it takes
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from tqdm import tqdm

from im3d_jax.asset import Request
from im3d_jax.cluster.events import Broken, Busy, Crew, Done, Event, Lost, Ready, Refused
from im3d_jax.cluster.nodes import Nodes
from im3d_jax.jobs.outcomes import Outcome
from im3d_jax.jobs.stop import Stop
from recon_torch.errors import UserError

MAX_STRIKES = 3
"""An asset that has ended so many actors is put aside: it would end all others, too."""

MAX_LOST_LOADING = 3
"""A node on which so many actors in a row have died before they were ready is taken out of use."""

PERIOD_S = 0.5
"""How often limits and signals are looked at while nothing happens."""

BUSY_PAUSE_S = 5.0
"""An asset that another process makes is asked for again after so long."""

TIMES_MEDIAN, SHORTEST_LIMIT_S = 10.0, 120.0
"""An asset may take so many times the median so far, and never less than this."""

TIMES_FIRST, SHORTEST_FIRST_LIMIT_S = 3.0, 3600.0
"""The first asset of an actor also compiles, so it may take so many times the longest first one so far."""

NUM_IN_MEDIAN = 200
ENOUGH_FOR_MEDIAN = 3


@dataclass(eq=False)
class Task:
    """An asset that has no outcome yet.

    Attributes:
        failed_on: nodes on which it has failed or lost an actor.
        failure: its first failure, until it is tried elsewhere.
        strikes: actors that it has ended.
        not_before: when it may be given again.
    """

    request: Request
    failed_on: set[str] = field(default_factory=set)
    failure: Outcome | None = None
    strikes: int = 0
    not_before: float = 0.0

    @property
    def name(self) -> str:
        return self.request.out.name


@dataclass(eq=False)
class Hand:
    """A ready actor: its node, how many assets it makes at once, and those that it has, by name, with the
    times at which it got them. num_done: how many it has finished."""

    node: str
    slots: int
    tasks: dict[str, tuple[Task, float]] = field(default_factory=dict)
    num_done: int = 0


class Dispatch:
    """Gives assets to the actors of a crew until each has an outcome.

    Attributes:
        nodes: their records.
    """

    def __init__(
        self,
        crew: Crew,
        give_up: Callable[[Request, str], Outcome],
        stop: Stop,
        *,
        asset_timeout_s: float = 0.0,
        patience_s: float = 600.0,
        min_actors: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            give_up: the outcome of an asset that no actor could finish, with the reason.
            asset_timeout_s: the longest that an asset may take; 0: told from the assets so far.
            patience_s: how long there may be fewer than `min_actors` at the start, and none later.
        """
        self.nodes = Nodes()
        self._waiting: deque[Task] = deque()
        self._crew, self._give_up, self._stop = crew, give_up, stop
        self._asset_timeout_s, self._patience_s, self._clock = asset_timeout_s, patience_s, clock
        self._needed = min_actors
        self._tell: Callable[[Outcome], None] = lambda outcome: None
        self._hands: dict[str, Hand] = {}
        self._seconds: deque[float] = deque(maxlen=NUM_IN_MEDIAN)
        self._longest_first = 0.0
        self._lost_loading: Counter[str] = Counter()
        self._last_at_work = clock()
        self._last_warned = clock()

    @property
    def num_open(self) -> int:
        """Assets without an outcome."""
        return len(self._waiting) + self.num_in_hand

    @property
    def num_in_hand(self) -> int:
        return sum(len(hand.tasks) for hand in self._hands.values())

    @property
    def num_actors(self) -> Counter[str]:
        """Actors that are ready, by node."""
        return Counter(hand.node for hand in self._hands.values())

    def start(self, num_assets: int) -> None:
        """Waits until `min_actors` are ready, or as many as there are assets.

        Raises UserError if there are too few for as long as may be, or if no node can work.
        """
        self._needed = min(self._needed, num_assets)
        while len(self._hands) < self._needed and not self._stop.soon:
            self._turn(num_assets)
        self._needed = 1

    def run(
        self,
        requests: Sequence[Request],
        tell: Callable[[Outcome], None],
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """Goes on until all assets have outcomes, or until the stop. Raises UserError as `start` does.

        Args:
            tell: called with the outcome of each asset, once.
            look: called every now and then.
        """
        self._tell = tell
        self._waiting.extend(map(Task, requests))
        while self.num_open and not self._stop.now and (self.num_in_hand or not self._stop.soon):
            self._give_all()
            self._turn(self.num_open)
            look()

    def _turn(self, wanted: int) -> None:
        """Waits for something to happen, for a moment, and does what follows from it."""
        self._crew.scale(wanted)
        for event in self._crew.events(PERIOD_S):
            self._hear(event)
        self._end_late()
        self._check_patience()

    # ---- What happens ----

    def _hear(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._hands[event.actor] = Hand(event.node, event.slots)
            self._lost_loading[event.node] = 0
        elif isinstance(event, Lost):
            self._lose(event)
        elif isinstance(event, Refused):
            self._exclude(event.node, event.error)
        elif event.actor in self._hands and event.name in self._hands[event.actor].tasks:
            self._take_back(event)

    def _take_back(self, event: Done | Broken | Busy) -> None:
        """An actor has put an asset down, in one way or the other."""
        hand = self._hands[event.actor]
        task, since = hand.tasks.pop(event.name)
        if isinstance(event, Busy):
            task.not_before = self._clock() + BUSY_PAUSE_S
            self._waiting.append(task)
        elif isinstance(event, Broken):
            self._strike(task, hand.node, event.error)
        elif event.outcome.error:
            self._fail(task, hand.node, event.outcome)
        else:
            seconds = self._clock() - since
            if hand.num_done:
                self._seconds.append(seconds)
            else:
                self._longest_first = max(self._longest_first, seconds)
            hand.num_done += 1
            for node in self.nodes.made(hand.node, task.name):
                self._exclude(node, "assets that failed there were made elsewhere")
            self._tell(event.outcome._replace(node=hand.node))

    def _fail(self, task: Task, node: str, outcome: Outcome) -> None:
        others = self._usable() - task.failed_on - {node}
        if task.failure or not others:
            self._settle(task, outcome._replace(node=node))
        else:
            task.failure = outcome
            self._try_again(task, node)

    def _strike(self, task: Task, node: str, error: str) -> None:
        task.strikes += 1
        if task.strikes >= MAX_STRIKES:
            reason = f"it has ended {task.strikes} actors, the last one on {node}: {error}"
            self._settle(task, self._give_up(task.request, reason)._replace(node=node))
        else:
            self._try_again(task, node)

    def _try_again(self, task: Task, node: str) -> None:
        task.failed_on.add(node)
        self.nodes.failed(node, task.name)
        self._waiting.appendleft(task)

    def _settle(self, task: Task, outcome: Outcome) -> None:
        self.nodes.settled(task.name)
        self._tell(outcome)

    def _lose(self, event: Lost) -> None:
        hand = self._hands.pop(event.actor, None)
        if hand is None:
            if not event.with_node:
                self._lost_loading[event.node] += 1
            if self._lost_loading[event.node] >= MAX_LOST_LOADING:
                self._exclude(event.node, f"actors end there before they are ready: {event.error}")
            return
        self._last_at_work = self._clock()
        for task, _ in hand.tasks.values():
            if event.with_node or event.node in self.nodes.excluded:
                self._waiting.appendleft(task)
            else:
                self._strike(task, event.node, event.error)

    def _exclude(self, node: str, why: str) -> None:
        if node not in self.nodes.excluded:
            self.nodes.excluded[node] = why
            self._crew.exclude(node)
            tqdm.write(f"im3d: warning: {node} is out of use for this job: {why}", file=sys.stderr)

    # ---- What is given ----

    def _usable(self) -> set[str]:
        """Nodes with actors that are ready."""
        return {hand.node for hand in self._hands.values()} - self.nodes.excluded.keys()

    def _give_all(self) -> None:
        if self._stop.soon:
            return
        usable = self._usable()
        # Those with fewer assets first, so that a few assets go to as many actors.
        for actor, hand in sorted(self._hands.items(), key=lambda item: len(item[1].tasks)):
            while hand.node in usable and len(hand.tasks) < hand.slots:
                task = self._next(hand.node, usable)
                if task is None:
                    break
                self._waiting.remove(task)
                hand.tasks[task.name] = task, self._clock()
                self._crew.give(actor, task.request)

    def _next(self, node: str, usable: set[str]) -> Task | None:
        """The first asset that a node may have: none that failed there, as long as there are other nodes."""
        now = self._clock()
        takes_new = self.nodes.takes_new(node) or usable == {node}
        for task in self._waiting:
            is_new = not task.failed_on
            if task.not_before > now or (is_new and not takes_new):
                continue
            if node not in task.failed_on or not usable - task.failed_on:
                return task
            if is_new:
                break
        return None

    # ---- What takes too long ----

    def limit_s(self, hand: Hand) -> float:
        """How long an actor's next asset may take."""
        if self._asset_timeout_s:
            return self._asset_timeout_s
        usual = TIMES_MEDIAN * median(self._seconds) if len(self._seconds) >= ENOUGH_FOR_MEDIAN else 0.0
        if hand.num_done and usual:
            return max(usual, SHORTEST_LIMIT_S)
        return max(usual, TIMES_FIRST * self._longest_first, SHORTEST_FIRST_LIMIT_S)

    def _end_late(self) -> None:
        for actor, hand in list(self._hands.items()):
            limit_s = self.limit_s(hand)
            if any(self._clock() - since > limit_s for _, since in hand.tasks.values()):
                self._crew.end(actor, f"it took longer than {limit_s:.0f} s")

    def _check_patience(self) -> None:
        """Raises UserError if there have been too few actors for too long, or if there can be none."""
        now = self._clock()
        if len(self._hands) >= self._needed:
            self._last_at_work = now
            return
        reason = self._crew.waits_for(self.nodes.excluded)
        if now - self._last_at_work > self._patience_s:
            few = f"{len(self._hands)} of {self._needed} actors" if self._hands else "no actor"
            raise UserError(f"{few} after {self._patience_s:.0f} s: the job waits for {reason}")
        if self.nodes.excluded and not reason and not self._hands:
            told = "; ".join(f"{node}: {why}" for node, why in self.nodes.excluded.items())
            raise UserError(f"no node can make assets: {told}")
        if reason and now - max(self._last_warned, self._last_at_work) > 30:
            self._last_warned = now
            tqdm.write(f"im3d: waiting for {reason}", file=sys.stderr)
