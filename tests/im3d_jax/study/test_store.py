"""Answers are kept once each, places are shared fairly, and nothing depends on the process that serves.

In SQLite, and among the slow tests in PostgreSQL.
"""

import random
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from im3d_jax.study import assignment
from im3d_jax.study import store as module
from im3d_jax.study.store import Answer, State, Store
from tests.im3d_jax.study.conftest import made_up


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request, tmp_path):
    if request.param == "postgresql":
        return request.getfixturevalue("postgresql_url")
    return module.default_url(tmp_path, "answers.sqlite")


@pytest.fixture
def open_store(url):
    """A study -> its store, each in a connection of its own, as in another process."""
    opened = []

    def make(study, **kwargs):
        opened.append(Store(study, url, **kwargs))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def test_many_annotators_at_once_fill_every_item_with_five(open_store):
    study = made_up(num_prompts=6)
    stores = [open_store(study), open_store(study)]

    def annotate(number):
        store, rng = stores[number % 2], random.Random(number)
        following = store.next(f"a{number}", wants_more=True)
        while following.item is not None:
            answer = Answer(f"a{number}", following.item.id, rng.choice(["left", "right"]))
            following = store.record(answer, wants_more=True)[1]

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(annotate, range(10)))
    for name in "xyz":  # whoever comes after them takes the places that were held by the way
        annotate_rest(stores[0], name)
    answers = stores[0].answers()
    counts = Counter(answer.item for answer in answers if not study.by_id[answer.item].is_check)
    assert counts == {item.id: 5 for item in study.items}
    assert len({(answer.annotator, answer.item) for answer in answers}) == len(answers)


def annotate_rest(store, name):
    while (following := store.next(name, wants_more=True)).item is not None:
        store.record(Answer(name, following.item.id, "left"))


def test_items_fill_evenly():
    study, load = made_up(num_checks=0), Counter()
    for number in range(5 * len(study.items)):
        load[assignment.choose(study, f"a{number}", set(), load).id] += 1
        counts = [load[item.id] for item in study.items]
        assert max(counts) - min(counts) <= 1
    assert assignment.choose(study, "one more", set(), load) is None


def test_all_shares_together_are_the_whole_study(open_store):
    study = made_up(num_prompts=6, num_checks=3, num_annotators=12)
    store = open_store(study)
    for number in range(12):
        following = store.next(f"a{number}")
        while following.state == State.QUESTION:
            assert following.num_answered < assignment.share(study, f"a{number}")
            following = store.record(Answer(f"a{number}", following.item.id, "left"))[1]
    items = [answer for answer in store.answers() if not study.by_id[answer.item].is_check]
    checked = {answer.annotator for answer in store.answers() if study.by_id[answer.item].is_check}
    assert len(items) == 60 and len(checked) == 12
    assert set(Counter(answer.annotator for answer in items).values()) == {5}
    assert store.next("a0").state == State.OVER


def test_a_double_click_counts_once_and_the_first_choice_stands(open_store):
    store = open_store(made_up())
    item = store.next("a").item
    stands = [store.record(Answer("a", item.id, choice))[0] for choice in ("left", "left", "right")]
    assert stands == ["left"] * 3
    assert [(answer.item, answer.choice) for answer in store.answers()] == [(item.id, "left")]


def test_an_item_stays_until_it_is_answered_also_after_a_restart(open_store):
    first = open_store(made_up()).next("a")
    assert first == open_store(made_up()).next("a") and first.item
    other = open_store(made_up())
    assert other.record(Answer("a", first.item.id, "right"))[1].item != first.item
    assert open_store(made_up()).next("a").num_answered == 1


def test_a_place_that_nobody_uses_is_free_again(open_store, monkeypatch):
    study = made_up(num_prompts=1, num_checks=0, answers_per_item=1, num_annotators=1)
    store = open_store(study)
    held = {store.next("a").item.id, store.next("b").item.id}
    assert held == {item.id for item in study.items}
    assert store.next("c").state == State.WAIT, "others may give back what they hold"
    late = store.next("a").item.id
    now = module.time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + assignment.LEASE_S + 1)
    assert store.next("c").item.id in held
    assert store.record(Answer("a", late, "left"))[0] == "left", "a person's work is kept, late or not"
    for name in ("c", "a"):
        annotate_rest(store, name)
    assert store.next("d").state == State.OVER


def test_checks_come_at_their_rate_and_each_once():
    study = made_up(num_prompts=40, num_checks=30, check_every=5)
    for annotator in ("a", "b", "c"):
        answered, places = set(), []
        for number in range(50):
            item = assignment.choose(study, annotator, answered, {})
            places += [number] * item.is_check
            assert item.id not in answered
            answered.add(item.id)
        assert [place // 5 for place in places] == [*range(10)], "one in each five"
    assert assignment.choose(study, "a", {item.id for item in study.items}, {}) is None


def test_annotators_do_not_all_begin_with_one_item():
    study = made_up(num_prompts=20, num_checks=0)
    assert len({assignment.choose(study, f"a{n}", set(), {}).id for n in range(10)}) > 5


def test_answers_that_are_none_are_refused(open_store, user_error):
    store = open_store(made_up())
    with user_error("no item 'q00099'"):
        store.record(Answer("a", "q00099", "left"))
    with user_error("'middle' is no answer"):
        store.record(Answer("a", "q00001", "middle"))
    with user_error("no item"):
        store.record_all([Answer("a", "q00001", "left"), Answer("a", "q00099", "left")])
    assert store.answers() == []


def test_databases_of_other_studies_are_refused(open_store, user_error):
    with user_error("no answers yet.*run `im3d study serve` or `im3d study import`"):
        open_store(made_up(), create=False)
    open_store(made_up(num_prompts=2))
    for create in (True, False):
        with user_error("has the answers of another study"):
            open_store(made_up(num_prompts=3), create=create)


def test_what_is_no_database_for_answers_is_refused(tmp_path, user_error):
    with user_error("--database is no URL"):
        Store(made_up(), "answers.sqlite")
    with user_error("SQLite or PostgreSQL"):
        Store(made_up(), "mysql://host/name")
    with user_error("names no file"):
        Store(made_up(), "sqlite://")
    (tmp_path / "text.sqlite").write_text("no database " * 100)
    with user_error("text.sqlite cannot be used: file is not a database"):
        Store(made_up(), f"sqlite:///{tmp_path}/text.sqlite")
    with sqlite3.connect(tmp_path / "other.sqlite") as connection:
        connection.execute("CREATE TABLE im3d_study (name TEXT)")
    with user_error("other.sqlite cannot be used: no such column"):
        Store(made_up(), f"sqlite:///{tmp_path}/other.sqlite")


def test_passwords_are_not_shown(user_error):
    with user_error(r"\*\*\*@127.0.0.1:1/x cannot be used") as told:
        Store(made_up(), "postgresql://me:hidden@127.0.0.1:1/x")
    assert "hidden" not in str(told)
