"""Stage 2 of the 128 px model: from an image to a turntable of 16 views (Sec. 3.1).

All layers train, as in configs/tiny_turntable.py. Half of the turntables start at a random view.

Command: im3d train --config=configs/toys_128_turntable.py --workdir=runs/toys_128_turntable
Devices: CPU. It has not been tried on a GPU.
Result:  the weights of 1399 steps are shipped, and
         --config.train.init_from=im3d_jax/weights/toys_128_turntable.safetensors goes on from them.
"""

from ml_collections import ConfigDict

from configs import autoencoder_128, base, toys_128_text_to_image


def get_config() -> ConfigDict:
    config = toys_128_text_to_image.get_config()
    config.train.update(
        init_from="runs/toys_128_text_to_image/weights.safetensors",
        learning_rate=8e-4,
        num_steps=12_000,
        decay_steps=3000,
        ema_decay=0.999,
    )
    config.train.streams.image.every = 6
    config.train.streams.turntable = base.stream(
        batch_size=4,
        keep_image=0.95,
        keep_text=0.5,
        timestep_shift=3.0,
        random_start=0.5,
        mix=autoencoder_128.mixture("latents"),
    )
    return config
