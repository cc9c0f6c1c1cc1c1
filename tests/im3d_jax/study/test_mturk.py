"""A project for Mechanical Turk, and its results in each of the forms that they come in."""

import csv
import html
import io
import json
import re

import pytest

from im3d_jax.study import mturk
from im3d_jax.study.plan import Prompt
from tests.im3d_jax.study.conftest import HOSTILE, made_up

HEAD = ["HITId", "AssignmentId", "WorkerId", "AssignmentStatus", "WorkTimeInSeconds"]


def rows_of(study, per_hit):
    return list(csv.DictReader(io.StringIO(mturk.input_csv(study, per_hit, "https://host/study/"))))


def turn(row, form, choices):
    """What Mechanical Turk makes of the choices of a HIT in one of its forms."""
    if form == "flat":
        sides = [(slot, side) for slot in choices for side in ("left", "right")]
        return {f"Answer.choice_{n}.{side}": str(choices[n] == side).lower() for n, side in sides}
    if form == "plain":
        return {f"Answer.choice_{slot}": side for slot, side in choices.items()}
    told = {f"choice_{n}": {each: each == side for each in ("left", "right")} for n, side in choices.items()}
    return {"Answer.taskAnswers": json.dumps([told])}


def write_results(path, study, form, per_hit=3, workers=("A1", "A2"), change=lambda row: row):
    rows = []
    for number, row in enumerate(rows_of(study, per_hit)):
        slots = [
            name.removeprefix("item_") for name, each in row.items() if name.startswith("item_") and each
        ]
        for worker in workers:
            choices = {slot: ("left", "right")[(number + int(slot)) % 2] for slot in slots}
            head = dict(
                zip(HEAD, [f"H{number}", f"S{number}{worker}", worker, "Approved", "40"], strict=True)
            )
            inputs = {f"Input.{name}": each for name, each in row.items()}
            rows.append(change(head | inputs | turn(row, form, choices)))
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


def test_every_item_is_in_one_hit_and_each_hit_has_a_check():
    study = made_up(num_prompts=5, num_checks=2)
    rows = rows_of(study, 3)
    ids = [[each for name, each in row.items() if name.startswith("item_") and each] for row in rows]
    assert [len(each) for each in ids] == [4, 4, 4, 2]
    items = [name for each in ids for name in each if not study.by_id[name].is_check]
    assert items == [item.id for item in study.items]
    assert all(sum(study.by_id[name].is_check for name in each) == 1 for each in ids)
    assert "ours" not in str([row["question_1"] for row in rows])


def test_the_layout_has_the_variables_of_the_input_file():
    study = made_up(num_prompts=5)
    used = set(re.findall(r"\$\{(\w+)\}", mturk.template(study, 3)))
    assert used | {"study"} == set(rows_of(study, 3)[0])


@pytest.mark.parametrize("text", [HOSTILE, "=1+1", "a \U0001f986 duck", 'a "quoted", mug'])
def test_prompts_stand_in_the_input_file_as_html(text):
    study = made_up(num_prompts=1)
    study.prompts["p0"] = Prompt(text)
    content = mturk.input_csv(study, 3, "https://host")
    assert content.isascii() and content.endswith("\r\n")
    prompts = {each for name, each in rows_of(study, 3)[0].items() if name.startswith("prompt")} - {""}
    assert {html.unescape(each) for each in prompts} == {text}
    assert not any(set(each) & set("<>\"$'") or each.startswith("=") for each in prompts)


@pytest.mark.parametrize("form", ["flat", "plain", "json"])
def test_results_come_back_as_they_were_given(form, tmp_path):
    study = made_up(num_prompts=5, num_checks=2)
    write_results(tmp_path / "results.csv", study, form)
    results = mturk.read_results(tmp_path / "results.csv", study)
    assert (results.num_rejected, results.num_blank) == (0, 0)
    expected = {}
    for number, chosen in enumerate(mturk.hits(study, 3)):
        for slot, item in enumerate(chosen, 1):
            for worker in ("A1", "A2"):
                seconds = 40 / len(chosen)
                expected[worker, item.id, number] = (("left", "right")[(number + slot) % 2], seconds, "mturk")
    got = [(each.choice, each.seconds, each.source) for each in results.answers]
    assert sorted(got) == sorted(expected.values())
    names = [(each.annotator, each.item) for each in results.answers]
    assert sorted(names) == sorted((worker, item) for worker, item, _ in expected)


def test_rejected_and_blank_ones_are_counted(tmp_path):
    study = made_up(num_prompts=2, num_checks=0)

    def change(row):
        rejected = {"AssignmentStatus": "Rejected"} if row["WorkerId"] == "A2" else {}
        return row | rejected | {"Answer.choice_1.left": "false", "Answer.choice_1.right": "false"}

    write_results(tmp_path / "results.csv", study, "flat", change=change)
    results = mturk.read_results(tmp_path / "results.csv", study)
    assert (len(results.answers), results.num_rejected, results.num_blank) == (2, 2, 2)


@pytest.mark.parametrize("seconds", ["nan", "inf", "", "long"])
def test_a_time_that_is_no_number_is_left_out(seconds, tmp_path):
    study = made_up(num_prompts=1, num_checks=0)
    change = lambda row: row | {"WorkTimeInSeconds": seconds}  # noqa: E731
    write_results(tmp_path / "results.csv", study, "flat", change=change)
    results = mturk.read_results(tmp_path / "results.csv", study)
    assert results.answers and {each.seconds for each in results.answers} == {None}


def test_other_files_are_refused(tmp_path, user_error):
    study, path = made_up(num_prompts=2), tmp_path / "results.csv"
    path.write_text("prompt,winner\nx,y\n")
    with user_error("results.csv has no column WorkerId, AssignmentStatus, Input.study, Input.item_1"):
        mturk.read_results(path, study)
    with user_error("nowhere.csv cannot be read"):
        mturk.read_results(tmp_path / "nowhere.csv", study)
    write_results(path, made_up(num_prompts=3), "flat")
    with user_error("line 2: is a result of another study"):
        mturk.read_results(path, study)
    write_results(path, study, "flat", change=lambda row: row | {"Input.item_2": "q12345"})
    with user_error("line 2: the study has no item 'q12345'"):
        mturk.read_results(path, study)
    write_results(path, study, "json", change=lambda row: row | {"Answer.taskAnswers": "left"})
    with user_error("line 2: Answer.taskAnswers is not the JSON of a form"):
        mturk.read_results(path, study)
    columns = lambda row: {name: each for name, each in row.items() if "Answer" not in name}  # noqa: E731
    write_results(path, study, "flat", change=columns)
    with user_error("has no column Answer.choice_1.left"):
        mturk.read_results(path, study)
