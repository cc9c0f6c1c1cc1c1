"""Paired differences of two result files, by hand, and files that cannot be compared."""

import numpy as np
import pytest
import scipy.stats

from im3d_jax.commands import evaluate
from im3d_jax.evaluate import result_file
from im3d_jax.evaluate.result_file import Row


def result(path, scores, method="ours, renders", command="faithfulness", protocol=None):
    rows = [Row(method, key, f"a {key}", dict(zip("st", both, strict=True))) for key, both in scores.items()]
    protocol = protocol or {"clip": {"sha256": "1", "size": 224}, "views": 4}
    found = result_file.content(command, protocol, rows, methods=[{"name": method}])
    path.mkdir()
    result_file.write(path / "results.json", found)
    return found


SCORES = {"cat": (1.0, 10.0), "dog": (2.0, None), "cow": (6.0, 30.0)}


def test_differences_are_paired_by_row(tmp_path, capsys):
    result(tmp_path / "a", SCORES)
    result(tmp_path / "b", {"cow": (3.0, 31.0), "cat": (0.0, 10.0), "dog": (4.0, 1.0)}, "theirs, renders")
    evaluate.main(
        ["compare", str(tmp_path / "a"), str(tmp_path / "b/results.json"), f"--out={tmp_path / 'c'}"]
    )
    found = result_file.read(tmp_path / "c")
    s, t = found["summary"]  # 1 - 0, 2 - 4, 6 - 3, and 10 - 10, 30 - 31
    assert (s["mean"], s["num_rows"], s["interval"]) == (pytest.approx(2 / 3), 3, [-2.0, 3.0])
    assert (t["mean"], t["num_rows"], t["interval"]) == (-0.5, 2, [-1.0, 0.0])
    label = "ours, renders minus theirs, renders"
    assert f"| {label}, s | 3 | +0.6667 | [-2, +3] | 67% |" in capsys.readouterr().out
    assert found["methods"][0]["name"] == label and found["compared"] == "faithfulness"


def test_rows_that_one_lacks_are_named_and_left_out_on_request(tmp_path, capsys, user_error):
    result(tmp_path / "a", SCORES)
    result(tmp_path / "b", {key: SCORES[key] for key in ("cat", "cow")} | {"pig": (1.0, 1.0)})
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    with user_error(r"of A lacks 1 row \(a pig\); .* of B lacks 1 row \(a dog\); give --common"):
        evaluate.main(["compare", *paths])
    evaluate.main(["compare", *paths, "--common"])
    told = capsys.readouterr().out
    assert "| ours, renders, s | 2 | +0 | [+0, +0] | 0% |" in told and "lacks 1 row (a pig)" in told


def test_other_pictures_and_numbers_of_views_are_said(tmp_path, capsys):
    for name, against in (("a", ("1", "2", "")), ("b", ("1", "3", "4"))):
        found = result(tmp_path / name, SCORES)
        for row, digest in zip(found["rows"], against, strict=True):
            row["against"] = digest
        found["methods"][0]["num_views"] = {"a": 4, "b": 16}[name]
        result_file.write(tmp_path / name / "results.json", found)
    evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    told = capsys.readouterr().out
    assert "- 1 rows of A and B were compared with different things" in told
    assert "- a row of ours, renders of A has 4 views, and one of ours, renders of B has 16" in told


MISTAKES = {
    "command": (
        dict(command="views3d"),
        [],
        "is of `im3d evaluate faithfulness`, and .* `im3d evaluate views3d`",
    ),
    "judge": (
        dict(protocol={"clip": {"sha256": "2", "size": 224}, "views": 4}),
        [],
        "not measured alike: clip.sha256 is '1' in the first and '2' in the second",
    ),
    "views": (dict(protocol={"clip": {"sha256": "1", "size": 224}}), [], "views is 4 .* and None"),
    "method": ({}, ["--method-b=our, renders"], "B has no method 'our, renders'; is it 'ours, renders'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_was_measured_differently_is_refused_by_name(mistake, tmp_path, user_error):
    changed, flags, message = MISTAKES[mistake]
    result(tmp_path / "a", SCORES)
    result(tmp_path / "b", SCORES, **changed)
    with user_error(message):
        evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), *flags])


def distances(path, method, kid, without, groups="g"):
    found = result_file.content("distribution", {"reference": "r"}, [], methods=[{"name": method}])
    told = {"method": method, "fid": None, "cmmd": 1.0, "kid": kid, "groups": groups, "without": without}
    path.mkdir()
    result_file.write(path / "results.json", {**found, "distances": [told]})


def test_distances_of_sets_differ_by_what_leaving_rows_out_of_both_tells(tmp_path, capsys, user_error):
    rng = np.random.default_rng(0)
    values, common = rng.normal(size=(2, 10)), 100 * rng.normal(size=10)  # rows that are hard for both
    sets = values + common
    for name, rows in zip("ab", sets, strict=True):
        without = [np.delete(rows, each).mean() for each in range(10)]
        distances(tmp_path / name, name, rows.mean(), {"kid": without})
    evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), f"--out={tmp_path / 'c'}"])
    kid, cmmd = result_file.read(tmp_path / "c")["differences"]
    apart = values[0] - values[1]
    expected = scipy.stats.t.interval(0.95, 9, apart.mean(), scipy.stats.sem(apart))
    assert (kid["mean"], *kid["interval"]) == pytest.approx((apart.mean(), *expected))
    assert (cmmd["mean"], cmmd["interval"]) == (0.0, None)
    assert "| a minus b, CMMD | +0.000 | - |" in capsys.readouterr().out
    result(tmp_path / "old", {}, "b", "distribution", {"reference": "r"})
    distances(tmp_path / "d", "b", 1.0, {"kid": [1.0] * 10}, groups="others")
    evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "d")])
    with user_error("distances of A or B are damaged, or of an older version"):
        evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "old")])
    assert "| a minus b, KID x 1000 |" in (told := capsys.readouterr().out) and "[" not in told


def test_other_prompts_and_several_methods_are_refused(tmp_path, user_error):
    found = result(tmp_path / "a", SCORES)
    found["rows"][0]["prompt"] = "another"
    (tmp_path / "b").mkdir()
    result_file.write(tmp_path / "b/results.json", found)
    with user_error("row 'cat' has the prompt 'a cat' in A and 'another' in B"):
        evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    found |= {"methods": [{"name": "x"}, {"name": "y"}], "rows": []}
    result_file.write(tmp_path / "b/results.json", found)
    with user_error("A has 'ours, renders', B has 'x', 'y'; name one of each"):
        evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
