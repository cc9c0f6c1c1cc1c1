"""Frames <-> latents, one frame at a time.

The tiny model's `Patches` moves each patch of pixels into channels, which loses nothing and has no
parameters; full size models use the learned `AutoencoderKL` behind the same methods. Both are pytrees whose
leaves are their weights, so that a jitted function takes one as an ordinary argument, and both are hashable.
"""

from __future__ import annotations

from collections.abc import Sequence

from im3d_jax.autoencoders.kl import AutoencoderKL
from im3d_jax.autoencoders.patches import Patches
from recon_torch.errors import UserError

AUTOENCODERS = {"patches": Patches, "autoencoder_kl": AutoencoderKL.load}


def build(name: str, kwargs: dict, size: int, latent_shape: Sequence[int]):
    """The autoencoder that a config names, which makes `latent_shape` of images of `size` pixels.

    Raises UserError for an unknown name and for sizes that do not go together.
    """
    if name not in AUTOENCODERS:
        raise UserError(f"config.autoencoder.name: no {name!r}; there is {', '.join(AUTOENCODERS)}")
    codec = AUTOENCODERS[name](**kwargs)
    made, taken = codec.latent_shape(size), tuple(latent_shape)
    if made != taken:
        raise UserError(f"config.size {size} makes latents {made}, config.backbone takes {taken}; match them")
    return codec
