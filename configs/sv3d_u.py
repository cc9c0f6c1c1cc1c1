"""SV3D_u: a picture to 21 views around its object, 576 px, without fine-tuning.

Voleti et al. 2024 (arXiv 2403.12008). All cameras have the elevation of the picture, which is estimated.

Weights: im3d convert --config=configs/sv3d_u.py --from sv3d_u.safetensors --to weights/sv3d_u.safetensors
Command: im3d generate --config=configs/sv3d_u.py --image mug.png --out out/mug
Devices: `im3d plan --config=configs/sv3d_u.py` estimates them.
Result:  not measured, because no public weights were at hand.

Put the paths of an autoencoder and of an image encoder where "" stands. SV3D's are the vae of Stable
Diffusion 2.1 and the image_encoder of SVD; SV3D's own file has them in another layout.

SV3D: the picture replaces its view at the end. Here: that view stays as it was drawn, together with its
neighbours. With --config.video.tie_first_view=true, all views are drawn together with the picture itself.
"""

from ml_collections import ConfigDict

from configs import svd_xt
from im3d_jax.backbones import svd

VIEWS = 21


def get_config() -> ConfigDict:
    config = svd_xt.get_config()
    config.weights = config.train.init_from = "weights/sv3d_u.safetensors"
    config.num_views = VIEWS
    config.backbone.kwargs = ConfigDict(
        dict(
            latent_shape=(72, 72, 4),
            num_views=VIEWS,
            vector="sv3d_u",
            noise_aug=1e-5,
            input_view="last",
            groupnorm_eps=1e-5,
            dtype="bfloat16",
            remat="nothing_saveable",
            query_chunk=324,
        )
    )
    config.video.update(num_steps=50, w_image=svd.triangular(VIEWS))
    config.train.streams.turntable.num_views = VIEWS
    return config
