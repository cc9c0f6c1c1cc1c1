"""`im3d dataset build`: which objects become records, in which split, and with what encoders make of them."""

import hashlib
import json

import numpy as np
import pytest

from im3d_jax import config_flags
from im3d_jax.autoencoders import patches
from im3d_jax.conditions.encoders import ImageEncoder, PretrainedText
from im3d_jax.data import views
from im3d_jax.data.turntables import TurntableSource, read_splits
from recon_torch.errors import UserError
from recon_torch.views import cameras
from recon_torch.views.images import read_image, write_image

pytestmark = pytest.mark.slow


def spoil(rendered):
    """Makes three of the objects unfit."""
    first, second, third, *_ = sorted(path for path in rendered.iterdir() if path.is_dir())
    (first / "metadata.json").unlink()
    (second / "images/001.png").write_text("no picture")
    frames = (third / "transforms.json").read_text().replace('"h": 16', '"h": 17')
    (third / "transforms.json").write_text(frames)


def test_unfit_objects_are_named_and_skipped(world, copied, tmp_path, capsys):
    spoil(copied)
    source = world.build(copied, tmp_path / "data", "--max-skipped", 3)
    printed = capsys.readouterr()
    assert [source[n]["id"][-8:] for n in range(3)] == [f"{world.first + n:08d}" for n in (3, 4, 5)]
    assert "3 in train; 3 skipped" in printed.out
    for number, why in enumerate(["it has no caption", "cannot read", "is 16x16 px"]):
        assert f"im3d: skipped {world.first + number:08d}: " in printed.err and why in printed.err
    with pytest.raises(UserError, match=r"more than --max-skipped 2 .*: 00020000: it has no caption"):
        world.build(copied, tmp_path / "more", "--max-skipped", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "views"]


def test_objects_of_another_size_are_skipped(world, copied, tmp_path, capsys):
    rgba = np.zeros((2, world.size, world.size, 4))
    rgba[:, 4:12, 4:12] = 1
    views.write_object(copied / "zz", rgba, cameras.orbit(2, 0.1, world.size), "", 0.1)
    assert len(world.build(copied, tmp_path / "data")) == world.objects
    assert "zz: it has 2 views of 16 px, the first object 4 views of 16 px" in capsys.readouterr().err


def test_splits_hold_each_object_once(world, rendered, tmp_path):
    world.build(rendered, tmp_path / "data", split="train=0.5,validation=0.2,test=0.3")
    counts = read_splits(tmp_path / "data")
    assert sum(counts.values()) == world.objects
    sources = [TurntableSource(tmp_path / "data", split) for split, count in counts.items() if count]
    names = [source[n]["id"][-8:] for source in sources for n in range(len(source))]
    assert sorted(names) == [f"{world.first + n:08d}" for n in range(world.objects)]


def test_what_encoders_make_is_stored(world, rendered, tmp_path, clip, clip_vision):
    text = dict(kind="clip", path=str(clip / "text_encoder"), max_length=16)
    vision = clip_vision(24)
    (tmp_path / "config.py").write_text(
        "from configs import tiny\n"
        "def get_config():\n"
        "    config = tiny.get_config()\n"
        f"    config.size = {world.size}\n"
        "    config.backbone.kwargs.latent_shape = (4, 4, 64)\n"
        f"    config.text = dict(name='pretrained', kwargs=dict(encoders=({text!r},)))\n"
        f"    config.image_encoder.path = {vision!r}\n"
        "    return config\n"
    )
    source = world.build(
        rendered, tmp_path / "data", "--embed", "--latents", f"--config={tmp_path / 'config.py'}"
    )
    plain = world.build(rendered, tmp_path / "plain")
    encoder, image_encoder, codec = PretrainedText([text]), ImageEncoder(vision), patches.Patches(4)
    for number in (0, 5):
        example, pictures = source[number], plain[number]
        embeddings, mask = encoder.encode([pictures["caption"]])
        np.testing.assert_allclose(example["text"][0], embeddings[0][0], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(example["text_mask"][0], mask[0][0])
        tokens = image_encoder.encode(pictures["rgb"][:1])[0]
        np.testing.assert_allclose(example["image_tokens"], tokens, rtol=1e-3, atol=1e-3)
        latents = codec.encode(pictures["rgb"], pictures["alpha"])
        np.testing.assert_allclose(example["latents"], latents, atol=1e-3)
        assert "rgb" not in example
    assert source.metadata["text_encoders"] == [encoder.encoders[0].digest]
    assert source.metadata["autoencoder"] == config_flags.load("configs/tiny.py").autoencoder.to_dict()


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def names_in(path, split):
    source = TurntableSource(path, split)
    return [source[number]["id"].split("/", 2)[2] for number in range(len(source))]


def test_a_split_file_decides(world, rendered, tmp_path, capsys):
    names = [f"{world.first + n:08d}" for n in range(world.objects)]
    lists = {"train": [*names[3:5], "nobody"], "validation": [], "test": names[:2]}
    file = write_json(tmp_path / "split.json", lists)
    selection = write_json(tmp_path / "selection.json", {"names": [*names[1:], "gone"]})
    out = tmp_path / "data"
    world.run("build", "--views", rendered, "--out", out, "--split-file", file, "--selection", selection)
    assert read_splits(out) == {"train": 2, "validation": 0, "test": 1}
    assert (names_in(out, "train"), names_in(out, "test")) == (names[3:5], names[1:2])
    printed = capsys.readouterr().err
    assert "1 names in the split file have no object: nobody" in printed
    assert "1 names in the selection have no object: gone" in printed
    assert f"2 objects have no split and are left out: {names[2]}, {names[5]}" in printed
    metadata = TurntableSource(out).metadata
    for key, path in (("split_file", file), ("selection", selection)):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert metadata[key] == {"name": path.name, "sha256": sha256}


def test_a_split_file_without_these_objects_is_refused(world, rendered, tmp_path, user_error):
    file = write_json(tmp_path / "split.json", {"train": ["nobody"]})
    with user_error("none of the 6 objects .* is selected and in a split"):
        world.run("build", "--views", rendered, "--out", tmp_path / "data", "--split-file", file)
    with user_error("not allowed with argument"):
        world.build(rendered, tmp_path / "data", "--split-file", file)


def test_the_digest_is_that_of_the_sources(world, copied, tmp_path):
    def sources(name, **options):
        return world.build(copied, tmp_path / name, **options).metadata["sources"]

    first = sources("first")
    assert first["num_objects"] == world.objects and first["num_meshes"] == 0
    assert sources("second", split="train=0.5,test=0.5") == first
    directory = copied / f"{world.first + 2:08d}"
    picture = directory / "images/001.png"
    rgba = read_image(picture)
    rgba[5, 5] = 1 - rgba[5, 5]
    write_image(picture, rgba)
    other = sources("picture")
    assert other["sha256"] != first["sha256"]
    views.write_caption(directory, "another caption", {})
    assert sources("caption")["sha256"] not in (first["sha256"], other["sha256"])
