"""Tables and what is kept between runs."""

import pytest

from im3d_jax.evaluate import results, views
from im3d_jax.evaluate.scores import Score


def scored(psnr):
    return Score(psnr, psnr - 5, 0.5, 0.25)._asdict()


def views_part():
    rows = [("mug", 20.0, 10.0, 2.0), ("mug", 22.0, 12.0, -4.0), ("car", 30.0, 14.0, 1.0)]
    return {
        "objects": [
            {
                "category": category,
                "scores": {
                    views.GENERATED: scored(ours),
                    views.REPEATED: scored(repeated),
                    views.TRAINING_MEAN: scored(9.0),
                },
                "elevation_deg": 10.0,
                "estimated_elevation_deg": 10.0 + error,
            }
            for category, ours, repeated, error in rows
        ]
    }


def test_views_are_averaged_over_all_and_by_category():
    text = results.report({"views": views_part()}, ["remark"])
    assert "- remark\n" in text
    assert "| generated, image and caption | 24.00 | 19.00 | 0.500 | 0.250 |" in text
    assert "| baseline: first view repeated | 12.00 | 7.00 |" in text
    assert "| mug | 2 | 21.00 | 16.00 | 0.500 | 0.250 | 11.00 | 9.00 |" in text
    assert text.index("| car |") < text.index("| mug |")


def test_rows_of_a_result_file_are_objects_by_what_a_part_compares():
    fits = {"true": {"rounds": [scored(10.0), scored(20.0)]}}
    parts = {
        "views": views_part(),
        "assets": {"objects": [{"index": 7, "caption": "a mug", "fits": fits}]},
        "prompts": {"objects": [{"prompt": "a car", "neighbour_lpips": 0.1, "true_neighbour_lpips": 0.02}]},
        "elevation": {"objects": [{"index": 3, "elevation_deg": 10.0, "estimated_elevation_deg": 8.0}]},
    }
    rows = {(row.method, row.key): row for row in results.rows(parts)}
    assert rows[f"views: {views.GENERATED}", "1"].scores["psnr"] == 22.0
    assert rows["assets: true elevation, round 1", "7"][2:4] == ("a mug", scored(20.0))
    assert rows["prompts: generated", "0"][2:4] == ("a car", {"neighbour_lpips": 0.1})
    assert rows["elevation: estimated", "3"].scores == {"error_deg": 2.0}
    assert len(rows) == 3 * 3 + 2 + 2 + 1


def test_elevation_errors_have_no_sign():
    assert "| generated views | 3 | 2.00 | 2.33 | 3.60 |" in results.report({"views": views_part()}, [])


def test_assets_are_averaged_round_by_round():
    fits = [
        {"true": {"rounds": [scored(10.0), scored(20.0)]}},
        {"true": {"rounds": [scored(12.0), scored(30.0)]}},
    ]
    text = results.report({"assets": {"objects": [{"fits": fit} for fit in fits]}}, [])
    assert "| true elevation, round 0 | 11.00 |" in text
    assert "| true elevation, round 1 | 25.00 |" in text


def test_prompts_stand_beside_true_turntables():
    rows = [
        {"neighbour_lpips": 0.1, "true_neighbour_lpips": 0.02},
        {"neighbour_lpips": 0.2, "true_neighbour_lpips": 0.04},
    ]
    text = results.report({"prompts": {"objects": rows}}, [])
    assert "| generated | 0.150 |" in text and "| true turntables | 0.030 |" in text


def test_kept_measures_once_for_each_key(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"value": 0.1 + len(calls)}

    path = tmp_path / "parts" / "x.json"
    first = results.kept(path, "a", make)
    assert results.kept(path, "a", make) == first and len(calls) == 1
    assert results.kept(path, "b", make)["value"] == pytest.approx(2.1)
    assert results.kept(path, "b", make)["key"] == "b" and len(calls) == 2
    for damaged in (path.read_text()[:-9], "[1]", ""):
        path.write_text(damaged)
        assert results.kept(path, "b", make)["key"] == "b"
    assert len(calls) == 5
