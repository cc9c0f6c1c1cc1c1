"""I2VGen-XL: image and prompt to 16 frames of 512 px, which fine-tuning makes a turntable.

Zhang et al. 2023 (arXiv 2311.04145) is conditioned on an image already. As published it makes the object
move, not turn: expect views around it only after fine-tuning (Sec. 3.1).

Weights:   im3d convert --config=configs/i2vgen_xl.py --from i2vgen-xl/unet --to weights/i2vgen_xl.safetensors
Fine-tune: im3d train --config=configs/i2vgen_xl.py --workdir=runs/i2vgen_xl
Generate:  im3d generate --config=configs/i2vgen_xl.py --image mug.png --out out/mug
Devices: unknown; `im3d plan --config=configs/i2vgen_xl.py` estimates. Not measured here: no public weights
can be had offline. Put the paths of the checkpoint's vae and image_encoder where "" stands; for the text the
text_encoder of Stable Diffusion 2.1, which is I2VGen-XL's without the last layer, whose output is not used.
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
