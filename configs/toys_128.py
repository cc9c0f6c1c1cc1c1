"""The 128 px model: the denoiser of configs/tiny.py on the latents of a small learned autoencoder.

Train:   launch/train_toys.sh, which makes the data and both stages
Command: im3d generate --config=configs/toys_128.py --prompt "a red mushroom" --out out/mushroom
Devices: two CPU cores are enough to generate.
Result:  the autoencoder is shipped (configs/autoencoder_128.py). So is an early state of stage 2 of the
         denoiser, from which training goes on.

The autoencoder brings 128 px to the 16x16 places that four-pixel patches make of 64 px, so a step of the
denoiser costs the same.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import tiny

WORDS = Path(__file__).with_name("words.txt")
"""The words of the captions of configs/toys_128_text_to_image.py, as `im3d dataset words` lists them."""


def get_config() -> ConfigDict:
    return enlarge(tiny.get_config())


def enlarge(config: ConfigDict) -> ConfigDict:
    """Changes a config of the 64 px model, of generation or of training, to the 128 px model."""
    words = tuple(WORDS.read_text().split())
    config.size = 128
    config.weights = "runs/toys_128_turntable/weights.safetensors"
    config.autoencoder = dict(
        name="autoencoder_kl", kwargs=dict(path="im3d_jax/weights/autoencoder_128", frames_per_call=0)
    )
    config.backbone.kwargs.update(latent_shape=(16, 16, 12), vocabulary=len(words) + 1)
    config.text.kwargs.words = words
    return config
