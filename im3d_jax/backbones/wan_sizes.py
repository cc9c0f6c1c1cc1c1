"""Sizes of Wan's video transformers: of the published weights, and of small ones that run anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from im3d_jax.backbones.unet import Channels, ComputeDtype, Remat
from recon_torch.errors import UserError
from recon_torch.ranges import Range, settings


@settings
class Architecture:
    """Sizes of the network, by the names of diffusers' config.json. The defaults are those of TI2V-5B.

    Args:
        num_attention_heads, attention_head_dim: whose product is the width of a token.
        in_channels: of the latents, with the mask and the image's latents where the model takes these.
        out_channels: of the prediction, which are the channels of the autoencoder's latents.
        text_dim: channels of the text encoder's tokens.
        freq_dim: sinusoids that tell the noise level.
        image_dim: channels of the image encoder's tokens, for Wan 2.1's image to video; 0 for no image.
        pos_embed_seq_len: learned places of the image's tokens, for a first and a last image; 0 for none.
        dtype: of the computation.
        remat: what the backward pass keeps of each block; it computes the rest again, which saves memory.
        query_chunk: see `attention.attend`.
    """

    num_attention_heads: Annotated[int, Range(1, 1024)] = 24
    attention_head_dim: Annotated[int, Range(6, 1024)] = 128
    in_channels: Channels = 48
    out_channels: Channels = 48
    text_dim: Channels = 4096
    freq_dim: Channels = 256
    ffn_dim: Channels = 14336
    num_layers: Annotated[int, Range(1, 1024)] = 30
    image_dim: Annotated[int, Range(0, 65_536)] = 0
    pos_embed_seq_len: Annotated[int, Range(0, 65_536)] = 0
    patch_size: Sequence[Annotated[int, Range(1, 64)]] = (1, 2, 2)
    eps: Annotated[float, Range(above=0, most=1)] = 1e-6
    dtype: ComputeDtype | str = ComputeDtype.FLOAT32
    remat: Remat | str = Remat.KEEP_ALL
    query_chunk: Annotated[int, Range(0, 2**24)] = 0

    def __post_init__(self) -> None:
        for name in ("attention_head_dim", "freq_dim"):
            if getattr(self, name) % 2:
                raise UserError(f"{name} is {getattr(self, name)}; give an even number")
        if len(self.patch_size) != 3:
            raise UserError(f"patch_size is {self.patch_size}; give its frames, height and width")

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The tokens along time, height and width of a latent. Raises UserError if patches do not fill it."""
        sides = (frames, height, width)
        if any(side % patch for side, patch in zip(sides, self.patch_size, strict=True)):
            latent, patch = ("x".join(map(str, each)) for each in (sides, self.patch_size))
            raise UserError(f"latents of {latent} do not divide into patches of {patch}; give other sizes")
        frames, height, width = (side // patch for side, patch in zip(sides, self.patch_size, strict=True))
        return frames, height, width


_WIDE: dict[str, Any] = dict(num_attention_heads=40, num_layers=40, ffn_dim=13824, out_channels=16)
_TINY: dict[str, Any] = dict(
    num_attention_heads=4, attention_head_dim=16, num_layers=2, ffn_dim=96, text_dim=24, freq_dim=16
)

PUBLISHED = {
    "t2v_1.3b": Architecture(
        num_attention_heads=12, ffn_dim=8960, num_layers=30, in_channels=16, out_channels=16
    ),
    "t2v_14b": Architecture(in_channels=16, **_WIDE),
    "i2v_14b": Architecture(in_channels=36, image_dim=1280, **_WIDE),
    "i2v_a14b": Architecture(in_channels=36, **_WIDE),
    "ti2v_5b": Architecture(),
}
"""Sizes of the published weights.

Wan 2.1 has "t2v_1.3b", "t2v_14b" and "i2v_14b", which attends to an image. Wan 2.2 has "ti2v_5b", and two
experts each of the sizes "t2v_14b" (T2V-A14B) and "i2v_a14b".
"""

SMALL = {
    "ti2v": Architecture(in_channels=48, out_channels=48, **_TINY),
    "i2v": Architecture(in_channels=36, out_channels=16, image_dim=20, **_TINY),
}
"""Sizes that checks can run anywhere, of the two kinds of conditions."""
