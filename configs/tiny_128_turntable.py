"""Stage 2 of the 128 px model: from an image to a turntable of 16 views (Sec. 3.1).

All layers train, as in configs/tiny_turntable.py.

Command: launch/train_tiny_gpu.sh 540, which chooses the number of steps by the time that it is given
Devices: meant for one GPU of 80 GB, or of 24 GB with --config.train.accumulate=4. It has not been tried.
Result:  not trained yet.
"""

from ml_collections import ConfigDict

from configs import tiny_128_text_to_image, tiny_turntable


def get_config() -> ConfigDict:
    return tiny_turntable.second_stage(
        tiny_128_text_to_image.get_config(),
        batch_size=32,
        init_from="runs/tiny_128_text_to_image/weights.safetensors",
        num_steps=12_000,
        decay_steps=3000,
        ema_decay=0.999,
    )
