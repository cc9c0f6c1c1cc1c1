"""The part `assets` with a worker that paints each view in a colour that tells the position of its camera."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from im3d_jax.autoencoders.patches import Patches
from im3d_jax.clips import Clip
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.evaluate import assets
from im3d_jax.evaluate.truth import Truth
from im3d_jax.generator import Generator
from im3d_jax.settings import RoundSettings, VideoSettings

pytestmark = pytest.mark.slow

NUM_VIEWS, SIZE, INDEX = 4, 32, 7
TRUE_RAD, ESTIMATED_RAD = 0.4, 0.25
SETTINGS = dict(seed=0, until_steps=(2, 4, 6))


def paint(positions):
    """[K, H, W, 3]: each view has the one colour 0.5 + position / 8."""
    return np.broadcast_to(
        0.5 + np.asarray(positions)[:, None, None] / 8, (len(positions), SIZE, SIZE, 3)
    ).astype("f4")


def on_orbit(elevation_rad, azimuths_deg):
    a, e = np.deg2rad(azimuths_deg), elevation_rad
    return 2 * np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.full(len(a), np.sin(e))], -1)


def truth_at(azimuths_deg):
    rgb = paint(on_orbit(TRUE_RAD, azimuths_deg))[None]
    return Truth([INDEX], ["a mug"], ["mug"], np.array([TRUE_RAD]), rgb, np.ones_like(rgb[..., :1]))


class Worker:
    """A `ReconstructionClient` that paints what it renders, always into the same memory."""

    step, num_gaussians, notes = 0, 0, []

    def inspect(self, *_):
        raise AssertionError("an evaluation needs neither verdicts nor files")

    export = close = inspect

    def __init__(self):
        self.views, self.renders = torch.zeros(2, NUM_VIEWS, SIZE, SIZE, 3)
        self.masks, self.alphas = torch.zeros(2, NUM_VIEWS, SIZE, SIZE, 1)
        self.fitted = []

    def reset(self, cameras):
        self.cameras, self.step = cameras, 0

    def set_targets(self, weights=None):
        self.fitted.append((self.cameras, self.views.numpy().copy()))

    def fit(self, until_step, on_progress):
        self.step = until_step
        return {"psnr": 0.0}

    def render(self, cameras=None):
        self.renders.copy_(torch.from_numpy(paint((cameras or self.cameras).positions)))
        self.alphas.fill_(1)
        return self.renders, self.alphas


class Darkening(Generator):
    """A generator whose videos are grey and which darkens what it refines. It loads nothing."""

    def __init__(self):
        pass

    codec = Patches(patch=4)
    turn = contextlib.nullcontext()
    size, clip = SIZE, Clip(NUM_VIEWS)
    video, rounds = VideoSettings(num_steps=1), RoundSettings(num_runs=1, num_steps=1)

    def condition(self, captions, rgb, alpha):
        assert captions == ["a mug"]
        return Conditioning(self.codec.encode(rgb, alpha), jnp.ones(1), (), ())

    def decode_clip(self, latents):
        return self.codec.decode(latents)

    def turntable(self, given, key, on_step):
        return jnp.zeros((1, NUM_VIEWS, *given.image.shape[1:]))

    def refine(self, renders, given, key, on_step):
        return renders - 0.125


class Empty(Generator):
    """A generator that cannot do anything."""

    def __init__(self):
        pass


def estimator(frames):
    return torch.full((len(frames),), ESTIMATED_RAD)


@pytest.fixture(scope="module")
def run(perceptual, tmp_path_factory):
    worker, directory = Worker(), tmp_path_factory.mktemp("assets")
    truth, between = truth_at([0, 90, 180, 270]), truth_at([45, 135, 225, 315])
    kept = dict(directory=directory, key="key")
    result = assets.measure(Darkening(), worker, estimator, truth, between, perceptual, **SETTINGS, **kept)
    return result, worker, directory


def test_unseen_views_are_rendered_from_the_true_cameras_after_every_round(run):
    [row] = run[0]["objects"]
    assert row["index"] == INDEX
    for name in ("estimated", "true"):
        assert len(row["fits"][name]["rounds"]) == 3
        for score in row["fits"][name]["rounds"]:
            assert score["psnr"] > 90 and score["silhouette_iou"] == 1


def test_fits_use_the_elevation_they_are_named_after(run):
    [row] = run[0]["objects"]
    assert row["fits"]["estimated"]["elevation_deg"] == pytest.approx(np.rad2deg(ESTIMATED_RAD))
    heights = [cameras.positions[:, 2].mean() for cameras, _ in run[1].fitted]
    expected = [2 * np.sin(ESTIMATED_RAD)] * 3 + [2 * np.sin(TRUE_RAD)] * 3
    assert heights == pytest.approx(expected, rel=1e-5)


def test_rounds_refine_the_turntable_and_not_the_unseen_views(run):
    for number, (cameras, targets) in enumerate(run[1].fitted):
        video, refined = np.full_like(targets, 0.5), paint(cameras.positions) - 0.125 / 2  # in latents 0.125
        expected = video if number % 3 == 0 else refined
        np.testing.assert_allclose(targets, expected, atol=1e-6)


def test_a_second_run_keeps_what_was_measured(run, perceptual):
    result, _, directory = run
    truth = truth_at([0, 90, 180, 270])
    models = Empty(), Worker(), estimator, truth, truth, perceptual
    again = assets.measure(*models, **SETTINGS, directory=directory, key="key")
    assert again == result
    with pytest.raises(AttributeError):  # under another key it would measure
        assets.measure(*models, **SETTINGS, directory=directory, key="other key")
