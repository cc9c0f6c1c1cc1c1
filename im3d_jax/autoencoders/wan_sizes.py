"""Sizes of Wan's autoencoders, and the means and deviations of their latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from im3d_jax.autoencoders.kl_network import Channels, ComputeDtype
from recon_torch.errors import UserError
from recon_torch.ranges import Range, settings

Number = Annotated[float, Range(-1e6, 1e6)]
Deviation = Annotated[float, Range(above=0, most=1e6)]


@settings
class Architecture:
    """Sizes of the networks, by the names of diffusers' config.json, with its spelling.

    Args:
        base_dim, dim_mult: the width of each level is a multiple of the first; every level but one halves the
            sides.
        decoder_base_dim: the same of the decoder; 0 for that of the encoder.
        z_dim: channels of the latents.
        num_res_blocks: of a level; the decoder has one more.
        temperal_downsample: for each level but the last, whether it halves the frames too.
        is_residual: whether levels have a shortcut around them, as in Wan 2.2's family.
        patch_size: squares of so many pixels are channels of the networks.
        latents_mean, latents_std: of each channel; latents of this package are without them.
        dtype: of the computation; normalisation and softmax stay float32.
    """

    base_dim: Channels = 96
    decoder_base_dim: Annotated[int, Range(0, 65_536)] = 0
    z_dim: Annotated[int, Range(1, 4096)] = 16
    dim_mult: Sequence[Annotated[int, Range(1, 1024)]] = (1, 2, 4, 4)
    num_res_blocks: Annotated[int, Range(1, 64)] = 2
    temperal_downsample: Sequence[bool] = (False, True, True)
    is_residual: bool = False
    patch_size: Annotated[int, Range(1, 64)] = 1
    latents_mean: Sequence[Number] = ()
    latents_std: Sequence[Deviation] = ()
    dtype: ComputeDtype | str = ComputeDtype.FLOAT32

    def __post_init__(self) -> None:
        if len(self.temperal_downsample) != self.num_levels - 1:
            told = f"{len(self.temperal_downsample)} entries for {self.num_levels} levels of dim_mult"
            raise UserError(f"temperal_downsample has {told}; give one for each level but the last")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if len(values) not in (0, self.z_dim):
                raise UserError(f"{name} has {len(values)} entries for {self.z_dim} channels of z_dim")

    @property
    def num_levels(self) -> int:
        """Levels of the networks."""
        return len(self.dim_mult)

    @property
    def decoder_width(self) -> int:
        """Channels of the decoder, of which its levels have multiples."""
        return self.decoder_base_dim or self.base_dim

    @property
    def out_channels(self) -> int:
        """Channels of an image whose patches have become channels."""
        return 3 * self.patch_size**2

    @property
    def side_factor(self) -> int:
        """Pixels along a side of a picture for each place of a latent."""
        return self.patch_size * 2 ** (self.num_levels - 1)

    @property
    def frame_factor(self) -> int:
        """Pictures for each latent frame after the first."""
        return 2 ** sum(self.temperal_downsample)

    def num_latents(self, pictures: int) -> int:
        """The latent frames of so many pictures. Raises UserError, which names the next numbers that fit."""
        whole, rest = divmod(pictures - 1, self.frame_factor)
        if rest or pictures < 1:
            fewer, more = max(whole, 0) * self.frame_factor + 1, (whole + 1) * self.frame_factor + 1
            takes = f"{self.frame_factor}n + 1 pictures, not {pictures}"
            raise UserError(f"this autoencoder takes {takes}; give {fewer} or {more}")
        return whole + 1

    def check_sides(self, height: int, width: int) -> None:
        """Raises UserError for pictures of so many pixels that the latents' places do not fill."""
        if height % self.side_factor or width % self.side_factor:
            takes = f"multiples of {self.side_factor} px, not pictures of {height}x{width}"
            raise UserError(f"this autoencoder takes {takes}; resize or crop them")


# Published with the weights, in the order of the latents' channels.
_MEAN_16 = (
    "-.7571 -.7089 -.9113 .1075 -.1745 .9653 -.1517 1.5508 .4134 -.0715 .5517 -.3632 -.1922 -.9497 .2503"
)
_MEAN_16 += " -.2921"
_STD_16 = "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253"
_STD_16 += " 2.8251 1.9160"
_MEAN_48 = """
    -.2289 -.0052 -.1323 -.2339 -.2799 .0174 .1838 .1557 -.1382 .0542 .2813 .0891 .1570 -.0098 .0375 -.1825
    -.2246 -.1207 -.0698 .5109 .2665 -.2108 -.2158 .2502 -.2055 -.0322 .1109 .1567 -.0729 .0899 -.2799 -.1230
    -.0313 -.1649 .0117 .0723 -.2839 -.2083 -.0520 .3748 .0152 .1957 .1433 -.2944 .3573 -.0548 -.1681 -.0667
"""
_STD_48 = """
    .4765 1.0364 .4514 1.1677 .5313 .4990 .4818 .5013 .8158 1.0344 .5894 1.0901 .6885 .6165 .8454 .4978
    .5759 .3523 .7135 .6804 .5833 1.4146 .8986 .5659 .7069 .5338 .4889 .4917 .4069 .4999 .6866 .4093
    .5709 .6065 .6415 .4944 .5726 1.2042 .5458 1.6887 .3971 1.0600 .3943 .5537 .5444 .4089 .7468 .7744
"""


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


PUBLISHED = {
    "wan2.1": Architecture(latents_mean=_numbers(_MEAN_16), latents_std=_numbers(_STD_16)),
    "wan2.2": Architecture(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        temperal_downsample=(False, True, True),
        is_residual=True,
        patch_size=2,
        latents_mean=_numbers(_MEAN_48),
        latents_std=_numbers(_STD_48),
    ),
}
"""Sizes of the published weights: those of Wan 2.1, which 2.2's A14B models share, and of 2.2's TI2V-5B."""

_TINY: dict[str, Any] = dict(
    base_dim=8, num_res_blocks=1, dim_mult=(1, 2, 2), temperal_downsample=(True, True)
)

SMALL = {
    "wan2.1": Architecture(
        z_dim=4, latents_mean=(0.5, -1.0, 0.2, 0.0), latents_std=(0.5, 2.0, 1.5, 1.0), **_TINY
    ),
    "wan2.2": Architecture(z_dim=6, decoder_base_dim=12, is_residual=True, patch_size=2, **_TINY),
}
"""Sizes of the two families that checks can run anywhere."""
