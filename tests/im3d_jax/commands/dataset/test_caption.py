"""`im3d dataset caption`: which objects get a caption, what is noted of it, and what interruptions leave."""

import json

import numpy as np
import pytest

from im3d_jax.data import captioning, views
from im3d_jax.data.captioning import Caption
from recon_torch import hosting
from recon_torch.views import cameras

pytestmark = pytest.mark.slow


class Counter(captioning.Captioner):
    """A captioner that says how red a picture is, and likes red ones. It stops after a number of calls."""

    digest = "00ff"
    seen: list = []
    stop_after = 99

    def __init__(self, path, **settings):
        self.path, type(self).seen = path, []

    def caption(self, pictures):
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(len(pictures))
        reds = [int(picture[8, 8, 0]) for picture in pictures]
        return [Caption(f"red {red}" if red else "", -1.0 / (1 + red)) for red in reds]


@pytest.fixture
def counter(monkeypatch, tmp_path):
    from im3d_jax.commands.dataset import caption

    monkeypatch.setattr(caption, "Captioner", Counter)
    monkeypatch.setattr(Counter, "stop_after", 99)
    return Counter


@pytest.fixture
def objects(tmp_path):
    """Five objects of four views that are red by 10 n + view; the third one has a caption."""
    root = tmp_path / "views"
    for number in range(1, 6):
        rgba = np.zeros((4, 16, 16, 4))
        rgba[:, 4:12, 4:12, 3] = 1
        rgba[..., 0] = (10 * number + np.arange(4)[:, None, None]) / 255
        caption = "a given one" if number == 3 else ""
        views.write_object(root / f"o{number}", rgba, cameras.orbit(4, 0.1, 16), caption, 0.1, {"more": 1})
    return root


def captions(root):
    return {path.name: views.read_metadata(path)["caption"] for path in views.find_objects(root)}


def caption(world, objects, *more):
    world.run("caption", "--views", objects, "--model", "models/redness", *more)


def test_the_likeliest_view_speaks_and_given_captions_stay(world, objects, counter, capsys):
    caption(world, objects, "--views-per-object", 2, "--batch-size", 3)
    assert captions(objects) == {"o1": "red 12", "o2": "red 22", "o3": "a given one"} | {
        f"o{n}": f"red {10 * n + 2}" for n in (4, 5)
    }
    assert counter.seen == [2, 2, 2, 2]
    assert "4 objects got a caption, 1 had one" in capsys.readouterr().out
    metadata = json.loads((objects / "o1/metadata.json").read_text())
    origin = metadata["caption_origin"]
    assert (origin["model"], origin["model_sha256"], origin["views_per_object"]) == ("redness", "00ff", 2)
    assert metadata["more"] == 1 and metadata["elevation_deg"] == pytest.approx(np.rad2deg(0.1))
    assert world.build(objects, objects.parent / "data")[0]["caption"] == "red 12"


def test_views_are_joined_and_batches_hold_several_objects(world, objects, counter):
    caption(world, objects, "--combine", "joined", "--views-per-object", 4, "--batch-size", 8)
    assert captions(objects)["o5"] == "red 50; red 51; red 52; red 53"
    assert counter.seen == [8, 8]


def test_an_interrupted_run_goes_on(world, objects, counter, monkeypatch):
    once = ["--views-per-object", 2, "--batch-size", 2, "--replace"]
    monkeypatch.setattr(counter, "stop_after", 2)
    with pytest.raises(KeyboardInterrupt):
        caption(world, objects, *once)
    assert captions(objects) == {"o1": "red 12", "o2": "red 22", "o3": "a given one", "o4": "", "o5": ""}
    monkeypatch.setattr(counter, "stop_after", 99)
    caption(world, objects, *once)
    assert len(counter.seen) == 3  # the two that were done are not done again
    assert captions(objects)["o3"] == "red 32"
    assert views.read_metadata(objects / "o3")["caption_before"] == "a given one"
    caption(world, objects, *once)
    assert not counter.seen
    caption(world, objects, *once, "--num-beams", 2)
    assert len(counter.seen) == 5 and views.read_metadata(objects / "o3")["caption_before"] == "a given one"


def test_parts_share_the_objects(world, objects, counter):
    caption(world, objects, "--part", "1/2")
    assert [name for name, text in captions(objects).items() if text.startswith("red")] == ["o2", "o4"]


def test_objects_that_cannot_be_read_are_named(world, objects, counter, capsys, user_error):
    (objects / "o1/metadata.json").write_text("[]")
    (objects / "o2/images/000.png").write_text("no picture")
    rgba = np.zeros((4, 16, 16, 4))
    rgba[..., 3] = 1
    views.write_object(objects / "o6", rgba, cameras.orbit(4, 0.1, 16), "", 0.1)
    caption(world, objects)
    printed = capsys.readouterr()
    assert "2 objects got a caption, 1 had one, 1 got an empty one, which was not written, 2 skipped" in (
        printed.out
    )
    assert "skipped o1: its metadata.json" in printed.err and "skipped o2: " in printed.err
    assert "o6: the network says nothing of it" in printed.err
    with user_error("more than --max-skipped 1 objects"):
        caption(world, objects, "--max-skipped", 1)


def test_a_caption_txt_is_a_given_caption(world, objects, counter):
    (objects / "o1/metadata.json").unlink()
    (objects / "o1/caption.txt").write_text("a mug")
    caption(world, objects)
    assert captions(objects)["o1"] == "a mug" and not (objects / "o1/metadata.json").exists()


def test_a_network_writes_captions(world, rendered, copied, blip):
    world.run("caption", "--views", copied, "--model", blip, "--replace", "--max-tokens", 4)
    network = captioning.Captioner(blip, max_tokens=4)
    for directory in views.find_objects(copied):
        metadata = views.read_metadata(directory)
        rgba = views.read_object(directory, "x").views
        assert len(rgba) == world.views
        pictures = np.rint(views.read_pictures(directory, 4) * 255).astype(np.uint8)
        best = max(network.caption(list(pictures)), key=lambda each: each.score)
        assert metadata["caption"] == best.text
        assert metadata["caption_before"] == views.read_metadata(rendered / directory.name)["caption"]
        assert metadata["caption_origin"]["model_sha256"] == hosting.digest(blip)


def test_numbers_below_one_are_refused(world, objects, user_error):
    with user_error("--batch-size: '0' is not a whole number from 1"):
        caption(world, objects, "--batch-size", 0)
    with user_error("no config.json in 'models/redness'"):
        caption(world, objects)
