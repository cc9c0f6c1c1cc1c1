"""Settings of a fit: what a config says is checked once, and a config holds plain strings."""

import pytest

from recon_torch.errors import UserError
from recon_torch.settings import (
    Engine,
    FitSettings,
    LpipsDtype,
    MeshFormat,
    MeshSettings,
    Representation,
    Start,
    plain,
)


def test_an_engine_may_be_given_by_its_name():
    assert FitSettings(engine="cpu").engine is Engine.CPU
    assert FitSettings().engine is Engine.AUTO


def test_every_enum_may_be_given_by_its_name():
    settings = FitSettings(start="ball", representation="nerf", lpips_dtype="bfloat16")
    assert settings.start is Start.BALL and settings.representation is Representation.NERF
    assert settings.lpips_dtype is LpipsDtype.BFLOAT16


@pytest.mark.parametrize("name", ["start", "representation", "lpips_dtype"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=f"{name} is 'half'; give one of [a-z0-9, ]+$"):
        FitSettings(**{name: "half"})


def test_an_unknown_engine_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="engine is 'opengl'; give one of auto, gsplat, cpu, torch"):
        FitSettings(engine="opengl")


def test_plain_values_hold_no_enums_in_tuples_either():
    """Configs are written down by their repr, which Python cannot read back for an enum."""
    settings = MeshSettings(formats=("glb", "ply"))
    assert isinstance(settings.formats[0], MeshFormat)
    assert repr(plain(settings)["formats"]) == "('glb', 'ply')"


def test_a_config_gets_plain_values_that_make_the_same_settings():
    settings = FitSettings(engine=Engine.TORCH, num_steps=7)
    values = plain(settings)
    assert type(values["engine"]) is str and values["engine"] == "torch"
    assert FitSettings(**values) == settings
