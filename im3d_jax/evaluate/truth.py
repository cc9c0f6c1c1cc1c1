"""The ground truth: turntables of test objects that training never sees, and their means."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from im3d_jax.data import mesh_rendering, objects, procedural
from im3d_jax.data.meshes.reading import UpAxis, load_mesh
from im3d_jax.data.objects import Split
from im3d_jax.data.rendering import find_meshes
from im3d_jax.stages import progress
from recon_torch.errors import UserError
from recon_torch.views.cameras import orbit

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


@runtime_checkable
class Objects(Protocol):
    """Objects whose true views can be rendered, divided into splits."""

    @property
    def about(self) -> str:
        """What they are, and a digest of it: results are kept under it."""

    def render(
        self, count: int, split: Split = Split.TEST, azimuths_rad: Float[np.ndarray, " K"] | None = None
    ) -> Truth:
        """Renders `count` objects of a split, or all where there are fewer, from the turntable's azimuths or
        from other ones."""


@dataclass(frozen=True)
class ProceduralObjects:
    """The procedural objects of a seed, and how they are looked at: `num_views` views of `size` pixels."""

    seed: int
    size: int
    num_views: int

    @property
    def about(self) -> str:
        return f"procedural objects of seed {self.seed}"

    def render(
        self, count: int, split: Split = Split.TEST, azimuths_rad: Float[np.ndarray, " K"] | None = None
    ) -> Truth:
        """Renders the first `count` objects of a split; see `Objects`."""
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


@dataclass(frozen=True)
class MeshObjects:
    """Meshes below a directory, by the splits of a split file, as `im3d dataset render` renders them.

    Attributes:
        captions: by name; a mesh that has none gets "".
        split: names of the objects of each split.
        seed: of the elevations.

    Raises UserError, when it renders, for names of the split that are not there and for unreadable meshes.
    """

    directory: Path
    captions: Mapping[str, str]
    split: Mapping[str, Sequence[str]]
    up: UpAxis
    seed: int
    size: int
    num_views: int

    @property
    def about(self) -> str:
        # Sizes stand for contents: files that were exported again are other objects.
        sizes = {name: path.stat().st_size for name, path in find_meshes(self.directory)[0].items()}
        of = [dict(self.split), dict(self.captions), sizes, self.up, self.seed]
        digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
        return f"meshes of files, split and captions {digest[:12]}"

    def render(
        self, count: int, split: Split = Split.TEST, azimuths_rad: Float[np.ndarray, " K"] | None = None
    ) -> Truth:
        """Renders `count` objects that are spread evenly over the names of a split; see `Objects`."""
        names, paths = self.split.get(split, ()), find_meshes(self.directory)[0]
        if not names:
            raise UserError(f"the split file has no '{split}'; it must name objects of train and test")
        if missing := [name for name in names if name not in paths]:
            raise UserError(f"{missing[0]} of the split '{split}' is no mesh below {self.directory}")
        indices = np.unique(np.linspace(0, len(names) - 1, count).astype(int)).tolist()
        rgba, elevations_rad = [], []
        with progress(f"render {split}", len(indices)) as bar:
            for name in (names[index] for index in indices):
                elevations_rad.append(objects.elevation_rad(self.seed, zlib.crc32(name.encode())))
                cameras = orbit(self.num_views, elevations_rad[-1], self.size, azimuths_rad=azimuths_rad)
                rgba.append(mesh_rendering.render(load_mesh(paths[name], self.up), cameras)[0])
                bar.update()
        alpha = np.stack(rgba)[..., 3:]
        return Truth(
            indices,
            [self.captions.get(names[index], "") for index in indices],
            [Path(names[index]).parts[0] for index in indices],
            np.asarray(elevations_rad),
            np.stack(rgba)[..., :3] * alpha + (1 - alpha),
            alpha,
        )


def azimuths_between_rad(num_views: int) -> Float[np.ndarray, " K"]:
    """Azimuths half a step off those of the turntable: views that no fit has seen."""
    return 2 * np.pi * (np.arange(num_views) + 0.5) / num_views


def mean_turntable(truth: Truth) -> tuple[Float[np.ndarray, "K H W 3"], Float[np.ndarray, "K H W 1"]]:
    """The mean (rgb, alpha) over objects, for each azimuth by itself."""
    return truth.rgb.mean(0), truth.alpha.mean(0)
