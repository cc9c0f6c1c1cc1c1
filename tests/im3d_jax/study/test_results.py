"""Win rates, intervals, agreement and exclusion, by cases worked out by hand."""

import krippendorff
import numpy as np
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
    nothing = {"krippendorff_alpha": None, "fleiss_kappa": None, "equal_pairs": None}
    assert found["alignment"] == {"num_items": 0, **nothing}
    # Each item counts alike. By chance: the mean shares of left are (1 + 4/5 + 1/5 + 2/3) / 4 = 2/3, so 5/9.
    assert found["quality"]["fleiss_kappa"] == pytest.approx(((1 + 0.6 + 0.6 + 1 / 3) / 4 - 5 / 9) / (4 / 9))


DIAGNOSES = """00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
    00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006"""
"""Of 30 patients by six psychiatrists, in five categories (Fleiss 1971, table 1)."""


def test_kappa_is_that_of_fleiss():
    table = np.array([[int(count) for count in row] for row in DIAGNOSES.split()])
    assert results.fleiss_kappa(table) == pytest.approx(0.430, abs=5e-4)
    # His paper has the kappa of each category alone, too.
    each = [results.fleiss_kappa(np.stack([table[:, n], 6 - table[:, n]], 1)) for n in range(5)]
    assert each == pytest.approx([0.245, 0.245, 0.520, 0.471, 0.566], abs=5e-4)
    # The package irrCAC 0.4.4 gives this for items with unequal numbers of answers.
    unequal = np.array([(5, 0), (4, 1), (1, 4), (2, 1), (3, 2)])
    assert results.fleiss_kappa(unequal) == pytest.approx(0.087519623234)
    assert results.fleiss_kappa(np.array([(5, 0), (3, 0)])) is None


def test_kappa_and_alpha_differ_by_the_number_of_answers_alone():
    left = np.random.default_rng(0).binomial(5, 0.6, 40)
    table = np.stack([left, 5 - left], 1)
    alpha = krippendorff.alpha(value_counts=table, level_of_measurement="nominal")
    assert 1 - alpha == pytest.approx((1 - results.fleiss_kappa(table)) * (1 - 1 / 200))


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
    with user_error(r"answers to 1 item \(other\) that the study does not have"):
        results.compute(study, [Answer("a", "other", "left"), Answer("b", "other", "left")], Rules())


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
