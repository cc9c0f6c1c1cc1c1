"""Stage 2 of the 128 px model: image to 16-view turntable (Sec. 3.1). All trains, as in `tiny_turntable`.

Command: launch/train_tiny_gpu.sh 540, which chooses the number of steps for the time that there is
Devices: meant for one GPU of 80 GB, with --config.train.accumulate=4 of 24 GB; not tried. Not trained yet.
"""

from ml_collections import ConfigDict

from configs import base, tiny_128_text_to_image


def get_config() -> ConfigDict:
    config = tiny_128_text_to_image.get_config()
    config.train.update(
        init_from="runs/tiny_128_text_to_image/weights.safetensors",
        num_steps=12_000,
        decay_steps=3000,
        learning_rate=8e-4,
        ema_decay=0.999,
    )
    image = config.train.streams.image
    image.every, image.data.first_object = 6, 2**29
    config.train.streams.turntable = base.stream(
        batch_size=32, keep_image=0.95, keep_text=0.5, timestep_shift=3.0, first_object=2**30
    )
    return config
