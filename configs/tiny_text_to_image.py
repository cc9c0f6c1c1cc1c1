"""Stage 1 of the shipped model: text to image, on the first views of procedural objects.

Command: im3d train --config=configs/tiny_text_to_image.py --workdir=runs/tiny_text_to_image
Devices: CPU. The shipped run took 33 minutes on one core.
Result:  the weights that configs/tiny_turntable.py starts from; see im3d_jax/weights/MODEL_CARD.md.
"""

from ml_collections import ConfigDict

from configs import base, tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.train = base.training(
        streams=dict(image=dict(batch_size=64, num_views=1, keep_image=0.0, keep_text=0.9)),
        num_steps=2000,
        decay_steps=400,
        learning_rate=1e-3,
        ema_decay=0.995,
        checkpoint=dict(every=200, weights_every=200),
    )
    return config
