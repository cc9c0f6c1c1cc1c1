"""The outputs of methods, as they lie in directories."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from im3d_jax.evaluate.outputs import layouts, names
from im3d_jax.evaluate.outputs.layouts import Source
from im3d_jax.study import media, sources
from recon_torch.views.images import write_image
from recon_torch.views.video import count_frames, frames_at, write_video


@pytest.fixture
def put(tmp_path, video):
    """Writes an asset of im3d, or a video."""

    def write(path, report=None):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, target)
        if report is not None:
            report = {"config_digest": "1"} | report
            (target.parent / "report.json").write_text(json.dumps(report))

    return write


def read(directory):
    return sources.read(Source(directory.name, directory))


def test_assets_of_a_batch_and_named_videos_have_equal_keys(put, tmp_path):
    put("ours/assets/000000/turntable.mp4", {"prompt": "A red mug!", "image": "", "seed": 0})
    put("base/a_red_mug.mp4")
    put("other/0001.mp4")
    (tmp_path / "other/0001.txt").write_text("a red mug\n")
    keys = [set(read(tmp_path / name).turntables) for name in ("ours", "base", "other")]
    assert keys == [{"a red mug"}] * 3


def test_a_single_asset_and_folders_of_assets_are_read(put, tmp_path):
    put("one/turntable.mp4", {"prompt": "", "image": "/no/such/blue mug.png", "seed": 0})
    put("two/blue_mug/turntable.mp4")
    assert set(read(tmp_path / "one").turntables) == {"blue mug"}
    assert set(read(tmp_path / "two").turntables) == {"blue mug"}


def test_the_least_seed_of_a_prompt_is_taken_and_the_others_are_named(put, tmp_path):
    for number, seed in enumerate([2, 1, 3]):
        put(f"ours/assets/00000{number}/turntable.mp4", {"prompt": "a mug", "seed": seed})
    found = read(tmp_path / "ours")
    assert found.turntables["a mug"].paths[0].parent.name == "000001"
    assert "2 further turntables (a mug, a mug)" in found.left_out[0]


def test_assets_that_failed_are_named(put, tmp_path):
    put("ours/assets/000000/turntable.mp4", {"prompt": "a mug", "seed": 1})
    (tmp_path / "ours/assets/000001").mkdir()
    (tmp_path / "ours/assets/000001/error.json").write_text("{}")
    assert read(tmp_path / "ours").left_out == ["ours has 1 folder (000001) without a whole asset"]


@pytest.mark.parametrize("text, key", [("A red,  mug.", "a red mug"), ("\u4e00", "\u4e00"), ("?!", "?!")])
def test_keys_differ_where_words_do(text, key):
    assert names.key_of(text) == key


def test_names_of_what_is_missing_are_cut():
    assert names.named(["x" * 1000, "y"], "prompt") == f"2 prompts ({'x' * 60}..., y)"


def test_a_directory_without_videos_is_refused(tmp_path, user_error):
    with user_error("nowhere: .*nowhere is no directory"):
        read(tmp_path / "nowhere")
    with user_error("has no assets of im3d, folders of pictures, videos"):
        read(tmp_path)
    write_image(tmp_path / "assets/000000/report.json.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "assets/000000/report.json").write_text('{"config_digest": "1"}')
    with user_error(r"has no whole asset of im3d \(.* has 1 folder \(000000\) without a whole asset\)"):
        read(tmp_path)


def test_a_picture_that_the_method_itself_has_drawn_is_no_reference(put, tmp_path):
    put("ours/turntable.mp4", {"prompt": "a mug", "image": ""})
    write_image(tmp_path / "ours/views_0/images/000.png", np.zeros((8, 8, 3), np.uint8))
    assert read(tmp_path / "ours").turntables["a mug"].picture is None
    write_image(tmp_path / "ours/input.png", np.zeros((8, 8, 3), np.uint8))
    assert read(tmp_path / "ours").turntables["a mug"].picture == tmp_path / "ours/input.png"


def test_pictures_become_the_frames_of_a_turn(tmp_path, user_error):
    for number, grey in enumerate((40, 120, 200)):
        rgba = np.full((10, 14, 4), (grey, grey, grey, 255), np.uint8)
        rgba[0] = 0  # white, once it is composited
        write_image(tmp_path / f"x/a_mug/{number}.png", rgba)
    turntable = read(tmp_path / "x").turntables["a mug"]
    media.write_video(turntable, tmp_path / "turn.mp4")
    count, _ = count_frames(tmp_path / "turn.mp4")
    frames = np.stack(list(frames_at(tmp_path / "turn.mp4", np.arange(count))))
    np.testing.assert_allclose(frames[:, 4:].mean((1, 2, 3)), (40, 120, 200), atol=3)
    assert frames.shape == (3, 10, 14, 3) and frames[:, 0].mean() > 200
    with user_error("2 pictures, not 3"):
        media.write_video(replace(turntable, paths=turntable.paths[:2]), tmp_path / "turn.mp4")


def test_a_layout_may_be_a_preset_or_a_file_and_3d_is_refused(put, tmp_path, user_error):
    put("x/videos/mug.mov")
    found = sources.read(layouts.named(f"openlrm:lrm={tmp_path / 'x'}"))
    assert found.name == "lrm" and found.turntables["mug"].paths[0].name == "mug.mov"
    (tmp_path / "y").mkdir()
    (tmp_path / "y/mug.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    with user_error("y: .* has files in 3D, and a study shows videos"):
        read(tmp_path / "y")


def test_a_video_wider_than_high_is_cut_to_its_left_square(tmp_path):
    halves = np.full((4, 16, 32, 3), 255, np.uint8)
    halves[:, :, :16] = 0
    write_video(tmp_path / "wide/mug.mp4", halves / np.float32(255))
    layout = layouts.Layout(layouts.Kind.VIDEO, ("{name}.mp4",), square=True)
    found = sources.read(Source("wide", tmp_path / "wide", layout))
    media.write_video(found.turntables["mug"], tmp_path / "left.mp4")
    (frame,) = frames_at(tmp_path / "left.mp4", np.array([1]))
    assert frame.shape == (16, 16, 3) and frame[:, :12].max() < 60


def test_references_have_the_colours_of_their_files(tmp_path):
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "grey16.png")
    media.write_picture(tmp_path / "grey16.png", tmp_path / "out.png")
    assert np.unique(np.asarray(Image.open(tmp_path / "out.png"))).tolist() == [128]
