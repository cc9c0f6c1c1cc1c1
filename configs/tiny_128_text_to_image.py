"""Stage 1 of the 128 px model: text to image, on the first views of procedural objects.

Command: launch/train_tiny_gpu.sh 540, which chooses the number of steps by the time that it is given
Devices: meant for one GPU of 24 GB or more. It has not been tried.
Result:  not trained yet.
"""

from ml_collections import ConfigDict

from configs import tiny_128, tiny_text_to_image


def get_config() -> ConfigDict:
    config = tiny_128.enlarge(tiny_text_to_image.get_config())
    config.backbone.kwargs.dtype = "bfloat16"
    config.train.streams.image.batch_size = 256
    config.train.update(num_steps=1000, decay_steps=200)
    config.train.checkpoint.update(every=500, keep=1, weights_every=500)
    # Each process is one batch ahead. A batch is small, because objects are rendered when their step comes.
    config.train.num_workers = 12
    config.train.loader.update(num_threads=12, buffer=12)
    return config
