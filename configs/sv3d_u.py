"""SV3D_u: a picture to 21 views around its object, 576 px, without fine-tuning.

Voleti et al. 2024 (arXiv 2403.12008). The cameras' elevation is the picture's, which is estimated.

Weights:  im3d convert --config=configs/sv3d_u.py --from sv3d_u.safetensors --to weights/sv3d_u.safetensors
Generate: im3d generate --config=configs/sv3d_u.py --image mug.png --out out/mug
Devices: unknown; `im3d plan --config=configs/sv3d_u.py` estimates. Not measured here: no public weights can
be had offline. Put the paths of an autoencoder and of the image encoder where "" stands: SV3D's are those of
Stable Diffusion 2.1 (vae) and of SVD (image_encoder), which its file has in another layout.

SV3D: the picture is put in place of its view at the end. Here: the view stays as drawn, as its neighbours
were drawn with it; --config.video.tie_first_view=true draws all views with the picture itself.
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
