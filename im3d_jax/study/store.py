"""The answers, in SQLite or PostgreSQL.

An annotator answers an item once: the table has a unique constraint, and an answer that comes again, by a
double click or because its acknowledgement was lost, changes nothing. Items are handed out in transactions
that wait for each other, so that no two annotators take the last place of an item; a place that is held and
not answered is free again after `LEASE_S`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from im3d_jax.study import SIDES
from im3d_jax.study.assignment import LEASE_S, choose, share
from im3d_jax.study.plan import Item, Study
from recon_torch.errors import UserError, first_line

PATIENCE_S = 30

METADATA = sa.MetaData()
STUDIES = sa.Table(
    "im3d_study",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),
)
ANSWERED = sa.Table(
    "im3d_answers",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("annotator", sa.String(200), nullable=False),
    sa.Column("item", sa.String(40), nullable=False),
    sa.Column("choice", sa.String(10), nullable=False),
    sa.Column("seconds", sa.Float),
    sa.Column("source", sa.String(10), nullable=False),
    sa.Column("answered_at", sa.Float, nullable=False),
    sa.UniqueConstraint("annotator", "item"),
)
LEASES = sa.Table(
    "im3d_leases",
    METADATA,
    sa.Column("annotator", sa.String(200), primary_key=True),
    sa.Column("item", sa.String(40), nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
)


class Answer(NamedTuple):
    """A choice, "left" or "right". seconds: how long the question was shown; source: "web" or "mturk"."""

    annotator: str
    item: str
    choice: str
    seconds: float | None = None
    source: str = "web"


class State(StrEnum):
    """Of an annotator: SHARE, who has answered as much as the others will; WAIT, for places that others hold
    and may give back; OVER, for whom nothing is left."""

    QUESTION = "question"
    SHARE = "share"
    WAIT = "wait"
    OVER = "over"


class Next(NamedTuple):
    """What an annotator does next.

    Attributes:
        num_answered: by this annotator, checks included.
        item: to be answered, in the state "question" alone.
    """

    state: State
    num_answered: int
    item: Item | None = None


class Store:
    """The answers of one study. Its methods may be called by several threads and processes at once."""

    def __init__(self, study: Study, url: str, create: bool = True) -> None:
        """Raises UserError for a database that cannot be had, or that has the answers of another study.

        Args:
            url: as SQLAlchemy takes it, such as sqlite:///answers.sqlite or postgresql://user@host/name.
            create: whether a database without answers becomes one of this study, and is no error.
        """
        self._study = study
        self._engine = _engine(url, create)
        with _named_errors(self._engine.url.render_as_string()):
            self._open(create)

    def _open(self, create: bool) -> None:
        place = self._engine.url.render_as_string()
        if create:
            # Two that begin at once: PostgreSQL has no lock on tables that are not there yet.
            with self._engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(4933)"))
                METADATA.create_all(connection)
                if connection.execute(sa.select(STUDIES.c.digest)).first() is None:
                    connection.execute(STUDIES.insert().values(id=1, digest=self._study.digest))
        elif not sa.inspect(self._engine).has_table(STUDIES.name):
            raise UserError(f"{place} has no answers yet; run `im3d study serve` or `im3d study import`")
        with self._engine.connect() as connection:
            digest = connection.execute(sa.select(STUDIES.c.digest)).scalar()
        if digest != self._study.digest:
            raise UserError(f"{place} has the answers of another study; give --database of this one")

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _alone(self) -> Iterator[sa.Connection]:
        """A transaction that waits until all others of this kind are over."""
        with self._engine.begin() as connection:  # SQLite: it begins as one that writes
            connection.execute(sa.select(STUDIES.c.id).with_for_update())
            yield connection

    # ---- Asking ----

    def next(self, annotator: str, wants_more: bool = False) -> Next:
        """Hands an item out, the same one until it is answered or given back.

        wants_more: whether an annotator who has done a share goes on.
        """
        with self._alone() as connection:
            return self._next(connection, annotator, time.time(), wants_more)

    def _next(self, connection: sa.Connection, annotator: str, now: float, wants_more: bool) -> Next:
        connection.execute(LEASES.delete().where(LEASES.c.expires < now))
        own = sa.select(ANSWERED.c.item).where(ANSWERED.c.annotator == annotator)
        answered = set(connection.execute(own).scalars())
        held = {row.annotator: row.item for row in connection.execute(sa.select(LEASES))}
        item = self._study.by_id.get(held.pop(annotator, ""))
        counted = sa.select(ANSWERED.c.item, sa.func.count()).group_by(ANSWERED.c.item)
        counts: dict[str, int] = {name: count for name, count in connection.execute(counted)}
        if choose(self._study, annotator, answered, counts) is None:
            return Next(State.OVER, len(answered))
        if len(answered) >= share(self._study, annotator) and not wants_more:
            return Next(State.SHARE, len(answered))
        if item is None or item.id in answered:
            item = choose(self._study, annotator, answered, Counter(held.values()) + Counter(counts))
        if item is None:
            return Next(State.WAIT, len(answered))
        connection.execute(LEASES.delete().where(LEASES.c.annotator == annotator))
        connection.execute(LEASES.insert().values(annotator=annotator, item=item.id, expires=now + LEASE_S))
        return Next(State.QUESTION, len(answered), item)

    # ---- Answering ----

    def record(self, answer: Answer, wants_more: bool = False) -> tuple[str, Next]:
        """Keeps an answer unless there is one. Returns the choice that stands, and what comes next.

        One that comes after its place was given to somebody else is kept, too: it is a person's work.

        Raises UserError for an item that the study does not have, and for a choice that is none.
        """
        self._check(answer)
        now = time.time()
        with self._alone() as connection:
            stands = _insert(connection, answer, now)
            connection.execute(
                LEASES.delete().where(LEASES.c.annotator == answer.annotator, LEASES.c.item == answer.item)
            )
            return stands, self._next(connection, answer.annotator, now, wants_more)

    def record_all(self, answers: Iterable[Answer]) -> tuple[int, int]:
        """Keeps all answers or none. Returns how many are new, and how many differ from one that stands."""
        answers, now = list(answers), time.time()
        for answer in answers:
            self._check(answer)
        with self._alone() as connection:
            before = self._count(connection)
            stand = [_insert(connection, answer, now) for answer in answers]
            new = self._count(connection) - before
        return new, sum(a.choice != kept for a, kept in zip(answers, stand, strict=True))

    def _check(self, answer: Answer) -> None:
        if answer.item not in self._study.by_id:
            raise UserError(f"the study has no item {answer.item[:40]!r}")
        if answer.choice not in SIDES:
            raise UserError(f"{answer.choice[:40]!r} is no answer; give one of {', '.join(SIDES)}")

    def _count(self, connection: sa.Connection) -> int:
        return connection.execute(sa.select(sa.func.count()).select_from(ANSWERED)).scalar_one()

    # ---- Reading ----

    def answers(self) -> list[Answer]:
        """In the order in which they came."""
        columns = [ANSWERED.c[name] for name in Answer._fields]
        with self._engine.connect() as connection:
            return [Answer(*row) for row in connection.execute(sa.select(*columns).order_by(ANSWERED.c.id))]


def _insert(connection: sa.Connection, answer: Answer, now: float) -> str:
    key = (ANSWERED.c.annotator == answer.annotator, ANSWERED.c.item == answer.item)
    stands = connection.execute(sa.select(ANSWERED.c.choice).where(*key)).scalar()
    if stands is not None:
        return str(stands)
    connection.execute(ANSWERED.insert().values(**answer._asdict(), answered_at=now))
    return answer.choice


# ---- Databases ----


def default_url(directory: Path, name: str) -> str:
    return sa.URL.create("sqlite", database=str(directory / name)).render_as_string()


def _engine(url: str, create: bool) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        raise UserError(
            "--database is no URL; give one such as sqlite:///answers.sqlite or postgresql://host/name"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise UserError(f"--database {parsed.drivername}: answers are kept in SQLite or PostgreSQL")
    is_file = parsed.get_backend_name() == "sqlite"
    if is_file and not parsed.database:
        raise UserError("--database sqlite:// names no file; answers would be lost with the process")
    if is_file and not create and not Path(parsed.database or "").is_file():
        raise UserError(
            f"{parsed.database} does not exist, so that there are no answers yet; "
            "run `im3d study serve` or `im3d study import`"
        )
    try:
        # Threads beyond the pool wait in turn. Several connections of SQLite would ask for its lock again and
        # again, some of them for long while others write; none can write beside another one anyway.
        pool: dict[str, Any] = {
            "pool_size": 1 if is_file else 8,
            "max_overflow": 0,
            "pool_timeout": PATIENCE_S,
        }
        if not is_file:
            # Whoever has waited for `_alone` must see what was written meanwhile, whatever is the default.
            pool |= {"pool_pre_ping": True, "isolation_level": "READ COMMITTED"}
        engine = sa.create_engine(parsed, **pool, connect_args={"timeout": PATIENCE_S} if is_file else {})
    except (NoSuchModuleError, ImportError):
        raise UserError('the database needs the package "psycopg"; pip install "im3d[study]"') from None
    if is_file:
        sa.event.listen(engine, "connect", _on_connect)
        sa.event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection, _record) -> None:  # type: ignore[no-untyped-def]
    connection.isolation_level = None  # or Python would begin transactions of its own
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _on_begin(connection: sa.Connection) -> None:
    # One that begins as a reader cannot become a writer while another one writes.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def _named_errors(place: str) -> Iterator[None]:
    """Turns what a database says when it is opened into a line for its user."""
    try:
        yield
    except DBAPIError as error:
        reason = first_line(error.orig or error, 160)
        raise UserError(f"{place} cannot be used: {reason}; check --database") from None
