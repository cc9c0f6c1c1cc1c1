"""ModelScope's text to video, fine-tuned to turn an image around: 16 views of 256 px.

Wang et al. 2023 (arXiv 2308.06571) is the public model nearest to Emu Video. It is not conditioned on an
image. The image enters through further input channels that start at zero, as in Emu Video (Sec. 3.1), so the
model has to be fine-tuned first.

Weights:   im3d convert --config=configs/modelscope.py --from text-to-video-ms-1.7b/unet
                        --to weights/modelscope.safetensors
Fine-tune: im3d train --config=configs/modelscope.py --workdir=runs/modelscope
Devices:   `im3d plan --config=configs/modelscope.py` estimates them.
Result:    not measured, because no public weights were at hand.

Put the paths of the checkpoint's text_encoder and vae where "" stands.
"""

from ml_collections import ConfigDict

from configs import emu_video_sd21


def get_config() -> ConfigDict:
    config = emu_video_sd21.get_config()
    config.weights = config.train.init_from = "weights/modelscope.safetensors"
    config.size = 256
    config.backbone = dict(
        name="unet3d",
        kwargs=dict(
            latent_shape=(32, 32, 4),
            image="channels",
            prediction_type="epsilon",
            dtype="bfloat16",
            remat="nothing_saveable",
        ),
    )
    config.turntable.size = 256
    # Paper: temporal layers only. Here: the first convolution too, because the image enters through it.
    config.train.trainable = "temp_convs|temp_attentions|transformer_in|conv_in"
    return config
