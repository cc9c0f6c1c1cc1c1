"""Win rates, intervals, agreement and exclusion, by cases worked out by hand."""

import pytest

from im3d_jax.study import figure, results
from im3d_jax.study.results import Rules
from im3d_jax.study.store import Answer
from tests.im3d_jax.study.conftest import made_up


def answers_for(study, wins_of_ours, question="alignment"):
    """For each item of a question, so many votes of five for the method "ours"."""
    items = [item for item in study.items if item.question == question]
    for item, wins in zip(items, wins_of_ours, strict=True):
        ours = ("left", "right")[study.methods_of(item).index("ours")]
        other = {"left": "right", "right": "left"}[ours]
        yield from (Answer(f"a{n}", item.id, ours if n < wins else other, 2.0) for n in range(5))


def test_a_win_rate_is_the_mean_over_prompts():
    study = made_up(num_prompts=4, num_checks=0)
    found = results.compute(study, list(answers_for(study, [5, 3, 2, 0])), Rules())
    [alignment, quality] = found["comparisons"]
    assert alignment["win_rate"] == pytest.approx((1 + 0.6 + 0.4 + 0) / 4)
    assert (alignment["num_prompts"], alignment["num_answers"]) == (4, 20)
    outcome = alignment["consensus"]
    assert (outcome["won"], outcome["tied"], outcome["lost"], outcome["win_rate"]) == (2, 0, 2, 0.5)
    assert quality["win_rate"] is None and quality["num_answers"] == 0
    assert found["answers_per_item"] == {"0": 4, "5": 4}
    votes = [(each["votes"], each["consensus"]) for each in found["items"] if each["question"] == "alignment"]
    assert votes[1] == ({"ours": 3, "base": 2}, "ours") and votes[3] == ({"ours": 0, "base": 5}, "base")
    assert "no answers yet" in results.screen(found)


def test_agreement_is_krippendorffs_by_hand():
    """Four items, with the numbers of answers (left, right): (5, 0), (4, 1), (1, 4), (2, 1).

    Each pair of answers to an item counts 1 / (answers - 1). Observed disagreement: (0 + 2*4/4 + 2*4/4 +
    2*2/2) / 18 = 6/18. Expected, with 12 left and 6 right: 2 * 12 * 6 / (18 * 17).
    """
    study = made_up(num_prompts=4, num_checks=0)
    items = [item for item in study.items if item.question == "quality"]
    counts = [(5, 0), (4, 1), (1, 4), (2, 1)]
    answers = [
        Answer(f"a{n}", item.id, "left" if n < left else "right")
        for item, (left, right) in zip(items, counts, strict=True)
        for n in range(left + right)
    ]
    found = results.compute(study, answers, Rules())["agreement"]
    assert found["quality"]["krippendorff_alpha"] == pytest.approx(1 - (6 / 18) / (144 / 306))
    assert found["quality"]["equal_pairs"] == pytest.approx((20 + 12 + 12 + 2) / (20 + 20 + 20 + 6))
    assert found["all"] == found["quality"]
    assert found["alignment"] == {"num_items": 0, "krippendorff_alpha": None, "equal_pairs": None}


def test_whoever_fails_the_checks_is_left_out_and_named():
    study = made_up(num_prompts=1, num_checks=5)
    item = study.items[0].id
    passed = {"good": 5, "almost": 4, "bad": 3}
    answers = [Answer(name, item, "left") for name in (*passed, "unchecked")]
    for name, count in passed.items():
        answers += [Answer(name, c.id, "right" if n < count else "left") for n, c in enumerate(study.checks)]
    found = results.compute(study, answers, Rules(min_passed=0.8))
    assert found["excluded"] == {"bad": "3 of 5 checks right"}
    assert (found["num_answers"], found["num_answers_excluded"], found["num_check_answers"]) == (3, 1, 15)
    assert found["num_annotators_without_checks"] == 1
    assert "left out: bad (3 of 5 checks right)" in results.screen(found)
    assert results.compute(study, answers, Rules(min_passed=0.6))["excluded"] == {}


def test_without_answers_there_are_no_results(user_error):
    study = made_up(num_checks=1)
    with user_error("there are no answers yet"):
        results.compute(study, [], Rules())
    with user_error("no annotator is left"):
        results.compute(study, [Answer("a", study.checks[0].id, "left")], Rules())


def test_the_figure_is_drawn_whatever_methods_are_called(tmp_path):
    each = {"num_prompts": 1, "num_answers": 5, "win_rate": 0.8, "interval": [0.8, 0.8], "consensus": None}
    empty = {"num_prompts": 0, "num_answers": 0, "win_rate": None, "interval": None, "consensus": None}
    names = {"first": "$\\frac{x$", "second": "<b>_^"}
    comparisons = [names | each | {"question": "alignment"}, names | empty | {"question": "quality"}]
    for attempt in ("a", "b"):
        figure.write(comparisons, [tmp_path / f"{attempt}.png", tmp_path / f"{attempt}.pdf"])
    for suffix in ("png", "pdf"):
        content = (tmp_path / f"a.{suffix}").read_bytes()
        assert len(content) > 5000 and content == (tmp_path / f"b.{suffix}").read_bytes()
