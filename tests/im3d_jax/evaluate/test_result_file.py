"""The result file that all commands write, by cases worked out by hand."""

import json

import numpy as np
import pytest

from im3d_jax.evaluate import result_file
from im3d_jax.evaluate.result_file import Bootstrap, Row


def made(**kwargs):
    scores = {"a": [1.0, 2.0, 6.0], "b": [0.0, 4.0, 5.0]}
    rows = [
        Row(name, str(n), "", {"s": value, "t": None})
        for name in scores
        for n, value in enumerate(scores[name])
    ]
    rows.append(Row("b", "more", "", {"s": 100.0, "t": None}))
    methods = [{"name": "a"}, {"name": "b"}]
    return result_file.content("test", {"judge": 1}, rows, methods=methods, **kwargs)


def test_means_deviations_and_paired_differences(tmp_path):
    found = made()
    a, no_t, b, _ = found["summary"]
    assert (a["mean"], a["num_rows"], b["num_rows"]) == (3.0, 3, 4)
    assert a["std"] == pytest.approx(np.sqrt((4 + 1 + 9) / 2))  # of the sample
    assert a["interval"] == [1.0, 6.0]  # all three alike has a chance of 1/27, above 2.5%
    assert no_t["num_rows"] == 0 and no_t["mean"] is None
    [difference, _] = found["differences"]  # 1 - 0, 2 - 4, 6 - 5; the row that a lacks does not count
    assert (difference["mean"], difference["num_rows"], difference["num_positive"]) == (0.0, 3, 2)
    assert difference["interval"] == [-2.0, 1.0] and difference["num_against_others"] == 0
    result_file.write(tmp_path / "results.json", found)
    assert result_file.read(tmp_path) == json.loads(json.dumps(found))
    assert result_file.rows_of(found)[3] == Row("b", "0", "", {"s": 0.0, "t": None})


def test_one_row_has_no_deviation_and_two_of_a_key_are_a_bug():
    one = result_file.summary([Row("a", "k", "", {"s": 2.0})], ["a"], Bootstrap())
    assert one[0]["std"] is None and one[0]["interval"] == [2.0, 2.0]
    with pytest.raises(ValueError, match="two rows of"):
        result_file.content("x", {}, [Row("a", "k", "", {})] * 2, methods=[{"name": "a"}])


@pytest.mark.parametrize("count, said", [(1, 0), (2, 1), (5, 1), (6, 0)])
def test_intervals_over_few_rows_have_a_remark(count, said):
    rows = [Row("a", str(number), "", {"s": float(number)}) for number in range(count)]
    found = result_file.content("x", {}, rows, methods=[{"name": "a"}])
    assert sum("are too narrow" in line for line in found["about"]) == said


def test_bars_in_names_do_not_end_cells():
    assert result_file.table(["", "n|m"], [["a|b", "1"]]).splitlines()[::2] == [
        r"|  | n\|m |",
        r"| a\|b | 1 |",
    ]


def test_table_is_markdown():
    assert result_file.table(["", "a"], [["x", "1"]]) == "|  | a |\n| --- | ---: |\n| x | 1 |\n"


DAMAGES = {
    "other": (lambda found: found.pop("format"), "is no results.json of"),
    "newer": (lambda found: found.update(format_version=2), "has format 2, and this reads 1"),
    "rows": (lambda found: found["rows"][0].pop("key"), "is damaged"),
    "double rows": (lambda found: found["rows"].append(found["rows"][0]), "is damaged"),
    "double methods": (lambda found: found["methods"].append(found["methods"][0]), "is damaged"),
    "strange rows": (lambda found: found["rows"][0].update(method="nobody"), "is damaged"),
    "prompts": (lambda found: found["rows"][0].update(prompt=3), "is damaged"),
    "protocol": (lambda found: found["protocol"].update(views=99), "is damaged or was changed"),
    "NaN": (lambda found: found["rows"][0]["scores"].update(s=float("nan")), "holds 'NaN'"),
    "infinity": (lambda found: found["rows"][0]["scores"].update(s=float("inf")), "holds 'Infinity'"),
    "huge": (lambda found: found["rows"][0]["scores"].update(s=10**400), "is damaged"),
    "numbers": (lambda found: found["rows"][0]["scores"].update(s="x"), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_files_are_refused(damage, tmp_path, user_error):
    found = made()
    spoil, message = DAMAGES[damage]
    spoil(found)
    (tmp_path / "results.json").write_text(json.dumps(found))
    with user_error(message):
        result_file.read(tmp_path / "results.json")
