"""The autoencoder of the 128 px model: RGBA frames of 128 px to latents of 16x16x12, and back.

Command: im3d train --config=configs/autoencoder_128.py --workdir=runs/autoencoder_128
Devices: CPU. The shipped run took 53 minutes on one core with AVX-512, which other programs shared.
Result:  im3d_jax/weights/autoencoder_128: 27.7 dB over white, on two views of each of 46 test meshes. It was
         a run of 3000 steps without the term for hues, which painted what was green brown (26.3 dB), and
         from it another of 2400 steps with that term.

The frames are the views of two data sets, from the views that launch/train_toys.sh renders:

    im3d dataset build --views data/toys/meshes_views --out data/toys/meshes_pixels --split-file SPLIT.json
    im3d dataset build --views data/toys/procedural_views --out data/toys/procedural_pixels
"""

from ml_collections import ConfigDict

from configs import autoencoder_tiny, base

DATA = "data/toys"
"""The directory of the data sets: NAME_pixels, and NAME_latents of this autoencoder, for each name."""


def get_config() -> ConfigDict:
    config = autoencoder_tiny.get_config()
    config.size = 128
    config.autoencoder.kwargs.update(
        rgba=True, patch_size=4, block_out_channels=(48, 64), latent_channels=12, norm_num_groups=8
    )
    config.train.streams.frames = base.stream(batch_size=4, num_views=2, mix=mixture("pixels"))
    config.train.update(num_steps=3000, decay_steps=1000)
    config.train.autoencoder.w_chroma = 1.0
    return config


def mixture(kind: str) -> dict:
    """Two meshes for one procedural object, of the data sets of this kind ("pixels" or "latents")."""
    return dict(
        meshes=dict(weight=2.0, path=f"{DATA}/meshes_{kind}"),
        procedural=dict(weight=1.0, path=f"{DATA}/procedural_{kind}"),
    )
