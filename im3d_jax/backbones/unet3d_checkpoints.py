"""diffusers' UNet3DConditionModel and I2VGenXLUNet <-> the parameters of `unet3d`."""

from __future__ import annotations

import numpy as np

from im3d_jax import pretrained
from im3d_jax.pretrained import Source

FAMILIES = {"none": "UNet3DConditionModel", "channels": "UNet3DConditionModel", "i2vgen": "I2VGenXLUNet"}
"""How the image enters -> the class of diffusers whose parameters the network has."""


def from_pretrained(spec, path, params) -> dict:
    """The parameters of a checkpoint of diffusers, float32.

    Args:
        spec: the `unet3d.Model`.
        path: a .safetensors file or a diffusers directory.
        params: their shapes. With `spec.image` "channels" and a checkpoint that knows no image, the weights
            of the image's channels are theirs: zero after `spec.init`.

    Raises UserError that names a tensor which is missing, unknown or of another shape, or a setting in the
    directory's config.json that `spec` does not have.
    """
    settings = {
        "_class_name": FAMILIES[spec.image],
        "attention_head_dim": spec.head_dim,
        "norm_num_groups": spec.norm_num_groups,
    }
    pretrained.check_config(path, settings)
    tensors = pretrained.read(path)
    width, channels = spec.block_out_channels[0], spec.latent_shape[-1]
    kernel = tensors.get("conv_in.weight")
    if spec.image == "channels" and kernel is not None and kernel.shape == (width, channels, 3, 3):
        image = np.asarray(params["conv_in"]["kernel"])[:, :, channels:].transpose(3, 2, 0, 1)
        tensors["conv_in.weight"] = np.concatenate([kernel, image], 1)
    return pretrained.to_params(tensors, params, source_of, f"{path} ({FAMILIES[spec.image]})")


def to_pretrained(params) -> dict[str, np.ndarray]:
    """The parameters as tensors of diffusers' class; "channels" is one of 2 c + 1 input channels."""
    return pretrained.to_tensors(params, source_of)


def source_of(path: str) -> Source:
    """Where a parameter stands in a checkpoint, for `pretrained`."""
    path = path.replace("/ff_in/", "/ff/net_0/proj/").replace("/ff_out/", "/ff/net_2/")
    return Source(pretrained.torch_name(path))
