"""Stage 1 of the shipped model: text to image, on first views of procedural objects.

Command: im3d train --config=configs/tiny_text_to_image.py --workdir=runs/tiny_text_to_image
Devices: CPU; the shipped run's steps, time and results stand in im3d_jax/weights/MODEL_CARD.md.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.train = ConfigDict(
        dict(
            init_from="",
            trainable=".*",
            streams=dict(
                image=dict(
                    every=1,
                    batch_size=64,
                    num_views=1,
                    first_object=0,
                    keep_image=0.0,
                    keep_text=0.9,
                    timestep_shift=1.0,
                )
            ),
            num_steps=2000,
            warmup_steps=100,
            decay_steps=400,
            learning_rate=1e-3,
            weight_decay=0.0,
            clip_norm=1.0,
            ema_decay=0.995,
            loss_weight="uniform",
            checkpoint_every=200,
            log_every=10,
        )
    )
    return config
