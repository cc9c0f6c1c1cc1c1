"""The dispatcher, against a crew of made-up actors that die, hang and fail in virtual time."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from im3d_jax.asset import Request
from im3d_jax.cluster.dispatch import MAX_STRIKES, SHORTEST_LIMIT_S, Dispatch
from im3d_jax.cluster.events import Broken, Busy, Crew, Done, Event, Lost, Ready, Refused
from im3d_jax.jobs.outcomes import Outcome
from im3d_jax.jobs.stop import Stop
from recon_torch.errors import UserError

GOOD, FAILS, KILLS, HANGS, BREAKS, BUSY = "good", "fails", "kills", "hangs", "breaks", "busy"


def requests(number: int) -> list[Request]:
    return [Request("a duck", "", 0, Path(f"{each:06d}")) for each in range(number)]


class Simulation:
    """A crew on nodes in virtual time.

    Attributes:
        speed: of each node, in assets a second. room: actors of each node.
        behaviour: of (node, asset): one of the words above.
        finished: how often each asset was finished. begun: (time, actor, asset) of each start.
    """

    def __init__(self, speed: dict[str, float], behaviour=lambda node, name: GOOD, room: int = 1) -> None:
        self.now = 0.0
        self.speed, self.behaviour, self.room = speed, behaviour, room
        self.finished: Counter[str] = Counter()
        self.begun: list[tuple[float, str, str]] = []
        self.excluded: set[str] = set()
        self.places: dict[str, str] = {}  # of all actors that ever were -> node
        self._actors: dict[str, str] = {}  # -> node
        self._busy: dict[str, tuple[float, str, str]] = {}  # actor -> (until, asset, what becomes of it)
        self._happened: list[Event] = []
        self._number = 0

    def clock(self) -> float:
        return self.now

    def scale(self, wanted: int) -> None:
        there = Counter(self._actors.values())
        for node in self.speed:
            for _ in range(self.room - there[node]):
                if node not in self.excluded and len(self._actors) < wanted:
                    self._number += 1
                    actor = f"a{self._number}"
                    self._actors[actor] = self.places[actor] = node
                    self._happened.append(Ready(actor, node))

    def events(self, timeout_s: float) -> list[Event]:
        if not self._happened:
            soonest = min((until for until, *_ in self._busy.values()), default=self.now + timeout_s)
            self.now = max(self.now, min(soonest, self.now + timeout_s))
        for actor, (until, name, kind) in list(self._busy.items()):
            if until <= self.now:
                self._end_of(actor, name, kind)
        happened, self._happened = self._happened, []
        return happened

    def _end_of(self, actor: str, name: str, kind: str) -> None:
        del self._busy[actor]
        node = self._actors[actor]
        if kind == KILLS:
            self.kill(actor, "it died")
        elif kind == BREAKS:
            self._happened.append(Broken(actor, name, "its worker died"))
        elif kind == BUSY:
            self._happened.append(Busy(actor, name, "in use by process 1"))
        elif kind == FAILS:
            self._happened.append(Done(actor, name, Outcome(name, error=f"failed on {node}")))
        else:
            self.finished[name] += 1
            self._happened.append(Done(actor, name, Outcome(name, "good", 20.0, 1.0)))

    def give(self, actor: str, request: Request) -> None:
        assert actor in self._actors and actor not in self._busy
        name = request.out.name
        self.begun.append((self.now, actor, name))
        node = self._actors[actor]
        kind = self.behaviour(node, name)
        self._busy[actor] = (float("inf") if kind == HANGS else self.now + 1 / self.speed[node], name, kind)

    def end(self, actor: str, error: str) -> None:
        self.kill(actor, error)

    def exclude(self, node: str) -> None:
        self.excluded.add(node)
        for actor in [actor for actor, where in self._actors.items() if where == node]:
            self.kill(actor, "its node is out of use")

    def kill(self, actor: str, error: str, with_node: bool = False) -> None:
        self._busy.pop(actor, None)
        self._happened.append(Lost(actor, self._actors.pop(actor), error, with_node))

    def remove(self, node: str) -> None:
        """As a spot machine that is taken away."""
        for actor in [actor for actor, where in self._actors.items() if where == node]:
            self.kill(actor, "the node is gone", with_node=True)
        del self.speed[node]

    def waits_for(self, excluded) -> str:
        return "" if self.speed and set(self.speed) <= set(excluded) else "a node"

    @property
    def actors(self) -> list[str]:
        return list(self._actors)


def run(
    crew: Simulation, number: int, each_turn=lambda: None, **options
) -> tuple[dict[str, Outcome], Dispatch]:
    """The outcomes by name; fails if one is told twice."""
    told: dict[str, Outcome] = {}

    def tell(outcome: Outcome) -> None:
        assert outcome.name not in told, "told twice"
        told[outcome.name] = outcome

    events = crew.events

    def with_turn(timeout_s: float) -> list[Event]:
        each_turn()
        return events(timeout_s)

    crew.events = with_turn
    give_up = lambda request, reason: Outcome(request.out.name, error=reason)  # noqa: E731
    dispatch = Dispatch(crew, give_up, Stop(), clock=crew.clock, **options)
    dispatch.start(number)
    dispatch.run(requests(number), tell)
    return told, dispatch


def test_the_simulation_is_a_crew():
    assert isinstance(Simulation({"a": 1.0}), Crew)


def test_shares_follow_speed():
    crew = Simulation({"slow": 0.2, "b": 1.0, "c": 1.0, "d": 1.0})
    told, _ = run(crew, 64)
    assert len(told) == 64
    # Static shares would take 16 assets at 5 s each; a perfect division takes 64 / 3.2 = 20 s.
    assert crew.now <= 20 + 5
    assert Counter(outcome.node for outcome in told.values())["slow"] == pytest.approx(4, abs=1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), number=st.integers(1, 40), rate=st.floats(0, 0.2))
def test_no_asset_is_lost_or_made_twice_when_actors_and_nodes_die(seed, number, rate):
    chance = random.Random(seed)
    crew = Simulation({name: chance.uniform(0.1, 2) for name in "abcd"}, room=2)
    kills = [20]

    def turn() -> None:
        if crew.actors and kills[0] and chance.random() < rate:
            kills[0] -= 1
            if chance.random() < 0.1 and len(crew.speed) > 1:
                crew.remove(chance.choice(sorted(crew.speed)))
            else:
                crew.kill(chance.choice(crew.actors), "SIGKILL")

    told, _ = run(crew, number, turn)
    assert sorted(told) == [each.out.name for each in requests(number)]
    made = {name for name, outcome in told.items() if not outcome.error}
    assert crew.finished == Counter(made), "made twice, or finished and not told"
    starts = Counter(name for _, _, name in crew.begun)
    assert all(starts[name] >= MAX_STRIKES for name in told.keys() - made)


def test_an_asset_that_kills_its_actors_is_put_aside():
    crew = Simulation(dict.fromkeys("abc", 1.0), lambda node, name: KILLS if name == "000003" else GOOD)
    told, dispatch = run(crew, 20)
    assert [name for name, outcome in told.items() if outcome.error] == ["000003"]
    assert told["000003"].error.startswith("it has ended 3 actors") and "it died" in told["000003"].error
    assert Counter(name for _, _, name in crew.begun)["000003"] == MAX_STRIKES
    assert not dispatch.nodes.excluded


def test_an_asset_whose_3d_worker_dies_is_given_to_another_node():
    broken = []

    def behaviour(node, name):
        if name == "000001" and not broken:
            broken.append(node)
            return BREAKS
        return GOOD

    crew = Simulation(dict.fromkeys("ab", 1.0), behaviour)
    told, _ = run(crew, 6)
    assert not any(outcome.error for outcome in told.values())
    assert told["000001"].node not in broken


def test_an_asset_that_fails_is_tried_on_one_other_node():
    crew = Simulation(dict.fromkeys("abc", 1.0), lambda node, name: FAILS if name == "000002" else GOOD)
    told, _ = run(crew, 9)
    tries = [actor for _, actor, name in crew.begun if name == "000002"]
    assert len(tries) == 2 and tries[0] != tries[1]
    assert told["000002"].error.startswith("failed on")


def test_on_one_node_an_asset_that_fails_is_not_tried_again():
    crew = Simulation({"a": 1.0}, lambda node, name: FAILS if name == "000000" else GOOD)
    told, _ = run(crew, 3)
    assert len(crew.begun) == 3 and told["000000"].error


def test_a_node_on_which_all_fails_is_taken_out_of_use_and_costs_no_asset(capsys):
    crew = Simulation({"bad": 20.0, "b": 1.0, "c": 1.0}, lambda node, name: FAILS if node == "bad" else GOOD)
    told, dispatch = run(crew, 40)
    assert not any(outcome.error for outcome in told.values()) and len(told) == 40
    assert dispatch.nodes.excluded.keys() == {"bad"}
    assert "bad is out of use for this job" in capsys.readouterr().err
    # It fails 20 times as fast as the others work.
    assert sum(crew.places[actor] == "bad" for _, actor, _ in crew.begun) <= 10


def test_assets_at_fault_do_not_speak_against_nodes():
    crew = Simulation(dict.fromkeys("abc", 1.0), lambda node, name: FAILS if int(name) < 12 else GOOD)
    told, dispatch = run(crew, 30)
    assert sum(bool(outcome.error) for outcome in told.values()) == 12
    assert not dispatch.nodes.excluded


def test_a_hung_actor_is_ended_after_ten_medians():
    hung = []

    def behaviour(node, name):
        if name == "000030" and not hung:
            hung.append(node)
            return HANGS
        return GOOD

    crew = Simulation(dict.fromkeys("ab", 1 / 20), behaviour)
    told, _ = run(crew, 40)
    assert not told["000030"].error
    first, second = (time for time, _, name in crew.begun if name == "000030")
    assert second - first == pytest.approx(10 * 20, abs=2)


def test_the_limit_of_a_fast_job_is_not_too_short_and_a_given_one_holds():
    crew = Simulation({"a": 10.0})
    _, dispatch = run(crew, 20)
    [hand] = dispatch._hands.values()  # noqa: SLF001
    assert dispatch.limit_s(hand) == SHORTEST_LIMIT_S
    crew = Simulation(dict.fromkeys("ab", 1.0), lambda node, name: HANGS if name == "000001" else GOOD)
    told, _ = run(crew, 4, asset_timeout_s=7.0)
    assert "it took longer than 7 s" in told["000001"].error and crew.now == pytest.approx(21, abs=3)


def test_an_asset_that_another_process_makes_is_asked_for_again():
    refused = []

    def behaviour(node, name):
        if name == "000000" and len(refused) < 3:
            refused.append(name)
            return BUSY
        return GOOD

    crew = Simulation({"a": 1.0}, behaviour)
    told, _ = run(crew, 3)
    assert not told["000000"].error and len(refused) == 3


def test_nodes_that_join_get_work():
    crew = Simulation({"a": 1.0})

    def turn() -> None:
        if crew.now > 5:
            crew.speed.setdefault("b", 1.0)

    told, _ = run(crew, 30, turn)
    assert Counter(outcome.node for outcome in told.values())["b"] > 8


def test_without_actors_the_job_gives_up_and_says_what_it_waited_for():
    crew = Simulation({})
    with pytest.raises(UserError, match=r"^no actor after 60 s: the job waits for a node$"):
        run(crew, 3, patience_s=60.0)
    assert crew.now == pytest.approx(60, abs=2)
    crew = Simulation({"a": 1.0})
    with pytest.raises(UserError, match="1 of 4 actors after 60 s"):
        run(crew, 8, patience_s=60.0, min_actors=4)


def test_where_no_node_can_work_the_reason_is_told_at_once():
    crew = Simulation({"a": 1.0})
    crew.scale = lambda wanted: crew._happened.append(Refused("a1", "a", "no weights at w.npz"))  # noqa: SLF001
    with pytest.raises(UserError, match="^no node can make assets: a: no weights at w.npz$"):
        run(crew, 3)
    assert crew.now < 5


def test_actors_that_die_while_they_load_take_their_node_out_of_use():
    crew = Simulation({"a": 1.0})
    crew.scale = lambda wanted: crew._happened.append(Lost("a1", "a", "out of memory"))  # noqa: SLF001
    with pytest.raises(
        UserError, match="no node can make assets: a: actors end there before .* out of memory"
    ):
        run(crew, 3)


def test_a_stop_lets_what_is_in_hand_finish_and_begins_no_other():
    crew = Simulation({"a": 1.0, "b": 1.0})
    stop, told = Stop(), []
    dispatch = Dispatch(crew, lambda *_: None, stop, clock=crew.clock)
    dispatch.start(10)

    def tell(outcome: Outcome) -> None:
        told.append(outcome.name)
        stop.soon = True

    dispatch.run(requests(10), tell)
    assert sorted(told) == ["000000", "000001"]
