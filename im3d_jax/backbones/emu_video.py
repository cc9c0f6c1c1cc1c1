"""The paper's generator: Emu Video's factorised UNet (Girdhar et al. 2023, arXiv 2311.10709; IM-3D Sec. 3.1).

A text-to-image UNet in the layout of latent diffusion is turned into a video model by a 1D temporal
convolution after every spatial convolution and a temporal attention block after every spatial one. Those
start as the identity, so at initialisation a video is K separate images; and for a single frame they are
skipped, so that the same parameters without time are the text-to-image model. The conditioning image enters
as frame 0's latent, with zeros elsewhere and a mask, on extra input channels whose weights start at zero.

The network is `emu_video_network`; the tiny model and the paper's size are this code with other arguments.
Every temporal parameter's path contains "temporal", which is what `TEMPORAL` matches and fine-tuning trains.
`emu_video_checkpoints` reads and writes Stable Diffusion's weights.
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

from im3d_jax.backbones import arguments, emu_video_checkpoints
from im3d_jax.backbones.emu_video_network import UNet
from im3d_jax.backbones.layers import PARTITION_RULES
from im3d_jax.conditions.conditioning import Conditioning
from recon_torch.errors import UserError

TEMPORAL = "temporal"
"""Pattern of the parameter paths that Sec. 3.1 trains."""

SMALL = dict(
    latent_shape=(8, 8, 4),
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    attention_levels=(1,),
    head_dim=16,
    text_dims=(16, 24),
)
"""Arguments of a model that checks and benchmarks can run anywhere."""


@dataclass(frozen=True)
class Model:
    """A denoiser under the backbone contract.

    Args:
        latent_shape: (h, w, c) of one frame's latent.
        model_channels, channel_mult, num_res_blocks: width of the UNet's levels, and their residual blocks.
        attention_levels: levels with attention; level l has latents of side h / 2^l. The middle of the UNet
            has it as well, as in latent diffusion, on which Emu builds.
        head_dim, num_transformer_layers, ff_mult: size of the heads, and depth and feed-forward width of
            every attention block.
        num_heads: if set, of every level, whatever the size that they then have, as in Stable Diffusion 1.
        temporal_span: level -> what temporal attention sees: "pixel", the same place in every frame (Emu
            Video); "first", all of frame 0; "video", all of every frame. Paper: "pixel". The tiny model uses
            the others, because with few layers content has no other way to move across the image from one
            view to the next.
        closed_orbit: temporal convolutions wrap around. Unspecified in the paper; a turntable's last view is
            next to its first.
        clean_first_view: view 0 comes in without noise where the image is given. Paper: noised as the others.
            The tiny model has it clean, because layers that know pictures can then read it from the start.
        image_in_every_view: the extra channels show the image to all views, as SVD does. Paper: to view 0,
            zeros elsewhere. The tiny model needs the short way.
        copy_gate: a view is a blend, with learned weights, of the given image and of what the network draws;
            for x0-prediction. Not in the paper. The tiny model has it, because few channels draw blurred.
        text_dims: width of each text encoder's output; transformer layer j attends to encoder j modulo their
            number.
        vocabulary: if set, text is word indices below it and the model carries its own `WordEncoder` of
            `text_dims[0]`.
        prediction_type: of the trained network, see `diffusion`.
        dtype: of the computation; normalisation, softmax and the embedding of the noise level stay float32.
        remat: what the backward pass computes again instead of keeping: "" for nothing, or a policy of
            `jax.checkpoint_policies` that says what is kept inside the blocks, where most memory goes.
        query_chunk: how many places of each frame attend to the others at a time, a divisor of their number;
            0 for all. At 64x64 places the weights of all at once take 64 MB for each frame and head.
    """

    latent_shape: Sequence[int] = (64, 64, 8)
    model_channels: int = 384
    channel_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: Sequence[int] = (3, 4, 4, 4)
    attention_levels: Sequence[int] = (0, 1, 2)
    head_dim: int = 64
    num_heads: int = 0
    num_transformer_layers: int = 2
    ff_mult: int = 4
    temporal_span: Sequence[str] = ("pixel", "pixel", "pixel", "pixel")
    closed_orbit: bool = False
    clean_first_view: bool = False
    image_in_every_view: bool = False
    copy_gate: bool = False
    text_dims: Sequence[int] = (768, 2048)
    vocabulary: int = 0
    max_words: int = 16
    prediction_type: str = "v"
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
            raise UserError(f"emu_video: {problem}")
        object.__setattr__(self, "net", UNet(self))

    def _problems(self) -> Iterator[str]:
        """What arguments are wrong, and why."""
        yield from arguments.problems(self.latent_shape, len(self.channel_mult), self.remat, self.query_chunk)
        if self.copy_gate and self.prediction_type != "x0":
            yield f"copy_gate blends clean views; it cannot predict {self.prediction_type!r}"

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
        """The network's prediction, float32, of type `prediction_type`."""
        return self.net.apply({"params": params}, noisy, timestep, conditioning)

    def num_heads_of(self, channels: int) -> int:
        """Attention heads of a level that is `channels` wide."""
        return self.num_heads or max(1, channels // self.head_dim)

    def from_pretrained(self, path: str | Path, params) -> dict:
        """`params` with the spatial layers of a Stable Diffusion; see `emu_video_checkpoints`."""
        return emu_video_checkpoints.from_pretrained(self, path, params)

    def to_pretrained(self, params) -> dict[str, np.ndarray]:
        """The spatial layers in the layout of a Stable Diffusion; see `emu_video_checkpoints`."""
        return emu_video_checkpoints.to_pretrained(self, params)

    def empty_conditioning(self, batch: int) -> Conditioning:
        """No image and the empty prompt."""
        if self.vocabulary:
            text = (jnp.zeros((batch, self.max_words), jnp.int32),)
        else:
            text = tuple(jnp.zeros((batch, self.max_words, dim)) for dim in self.text_dims)
        mask = tuple(jnp.zeros((batch, self.max_words)).at[:, 0].set(1) for _ in text)
        return Conditioning(jnp.zeros((batch, *self.latent_shape)), jnp.zeros(batch), text, mask)
