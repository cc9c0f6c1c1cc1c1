"""Stable Video Diffusion and SV3D: image to video, and image to orbit, with public weights.

SVD (Blattmann et al. 2023, arXiv 2311.15127) puts a temporal residual block after every spatial one and a
temporal transformer after every spatial one, and blends each pair with a learned weight. SV3D (Voleti et al.
2024, arXiv 2403.12008) is SVD fine-tuned to 21 frames around an object, at SV3D_p with the cameras told to
the network. The picture is shown to every frame, as a latent on extra channels and as a CLIP embedding to
attend to; there is no text. IM-3D's own generator is not public: these are the open ones that do its part
(Sec. 3.1).

Both were trained with EDM (Karras et al. 2022): use `diffusion.make_schedule(kind="edm")`, in whose terms
they predict "v". The network is `svd_network`; `svd_checkpoints` reads and writes both projects' weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from im3d_jax.backbones import arguments, svd_checkpoints
from im3d_jax.backbones.layers import PARTITION_RULES, sinusoids
from im3d_jax.backbones.svd_network import UNet
from im3d_jax.conditions.conditioning import Conditioning
from recon_torch.errors import UserError

TEMPORAL = "temporal_res_block|temporal_transformer_blocks|time_mixer|time_pos_embed"
"""Pattern of the parameter paths that Sec. 3.1 trains."""

VECTORS = ("svd", "sv3d_u", "sv3d_p")

SMALL = dict(
    latent_shape=(4, 4, 4),
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_levels=(0,),
    num_attention_heads=(2, 4),
    cross_attention_dim=24,
    addition_time_embed_dim=16,
    num_views=3,
)
"""Arguments of a model that checks and benchmarks can run anywhere."""


@dataclass(frozen=True)
class Model:
    """A denoiser under the backbone contract; the defaults are SVD-XT's.

    Args:
        latent_shape: (h, w, c) of one frame's latent; h and w are multiples of 2^(levels - 1).
        block_out_channels, layers_per_block: channels of the levels, in 32 groups; residual blocks of each.
        attention_levels: levels with attention; level l has latents of side h / 2^l.
        num_attention_heads: of each level.
        cross_attention_dim: of the image's embedding.
        num_views: frames that the weights were trained for: 14 (SVD), 25 (SVD-XT), 21 (SV3D); None for any.
        vector: what every frame is told, as sinusoids of `addition_time_embed_dim`: "svd" `fps` - 1,
            `motion_bucket` and `noise_aug`; "sv3d_u" `noise_aug`; "sv3d_p" also, twice as wide, the camera's
            polar angle and azimuth.
        fps, motion_bucket: frames per second, and amount of motion in [0, 255].
        noise_aug: standard deviation of the noise that the picture is said to have; none is added here.
        input_view: frame that is the picture's view, "first" (SVD) or "last" (SV3D: frame i stands at azimuth
            2 pi (i + 1) / K). View 0 is that frame.
        orbit_direction: 1 if the frames' azimuths grow counter-clockwise seen from above, -1 if clockwise.
            SV3D's published examples turn counter-clockwise.
        latent_scale: factor of noisy latents that the picture's latent, on the extra channels, is without.
        groupnorm_eps: of the residual blocks that have 1e-6 in diffusers: on the way down in levels with
            attention, on the way up in all. Stability's own code, which the weights were trained with, has
            1e-5 there as everywhere.
        dtype: of the computation; normalisation, softmax and the embedding of the noise level stay float32.
        remat: what the backward pass computes again instead of keeping: "" for nothing, or a policy of
            `jax.checkpoint_policies` that says what is kept inside the blocks.
        query_chunk: how many places of each frame attend to the others at a time, a divisor of their number;
            0 for all.
    """

    latent_shape: Sequence[int] = (72, 72, 4)
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_levels: Sequence[int] = (0, 1, 2)
    num_attention_heads: Sequence[int] = (5, 10, 20, 20)
    cross_attention_dim: int = 1024
    addition_time_embed_dim: int = 256
    num_views: int | None = 25
    vector: str = "svd"
    fps: int = 7
    motion_bucket: int = 127
    noise_aug: float = 0.02
    input_view: str = "first"
    orbit_direction: int = 1
    latent_scale: float = 0.18215
    groupnorm_eps: float = 1e-6
    dtype: Any = "float32"
    remat: str = ""
    query_chunk: int = 0
    net: nn.Module = field(init=False, repr=False, compare=False)

    prediction_type = "v"
    temporal_pattern = TEMPORAL
    partition_rules = PARTITION_RULES
    traceable = True

    def __post_init__(self):
        arguments.freeze(self)
        for problem in self._problems():
            raise UserError(f"svd: {problem}")
        object.__setattr__(self, "net", UNet(self))

    def _problems(self) -> Iterator[str]:
        """What arguments are wrong, and why."""
        levels = len(self.block_out_channels)
        yield from arguments.problems(self.latent_shape, levels, self.remat, self.query_chunk)
        if any(channels % 32 for channels in self.block_out_channels):
            yield f"block_out_channels {self.block_out_channels} are not multiples of 32, the norms' groups"
        if self.vector not in VECTORS:
            yield f"no vector {self.vector!r}; there is {', '.join(VECTORS)}"
        if self.input_view not in ("first", "last"):
            yield f"input_view {self.input_view!r} is not 'first' or 'last'"
        if self.orbit_direction not in (1, -1):
            yield f"orbit_direction {self.orbit_direction} is not 1 or -1"

    def init(self, key) -> dict:
        """Parameters, with every temporal layer at the identity."""
        noisy, empty = jnp.zeros((1, 2, *self.latent_shape)), self.empty_conditioning(1)
        inputs = self._image(empty), self._tokens(empty), self._vector(empty, 2)
        return self.net.init(key, noisy, jnp.zeros(1), *inputs)["params"]

    def apply(
        self,
        params,
        noisy: Float[Array, "B K h w c"],
        timestep: Float[Array, " B"],
        conditioning: Conditioning,
    ) -> Float[Array, "B K h w c"]:
        """The network's "v", float32. `timestep` is EDM's c_noise = ln(sigma) / 4."""
        order = self.frame_order(noisy.shape[1])
        vector = self._vector(conditioning, len(order))
        inputs = self._image(conditioning), self._tokens(conditioning), vector
        frames = self.net.apply({"params": params}, noisy[:, order], timestep, *inputs)
        return frames[:, np.argsort(order)]

    def empty_conditioning(self, batch: int) -> Conditioning:
        """No image. SV3D_p is told that its cameras are level with the object. There is no text."""
        return Conditioning(
            image=jnp.zeros((batch, *self.latent_shape)),
            image_mask=jnp.zeros(batch),
            text=(),
            text_mask=(),
            image_tokens=jnp.zeros((batch, 1, self.cross_attention_dim)),
            elevation_rad=jnp.zeros(batch) if self.vector == "sv3d_p" else None,
        )

    def from_pretrained(self, path, params) -> dict:
        """See `svd_checkpoints.from_pretrained`."""
        return svd_checkpoints.from_pretrained(self, path, params)

    def to_pretrained(self, params) -> dict[str, np.ndarray]:
        """The parameters as tensors of diffusers' UNetSpatioTemporalConditionModel."""
        return svd_checkpoints.to_pretrained(params)

    def to_stability(self, params) -> dict[str, np.ndarray]:
        """The parameters as tensors of Stability's own files."""
        return svd_checkpoints.to_stability(self, params)

    def frame_order(self, num_views: int) -> np.ndarray:
        """The view that each of the network's own frames shows, [K]."""
        return self.orbit_direction * self._places(num_views) % num_views

    def _places(self, num_views: int) -> np.ndarray:
        """Steps that each of the network's own frames stands from the picture along its orbit, [K]."""
        return (np.arange(num_views) + (self.input_view == "last")) % num_views

    def _image(self, conditioning: Conditioning) -> Float[Array, "B h w c"]:
        return conditioning.image * conditioning.image_mask[:, None, None, None] / self.latent_scale

    def _tokens(self, conditioning: Conditioning) -> Float[Array, "B L d"]:
        tokens = conditioning.image_tokens
        if tokens is None:
            tokens = jnp.zeros((len(conditioning.image), 1, self.cross_attention_dim))
        return tokens * conditioning.image_mask[:, None, None]

    def _vector(self, conditioning: Conditioning, num_views: int) -> Float[Array, "B K d"]:
        """What each of the network's own frames is told."""
        batch, dim = len(conditioning.image), self.addition_time_embed_dim
        numbers = [self.noise_aug]
        if self.vector == "svd":  # trained with the frame rate less one
            numbers = [self.fps - 1, self.motion_bucket, self.noise_aug]
        parts = [sinusoids(jnp.array(numbers), dim).reshape(1, 1, -1)]
        if self.vector == "sv3d_p":
            elevation = conditioning.elevation_rad
            polar = jnp.pi / 2 - (jnp.zeros(batch) if elevation is None else elevation)
            azimuth = jnp.asarray(2 * np.pi * self._places(num_views) / num_views)
            parts += [sinusoids(polar, 2 * dim)[:, None], sinusoids(azimuth, 2 * dim)[None]]
        return jnp.concatenate([jnp.broadcast_to(p, (batch, num_views, p.shape[-1])) for p in parts], -1)


def triangular(
    num_views: int, low: float = 1.0, high: float = 2.5, frame_order: Sequence[int] | None = None
) -> tuple[float, ...]:
    """SV3D's weights of guidance on the image, one for each view: `low` at the picture, `high` behind it.

    A triangle over the network's own frames ("triangular CFG scaling", Voleti et al. 2024) of which the first
    and the last have `low`; `frame_order` is `Model.frame_order`, by default SV3D's, whose last frame is view
    0. So views 0 and 1 both have `low`.
    """
    order = (np.arange(num_views) + 1) % num_views if frame_order is None else np.asarray(frame_order)
    rising = np.linspace(0, 2, num_views)
    weights = low + (high - low) * np.minimum(rising, 2 - rising)
    return tuple(weights[np.argsort(order)].tolist())
