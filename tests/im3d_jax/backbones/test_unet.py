"""Wrong arguments of the UNets, those that all share and those of each, are named in one line."""

import pytest

from im3d_jax import backbones
from im3d_jax.backbones import emu_video, svd, unet3d
from recon_torch.errors import UserError

NETWORKS = {"emu_video": emu_video, "svd": svd, "unet3d": unet3d}


def rejects(name, kwargs, message):
    with pytest.raises(UserError, match=message) as error:
        backbones.build(name, NETWORKS[name].SMALL | kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_wrong_arguments_that_all_networks_share(name):
    height, width, channels = NETWORKS[name].SMALL["latent_shape"]
    rejects(name, dict(latent_shape=(height, width + 1, channels)), "not divisible by 2")
    rejects(name, dict(query_chunk=7), "query_chunk 7")
    for policy in ("all", "everything"):
        rejects(name, dict(remat=policy), f"remat is '{policy}'")


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("svd", dict(vector="sv4d"), "vector is 'sv4d'; give one of svd, sv3d_u"),
        ("svd", dict(input_view="middle"), "input_view is 'middle'"),
        ("svd", dict(orbit_direction=2), "orbit_direction is 2; give a whole number from -1 to 1"),
        ("svd", dict(block_out_channels=(48, 96)), "multiples of 32"),
        ("svd", dict(block_out_channels=(32,) * 4, latent_shape=(70, 72, 4)), "not divisible by 8"),
        ("unet3d", dict(image="frames"), "image is 'frames'; give one of none, channels"),
        ("unet3d", dict(block_out_channels=(32, 44)), "multiples of norm_num_groups 8"),
    ],
)
def test_wrong_arguments_of_one_network(name, kwargs, message):
    rejects(name, kwargs, message)
