"""The pictures of a batch that a text-to-image pipeline draws of its prompts: each is drawn once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from im3d_jax import pipeline
from im3d_jax.asset import Request
from im3d_jax.asset_kinds import PICTURE
from im3d_jax.jobs import PICTURES
from im3d_jax.jobs.outcomes import MAX_FAILURES, Outcome, failure
from im3d_jax.jobs.storage import Storage
from im3d_jax.settings import AssetSettings
from recon_torch import outputs
from recon_torch.errors import UserError

AT_ONCE = 64
"""Pictures for which the pipeline is loaded once: this bounds what is in memory."""


def draw_missing(
    settings: AssetSettings, requests: Sequence[Request], storage: Storage
) -> tuple[list[Request], list[Outcome]]:
    """The requests with pictures by `config.text_to_image.pipeline`, and the outcomes of those that failed.

    A picture is OUT/pictures/DIGEST/input.png, where the digest is of prompt, seed and config: what an
    earlier call has drawn is kept. Without such a pipeline the requests stay as they are. Raises UserError if
    the first pictures all fail, because then it is the pipeline that is at fault.
    """
    if not settings.text_to_image.pipeline:
        return list(requests), []
    named, missing = [], {}
    for request in requests:
        if not request.image:
            path = _path(request, settings, storage.out)
            if not storage.has(path):
                missing[path] = request._replace(out=path.parent)
            request = request._replace(image=storage.locate(path))
        named.append(request)
    for path in missing:
        outputs.check(path.parent, PICTURE, root=storage.out)
    errors: dict[str, UserError] = {}
    for path, error in _draw(settings, list(missing.values())):
        errors[storage.locate(path)] = error
        if len(errors) == MAX_FAILURES and not any(each.is_file() for each in missing):
            raise error
    for path in missing:
        if path.is_file():
            try:
                storage.keep(path.parent)
            except UserError as error:
                errors[storage.locate(path)] = error
    failed = [failure(r, errors[r.image], storage.keep) for r in named if r.image in errors]
    return [r for r in named if r.image not in errors], failed


def _path(request: Request, settings: AssetSettings, out: Path) -> Path:
    key = json.dumps([request.prompt, request.seed, settings.config_digest])
    return out / PICTURES / hashlib.sha256(key.encode()).hexdigest()[:32] / "input.png"


def _draw(settings: AssetSettings, requests: list[Request]) -> Iterator[tuple[Path, UserError]]:
    """Draws the pictures in lots. Yields the path and the error of each that cannot be drawn.

    A lot that fails is halved until the picture is found that is at fault.
    """
    if not requests:
        return
    if len(requests) <= AT_ONCE:
        try:
            pipeline.draw_pictures(settings, requests)
            return
        except UserError as error:
            if len(requests) == 1:
                yield requests[0].out / "input.png", error
                return
    middle = len(requests) // 2
    yield from _draw(settings, requests[:middle])
    yield from _draw(settings, requests[middle:])
