"""Stage 1 of the 128 px model: text to image, on first views of procedural objects.

Command: launch/train_tiny_gpu.sh 540, which chooses the number of steps for the time that there is
Devices: meant for one GPU of 24 GB or more; not tried. Not trained yet.
"""

from ml_collections import ConfigDict

from configs import base, tiny_128


def get_config() -> ConfigDict:
    config = tiny_128.get_config()
    config.backbone.kwargs.dtype = "bfloat16"
    config.train = base.training(
        streams=dict(image=dict(batch_size=256, num_views=1, keep_image=0.0, keep_text=0.9)),
        num_steps=1000,
        decay_steps=200,
        learning_rate=1e-3,
        ema_decay=0.995,
        # A batch ahead of each process. It is small: objects are rendered when their step comes.
        num_workers=12,
        loader=dict(num_threads=12, buffer=12, max_corrupt=0),
        checkpoint=dict(every=500, keep=1, keep_every=0, weights_every=500),
    )
    return config
