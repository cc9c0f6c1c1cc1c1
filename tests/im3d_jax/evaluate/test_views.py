"""The parts `views` and `prompts` with a generator that knows the truth."""

import numpy as np
import pytest

from im3d_jax.autoencoders.patches import Patches
from im3d_jax.evaluate import prompts, views
from im3d_jax.evaluate.truth import Truth, azimuths_between_rad, mean_turntable
from im3d_jax.generator import Generator
from im3d_jax.settings import TextToImageSettings, VideoSettings
from recon_torch.views.images import read_image

pytestmark = pytest.mark.slow

OBJECTS, NUM_VIEWS, SIZE = 5, 4, 32  # one object more than a batch
CAPTIONS = [f"object {i}" for i in range(OBJECTS)]


class Oracle(Generator):
    """A generator that knows the turntable of a first view and caption, and draws black without a caption."""

    codec = Patches(patch=4)
    video, image = VideoSettings(num_steps=1), TextToImageSettings(num_steps=1)

    def __init__(self, truth):
        self.truth = truth
        self.latents = np.asarray(self.codec.encode(truth.rgb, truth.alpha))

    def condition(self, captions, rgb, alpha):
        images = self.codec.encode(rgb, alpha)
        return list(zip(captions, np.asarray(images), strict=True))

    def decode(self, latents):
        return self.codec.decode(latents)

    def turntable(self, given, key, on_step):
        on_step(0, None)
        return np.stack([self._answer(caption, image) for caption, image in given])

    def text_to_image(self, prompts, key, on_step):
        return self.decode(self.latents[[CAPTIONS.index(prompt) for prompt in prompts], 0])

    def _answer(self, caption, image):
        b = next(b for b in range(OBJECTS) if np.array_equal(self.latents[b, 0], image))
        assert caption in ("", CAPTIONS[b])
        return self.latents[b] if caption else np.full_like(self.latents[b], -1)


def estimator(frames):
    """Takes the mean colour for the elevation."""
    return frames.mean((1, 2, 3, 4))


@pytest.fixture(scope="module")
def truth():
    rng = np.random.default_rng(0)
    rgb = rng.random((OBJECTS, NUM_VIEWS, SIZE, SIZE, 3), np.float32)
    alpha = rng.random((OBJECTS, NUM_VIEWS, SIZE, SIZE, 1), np.float32)
    return Truth(list(range(OBJECTS)), CAPTIONS, ["mug"] * OBJECTS, np.full(OBJECTS, 0.3), rgb, alpha)


@pytest.fixture(scope="module")
def measured(truth, perceptual, tmp_path_factory):
    sheet = tmp_path_factory.mktemp("views") / "views.png"
    oracle = Oracle(truth)
    mean = mean_turntable(truth)
    measured = views.measure(oracle, oracle, estimator, truth, mean, perceptual, seed=0, sheet=sheet)
    return measured, sheet


def psnr(rgb, true_rgb):
    """Mean of the views' PSNRs, in float64."""
    return np.mean(-10 * np.log10(((rgb.astype(float) - true_rgb) ** 2).mean((1, 2, 3))))


def scores_of(measured, name):
    return [row["scores"][name] for row in measured[0]["objects"]]


def test_the_true_views_score_best(measured):
    for score in scores_of(measured, views.GENERATED) + scores_of(measured, "one step, image and caption"):
        assert score["psnr"] > 90 and score["silhouette_iou"] == 1 and score["lpips"] < 1e-6


def test_image_alone_is_without_the_caption(measured, truth):
    for b, score in enumerate(scores_of(measured, "generated, image alone")):
        assert score["psnr"] == pytest.approx(
            psnr(np.zeros_like(truth.rgb[b, 1:]), truth.rgb[b, 1:]), rel=1e-5
        )


def test_baselines_over_all_views_but_the_first(measured, truth):
    training_mean = truth.rgb.astype(float).mean(0)
    for b in range(OBJECTS):
        rgb = truth.rgb[b]
        row = measured[0]["objects"][b]["scores"]
        assert row[views.REPEATED]["psnr"] == pytest.approx(psnr(rgb[[0, 0, 0]], rgb[1:]), rel=1e-5)
        assert row[views.TRAINING_MEAN]["psnr"] == pytest.approx(psnr(training_mean[1:], rgb[1:]), rel=1e-5)
        own = np.broadcast_to(rgb.astype(float).mean(0), rgb[1:].shape)
        name = "bound on blur: the object's own mean view"
        assert row[name]["psnr"] == pytest.approx(psnr(own, rgb[1:]), rel=1e-5)


def test_elevation_is_estimated_from_the_generated_views(measured, truth):
    for b, row in enumerate(measured[0]["objects"]):
        assert row["estimated_elevation_deg"] == pytest.approx(np.rad2deg(truth.rgb[b].mean()), rel=1e-4)
        assert row["elevation_deg"] == pytest.approx(np.rad2deg(0.3))


def test_sheet_has_two_rows_for_each_object(measured):
    height = read_image(measured[1]).shape[0]
    assert height == 2 * OBJECTS * (64 + 2) + 2


def test_measuring_twice_gives_the_same(measured, truth, perceptual, tmp_path):
    oracle, sheet = Oracle(truth), tmp_path / "again.png"
    mean = mean_turntable(truth)
    again = views.measure(oracle, oracle, estimator, truth, mean, perceptual, seed=0, sheet=sheet)
    assert again == measured[0]
    assert sheet.read_bytes() == measured[1].read_bytes()


def test_prompts_of_true_turntables_change_as_the_truth_does(truth, perceptual, tmp_path):
    sheet = tmp_path / "prompts.png"
    rows = prompts.measure(Oracle(truth), truth, perceptual, seed=0, sheet=sheet)["objects"]
    assert [row["prompt"] for row in rows] == CAPTIONS
    for row in rows:
        assert row["neighbour_lpips"] == pytest.approx(row["true_neighbour_lpips"], rel=1e-3)
    assert sheet.is_file()


def test_sheets_take_at_most_eight_views():
    pictures = np.zeros((16, 2, 2, 3)) + np.arange(16)[:, None, None, None] / 16
    assert views.for_sheet(pictures)[:, 0, 0, 0].tolist() == [k / 16 for k in range(0, 16, 2)]
    assert len(views.for_sheet(pictures[:4])) == 4


def test_azimuths_between_are_half_a_step_off():
    assert np.rad2deg(azimuths_between_rad(4)).tolist() == pytest.approx([45, 135, 225, 315])
