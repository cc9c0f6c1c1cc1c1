"""`im3d generate` makes an asset with every backbone, tiny and of random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from im3d_jax import backbones, main
from im3d_jax.backbones.svd import triangular
from recon_torch.views.transforms import read_transforms

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_client")]

ROOT = Path(__file__).parents[2]
SIZE, LATENT = 32, (8, 8, 4)
CONFIG = """
from configs import tiny

def get_config():
    config = tiny.get_config()
    for name, value in CHANGES.items():
        config[name] = value
    config.text_to_image.num_steps = 1
    with config.ignore_type():  # a number for all views, or one for each
        config.video.update(num_steps=2, w_image=2.0, w_text=0.0)
    config.rounds.update(at_steps=(4, 6), num_steps=1)
    config.fit.update(num_gaussians=100, num_steps=8, lpips_net="alex")
    config.turntable.update(num_frames=2, size=SIZE)
    return config
"""


def small(name, **kwargs):
    return dict(name=name, kwargs=backbones.small_kwargs(name) | dict(latent_shape=LATENT) | kwargs)


def case(name, clip, t5, clip_vision):
    """Changes to the tiny config, and how many views there are."""
    if name == "emu_video":
        encoders = (
            dict(kind="clip", path=f"{clip}/text_encoder", max_length=16),
            dict(kind="t5", path=str(t5)),
        )
        text = dict(name="pretrained", kwargs=dict(encoders=encoders))
        return dict(backbone=small("emu_video", text_dims=(32, 24)), text=text), 4
    if name == "svd":
        vision = dict(path=clip_vision(24))
        backbone = small("svd", num_views=4)
        return dict(backbone=backbone, text=dict(name="none", kwargs={}), image_encoder=vision), 4
    if name == "sv3d_p":
        kwargs = dict(vector="sv3d_p", input_view="last", num_views=5)
        changes = dict(backbone=small("svd", **kwargs), text=dict(name="none", kwargs={}))
        return changes | dict(image_encoder=dict(path=clip_vision(24))), 5
    encoders = (dict(kind="clip", path=f"{clip}/text_encoder", max_length=5),)
    text = dict(name="pretrained", kwargs=dict(encoders=encoders))
    kwargs = {}
    if name == "torch_hosted":
        kwargs["kwargs"] = backbones.small_kwargs(name)["kwargs"] | dict(cross_attention_dim=32)
    return dict(backbone=small(name, **kwargs), text=text, image_encoder=dict(path=clip_vision(32))), 4


@pytest.fixture
def picture(tmp_path):
    rows, columns = np.mgrid[:60, :60]
    inside = np.hypot(rows - 20, columns - 30) < 15
    Image.fromarray(np.where(inside[..., None], [200, 30, 40], 255).astype(np.uint8)).save(
        tmp_path / "ball.png"
    )
    return tmp_path / "ball.png"


@pytest.fixture
def write_config(vae, tmp_path):
    """(changes, number of views) -> a config file: the tiny one, shrunk, with the changes."""

    def write(changes, num_views):
        shrunk = dict(size=SIZE, num_views=num_views, weights="random")
        shrunk |= dict(autoencoder=dict(name="autoencoder_kl", kwargs=dict(path=vae))) | changes
        (tmp_path / "config.py").write_text(
            CONFIG.replace("CHANGES", repr(shrunk)).replace("SIZE", str(SIZE))
        )
        return tmp_path / "config.py"

    return write


@pytest.mark.parametrize("name", ["sv3d_p", "unet3d", "torch_hosted"])
def test_every_backbone_makes_an_asset(name, clip, t5, clip_vision, picture, write_config, tmp_path):
    changes, num_views = case(name, clip, t5, clip_vision)
    config = write_config(changes, num_views)
    flags = ["--image", picture, "--prompt", "a cat", "--out", tmp_path / "out", "--save-views"]
    if name == "sv3d_p":  # one weight for each view, and told its cameras
        weights = triangular(num_views, 1.0, 2.5)
        config.write_text(config.read_text().replace("w_image=2.0", f"w_image={tuple(map(float, weights))}"))
        flags.append("--config.elevation.deg=12.0")
    assert main.run(["generate", f"--config={config}", *map(str, flags)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["network_calls"] == 2 + 2 * 2 * 1
    assert report["network_evaluations"] == 2 * report["network_calls"]
    cameras, paths = read_transforms(tmp_path / "out" / "transforms.json")
    assert len(cameras) == len(paths) == num_views
    if name == "sv3d_p":
        assert report["elevation_deg"] == pytest.approx(12)
    views = [np.asarray(Image.open(tmp_path / "out/views_0" / path), float) for path in paths]
    assert all(view.shape == (SIZE, SIZE, 4) for view in views)
    assert all(np.abs(view - views[0]).mean() > 0.5 for view in views[1:])  # random networks, random views


def test_a_prompt_draws_with_text_alone(clip, t5, clip_vision, write_config, tmp_path):
    changes, num_views = case("emu_video", clip, t5, clip_vision)
    config = write_config(changes, num_views)
    flags = ["--prompt", "a cat", "--out", str(tmp_path / "out")]
    assert main.run(["generate", f"--config={config}", *flags]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["text_to_image_calls"] == 1 and report["network_calls"] == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_encoder=dict(path="")), "set config.image_encoder.path"),
        (dict(num_views=5), "config.num_views is 5, but svd makes 4"),
        (dict(weights=""), "config.weights is empty"),
    ],
)
def test_parts_that_do_not_go_together_are_named(
    changes, message, clip_vision, picture, write_config, tmp_path, capsys
):
    whole, num_views = case("svd", None, None, clip_vision)
    config = write_config(whole | changes, changes.get("num_views", num_views))
    flags = ["--image", str(picture), "--out", str(tmp_path / "out")]
    assert main.run(["generate", f"--config={config}", *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_backbone_without_text_asks_for_a_picture(clip_vision, write_config, tmp_path, capsys):
    whole, num_views = case("svd", None, None, clip_vision)
    config = write_config(whole, num_views)
    flags = ["--prompt", "a cat", "--out", str(tmp_path / "out")]
    assert main.run(["generate", f"--config={config}", *flags]) == 2
    assert "svd takes no prompts; give --image" in capsys.readouterr().err


def test_encoders_of_another_width_are_refused(
    clip, t5, clip_vision, picture, write_config, tmp_path, capsys
):
    changes, num_views = case("emu_video", clip, t5, clip_vision)
    changes["backbone"]["kwargs"]["text_dims"] = (32, 99)
    config = write_config(changes, num_views)
    flags = ["--image", str(picture), "--out", str(tmp_path / "out")]
    assert main.run(["generate", f"--config={config}", *flags]) == 2
    assert "config.text makes widths" in capsys.readouterr().err
