"""I2VGen-XL: an image and a prompt to 16 frames of 512 px, which fine-tuning makes a turntable.

Zhang et al. 2023 (arXiv 2311.04145) is conditioned on an image already. With the published weights the object
moves and the camera does not go around it: views around the object come only with fine-tuning (Sec. 3.1).

Weights:   im3d convert --config=configs/i2vgen_xl.py --from i2vgen-xl/unet --to weights/i2vgen_xl.safetensors
Fine-tune: im3d train --config=configs/i2vgen_xl.py --workdir=runs/i2vgen_xl
Command:   im3d generate --config=configs/i2vgen_xl.py --image mug.png --out out/mug
Devices:   `im3d plan --config=configs/i2vgen_xl.py` estimates them.
Result:    not measured, because no public weights were at hand.

Put the paths of the checkpoint's vae and image_encoder where "" stands. For the text, put the text_encoder of
Stable Diffusion 2.1: it is that of I2VGen-XL without the last layer, whose output is not used.
"""

from ml_collections import ConfigDict

from configs import modelscope


def get_config() -> ConfigDict:
    config = modelscope.get_config()
    config.weights = config.train.init_from = "weights/i2vgen_xl.safetensors"
    config.size = 512
    config.backbone.kwargs.update(
        latent_shape=(64, 64, 4), image="i2vgen", prediction_type="v", query_chunk=512
    )
    config.schedule = dict(kind="cosine", num_steps=1000, zero_terminal_snr=True)
    config.turntable.size = 512
    config.train.trainable = "temp_convs|temp_attentions|transformer_in"
    return config
