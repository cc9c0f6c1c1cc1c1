"""A larger relative of the shipped model: 128 px and wider, to be trained on a GPU. There are no weights yet.

Train:   launch/train_tiny_gpu.sh 540
Command: im3d generate --config=configs/tiny_128.py --prompt "a red mushroom" --out out/mushroom
Devices: two CPU cores are enough to generate.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    return enlarge(tiny.get_config())


def enlarge(config: ConfigDict) -> ConfigDict:
    """Changes a config of the 64 px model, of generation or of training, to the 128 px model."""
    config.size = 128
    config.weights = "runs/tiny_128_turntable/weights.safetensors"
    config.backbone.kwargs.update(latent_shape=(32, 32, 64), model_channels=64, channel_mult=(1, 2, 2))
    return config
