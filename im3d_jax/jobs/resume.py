"""What an earlier call has made: an asset that is there is not made again."""

from __future__ import annotations

import json

from im3d_jax.asset import REPORT, Request, images_digest, origin
from im3d_jax.jobs.configs import Configs
from im3d_jax.settings import AssetSettings
from recon_torch.errors import UserError
from recon_torch.settings import Verdict


def is_made(
    request: Request, settings: AssetSettings, num_retries: int, overwrite: bool, configs: Configs
) -> bool:
    """Whether an asset is there: whole, of this request and, if it is bad, tried as often as is asked for.

    configs: of the batch, for the error that names what differs.

    Raises UserError for an asset of another request, unless it is to be overwritten.
    """
    try:
        report = json.loads((request.out / REPORT).read_text())
        tries = report.get("tries", [report])
        found = report | {"seed": tries[0]["seed"]}
        is_final = report["quality"]["verdict"] != Verdict.BAD or len(tries) > num_retries
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    wanted = origin(request, images_digest(request), settings.config_digest)
    if settings.text_to_image.pipeline and not request.image:
        del wanted["image_digest"]  # the picture that the pipeline drew follows from all the others
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if different and not overwrite:
        if "config_digest" in different and (keys := configs.difference(found.get("config_digest"))):
            different[different.index("config_digest")] = f"config ({keys})"
        made_from = f"{request.out} was made from another {' and '.join(different)}"
        raise UserError(f"{made_from}; give another --out, or --overwrite to make it again")
    return is_final and not different
