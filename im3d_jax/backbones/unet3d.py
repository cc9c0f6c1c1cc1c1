"""ModelScope's text to video and I2VGen-XL: the public generators nearest to Emu Video.

Both add temporal layers to a Stable Diffusion, as the paper's generator does (Sec. 3.1): four temporal
convolutions after every residual block and a temporal transformer after every spatial one, each on a residual
of its own (Wang et al. 2023, arXiv 2308.06571). ModelScope sees text alone; fine-tuned here with the image on
extra input channels it is conditioned as Emu Video is. I2VGen-XL (Zhang et al. 2023, arXiv 2311.04145) sees
the image as a latent on extra channels, as tokens beside the text's, and as a CLIP embedding.

The network is `unet3d_network`; `unet3d_checkpoints` reads and writes the weights of diffusers'
UNet3DConditionModel and I2VGenXLUNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.backbones import arguments, unet3d_checkpoints
from im3d_jax.backbones.layers import PARTITION_RULES
from im3d_jax.backbones.unet3d_network import UNet
from im3d_jax.conditions.conditioning import Conditioning
from recon_torch.errors import UserError

TEMPORAL = "temp_convs|temp_attentions|transformer_in"
"""Pattern of the parameter paths that Sec. 3.1 trains."""

IMAGES = ("none", "channels", "i2vgen")

SMALL = dict(
    latent_shape=(8, 8, 4),
    block_out_channels=(32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    head_dim=8,
    cross_attention_dim=32,
    max_words=5,
    image="i2vgen",
)
"""Arguments of a model that checks and benchmarks can run anywhere."""


@dataclass(frozen=True)
class Model:
    """A denoiser under the backbone contract; the defaults are ModelScope's and I2VGen-XL's sizes.

    Args:
        latent_shape: (h, w, c) of one frame's latent; h and w are multiples of 2^(levels - 1).
        block_out_channels, layers_per_block: channels of the levels, and their residual blocks. All levels
            but the last have attention.
        norm_num_groups, head_dim: groups of channels that are normalised together; size of attention heads.
        cross_attention_dim, max_words: of the text's embedding, which is CLIP's.
        image: how the picture enters. "none": not at all (ModelScope); "channels": its latent at frame 0 and
            a mask, on input channels whose weights start at zero (Emu Video's way, for a ModelScope
            fine-tuned here); "i2vgen": as in I2VGen-XL, which also asks for `Conditioning.image_tokens`, one
            CLIP embedding.
        fps: what I2VGen-XL is told of the frame rate. It was trained at 16 frames, 8 to 16 a second.
        prediction_type: of the trained network: "epsilon" for ModelScope, "v" for I2VGen-XL.
        dtype: of the computation; normalisation, softmax and the embedding of the noise level stay float32.
        remat: what the backward pass computes again instead of keeping: "" for nothing, or a policy of
            `jax.checkpoint_policies` that says what is kept inside the blocks.
        query_chunk: how many places of each frame attend to the others at a time, a divisor of their number;
            0 for all.
    """

    latent_shape: Sequence[int] = (32, 32, 4)
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    head_dim: int = 64
    cross_attention_dim: int = 1024
    max_words: int = 77
    image: str = "none"
    fps: float = 16.0
    prediction_type: str = "epsilon"
    dtype: Any = "float32"
    remat: str = ""
    query_chunk: int = 0
    net: nn.Module = field(init=False, repr=False, compare=False)

    num_views = None
    temporal_pattern = TEMPORAL
    partition_rules = PARTITION_RULES
    traceable = True

    def __post_init__(self):
        arguments.freeze(self)
        for problem in self._problems():
            raise UserError(f"unet3d: {problem}")
        object.__setattr__(self, "net", UNet(self))

    def _problems(self) -> Iterator[str]:
        """What arguments are wrong, and why."""
        levels = len(self.block_out_channels)
        yield from arguments.problems(self.latent_shape, levels, self.remat, self.query_chunk)
        for name, size in (("norm_num_groups", self.norm_num_groups), ("head_dim", self.head_dim)):
            if any(channels % size for channels in self.block_out_channels):
                yield f"block_out_channels {self.block_out_channels} are not multiples of {name} {size}"
        if self.image not in IMAGES:
            yield f"no image {self.image!r}; there is {', '.join(IMAGES)}"

    def init(self, key) -> dict:
        """Parameters, with every temporal layer at the identity."""
        noisy = jnp.zeros((1, 2, *self.latent_shape))
        return self.net.init(key, noisy, jnp.zeros(1), self.empty_conditioning(1))["params"]

    def apply(
        self,
        params,
        noisy: Float[Array, "B K h w c"],
        timestep: Float[Array, " B"],
        conditioning: Conditioning,
    ) -> Float[Array, "B K h w c"]:
        """The network's prediction, float32, of type `prediction_type`.

        The public networks were trained to attend to the padding of their prompts as well: give them a text
        mask of ones.
        """
        return self.net.apply({"params": params}, noisy, timestep, conditioning)

    def empty_conditioning(self, batch: int) -> Conditioning:
        """No image and the empty prompt."""
        text = jnp.zeros((batch, self.max_words, self.cross_attention_dim))
        mask = jnp.zeros((batch, self.max_words)).at[:, 0].set(1)
        tokens = jnp.zeros((batch, 1, self.cross_attention_dim)) if self.image == "i2vgen" else None
        image = jnp.zeros((batch, *self.latent_shape))
        return Conditioning(image, jnp.zeros(batch), (text,), (mask,), tokens)

    def from_pretrained(self, path: str | Path, params) -> dict:
        """The parameters of a checkpoint of diffusers; see `unet3d_checkpoints`."""
        return unet3d_checkpoints.from_pretrained(self, path, params)

    def to_pretrained(self, params) -> dict[str, np.ndarray]:
        """The parameters as tensors of diffusers' class; see `unet3d_checkpoints`."""
        return unet3d_checkpoints.to_pretrained(params)
