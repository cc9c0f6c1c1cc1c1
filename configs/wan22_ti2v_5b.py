"""Wan 2.2's TI2V-5B: 16 views of 512 px from its public weights, fine-tuned by LoRA on turntables.

Weights: the directory of Wan-AI/Wan2.2-TI2V-5B-Diffusers, as DIR
Plan:    im3d plan --config=configs/wan22_ti2v_5b.py --mesh data=8 --accelerator h100
Train:   im3d train --config=configs/wan22_ti2v_5b.py --workdir=runs/wan22
Command: im3d generate --config=configs/wan22_ti2v_5b.py --config.lora=runs/wan22/weights.safetensors
         --image FILE --out OUT
Devices: not run here, for lack of the weights. At small sizes, with random weights, the network, the
         autoencoder, the text encoder and the whole call of three steps equal those of diffusers.
Result:  none. Whether an autoencoder trained on slow video survives steps of 22.5 degrees is not known;
         --config.clip.pictures_per_view=5 makes 81 pictures of which 16 are views.

The model is not trained on orbits: without a LoRA its objects move as it likes, and the verdict says so.
"""

from ml_collections import ConfigDict

from configs import base
from im3d_jax.backbones.wan_sizes import PUBLISHED
from recon_torch.settings import plain

DIR = "weights/Wan2.2-TI2V-5B-Diffusers"

NEGATIVE = "blurred, deformed, motion blur, a changing background, cropped, text, watermark"


def get_config() -> ConfigDict:
    config = base.get_config()
    config.size = 512
    config.weights = f"{DIR}/transformer"
    config.clip.closed = True
    sizes = plain(PUBLISHED["ti2v_5b"]) | dict(dtype="bfloat16", remat="nothing_saveable")
    config.backbone = dict(name="wan", kwargs=dict(latent_shape=(32, 32, 48), **sizes))
    config.autoencoder = dict(name="wan", kwargs=dict(path=f"{DIR}/vae", dtype="bfloat16"))
    encoders = (dict(kind="umt5", path=f"{DIR}/text_encoder", max_length=512),)
    config.text = dict(name="pretrained", kwargs=dict(encoders=encoders))
    config.schedule = dict(kind="flow", num_steps=1000, shift=5.0)
    config.text_to_image.update(w_text=5.0, spacing="flow_unipc", solver="unipc", negative_prompt=NEGATIVE)
    config.video.update(w_text=5.0, spacing="flow_unipc", solver="unipc", negative_prompt=NEGATIVE)
    config.train = base.training(
        streams=dict(turntable=dict(batch_size=16, keep_image=1.0, keep_text=0.9)),
        lora=dict(rank=64, alpha=64.0),
        init_from=config.weights,
        trainable=".*",
        frozen_dtype="bfloat16",
        num_steps=3000,
        warmup_steps=100,
        learning_rate=1e-4,
        ema_decay=0.99,
    )
    return config
