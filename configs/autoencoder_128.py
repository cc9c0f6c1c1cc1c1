"""The autoencoder of the 128 px model: RGBA frames of 128 px to latents of 16x16x12, and back.

Command: im3d train --config=configs/autoencoder_128.py --workdir=runs/autoencoder_128
Devices: CPU.
Result:  not measured yet.

The frames are the views of two data sets, of meshes and of procedural objects, which launch/train_toys.sh
makes.
"""

from ml_collections import ConfigDict

from configs import base

DATA = "data/toys"
"""The directory of the data sets: NAME_pixels, and NAME_latents of this autoencoder, for each name."""


def get_config() -> ConfigDict:
    config = base.get_config()
    config.size = 128
    config.autoencoder = dict(
        name="autoencoder_kl",
        kwargs=dict(
            path="",
            rgba=True,
            patch_size=4,
            block_out_channels=(48, 64),
            layers_per_block=1,
            latent_channels=12,
            norm_num_groups=8,
            mid_block_add_attention=False,
        ),
    )
    config.backbone = config.text = ConfigDict()
    config.train = base.training(
        task="autoencoder",
        streams=dict(frames=dict(batch_size=4, num_views=2, mix=mixture("pixels"))),
        num_steps=3000,
        decay_steps=1000,
        learning_rate=1e-3,
        ema_decay=0.99,
        checkpoint=dict(every=250, keep=2, keep_every=0, weights_every=0),
    )
    config.train.autoencoder = dict(w_l1=1.0, w_ssim=0.2, w_kl=5e-7)
    return config


def mixture(kind: str) -> dict:
    """Two meshes for one procedural object, of the data sets of this kind ("pixels" or "latents")."""
    return dict(
        meshes=dict(weight=2.0, path=f"{DATA}/meshes_{kind}"),
        procedural=dict(weight=1.0, path=f"{DATA}/procedural_{kind}"),
    )
