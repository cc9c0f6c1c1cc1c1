"""Stages: seconds add up by name, and what is shown begins where a stage resumes."""

import time
from contextlib import contextmanager

from im3d_jax.stages import Count, Stages, progress, silent


def test_seconds_of_stages_of_the_same_name_add_up():
    stages = Stages(silent)
    for _ in range(2):
        with stages.timed("wait"):
            time.sleep(0.06)
    with stages.shown("fit", "fit, round 1", total=3, initial=2) as bar:
        bar.update()
        assert bar.n == 3
    seconds = stages.seconds()
    assert list(seconds) == ["wait", "fit", "total"]
    assert seconds["wait"] >= 0.12 and seconds["total"] >= seconds["wait"] > seconds["fit"]


def test_a_function_of_ones_own_is_told_what_begins_and_how_far_it_is():
    begun = []

    @contextmanager
    def show(what, total, initial=0):
        begun.append((what, total, initial))
        yield Count(initial)

    with Stages(show).shown("fit", "fit, round 1", total=1200, initial=500):
        pass
    assert begun == [("fit, round 1", 1200, 500)]


def test_a_log_gets_one_plain_line(capsys):
    with progress("video", 2) as bar:
        bar.update()
    assert capsys.readouterr().err.startswith("video: ")
