"""The paper's generator on public weights: Emu Video's layers around Stable Diffusion 2.1, at 512 px.

This is the nearest to Sec. 3.1 that anyone can start from. With one view, K = 1, Stable Diffusion draws the
image without further training. Temporal layers start as the identity and the input channels of the image
start at zero, so both have to be fine-tuned before the backbone makes turntables.

Weights:   im3d convert --config=configs/emu_video_sd21.py --from stable-diffusion-2-1-base/unet
                        --to weights/emu_video_sd21.safetensors
Fine-tune: im3d train --config=configs/emu_video_sd21.py --workdir=runs/emu_video_sd21
Devices:   `im3d plan --config=configs/emu_video_sd21.py` estimates them.
Result:    not measured, because no public weights were at hand.

Put the paths of the text encoder and of the autoencoder where "" stands. To use Stable Diffusion 1.5 instead,
whose latent_shape and schedule are the same, add
    --config.backbone.kwargs.num_heads=8 --config.backbone.kwargs.text_dims=768,
"""

from ml_collections import ConfigDict

from configs import paper_512


def get_config() -> ConfigDict:
    config = paper_512.get_config()
    del config.published
    config.weights = config.train.init_from = "weights/emu_video_sd21.safetensors"
    config.backbone.kwargs.update(
        latent_shape=(64, 64, 4),
        model_channels=320,
        num_res_blocks=(2, 2, 2, 2),
        num_heads=0,  # as many as head_dim makes
        num_transformer_layers=1,
        text_dims=(1024,),
        prediction_type="epsilon",
    )
    config.schedule.zero_terminal_snr = False
    config.text.kwargs.encoders = (dict(kind="clip", path="", max_length=77),)
    # Paper: temporal layers only. Here: the first convolution too, because the image enters through it.
    config.train.trainable = "temporal|conv_in"
    return config
