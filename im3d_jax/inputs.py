"""What is doubtful about a prompt and a picture, for the verdict on what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from im3d_jax.asset import Picture
from im3d_jax.conditions.text import TextEncoder
from recon_torch.settings import Verdict


class Inputs(NamedTuple):
    """What a model makes of the inputs of an asset.

    Attributes:
        reasons, hints: as quality gates give them.
        not_understood: sentences on what of the prompt is left out.
    """

    reasons: list[str]
    hints: list[str]
    not_understood: list[str]


def look(prompt: str, pictures: Sequence[Picture], text: TextEncoder) -> Inputs:
    """Looks at a prompt, and at what is known of the foreground of pictures.

    pictures: what the asset is made from; none: the prompt is all there is.
    """
    reasons, hints = doubts(pictures), _said(pictures, [each.hints for each in pictures])
    left_out = text.warnings(prompt)
    if prompt.strip() and not text.understands(prompt):
        (hints if pictures else reasons).append("nothing of the prompt was understood")
    elif left_out:
        hints.append("the prompt was understood in part (see not_understood)")
    return Inputs(reasons, hints, left_out)


def closing(inputs: Inputs, closure_db: float | None, least_db: float) -> Inputs:
    """The inputs with what speaks against a clip that does not come back to view 0.

    closure_db: see `Clip.closure_db`. least_db: `config.clip.closure_psnr`.
    """
    if closure_db is None or closure_db >= least_db:
        return inputs
    reason = f"the video does not come back to its first view ({closure_db:.1f} dB, at least {least_db:g})"
    return inputs._replace(reasons=[*inputs.reasons, reason])


def doubts(pictures: Sequence[Picture]) -> list[str]:
    """Why the foreground of pictures may not be the object, in sentences."""
    return _said(pictures, [each.doubts for each in pictures])


def _said(pictures: Sequence[Picture], words: Sequence[Sequence[str]]) -> list[str]:
    names = [f" at {each.azimuth_deg:g} degrees" if len(pictures) > 1 else "" for each in pictures]
    return [
        f"in the picture{name}, the object {each}"
        for name, said in zip(names, words, strict=True)
        for each in said
    ]


def judge(quality: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """The quality of an asset by gates and inputs: doubtful inputs make a good one suspect."""
    verdict = Verdict(quality["verdict"])
    if inputs.reasons and verdict == Verdict.GOOD:
        verdict = Verdict.SUSPECT
    reasons, hints = (inputs.reasons + quality["reasons"], inputs.hints + quality["hints"])
    return quality | {"verdict": verdict, "reasons": reasons, "hints": hints}
