"""Sections of a config as settings: each mistake that a config file can make is one line that names it."""

import pytest
from ml_collections import ConfigDict

from im3d_jax import config_flags, config_sections, generator, pipeline, sampling_checks
from im3d_jax.settings import RoundSettings, TurntableSettings, VideoSettings
from recon_torch.settings import FitSettings, Start


def test_settings_are_those_of_the_section():
    config = ConfigDict(
        {"video": {"num_steps": 3, "w_image": 2.0, "w_text": (1.0, 2.0)}, "fit": {"start": "ball"}}
    )
    expected = VideoSettings(num_steps=3, w_image=2.0, w_text=(1.0, 2.0))
    assert config_sections.settings(config, "video", VideoSettings) == expected
    assert config_sections.settings(config, "fit", FitSettings).start == Start.BALL


@pytest.mark.parametrize(
    "kind, section, message",
    [
        (VideoSettings, None, "config.part is None; it has to be a section with num_steps, "),
        (
            VideoSettings,
            {"numsteps": 3},
            "config.part has an unknown entry 'numsteps'; the nearest is 'num_steps'",
        ),
        (VideoSettings, {"num_steps": 3.5}, "config.part.num_steps is 3.5; give a whole number"),
        (VideoSettings, {"num_steps": True}, "config.part.num_steps is True; give a whole number"),
        (VideoSettings, {"w_text": "much"}, "config.part.w_text is 'much'; give a number .*, or a tuple"),
        (VideoSettings, {"w_text": ("much",)}, "config.part.w_text is .*; give a number"),
        (RoundSettings, {"at_steps": ("a",)}, "config.part.at_steps is .*; give a tuple"),
        (RoundSettings, {"num_runs": -1}, "config.part.num_runs is -1; give a whole number from 0"),
        (TurntableSettings, {"fps": 0}, "config.part.fps is 0; give a whole number from 1 to 240"),
        (FitSettings, {"start": "hul"}, "config.part.start is 'hul'; give one of hull, ball"),
        (
            FitSettings,
            {"lpips_stages": "two"},
            "config.part.lpips_stages is 'two'; give a whole number from 1 to 7, or None",
        ),
    ],
)
def test_mistakes_in_a_section(kind, section, message, user_error):
    with user_error(message):
        config_sections.settings(ConfigDict({"part": section}), "part", kind)


def test_what_names_a_part_has_a_name_and_arguments(user_error):
    config = ConfigDict(
        {"good": {"name": "a", "kwargs": {"b": 1}}, "lone": {"name": "a"}, "wrong": {"nam": "a"}}
    )
    assert config_sections.named(config, "good") == ("a", {"b": 1})
    with user_error("the config has no lone.kwargs; set it"):
        config_sections.named(config, "lone")
    with user_error("config.wrong has an unknown entry 'nam'; the nearest is 'name'"):
        config_sections.named(config, "wrong")
    with user_error("the config has no absent; set it"):
        config_sections.named(config, "absent")


@pytest.mark.parametrize(
    "path, message",
    [
        ("configs/autoencoder_tiny.py", "the config has no backbone.name"),
        ("configs/elevation_tiny.py", "config has an unknown entry 'augment'.*config of another command"),
    ],
)
def test_configs_of_other_commands_are_named_mistakes(path, message, user_error):
    with user_error(message):
        pipeline.load(config_flags.load(path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"video.num_steps": 0}, "config.video.num_steps is 0; give a whole number from 1"),
        ({"video.solver": "x"}, "config.video.solver is 'x'; give one of 1, 2m"),
        ({"text_to_image.spacing": "x"}, "config.text_to_image.spacing is 'x'; give one of trailing"),
        (
            {"rounds.start_level": 3.0},
            "config.rounds.start_level is 3.0; give a number above 0 and at most 1",
        ),
        ({"num_views": 0}, "config.num_views is 0; give a whole number from 1"),
        ({"size": 8}, "config.size is 8; views of an asset need 32 px"),
        ({"fit.num_gaussians": 10**8}, "config.fit.num_gaussians is 100000000; give a whole number from 1"),
        ({"rounds.at_steps": (500, 400)}, r"at_steps \(500, 400\), .*: make each larger than the one before"),
        ({"backbone.kwargs.head_dim": 0}, "config.backbone.kwargs.head_dim is 0; give a whole number"),
        ({"schedule.num_steps": 20, "text_to_image.num_steps": 20}, "config.video: .* no 40 distinct steps"),
    ],
)
def test_what_cannot_be_is_found_before_anything_is_loaded(changes, message, user_error, monkeypatch):
    monkeypatch.setattr(generator, "load", None)
    with user_error(message):
        pipeline.load(config_flags.with_overrides("configs/tiny.py", changes))


def test_a_guidance_scale_for_each_view_is_for_every_view(user_error):
    config = config_flags.load("configs/svd_xt.py")
    sampling_checks.check(config)
    config.num_views = 4
    with user_error("config.video.w_image has 16 scales; give a number, or one for each of the 4 views"):
        sampling_checks.check(config)
