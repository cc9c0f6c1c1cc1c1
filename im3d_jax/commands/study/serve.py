"""`im3d study serve`: the web page on which annotators answer."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Annotated

from im3d_jax.study import ANNOTATORS, ANSWERS, annotators, plan
from im3d_jax.study.extra import needed
from recon_torch.errors import CommandParser
from recon_torch.ranges import Flag, Range

DESCRIPTION = """Serves a study to annotators until it is interrupted.

    im3d study serve study
    im3d study serve study --host 0.0.0.0 --database postgresql://me@db.lab/study

An annotator's address is http://HOST:PORT/a/TOKEN/, with a token of STUDY/annotators.csv. It may be opened on
any device and as often as one likes. It listens on this machine alone unless --host says otherwise; put a
server with HTTPS before it where annotators come from outside. Killed and started again, it goes on."""
LOOPBACK, PORT = "127.0.0.1", 8080
Port = Annotated[int, Range(0, 65535)]


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    study = plan.read(flags.study)
    names = annotators.read(flags.study)
    for package in ("starlette", "uvicorn", "sqlalchemy"):
        needed(package)
    from im3d_jax.study import server, store

    answers = store.Store(study, flags.database or store.default_url(flags.study, ANSWERS))
    listening = server.listen(flags.host, flags.port)
    app = server.application(study, flags.study, answers, names, server.is_loopback(flags.host))
    port = listening.getsockname()[1]
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    there = len(answers.answers())
    print(
        f"http://{host}:{port}/a/TOKEN/ is the page of each annotator, whose token is in"
        f" {flags.study / ANNOTATORS}; {there} answers are there; Ctrl-C ends it",
        flush=True,
    )
    try:
        server.run(app, listening)
    finally:
        answers.close()


def _parse(argv: list[str]) -> Namespace:
    parser = CommandParser("study serve", DESCRIPTION)
    add, default = parser.add_argument, " (default %(default)s)"
    # fmt: off
    add("study", type=Path, metavar="STUDY", help="a directory that `im3d study new` made")
    add("--database", metavar="URL", help="of SQLite or PostgreSQL; by default the file STUDY/answers.sqlite")
    add("--host", default=LOOPBACK, help="the address to listen on, 0.0.0.0 for all" + default)
    add("--port", type=Flag(Port), default=PORT, help="the port, or 0 for one that is free" + default)
    # fmt: on
    return parser.parse_args(argv)
