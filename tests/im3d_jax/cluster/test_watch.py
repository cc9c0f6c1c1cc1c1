"""The line that a job on a cluster prints every minute."""

from collections import Counter
from types import SimpleNamespace

import pytest

from im3d_jax.jobs.outcomes import Outcome

pytest.importorskip("ray")


def test_the_line_names_nodes_and_kinds_of_failures(capsys):
    from im3d_jax.cluster.dispatch import Dispatch
    from im3d_jax.cluster.watch import Watch

    now = [0.0]
    dispatch = Dispatch.__new__(Dispatch)
    actors = {"a1": "n7", "a2": "n8"}
    hands = {actor: SimpleNamespace(node=node, tasks={}) for actor, node in actors.items()}
    dispatch._hands = hands  # noqa: SLF001
    dispatch._waiting = [None] * 5  # noqa: SLF001
    watch = Watch(dispatch, lambda: now[0])
    for node in ("n8", "n7", "n8"):
        watch.tell(Outcome("000000", "good", 20.0, 1.0, node=node))
    for error in ("cannot write into x (disk full): a", "cannot write into x (disk full): b", "no"):
        watch.tell(Outcome("000001", error=error, node="n8"))
    watch.look()
    assert capsys.readouterr().err == ""
    now[0] = 60.0
    watch.look()
    line = "im3d: 3 made (180.0 an hour), 5 to do; n8 2 by 1 actors, n7 1 by 1 actors;"
    line += " failed: 2 x cannot write into x (disk full), 1 x no\n"
    assert capsys.readouterr().err == line
    dispatch._hands = {}  # noqa: SLF001
    assert Counter(str(Watch(dispatch, lambda: 1.0)).split("; "))["no actors"] == 1
