"""What an earlier call has made: an asset that is there is not made again."""

from __future__ import annotations

from im3d_jax.asset import Request, images_digest, origin
from im3d_jax.jobs import FAILED
from im3d_jax.jobs.configs import Configs
from im3d_jax.jobs.rows import Row
from im3d_jax.settings import AssetSettings
from recon_torch.errors import UserError
from recon_torch.settings import Verdict


def is_made(
    request: Request,
    row: Row | None,
    settings: AssetSettings,
    num_retries: int,
    overwrite: bool,
    configs: Configs,
) -> bool:
    """Whether an asset is there: whole, of this request and, if it is bad, tried as often as is asked for.

    row: what the batch's index has of it. configs: of the batch, for the error that names what differs.

    Raises UserError for an asset of another request, unless it is to be overwritten.
    """
    if row is None or row.verdict == FAILED:
        return False
    found = row._asdict() | {"seed": row.first_seed}
    is_final = row.verdict != Verdict.BAD or row.tries > num_retries
    wanted = origin(request, images_digest(request), settings.config_digest)
    if settings.text_to_image.pipeline and not request.image:
        del wanted["image_digest"]  # the picture that the pipeline drew follows from all the others
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if different and not overwrite:
        if "config_digest" in different and (keys := configs.difference(row.config_digest)):
            different[different.index("config_digest")] = f"config ({keys})"
        made_from = f"{request.out} was made from another {' and '.join(different)}"
        raise UserError(f"{made_from}; give another --out, or --overwrite to make it again")
    return is_final and not different
