"""The estimator of a video's elevation (Sec. 3.3), as `recon_torch/weights/elevation_tiny.safetensors`.

    im3d train-elevation --workdir=runs/elevation

Devices: one CPU thread. Time: 8 CPU-minutes. Result, measured on 200 test objects: a median error of 0.75
degrees (mean 0.88; 4 above 3 degrees, 1 of them above 5), and of 0.66 (0.89) on views with the blur, noise,
shifts and tints of training. The shipped weights are of an earlier loop, with as many steps on 4 views of an
object at random azimuths: 0.66 (0.86) and 0.72 (0.94), which is as good, so they stay. It knows its
categories, not perspective as such: on five meshes of other kinds the shipped weights are off by 2 to 35
degrees, so give the elevation of pictures that are not of procedural objects.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.size = 64  # px of the rendered frames
    # A data set of `im3d dataset` and its splits; "": procedural objects.
    config.data = ConfigDict(dict(path="", split="train", test_split="test"))
    config.num_objects = 8192  # procedural ones to train on, rendered once
    config.num_views = 8  # of an object, evenly spaced; a video has 4 of them
    config.num_test_objects = 200
    config.loader = ConfigDict(dict(num_threads=1, buffer=2, max_corrupt=0))  # buffer: batches read ahead
    config.num_steps = 2000
    config.batch_size = 64  # videos
    config.learning_rate = 2e-3  # peak, falling to 0 on a cosine
    config.weight_decay = 0.02
    config.dino = ""  # directory of a DINO model instead of the small encoder
    config.checkpoint_every = 200
    config.log_every = 50
    config.tensorboard = False
    config.max_skipped = 0  # steps with a loss or gradient that is not finite, before the run stops
    config.augment = ConfigDict(dict(noise=0.08, blur_px=1.2, shift_px=1, colour=0.3))
    return config
