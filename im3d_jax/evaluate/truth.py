"""The ground truth: turntables of procedural objects that training never sees, and their means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from im3d_jax.data import objects, procedural
from im3d_jax.data.objects import Split
from im3d_jax.stages import progress

RENDER_BATCH = 8


@dataclass(frozen=True)
class Truth:
    """True turntables of B objects. rgb is over white, alpha is coverage, both in [0, 1]."""

    indices: list[int]
    captions: list[str]
    categories: list[str]
    elevations_rad: Float[np.ndarray, " B"]
    rgb: Float[np.ndarray, "B K H W 3"]
    alpha: Float[np.ndarray, "B K H W 1"]

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Objects:
    """The procedural objects of a seed, and how they are looked at: `num_views` views of `size` pixels."""

    seed: int
    size: int
    num_views: int

    def render(
        self, count: int, split: Split = Split.TEST, azimuths_rad: Float[np.ndarray, " K"] | None = None
    ) -> Truth:
        """Renders the first `count` objects of a split, from the turntable's azimuths or from other ones."""
        first = objects.SPLITS[split][0]
        indices = list(range(first, first + count))
        parts = []
        with progress(f"render {split}", count) as bar:
            for start in range(0, count, RENDER_BATCH):
                chosen = indices[start : start + RENDER_BATCH]
                parts.append(
                    procedural.turntables(
                        self.seed,
                        chosen,
                        size=self.size,
                        num_views=self.num_views,
                        azimuths_rad=azimuths_rad,
                    )
                )
                bar.update(len(chosen))
        return Truth(
            indices,
            [caption for part in parts for caption in part.captions],
            [objects.make_object(self.seed, index).category for index in indices],
            np.concatenate([part.elevation_rad for part in parts]),
            np.concatenate([np.asarray(part.views.rgb) for part in parts]),
            np.concatenate([np.asarray(part.views.alpha) for part in parts]),
        )


def azimuths_between_rad(num_views: int) -> Float[np.ndarray, " K"]:
    """Azimuths half a step off those of the turntable: views that no fit has seen."""
    return 2 * np.pi * (np.arange(num_views) + 0.5) / num_views


def mean_turntable(truth: Truth) -> tuple[Float[np.ndarray, "K H W 3"], Float[np.ndarray, "K H W 1"]]:
    """The mean (rgb, alpha) over objects, for each azimuth by itself."""
    return truth.rgb.mean(0), truth.alpha.mean(0)
