"""Stage 1 of the 128 px model: text to image, on the first views of meshes and of procedural objects.

Command: im3d train --config=configs/toys_128_text_to_image.py --workdir=runs/toys_128_text_to_image
Devices: CPU. It has not been tried on a GPU.
Result:  the weights that configs/toys_128_turntable.py starts from. What is shipped there has been through
         2000 steps of this stage.
"""

from ml_collections import ConfigDict

from configs import autoencoder_128, base, tiny_text_to_image, toys_128


def get_config() -> ConfigDict:
    config = toys_128.enlarge(tiny_text_to_image.get_config())
    image = dict(batch_size=64, num_views=1, keep_image=0.0, keep_text=0.9)
    config.train.streams.image = base.stream(**image, mix=autoencoder_128.mixture("latents"))
    config.train.update(num_steps=4000, decay_steps=800)
    return config
