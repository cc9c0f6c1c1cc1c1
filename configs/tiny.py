"""The shipped 64 px model: from a prompt or an image to an asset on a CPU.

Command: im3d generate --prompt "a red mushroom with a beige stem" --out out/mushroom
Devices: two CPU cores are enough.
Result:  im3d_jax/weights/MODEL_CARD.md says how the weights were trained and what they can do.
"""

from ml_collections import ConfigDict

from configs import base
from im3d_jax.data import objects


def get_config() -> ConfigDict:
    words = tuple(objects.vocabulary())
    config = base.get_config()
    config.weights = "im3d_jax/weights/tiny.safetensors"
    config.backbone = dict(
        name="emu_video",
        kwargs=dict(
            latent_shape=(16, 16, 64),
            model_channels=48,
            channel_mult=(1, 2, 3),
            num_res_blocks=(1, 1, 1),
            attention_levels=(1, 2),
            head_dim=32,
            num_transformer_layers=1,
            ff_mult=2,
            temporal_span=("pixel", "first", "video"),
            closed_orbit=True,
            clean_first_view=True,
            image_in_every_view=True,
            copy_gate=True,
            text_dims=(96,),
            vocabulary=len(words) + 1,
            prediction_type="x0",
        ),
    )
    config.autoencoder = dict(name="patches", kwargs=dict(patch=4))
    config.text = dict(name="words", kwargs=dict(words=words, max_words=16))
    # Its views of objects at rest disagree by up to 6.7% (docs/gates.md).
    config.gates.view_motion = 0.07
    return config
