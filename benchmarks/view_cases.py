"""Sixteen true views of a mesh as users have them: with noise, without masks, too few, with wrong cameras.

A case is made from the mesh, so that it can change the cameras, and holds what a fit is given. What it is
compared with stays the same for all cases.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import perturbed_views
from jaxtyping import Float
from PIL import Image
from scipy.spatial.transform import Rotation

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.parts import Mesh
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.directory import Views, assemble
from recon_torch.views.images import to_uint8
from recon_torch.views.masks import by_backdrop

NUM_VIEWS, ELEVATION_DEG = 16, 20.0
NUM_TESTED, TESTED_ELEVATIONS_DEG = 24, (-10.0, 60.0)
GOLDEN_ANGLE_RAD = np.pi * (3 - np.sqrt(5))  # azimuths that never repeat
WRONG_POSES, WRONG_BY_DEG = 3, 5.0

Pictures = Float[np.ndarray, "K H W 3"]


class Given(NamedTuple):
    """What a fit is given.

    Attributes:
        views: as `im3d fit` reads them.
        pictures: over white as they came, for a recipe that knows no masks.
    """

    views: Views
    pictures: Pictures


Change = Callable[[Views, np.random.Generator], Given]


def held_out_cameras(size: int) -> Cameras:
    """What fits are tested from: a spiral from the lowest to the highest elevation."""
    elevations_rad = np.radians(np.linspace(*TESTED_ELEVATIONS_DEG, NUM_TESTED))
    return orbit(
        elevation_rad=elevations_rad, size=size, azimuths_rad=np.arange(NUM_TESTED) * GOLDEN_ANGLE_RAD
    )


def views_of(mesh: Mesh, case: str, size: int, seed: int) -> Given:
    """What a fit is given in this case; the seed is of what the case draws at random."""
    num_views, elevation_deg, change = CASES[case]
    cameras = orbit(num_views, np.radians(elevation_deg), size)
    rgba, _ = mesh_rendering.render(mesh, cameras)
    rgba = np.round(rgba * 255) / np.float32(255)
    over_white = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    names = [f"{index:03d}.png" for index in range(num_views)]
    views = Views(cameras, over_white, rgba[..., 3:], names, [])
    return change(views, np.random.default_rng([seed, *case.encode()]))


def _unchanged(views: Views, generator: np.random.Generator) -> Given:
    return Given(views, views.images)


def _unmasked(views: Views, pictures: Pictures) -> Given:
    """Pictures without alpha, with the masks that `im3d fit` finds in them."""
    rgbm = np.concatenate([pictures, np.full_like(pictures[..., :1], np.nan)], -1).astype(np.float32)
    return Given(assemble(views.cameras, rgbm, views.names, by_backdrop, [], "views"), pictures)


def _without_masks(views: Views, generator: np.random.Generator) -> Given:
    return _unmasked(views, views.images)


def _jpeg(quality: int) -> Change:
    def compressed(image: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 3"]:
        file = io.BytesIO()
        Image.fromarray(to_uint8(image)).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file), np.float32) / 255

    return lambda views, generator: _unmasked(views, np.stack([compressed(image) for image in views.images]))


def _noisy(views: Views, sigma: float, generator: np.random.Generator) -> Pictures:
    noisy = views.images + generator.normal(0, sigma / 255, views.images.shape)
    return (np.round(noisy.clip(0, 1) * 255) / 255).astype(np.float32)


def _noise(sigma: float) -> Change:
    return lambda views, generator: _unmasked(views, _noisy(views, sigma, generator))


def _noise_with_alpha(sigma: float) -> Change:
    """Noise in the colours of RGBA pictures, of which only what the alpha shows is seen."""

    def change(views: Views, generator: np.random.Generator) -> Given:
        alpha = views.masks
        assert alpha is not None
        images = views.images + (_noisy(views, sigma, generator) - views.images) * alpha
        return Given(dataclasses.replace(views, images=images), images)

    return change


def _wrong_poses(views: Views, generator: np.random.Generator) -> Given:
    """Some of the cameras turned about the middle of the object, each about an axis of its own."""
    w2c = views.cameras.w2c.copy()
    for index in generator.choice(len(views), WRONG_POSES, replace=False):
        w2c[index, :3, :3] = w2c[index, :3, :3] @ rotation(generator, np.radians(WRONG_BY_DEG))
    wrong = dataclasses.replace(views, cameras=dataclasses.replace(views.cameras, w2c=w2c))
    return Given(wrong, views.images)


def rotation(generator: np.random.Generator, angle_rad: float) -> Float[np.ndarray, "3 3"]:
    """About a random axis."""
    axis = generator.normal(size=3)
    return Rotation.from_rotvec(angle_rad * axis / np.linalg.norm(axis)).as_matrix()


def _disagreeing(views: Views, generator: np.random.Generator) -> Given:
    changed = perturbed_views.perturb(views, seed=int(generator.integers(2**31)))
    return Given(changed, changed.images)


CASES: dict[str, tuple[int, float, Change]] = {
    "clean": (NUM_VIEWS, ELEVATION_DEG, _unchanged),
    "8 views": (8, ELEVATION_DEG, _unchanged),
    "4 views": (4, ELEVATION_DEG, _unchanged),
    "elevation 0": (NUM_VIEWS, 0.0, _unchanged),
    "elevation 60": (NUM_VIEWS, 60.0, _unchanged),
    "no masks": (NUM_VIEWS, ELEVATION_DEG, _without_masks),
    "JPEG 75": (NUM_VIEWS, ELEVATION_DEG, _jpeg(75)),
    "JPEG 30": (NUM_VIEWS, ELEVATION_DEG, _jpeg(30)),
    "noise 5": (NUM_VIEWS, ELEVATION_DEG, _noise(5)),
    "noise 10": (NUM_VIEWS, ELEVATION_DEG, _noise(10)),
    "noise 10, alpha": (NUM_VIEWS, ELEVATION_DEG, _noise_with_alpha(10)),
    "wrong poses": (NUM_VIEWS, ELEVATION_DEG, _wrong_poses),
    "disagreeing": (NUM_VIEWS, ELEVATION_DEG, _disagreeing),
}
"""Number of views, their elevation, and what is changed in them. Noise is its standard deviation by 255."""
