"""CLIP scores of Table 1, against a few lines of torch on the same CLIP, and cases worked out by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from im3d_jax.commands import evaluate
from im3d_jax.data.clip import Clip
from im3d_jax.evaluate import faithfulness, result_file
from im3d_jax.evaluate.outputs import finding
from im3d_jax.evaluate.outputs.layouts import Source
from recon_torch.views.images import write_image

RNG = np.random.default_rng(0)
PROMPTS = {"a cat": "cat.png", "b": "b.png", "a b c": "gone.png"}


def write_outputs(root, prompts, num_views=3, channels=4, seed=0):
    """Folders of random pictures with random alpha."""
    rng = np.random.default_rng(seed)
    for prompt in prompts:
        for view in range(num_views):
            pixels = rng.integers(0, 256, (20, 20, channels), np.uint8)
            write_image(root / prompt.replace(" ", "_") / f"{view}.png", pixels)


@pytest.fixture
def asked(tmp_path):
    """A list of prompts, two of which have a picture."""
    for name in ("cat.png", "b.png"):
        write_image(tmp_path / name, RNG.integers(0, 256, (20, 20, 3), np.uint8))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "image": i}) + "\n" for p, i in PROMPTS.items()))
    return path


@pytest.fixture
def command(whole_clip, tmp_path):
    def run(*flags, out="out"):
        fixed = [f"--clip={whole_clip}", f"--out={tmp_path / out}", "--resamples=200"]
        evaluate.main(["faithfulness", *map(str, flags), *fixed])
        return result_file.read(tmp_path / out)

    return run


def plainly(clip, views, prompt, picture):
    """The two scores of one row, with nothing but transformers, torch and Pillow."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    images = []
    for path in [*views, picture]:
        image = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        images.append(Image.alpha_composite(white, image).convert("RGB"))
    with torch.no_grad():
        out = model(**processor(text=[prompt], images=images, return_tensors="pt", padding=True))
    image_embeds = out.image_embeds / out.image_embeds.norm(dim=-1, keepdim=True)
    text_embeds = out.text_embeds / out.text_embeds.norm(dim=-1, keepdim=True)
    text, image = image_embeds[:-1] @ text_embeds[0], image_embeds[:-1] @ image_embeds[-1]
    return 100 * float(text.mean()), 100 * float(image.mean())


@pytest.mark.slow
def test_scores_are_those_of_a_few_lines_of_torch(command, whole_clip, asked, tmp_path, capsys):
    write_outputs(tmp_path / "one", PROMPTS)
    write_outputs(tmp_path / "two", ["a cat", "b"], seed=1)
    found = command(
        *(f"--method={name}={tmp_path / name}" for name in ("one", "two")),
        f"--prompts={asked}",
        "--batch-size=2",
    )
    rows = {(row.method, row.prompt): row.scores for row in result_file.rows_of(found)}
    for name, prompt in (("one", "a cat"), ("one", "b"), ("two", "b")):
        views = sorted((tmp_path / name / prompt.replace(" ", "_")).iterdir())
        expected = plainly(whole_clip, views, prompt, tmp_path / PROMPTS[prompt])
        scores = rows[f"{name}, renders", prompt]
        np.testing.assert_allclose([scores["clip_text"], scores["clip_image"]], expected, atol=0.05)
    assert rows["one, renders", "a b c"]["clip_image"] is None
    assert ("two, renders", "a b c") not in rows

    told = capsys.readouterr()
    assert "one, renders: without a picture, so without CLIP (image): 1 row (a b c)" in told.err
    assert "two, renders: left out, missing: 1 name (a b c)" in told.err
    assert "| IM-3D, views (Table 1, as published) |  |  | 31.92 | 92.38 | 3 |" in told.out
    assert "| one, renders | 3 | 3 |" in told.out and "| IM-3D (as published) | 80 |" in told.out
    text = {
        name: [rows[f"{name}, renders", p]["clip_text"] for p in ("a cat", "b")] for name in ("one", "two")
    }
    difference = next(each for each in found["differences"] if each["score"] == "clip_text")
    assert difference["mean"] == pytest.approx(np.mean(text["one"]) - np.mean(text["two"]), abs=1e-4)
    assert difference["num_rows"] == 2
    summary = next(each for each in found["summary"] if each["method"] == "two, renders")
    assert summary["std"] == pytest.approx(np.std(text["two"], ddof=1), abs=1e-4)
    assert found["weights_digest"] == found["protocol"]["clip"]["sha256"] == Clip(whole_clip).digest
    assert found["protocol"]["clip"]["preprocessing"]["crop_size"] == {"height": 16, "width": 16}
    assert found["published"][2]["network_calls"] == 80


class Corners:
    """A CLIP by hand: red, green and blue are its axes, of pictures and of words."""

    max_tokens = 4
    AXES = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "red or green": (0.5**0.5, 0.5**0.5, 0)}

    def embed_pictures(self, pictures):
        means = np.array([picture.mean((0, 1)) for picture in pictures])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def embed_captions(self, captions):
        return np.array([self.AXES[each] for each in captions], float), np.array([False] * len(captions))


def test_a_case_by_hand(tmp_path):
    colors = {"red": (255, 0, 0), "green": (0, 255, 0), "clear": (0, 0, 255, 0)}
    for prompt, views in {"red": ("red", "green", "green", "green"), "red or green": ("red",) * 4}.items():
        for number, view in enumerate(views):
            write_image(tmp_path / "x" / prompt / f"{number}.png", np.full((4, 4, 3), colors[view], np.uint8))
    write_image(tmp_path / "red.png", np.full((4, 4, 4), colors["clear"], np.uint8))  # white: (1, 1, 1)
    [outputs] = finding.find(Source("x", tmp_path / "x"))
    scorer = faithfulness.Scorer(Corners(), {"red": tmp_path / "red.png"}, batch_size=3)
    red, either = faithfulness.measure([outputs], scorer)
    assert red.scores == {"clip_text": pytest.approx(25.0), "clip_image": pytest.approx(100 / 3**0.5)}
    assert either.scores == {"clip_text": pytest.approx(100 * 0.5**0.5), "clip_image": None}
    [outputs] = finding.find(Source("x", tmp_path / "x"))
    two = list(faithfulness.measure([outputs], scorer, num_views=2))  # views 0 and 2
    assert two[0].scores["clip_text"] == pytest.approx(50.0)


def test_other_pictures_of_one_prompt_are_said(tmp_path):
    rows = []
    for name, color in (("x", 255), ("y", 100)):
        write_image(tmp_path / name / "red/0.png", np.full((4, 4, 3), (255, 0, 0), np.uint8))
        write_image(tmp_path / f"{name}.png", np.full((4, 4, 3), (color, 255, 0), np.uint8))
        [outputs] = finding.find(Source(name, tmp_path / name))
        rows += faithfulness.measure(
            [outputs], faithfulness.Scorer(Corners(), {"red": tmp_path / f"{name}.png"})
        )
    methods = [{"name": name} for name in ("x, renders", "y, renders")]
    [line] = faithfulness.other_pictures(result_file.content("faithfulness", {}, rows, methods=methods))
    assert line.startswith("x, renders and y, renders have other pictures for 1 of their rows")


def test_pictures_that_are_not_used_or_lack_are_named(tmp_path):
    for name in ("red", "green"):
        write_image(tmp_path / "x" / name / "0.png", np.full((4, 4, 3), (255, 0, 0), np.uint8))
        write_image(tmp_path / f"{name}.png", np.full((4, 4, 3), (255, 0, 0), np.uint8))
    [outputs] = finding.find(Source("x", tmp_path / "x"))
    outputs.rows["green"] = outputs.rows["green"]._replace(picture=tmp_path / "green.png")
    scorer = faithfulness.Scorer(Corners(), {each: tmp_path / "red.png" for each in ("red", "rde")})
    list(faithfulness.measure([outputs], scorer))
    assert scorer.about() == [
        "x, renders: not in --pictures, so compared with what it was made from: 1 row (green)",
        "--pictures has 1 picture (rde) of no row",
    ]


def test_what_is_left_is_nothing(command, tmp_path, user_error):
    write_outputs(tmp_path / "one", ["a cat"])
    (tmp_path / "one/a_cat/1.png").write_bytes(b"no picture")
    with user_error("nothing is left to score .*one, renders: left out, unreadable: 1 name"):
        command(f"--method=one={tmp_path / 'one'}")
    assert not (tmp_path / "out").exists()


MISTAKES = {
    "--method one": "is not NAME=DIR, PRESET:NAME=DIR or a YAML file",
    "--method one=gone": "gone is no directory",
    "--method nothing:one=out": "unknown preset 'nothing'",
    "--method one={one} --method one={one}": "two methods are called 'one, renders'",
    "--method one={one} --num-views 0": "is not a whole number from 1",
    "--method one={one} --prompts gone.txt": "gone.txt cannot be read",
    "--method one={one} --pictures gone": "--pictures gone is no directory",
    "--method one={one} --clip gone": "--clip: no config.json in 'gone'",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_one_line(flags, tmp_path, user_error):
    write_outputs(tmp_path / "one", ["a cat"], num_views=1)
    given = flags.format(one=tmp_path / "one").split()
    with user_error(MISTAKES[flags]):
        evaluate.main(["faithfulness", f"--clip={tmp_path}", f"--out={tmp_path / 'out'}", *given])
    assert not (tmp_path / "out").exists()


def test_unknown_commands_are_named(user_error):
    with user_error("im3d evaluate has no 'faithfulnes'; it has .*; is it 'faithfulness'"):
        evaluate.main(["faithfulnes"])
