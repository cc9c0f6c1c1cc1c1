"""The source that a config's `data` names."""

from __future__ import annotations

from im3d_jax.data import objects
from im3d_jax.data.pipeline import ProceduralSource, Source
from im3d_jax.data.workers import Run, run_here
from recon_torch.errors import UserError


def open_source(
    *,
    path: str,
    split: str,
    first_object: int,
    seed: int,
    size: int,
    num_views: int,
    run: Run = run_here,
) -> Source:
    """A data set of `im3d dataset`, or procedural objects.

    Args:
        path: of the data set; "" for procedural objects.
        split: of either; see `objects.SPLITS` for the latter's.
        first_object: number within the split of the procedural object that comes first; seed: of their world.
        size: side of the views in pixels. num_views: K.
        run: makes the procedural objects, perhaps in another process; see `workers`.

    Raises UserError if there is no such data set or split.
    """
    if path:
        from im3d_jax.data.turntables import TurntableSource  # which imports tfds

        return TurntableSource(path, split=split, size=size, num_views=num_views)
    if split not in objects.SPLITS:
        raise UserError(f"no split {split!r} of procedural objects; there is {', '.join(objects.SPLITS)}")
    return ProceduralSource(seed, objects.SPLITS[split][0] + first_object, size, num_views, run)
