"""Stable Video Diffusion XT: a picture to a video of 576 px, which fine-tuning makes a turntable.

Blattmann et al. 2023 (arXiv 2311.15127); SV3D was made of this network. With the published weights the camera
and the object move freely: views around the object come only with fine-tuning (Sec. 3.1). Temporal layers
take any number of views; here it is the paper's 16.

Weights:   im3d convert --config=configs/svd_xt.py --from stable-video-diffusion-img2vid-xt/unet
                        --to weights/svd_xt.safetensors
Fine-tune: im3d train --config=configs/svd_xt.py --workdir=runs/svd_xt
Command:   im3d generate --config=configs/svd_xt.py --image mug.png --out out/mug
Devices:   `im3d plan --config=configs/svd_xt.py` estimates them.
Result:    not measured, because no public weights were at hand.

Put the paths of the checkpoint's vae and image_encoder where "" stands.

SVD: in training, ln(sigma) has a normal distribution of mean 0.7 and standard deviation 1.6. Here: it is
uniform between the least and the greatest sigma of sampling, which are those of the schedule.
"""

from ml_collections import ConfigDict

from configs import paper_512
from im3d_jax.backbones import svd


def get_config() -> ConfigDict:
    config = paper_512.get_config()
    del config.published
    config.weights = config.train.init_from = "weights/svd_xt.safetensors"
    config.size = 576
    config.backbone.name = "svd"
    config.backbone.kwargs = ConfigDict(
        dict(
            latent_shape=(72, 72, 4),
            num_views=None,
            dtype="bfloat16",
            remat="nothing_saveable",
            query_chunk=324,
        )
    )
    config.text = dict(name="none", kwargs=dict())
    config.schedule = dict(kind="edm", num_steps=1000, sigma_min=0.002, sigma_max=700.0)
    # First-order steps in the spacing of Karras are the Euler steps that SVD and SV3D are sampled with.
    config.video = dict(
        num_steps=25,
        spacing="karras",
        solver="1",
        # SVD: from 1 to 3 along the video. Here: as in SV3D, because a turntable returns to its first view.
        w_image=svd.triangular(16, frame_order=range(16)),
        w_text=0.0,
        rescale=0.0,
        tie_first_view=False,
    )
    config.turntable.size = 576
    config.train.trainable = svd.Model.temporal_pattern
    return config
