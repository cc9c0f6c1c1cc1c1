"""Sections of a config as settings: each mistake that a config file can make is one line that names it."""

import pytest
from ml_collections import ConfigDict

from im3d_jax import config_flags, config_sections, pipeline
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
        (VideoSettings, {"num_steps": 3.5}, "config.part.num_steps is 3.5; it takes int"),
        (VideoSettings, {"num_steps": True}, "config.part.num_steps is True; it takes int"),
        (VideoSettings, {"w_text": "much"}, "config.part.w_text is 'much'; it takes float | tuple"),
        (VideoSettings, {"w_text": ("much",)}, "config.part.w_text is .*; it takes float"),
        (RoundSettings, {"at_steps": ("a",)}, "config.part.at_steps is .*; it takes tuple"),
        (RoundSettings, {"num_runs": -1}, "config.part: num_runs is -1"),
        (TurntableSettings, {"fps": 0}, "config.part: num_frames, size and fps are .*; give at least 1"),
        (FitSettings, {"start": "hul"}, "config.part: start is 'hul'; choose one of hull, ball"),
        (FitSettings, {"lpips_stages": "two"}, "config.part.lpips_stages is 'two'; it takes int"),
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
        ("configs/elevation_tiny.py", "the config has no elevation.deg"),
    ],
)
def test_configs_of_other_commands_are_named_mistakes(path, message, user_error):
    with user_error(message):
        pipeline.load(config_flags.load(path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"video.num_steps": 0}, "config.video: sampler: num_steps is 0"),
        ({"video.solver": "x"}, "config.video.solver is 'x'; choose one of"),
        ({"text_to_image.spacing": "x"}, "config.text_to_image: sampler spacing is 'x'"),
        ({"rounds.start_level": 3.0}, "config.rounds: sampler: start_level is 3.0"),
        ({"num_views": 0}, "config.num_views 0, config.size 64: give at least 1"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_sampled_is_found_when_the_model_is_loaded(changes, message, user_error):
    with user_error(message):
        pipeline.load(config_flags.with_overrides("configs/tiny.py", changes))
