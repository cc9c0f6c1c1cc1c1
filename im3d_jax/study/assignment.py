"""Which item an annotator is asked next. Pure functions of the study and of what has been answered."""

from __future__ import annotations

import random
from collections.abc import Mapping, Set

from im3d_jax.study.plan import Item, Study

LEASE_S = 600.0
"""So long an item that was handed out is kept for its annotator."""


def is_check_due(study: Study, annotator: str, num_answered: int) -> bool:
    """Whether an annotator's next question is a check.

    Of each `check_every` questions one is, at a place that is drawn for the annotator. The first one comes
    within the annotator's share.
    """
    if not study.checks:
        return False
    block, place = divmod(num_answered, study.check_every)
    places = study.check_every if block else min(study.check_every, study.items_each)
    return place == random.Random(f"{study.seed} {annotator} {block}").randrange(places)


def share(study: Study, annotator: str) -> int:
    """How many questions, checks among them, an annotator answers if all answer as many items."""
    items = checks = 0
    while items < study.items_each:
        if checks < len(study.checks) and is_check_due(study, annotator, items + checks):
            checks += 1
        else:
            items += 1
    return items + checks


def choose(study: Study, annotator: str, answered: Set[str], load: Mapping[str, int]) -> Item | None:
    """The next item or check; None if nothing is open to this annotator.

    Items that fewest annotators have come first, which keeps the numbers of answers equal to one; those with
    equally many stand in an order that is drawn for each annotator.

    Args:
        answered: the ids that this annotator has answered.
        load: for each item how many other annotators have answered it or hold it now; 0 if it is not there.
    """
    order = random.Random(f"{study.seed} {annotator}")
    open_items = [
        (load.get(item.id, 0), order.random(), item) for item in study.items if item.id not in answered
    ]
    free = [each for each in open_items if each[0] < study.answers_per_item]
    if not free:
        return None
    if is_check_due(study, annotator, len(answered)):
        checks = [check for check in study.checks if check.id not in answered]
        if checks:
            return random.Random(f"{study.seed} {annotator} checks {len(checks)}").choice(checks)
    return min(free, key=lambda each: each[:2])[2]
