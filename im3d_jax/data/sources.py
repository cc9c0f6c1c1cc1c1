"""Where examples come from: procedural objects, or a data set on disk, as a config's `data` section says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from im3d_jax.data import Example, Source, objects
from im3d_jax.data.mixture import Mixture, Part
from im3d_jax.data.objects import Split
from im3d_jax.data.workers import Run, run_here
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


def _open_part(name: str, part: dict[str, Any], shared: dict[str, Any]) -> Part:
    known = {"weight", "path", "split", "first_object"}
    if "weight" not in part or not part.keys() <= known:
        raise UserError(f"part {name!r} of a mix has {', '.join(sorted(part))}; give it {', '.join(known)}")
    weight = part.pop("weight")
    data = {"path": "", "split": "train", "first_object": 0, **part}
    return Part(open_source(**data, **shared), float(weight), shuffle=bool(data["path"]))


def open_source(
    *,
    path: str,
    split: str,
    first_object: int,
    seed: int,
    size: int,
    num_views: int,
    mix: Mapping[str, Mapping[str, Any]] | None = None,
    run: Run = run_here,
) -> Source:
    """Opens a data set that `im3d dataset build` made, or procedural objects, or a mixture of such.

    Args:
        path: the data set's directory; "" stands for procedural objects.
        split: one of the data set's splits, or one of `objects.Split`.
        first_object: number of the first procedural object, counted from the start of its split.
        seed: of the world of procedural objects.
        size: side of the views in pixels.
        num_views: K.
        mix: the parts of a mixture by name, which take the place of `path`, `split` and `first_object`: each
            has a "weight" and may have a "path", a "split" ("train") and a "first_object" (0).
        run: makes the procedural objects, perhaps in another process; see `workers`.

    Raises UserError if there is no such data set or split, and for a part that has something else.
    """
    if mix:
        if path:
            raise UserError(f"a stream's data have a path ({path}) and a mix; leave one of them out")
        shared = dict(seed=seed, size=size, num_views=num_views, run=run)
        return Mixture([_open_part(name, dict(part), shared) for name, part in mix.items()])
    if path:
        from im3d_jax.data.turntables import TurntableSource  # imports tfds, which takes seconds

        return TurntableSource(path, split=split, size=size, num_views=num_views)
    if split not in list(Split):
        raise UserError(f"no split {split!r} of procedural objects; there is {', '.join(Split)}")
    return ProceduralSource(seed, objects.SPLITS[Split(split)][0] + first_object, size, num_views, run)
