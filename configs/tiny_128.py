"""The shipped model's larger sister: 128 px, wider, to be trained on a GPU. Not trained yet: no weights.

Command: im3d generate --config=configs/tiny_128.py --prompt "a red mushroom" --out out/mushroom
Devices: two CPU cores are enough.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.size = 128
    config.weights = "runs/tiny_128_turntable/weights.safetensors"
    config.backbone.kwargs.update(latent_shape=(32, 32, 64), model_channels=64, channel_mult=(1, 2, 2))
    return config
