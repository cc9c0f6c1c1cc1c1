"""A study is drawn from a seed, balanced, and shows nobody which method made what."""

import json
from collections import Counter
from dataclasses import replace

import imageio_ffmpeg
import numpy as np
import pytest

from im3d_jax.study import FILES, STUDY, drawing, media, plan
from im3d_jax.study.sources import Turntable
from tests.im3d_jax.study.conftest import KEY, write_test_video


@pytest.fixture
def no_encoding(monkeypatch):
    """Files of a few bytes in place of videos."""

    def write(source, target, *_):
        target.write_bytes(source.paths[0].name.encode())

    monkeypatch.setattr(media, "write_video", write)
    monkeypatch.setattr(media, "write_broken", write)


def test_sides_are_balanced_for_each_pair_and_question(source, tmp_path, no_encoding):
    prompts = [f"prompt {number}" for number in range(7)]
    found = [source(name, *prompts) for name in ("a", "b", "c")]
    study = drawing.draw(found, {}, drawing.Settings(all_pairs=True), tmp_path)
    assert study.pairs == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert len(study.items) == 3 * 7 * 2
    left = Counter((study.methods_of(item), item.question) for item in study.items)
    for first, second in study.pairs:
        for question in study.questions:
            counts = left[(first, second), question], left[(second, first), question]
            assert sorted(counts) == [3, 4]
    orders = [[item.prompt for item in study.items if item.question == each] for each in study.questions]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0]), "the order is drawn"


def test_the_seed_decides_everything(source, tmp_path, no_encoding):
    found = [source("a", *"123456"), source("b", *"123456")]
    studies = [drawing.draw(found, {}, drawing.Settings(seed=seed), tmp_path) for seed in (0, 0, 1)]
    assert studies[0] == studies[1] and studies[0].items != studies[2].items


def test_what_is_missing_is_named_and_counted(source, tmp_path, no_encoding):
    found = [source("a", "x", "y", "z"), source("b", "x", "y"), source("c", "x", "w")]
    study = drawing.draw(found, {}, drawing.Settings(), tmp_path)
    assert study.left_out == [
        "a lacks 1 prompt (w) of 4",
        "b lacks 2 prompts (w, z) of 4",
        "c lacks 2 prompts (y, z) of 4",
    ]
    pairs = Counter((frozenset(study.methods_of(item)), item.prompt) for item in study.items)
    expected = [({"a", "b"}, "x"), ({"a", "b"}, "y"), ({"a", "c"}, "x")]
    assert pairs == {(frozenset(methods), prompt): 2 for methods, prompt in expected}


def test_pictures_of_no_prompt_are_named(source, tmp_path, no_encoding, monkeypatch):
    monkeypatch.setattr(drawing.media, "write_picture", lambda source, target: target.touch())
    found = [source(name, "a mug") for name in ("a", "b")]
    pictures = {"a mug": tmp_path / "mug.png", "mugg": tmp_path / "mugg.png"}
    study = drawing.draw(found, pictures, drawing.Settings(), tmp_path)
    assert study.left_out == ["--pictures has 1 picture (mugg) of no prompt of the study"]
    assert study.prompts["a mug"].picture


def test_mistakes_are_named(source, tmp_path, user_error, no_encoding):
    draw = lambda found, **changes: drawing.draw(found, {}, drawing.Settings(**changes), tmp_path)  # noqa: E731
    with user_error("compares two methods"):
        draw([source("a", "x")])
    with user_error("two methods are called 'a'"):
        draw([source("a", "x"), source("a", "x")])
    with user_error("a and b have no prompt in common, such as 'x' and 'y'"):
        draw([source("a", "x"), source("b", "y")])
    with user_error("3 are too few"):
        draw([source("a", "x"), source("b", "x")], num_annotators=3)


def test_a_video_that_cannot_be_read_is_an_error_or_named(source, tmp_path, user_error):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    found = [source("a", "x", "y"), source("b", "x", "y")]
    found[1].turntables["y"] = Turntable("y", (broken,))
    with user_error(r"broken.mp4 cannot be read as a video \(.*--skip-unreadable"):
        drawing.draw(found, {}, drawing.Settings(check_share=0.0), tmp_path)
    settings = drawing.Settings(check_share=0.0, skip_unreadable=True)
    study = drawing.draw(found, {}, settings, tmp_path)
    assert study.left_out == ["b has 1 video (y) that cannot be read"]
    assert {item.prompt for item in study.items} == {"x"}


def frames_of(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(each, np.uint8).reshape(height, width, 3) for each in reader])


def test_a_check_has_one_side_that_is_evidently_broken(directory):
    study = plan.read(directory)
    for check in study.checks:
        sides = {"left": study.videos[check.left], "right": study.videos[check.right]}
        assert [name for name, video in sides.items() if not video.broken] == [check.correct]
        whole, broken = (
            frames_of(directory / FILES / sides[name].file)
            for name in sorted(sides, key=lambda name: sides[name].broken)
        )
        enlarged = whole.repeat(8, 1).repeat(8, 2)
        # The same pixels, elsewhere.
        assert abs(enlarged.mean() - broken.mean()) < 5
        assert np.abs(enlarged.astype(float) - broken).mean() > 40


def test_annotators_see_neither_methods_nor_checks_in_names(directory):
    study = plan.read(directory)
    ids = [item.id for item in study.items], [item.id for item in study.checks]
    assert all(len(each) == 6 and each[0] == "q" for each in ids[0] + ids[1])
    assert sorted(int(each[1:]) for each in ids[0] + ids[1]) == [*range(1, len(ids[0] + ids[1]) + 1)]
    assert not any("ours" in name or "base" in name for name in study.files)
    assert study.prompts[KEY].text.startswith("</script>")


def test_videos_become_even_small_and_silent(tmp_path):
    write_test_video(tmp_path / "odd.mkv", size="1501x333", seconds=0.1)
    media.write_video(Turntable("odd", (tmp_path / "odd.mkv",)), tmp_path / "x.mp4")
    assert frames_of(tmp_path / "x.mp4").shape[1:3] == (226, 1024)


def test_a_study_is_read_as_it_was_written_and_damage_is_named(directory, tmp_path, user_error):
    study = plan.read(directory)
    (tmp_path / FILES).symlink_to(directory / FILES)
    changed = replace(study, items=[replace(study.items[0], left="elsewhere"), *study.items[1:]])
    plan.write(changed, tmp_path / STUDY)
    with user_error("is damaged: item .* names what is not there"):
        plan.read(tmp_path)
    told = json.loads((directory / STUDY).read_text())
    (tmp_path / STUDY).write_text(json.dumps(told | {"surprise": 1}))
    with user_error("is damaged"):
        plan.read(tmp_path)
    (tmp_path / STUDY).write_text('{"format": "other"}')
    with user_error("no study of this version"):
        plan.read(tmp_path)
    plan.write(study, tmp_path / STUDY)
    assert plan.read(tmp_path) == study
