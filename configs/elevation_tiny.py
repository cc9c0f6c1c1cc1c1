"""The estimator of a video's elevation (Sec. 3.3); makes `recon_torch/weights/elevation_tiny.safetensors`.

    im3d train-elevation --out recon_torch/weights/elevation_tiny.safetensors

Devices: one CPU. Time and result: see below.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.size = 64  # px of the rendered frames
    config.num_objects = 8192  # of the train split, rendered once
    config.num_test_objects = 200
    config.num_steps = 2000
    config.batch_size = 64  # videos of 4 frames
    config.learning_rate = 2e-3  # peak, falling to 0 on a cosine
    config.weight_decay = 0.02
    config.dino = ""  # directory of a DINO model instead of the small encoder
    config.augment = ConfigDict(dict(noise=0.08, blur_px=1.2, shift_px=1, colour=0.3))
    return config
