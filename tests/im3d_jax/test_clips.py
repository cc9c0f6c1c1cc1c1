"""Clips against what their table says, and the method with an autoencoder that compresses time."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax import clips, config_flags, generator
from im3d_jax.autoencoders.patches import Patches, from_patches, to_patches
from im3d_jax.clips import Clip
from im3d_jax.conditions import conditioning
from im3d_jax.settings import ClipSettings
from recon_torch.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EveryFourth:
    """A stand-in for a causal autoencoder of 4n + 1 pictures: picture 0, then the mean of each four."""

    def latent_shape(self, size):
        return Patches(4).latent_shape(size)

    def num_latents(self, num_pictures):
        if num_pictures % 4 != 1:
            raise UserError(f"{num_pictures} pictures are not 4n + 1")
        return 1 + num_pictures // 4

    def encode(self, rgb, alpha):
        x = to_patches(jnp.concatenate([rgb, alpha], -1) * 2 - 1, 4)
        rest = x[..., 1:, :, :, :].reshape(*x.shape[:-4], -1, 4, *x.shape[-3:]).mean(-4)
        return jnp.concatenate([x[..., :1, :, :, :], rest], -4)

    def decode(self, latents):
        x = jnp.concatenate([latents[..., :1, :, :, :], jnp.repeat(latents[..., 1:, :, :, :], 4, -4)], -4)
        x = jnp.clip(from_patches(x, 4) / 2 + 0.5, 0, 1)
        return x[..., :3], x[..., 3:]

    def clip(self, latents):
        return jnp.clip(latents, -1, 1)


@pytest.mark.parametrize(
    ("clip", "pictures", "latents"),
    [
        (Clip(16), 16, None),
        (Clip(16, closed=True), 17, 5),
        (Clip(16, 5, closed=True), 81, 21),
        (Clip(16, 5), 76, None),
        (Clip(5, 4), 17, 5),
        (Clip(1), 1, 1),
    ],
)
def test_counts_are_those_of_the_table(clip, pictures, latents):
    assert clip.num_pictures == pictures
    if latents is None:
        with pytest.raises(UserError, match=r"not 4n \+ 1; config.num_views \d+ with config.clip"):
            clips.num_latents(clip, EveryFourth())
    else:
        assert clips.num_latents(clip, EveryFourth()) == latents
    assert clips.num_latents(clip, Patches(4)) == pictures


def test_views_are_found_again_among_the_pictures():
    orbit = np.arange(2 * 15, dtype=np.float32).reshape(2, 15)
    for clip, numbers in (
        (Clip(15), [*range(15)]),
        (Clip(15, closed=True), [*range(15), 0]),
        (Clip(5, 3, closed=True), [*range(15), 0]),
        (Clip(5, 3), [*range(13)]),
    ):
        pictures = clip.pictures(orbit)
        np.testing.assert_array_equal(pictures, orbit[:, numbers])
        np.testing.assert_array_equal(clip.views(pictures), orbit[:, :: clip.pictures_per_view])
    assert Clip(5, 3, True).of_orbit(6) == Clip(2, 3, True)
    assert Clip(5, 3, True).of_orbit(1) == Clip(1)
    with pytest.raises(UserError, match="7 pictures of an orbit, and config.clip.pictures_per_view is 3"):
        Clip(5, 3).of_orbit(7)
    assert Clip.of(ClipSettings(pictures_per_view=5, closed=True), 1) == Clip(1)


def test_a_scale_of_each_view_becomes_the_mean_over_the_pictures_of_a_frame():
    scales = tuple(float(x) for x in range(16))
    found = Clip(16, closed=True).of_frames(scales, 5)
    np.testing.assert_allclose(found, [0, 2.5, 6.5, 10.5, np.mean([13, 14, 15, 0])])
    assert Clip(16).of_frames(scales, 16) == scales
    assert Clip(16, closed=True).of_frames(1.5, 5) == 1.5
    between = Clip(2, 4, closed=True).of_frames((0.0, 1.0), 3)  # 9 pictures: 0, 1/4, ..., 1, 3/4, ..., 0
    np.testing.assert_allclose(between, [0, np.mean([0.25, 0.5, 0.75, 1]), np.mean([0.75, 0.5, 0.25, 0])])


def test_closure_is_the_psnr_of_the_foreground():
    rgb, alpha = np.ones((2, 5, 4, 4, 3)), np.zeros((2, 5, 4, 4, 1))
    rgb[:, :, :2], alpha[:, :, :2] = 0.5, 1
    rgb[0, -1, :2] = 0.6  # an error of 0.1 within the object, and none beside it: 20 dB
    found = Clip(4, closed=True).closure_db(jnp.asarray(rgb), jnp.asarray(alpha))
    np.testing.assert_allclose(found, [20, 100], atol=1e-4)
    assert Clip(5).closure_db(jnp.asarray(rgb), jnp.asarray(alpha)) is None


def test_a_padded_clip_is_grey_after_its_picture():
    first = np.random.default_rng(0).random((2, 3, 3, 3)).astype(np.float32)
    padded = clips.padded_clip(jnp.asarray(first), 5)
    np.testing.assert_array_equal(padded[:, 0], first)
    assert (padded[:, 1:] == 0.5).all() and padded.shape == (2, 5, 3, 3, 3)


@pytest.fixture(scope="module")
def compressed():
    """A random generator whose 16 views are 17 pictures in 5 frames."""
    config = config_flags.load("configs/tiny.py")
    config.size, config.video.num_steps, config.rounds.num_steps = 8, 1, 1
    config.backbone.kwargs.update(latent_shape=(2, 2, 64), channel_mult=(1,), num_res_blocks=(1,))
    config.backbone.kwargs.attention_levels = ()
    config.weights = "random"
    loaded = generator.load(config)
    return dataclasses.replace(loaded, codec=EveryFourth(), clip=Clip(16, closed=True))


def test_a_generator_with_compressed_time_makes_all_views(compressed):
    assert (compressed.num_views, compressed.num_frames, compressed.latents_are_views) == (16, 5, False)
    rgb = jnp.asarray(np.random.default_rng(0).random((1, 8, 8, 3)), jnp.float32)
    alpha = jnp.ones((1, 8, 8, 1))
    given = compressed.condition([""], rgb, alpha)
    latents = compressed.turntable(given, jax.random.key(0))
    assert latents.shape == (1, 5, 2, 2, 64)
    np.testing.assert_allclose(latents[:, 0], given.image, atol=1e-6)  # tied
    views, masks = compressed.decode(latents)
    assert views.shape == (1, 16, 8, 8, 3) and masks.shape == (1, 16, 8, 8, 1)
    pictures = compressed.decode_clip(latents)[0]
    np.testing.assert_array_equal(pictures[:, :16], views)
    assert pictures.shape == (1, 17, 8, 8, 3)
    again = compressed.encode(views, masks)
    np.testing.assert_allclose(again, compressed.codec.encode(*map(compressed.clip.pictures, (views, masks))))
    assert compressed.refine(again, given, jax.random.key(1)).shape == latents.shape
    with pytest.raises(UserError, match="is shown one picture, because its 5 frames of latents are not 16"):
        compressed.condition([""], rgb, alpha, shown={8: (rgb, alpha)})


def test_the_padded_picture_is_told_to_a_backbone_that_asks_for_it(compressed):
    class Asking(type(compressed.model)):
        def empty_conditioning(self, batch):
            empty = super().empty_conditioning(batch)
            return empty._replace(clip=jnp.zeros((batch, 1, *empty.image.shape[1:])))

    asking = Asking(**vars(compressed.model))
    rgb, alpha = jnp.full((1, 8, 8, 3), 0.25), jnp.ones((1, 8, 8, 1))
    given = dataclasses.replace(compressed, model=asking).condition([""], rgb, alpha)
    assert given.clip.shape == (1, 5, 2, 2, 64)
    np.testing.assert_array_equal(given.clip[:, 0], given.image)
    np.testing.assert_array_equal(given.clip[:, 1:], 0)  # grey is 0 in latents of pixels
    dropped = conditioning.drop(given, asking.empty_conditioning(1), jnp.zeros(1), jnp.ones(1))
    np.testing.assert_array_equal(dropped.clip, jnp.zeros_like(given.clip))
