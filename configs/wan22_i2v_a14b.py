"""Wan 2.2's I2V-A14B: 16 views of 512 px from its public weights, two experts of 14B parameters each.

Weights: the directory of Wan-AI/Wan2.2-I2V-A14B-Diffusers, as DIR
Plan:    im3d plan --config=configs/wan22_i2v_a14b.py --mesh fsdp=8 --accelerator h100
Train:   im3d train --config=configs/wan22_i2v_a14b.py --workdir=runs/wan22_a14b
Command: im3d generate --config=configs/wan22_i2v_a14b.py --config.lora=runs/wan22_a14b/weights.safetensors
         --image FILE --out OUT
Devices: not run here, for lack of the weights. At small sizes, with random weights, the whole call, with its
         change of experts, equals that of diffusers.
Result:  none; see configs/wan22_ti2v_5b.py for what is not known.

The network sees the picture on further channels, so view 0 is its own version of it, as in the pipeline of
diffusers.
"""

from ml_collections import ConfigDict

from configs import wan22_ti2v_5b
from im3d_jax.backbones.wan_sizes import PUBLISHED
from recon_torch.settings import plain

DIR = "weights/Wan2.2-I2V-A14B-Diffusers"


def get_config() -> ConfigDict:
    config = wan22_ti2v_5b.get_config()
    config.weights = DIR
    config.train.init_from = DIR
    config.train.mesh = "fsdp=-1"
    sizes = plain(PUBLISHED["i2v_a14b"]) | dict(dtype="bfloat16", remat="nothing_saveable")
    told = dict(latent_shape=(64, 64, 16), first_frame="channels", experts=True, boundary=0.9)
    config.backbone.kwargs = told | sizes
    config.autoencoder.kwargs.path = f"{DIR}/vae"
    encoders = (dict(kind="umt5", path=f"{DIR}/text_encoder", max_length=512),)
    config.text.kwargs.encoders = encoders
    config.video.update(w_text=3.5, tie_first_view=False)
    return config
