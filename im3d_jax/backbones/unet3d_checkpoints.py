"""diffusers' UNet3DConditionModel and I2VGenXLUNet <-> the parameters of `unet3d`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from im3d_jax import pretrained, public_tensors
from im3d_jax.backbones import Params
from im3d_jax.pretrained import Source


def from_pretrained(
    path: str | Path,
    params: Params,
    family: str,
    latent_channels: int,
    settings: Mapping[str, object],
    averaged: bool = False,
) -> Params:
    """The parameters of a checkpoint of diffusers, float32.

    Args:
        path: a .safetensors file or a diffusers directory.
        params: tree of the parameters' shapes. A checkpoint may know no image where the model takes it on
            channels of its own: their weights are those of `params`, zero after `Model.init`.
        family: the class of diffusers.
        latent_channels: of the noisy latent, which the first convolution has before those of the image.
        settings: the model's, by their names in the directory's config.json.
        averaged: see `public_tensors.read`.

    Raises UserError that names a tensor which is missing, unknown or of another shape, or a setting in the
    directory's config.json that the model does not have.
    """
    pretrained.check_config(path, {"_class_name": family, **settings})
    tensors, ours = public_tensors.read(path, averaged=averaged), params["conv_in"]["kernel"]
    kernel = tensors.get("conv_in.weight")
    knows_image = kernel is None or kernel.shape != (ours.shape[-1], latent_channels, 3, 3)
    if not knows_image and ours.shape[2] == 2 * latent_channels + 1:
        image = np.asarray(ours)[:, :, latent_channels:].transpose(3, 2, 0, 1)
        tensors["conv_in.weight"] = np.concatenate([kernel, image], 1)
    return pretrained.to_params(tensors, params, source_of, f"{path} ({family})")


def to_pretrained(params: Params) -> dict[str, np.ndarray]:
    """The parameters as tensors of diffusers' class; one with an image on channels has 2 c + 1 of them."""
    return pretrained.to_tensors(params, source_of)


def source_of(path: str) -> Source:
    """Where a parameter stands in a checkpoint, for `pretrained`."""
    path = path.replace("/ff_in/", "/ff/net_0/proj/").replace("/ff_out/", "/ff/net_2/")
    return Source(pretrained.torch_name(path))
