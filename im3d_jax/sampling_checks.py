"""Which settings of sampling go together: steps, spacings and levels with the schedule, and guidance.

A setting that would change nothing is refused, so that nobody takes its effect for granted.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from im3d_jax import config_sections
from im3d_jax.conditions.text import TextEncoder
from im3d_jax.diffusion import sampler, schedules
from im3d_jax.diffusion.guidance import Branch, Guidance
from im3d_jax.settings import RoundSettings, TextToImageSettings, VideoSettings
from recon_torch.errors import UserError


def check(config: ConfigDict) -> None:
    """Raises UserError for steps, spacings, levels or scales with which it cannot be sampled."""
    schedule = schedules.make_schedule(**config.schedule)
    image = config_sections.settings(config, "text_to_image", TextToImageSettings)
    video = config_sections.settings(config, "video", VideoSettings)
    rounds = config_sections.settings(config, "rounds", RoundSettings)
    runs = [
        ("text_to_image", image.num_steps, image.spacing, 1.0),
        ("video", video.num_steps, video.spacing, 1.0),
        ("rounds", rounds.num_steps, video.spacing, rounds.start_level),
    ]
    steps = {}
    for section, num_steps, spacing, start_level in runs:
        try:
            steps[section] = sampler.make_steps(schedule, num_steps, spacing, start_level)
        except UserError as error:
            raise UserError(f"config.{section}: {error}") from None
    for name in ("w_image", "w_text", "w_image_end", "w_text_end"):
        scales = getattr(video, name)
        if isinstance(scales, tuple) and len(scales) != config.num_views:
            raise UserError(
                f"config.video.{name} has {len(scales)} scales; give a number, or one for each of the"
                f" {config.num_views} views"
            )
    if image.pipeline and image.negative_prompt:
        raise UserError(
            "config.text_to_image.negative_prompt: the pipeline that draws the picture is not told it; leave"
            " it empty"
        )
    image_guidance, video_guidance = Guidance.of_image(image), Guidance.of_video(video)
    _check_guidance("text_to_image", image_guidance, steps["text_to_image"], image.negative_prompt)
    _check_guidance("video", video_guidance, steps["video"], video.negative_prompt)


def _check_guidance(section: str, guidance: Guidance, steps: sampler.Steps, negative_prompt: str) -> None:
    """Raises UserError for an interval that is none, and for settings of guidance that change nothing."""
    interval, sigmas = tuple(guidance.interval), steps.sigmas[:-1]
    name = f"config.{section}.guidance_interval"
    if len(interval) != 2 or interval[0] >= interval[1]:
        raise UserError(
            f"{name} is {interval}; give the lowest and the highest noise level, as in (0.1, 0.8)"
        )
    if interval != (0, 1):
        if max(guidance._replace(interval=(0, 1)).evaluations(sigmas)) == 1:
            raise UserError(
                f"{name}: with these scales there is no guidance to leave out; make it (0.0, 1.0)"
            )
        if not ((interval[0] <= sigmas) & (sigmas <= interval[1])).any():
            raise UserError(f"{name} {interval} has none of the levels of the {len(sigmas)} steps; widen it")
    branches = set().union(*(guidance.weights(float(sigma)) for sigma in sigmas))
    if negative_prompt and branches == {Branch.FULL}:
        raise UserError(
            f"config.{section}.negative_prompt changes nothing without guidance; set w_text to more than 1,"
            " or leave it empty"
        )


def check_negative_prompts(config: ConfigDict, text: TextEncoder) -> None:
    """Raises UserError for a negative prompt that is not encoded, or not as a whole."""
    image = config_sections.settings(config, "text_to_image", TextToImageSettings)
    video = config_sections.settings(config, "video", VideoSettings)
    for section, prompt in (("text_to_image", image.negative_prompt), ("video", video.negative_prompt)):
        if not prompt:
            continue
        name = f"config.{section}.negative_prompt"
        if not text.encode([prompt])[0]:
            raise UserError(f"{name}: {config.text.name} encodes no text; leave it empty")
        if lost := text.warnings(prompt):
            raise UserError(f"{name}: {lost[0]}")
