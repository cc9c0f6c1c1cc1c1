"""Where examples come from: procedural objects, or a data set on disk, as a config's `data` section says."""

from __future__ import annotations

from collections.abc import Sequence

from im3d_jax.data import Example, Source, objects
from im3d_jax.data.mixture import Mixture, Part
from im3d_jax.data.objects import Split
from im3d_jax.data.workers import Run, run_here
from im3d_jax.training_settings import DataSettings, PartSettings
from recon_torch.errors import UserError


class ProceduralSource:
    """Procedural objects as scenes that are still to be rendered. A `BatchSource`.

    Args:
        seed: of the world of objects.
        first_object: the number of the object that has index 0 here; see `objects.SPLITS`.
        size: side of the square views in pixels.
        num_views: K.
        run: calls a function, perhaps in another process; see `workers`.
    """

    def __init__(self, seed: int, first_object: int, size: int, num_views: int, run: Run = run_here):
        self.seed, self.first_object, self.size, self.num_views = seed, first_object, size, num_views
        self._run = run

    def __len__(self) -> int:
        return max(last for _, last in objects.SPLITS.values()) - self.first_object

    def __getitem__(self, index: int) -> Example:
        return self.batch([index])[0]

    def batch(self, indices: Sequence[int]) -> list[Example]:
        """Several objects at once, which is one call of another process instead of many."""
        numbers = [self.first_object + index for index in indices]
        scenes = self._run(objects.on_turntables, self.seed, numbers, self.num_views)
        fields = scenes.packed | {"w2c": scenes.w2c}
        return [
            Example(
                id=f"procedural/{number}",
                scene={name: rows[row] for name, rows in fields.items()},
                size=self.size,
                caption=scenes.captions[row],
                elevation_rad=float(scenes.elevation_rad[row]),
            )
            for row, number in enumerate(numbers)
        ]


def open_source(
    data: DataSettings | PartSettings, *, seed: int, size: int, num_views: int, run: Run = run_here
) -> Source:
    """Opens a data set that `im3d dataset build` made, or procedural objects, or a mixture of such.

    Args:
        data: which; see `DataSettings`.
        seed: of the world of procedural objects.
        size: side of the views in pixels.
        num_views: K.
        run: makes the procedural objects, perhaps in another process; see `workers`.

    Raises UserError if there is no such data set or split, and for a mixture with a path beside it.
    """
    shared = dict(seed=seed, size=size, num_views=num_views)
    if isinstance(data, DataSettings) and data.mix:
        if data.path:
            raise UserError(f"a stream's data have a path ({data.path}) and a mix; leave one of them out")
        parts = [
            Part(open_source(part, **shared, run=run), float(part.weight), shuffle=bool(part.path))
            for part in data.mix.values()
        ]
        return Mixture(parts)
    if data.path:
        from im3d_jax.data.turntables import TurntableSource  # imports tfds, which takes seconds

        return TurntableSource(data.path, split=data.split, size=size, num_views=num_views)
    if data.split not in list(Split):
        raise UserError(f"no split {data.split!r} of procedural objects; there is {', '.join(Split)}")
    first = objects.SPLITS[Split(data.split)][0] + data.first_object
    return ProceduralSource(seed, first, size, num_views, run)
