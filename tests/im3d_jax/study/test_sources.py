"""The outputs of methods, as they lie in directories."""

import json
import shutil

import pytest

from im3d_jax.study import sources


@pytest.fixture
def put(tmp_path, video):
    """Writes an asset of im3d, or a video."""

    def write(path, report=None):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, target)
        if report is not None:
            (target.parent / "report.json").write_text(json.dumps(report))

    return write


def test_assets_of_a_batch_and_named_videos_have_equal_keys(put, tmp_path):
    put("ours/assets/000000/turntable.mp4", {"prompt": "A red mug!", "image": "", "seed": 0})
    put("base/a_red_mug.mp4")
    put("other/0001.mp4")
    (tmp_path / "other/0001.txt").write_text("a red mug\n")
    keys = [set(sources.read(name, tmp_path / name).turntables) for name in ("ours", "base", "other")]
    assert keys == [{"a red mug"}] * 3


def test_a_single_asset_and_folders_of_assets_are_read(put, tmp_path):
    put("one/turntable.mp4", {"prompt": "", "image": "/no/such/blue mug.png", "seed": 0})
    put("two/blue_mug/turntable.mp4")
    assert set(sources.read("one", tmp_path / "one").turntables) == {"blue mug"}
    assert set(sources.read("two", tmp_path / "two").turntables) == {"blue mug"}


def test_the_least_seed_of_a_prompt_is_taken_and_the_others_are_named(put, tmp_path):
    for number, seed in enumerate([2, 1, 3]):
        put(f"ours/assets/00000{number}/turntable.mp4", {"prompt": "a mug", "seed": seed})
    found = sources.read("ours", tmp_path / "ours")
    assert found.turntables["a mug"].video.parent.name == "000001"
    assert "2 further turntables (a mug, a mug)" in found.left_out[0]


def test_assets_that_failed_are_named(put, tmp_path):
    put("ours/assets/000000/turntable.mp4", {"prompt": "a mug", "seed": 1})
    (tmp_path / "ours/assets/000001").mkdir()
    (tmp_path / "ours/assets/000001/error.json").write_text("{}")
    assert sources.read("ours", tmp_path / "ours").left_out == [
        "ours has 1 folder (000001) without a whole asset"
    ]


@pytest.mark.parametrize("text, key", [("A red,  mug.", "a red mug"), ("\u4e00", "\u4e00"), ("?!", "?!")])
def test_keys_differ_where_words_do(text, key):
    assert sources.key_of(text) == key


def test_names_of_what_is_missing_are_cut():
    assert sources.named(["x" * 1000, "y"], "prompt") == f"2 prompts ({'x' * 60}..., y)"


def test_a_directory_without_videos_is_refused(tmp_path, user_error):
    with user_error("ours: .*nowhere is no directory"):
        sources.read("ours", tmp_path / "nowhere")
    with user_error("has neither assets of im3d nor videos"):
        sources.read("ours", tmp_path)
