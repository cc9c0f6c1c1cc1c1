"""The 128 px model's configs, shrunk, from views to a turntable step: autoencoder, latents, denoiser."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax import autoencoders, config_flags, config_sections, sharding, tasks
from im3d_jax.commands import dataset, train
from im3d_jax.data import turntables, views
from recon_torch.views.cameras import orbit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SIZE, VIEWS = 32, 2
CONFIG = """
from configs import toys_128

def get_config():
    config = toys_128.get_config()
    config.size = {size}
    config.autoencoder.kwargs.path = {path!r}
    config.backbone.kwargs.update(latent_shape=(4, 4, 12))
    return config
"""


def last_line(workdir):
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The directory of the data sets of pixels."""
    directory = tmp_path_factory.mktemp("toys")
    for name in ("meshes", "procedural"):
        for number in range(4):
            rgba = np.random.default_rng(number).uniform(size=(VIEWS, SIZE, SIZE, 4))
            place = directory / f"{name}_views/{number}"
            views.write_object(place, rgba, orbit(VIEWS, 0.2, SIZE), "a red mug with a blue handle", 0.2)
        build(directory, name, "pixels")
    return directory


def build(directory, name, kind, *flags):
    directories = [f"--views={directory / f'{name}_views'}", f"--out={directory / f'{name}_{kind}'}"]
    dataset.main(["build", *directories, "--split=train=1", *flags])


def load(name, data, **settings):
    """A config of training that reads the data sets in `data`, of one step on few views."""
    config = config_flags.load(ROOT / "configs" / name)
    config.size = SIZE
    for stream in config.train.streams.values():
        stream.update(batch_size=8, num_views=min(stream.num_views, VIEWS), every=1)
        for part in stream.data.mix.values():
            part.path = str(data / Path(part.path).name)
    config.train.update(
        dict(num_steps=1, warmup_steps=0, decay_steps=0, log_every=1, init_from="") | settings
    )
    return config


def test_the_shipped_autoencoder_keeps_hues(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it is found from anywhere
    config = config_flags.load("configs/toys_128.py")
    name, arguments = config_sections.named(config, "autoencoder")
    codec = autoencoders.build(name, arguments, config.size, (16, 16, 12))
    colors = np.array([[0.8, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.3, 0.8], [0.5, 0.3, 0.7]])
    inside = np.hypot(*np.mgrid[-64:64, -64:64]) < 45
    rgb = np.where(inside[..., None], colors[:, None, None], 1.0)[:, None].astype(np.float32)
    alpha = np.broadcast_to(inside[..., None], (4, 1, 128, 128, 1)).astype(np.float32)
    made, coverage = codec.decode(codec.encode(jnp.asarray(rgb), jnp.asarray(alpha)))
    middle = np.hypot(*np.mgrid[-64:64, -64:64]) < 35
    np.testing.assert_allclose(np.asarray(made)[:, 0, middle].mean(1), colors, atol=0.08)
    assert (np.asarray(coverage)[..., 0] > 0.5)[:, 0].mean((1, 2)) == pytest.approx(inside.mean(), abs=0.02)


def test_from_views_to_a_step_on_latents(data, shrunk, tmp_path):
    config = load("autoencoder_128.py", data)
    assert config.autoencoder.kwargs.rgba and config.autoencoder.kwargs.patch_size == 4
    config.autoencoder.kwargs.update(block_out_channels=(8, 16))
    # Untrained, but scaled by the latents of the mixture: a step of this task is tested elsewhere.
    task = tasks.build(config, sharding.make_mesh())
    path = str(task.save(tmp_path, jax.jit(task.init)(jax.random.key(0)), {}))
    (tmp_path / "toys.py").write_text(CONFIG.format(size=SIZE, path=path))
    for name in ("meshes", "procedural"):
        build(data, name, "latents", "--latents", f"--config={tmp_path / 'toys.py'}")
    stored = [turntables.TurntableSource(data / f"{name}_latents") for name in ("meshes", "procedural")]
    latents = np.stack([source[number]["latents"] for source in stored for number in range(4)])
    assert latents.std() == pytest.approx(1, abs=0.1) and latents.shape == (8, VIEWS, 4, 4, 12)

    config = load("toys_128_turntable.py", data)
    small = shrunk().backbone.kwargs
    changed = (
        "model_channels",
        "channel_mult",
        "num_res_blocks",
        "attention_levels",
        "temporal_span",
        "ff_mult",
    )
    config.backbone.kwargs.update(
        {name: small[name] for name in changed}, latent_shape=(4, 4, 12), head_dim=8
    )
    config.autoencoder.kwargs.path = path
    with config.unlocked():
        del config.train.streams["image"]
    # All eight turntables, from view 0, with their image.
    config.train.streams.turntable.update(keep_image=1.0, random_start=0.0)
    for part in config.train.streams.turntable.data.mix.values():
        part.weight = 1.0
    train.train(config, tmp_path / "turntable")
    # At initialisation only what the gate lets through of view 0 is predicted.
    expected = np.mean((latents[:, :1] / (1 + np.exp(3.0)) - latents) ** 2, dtype=np.float64)
    assert last_line(tmp_path / "turntable")["turntable_loss"] == pytest.approx(expected, rel=1e-4)
