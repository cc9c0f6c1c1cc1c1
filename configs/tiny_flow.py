"""A small model of today's kind, 64 px: flow matching, and full attention over latents compressed in time.

Command: im3d train --config=configs/tiny_flow.py --workdir=runs/tiny_flow
         im3d generate --config=configs/tiny_flow.py --image FILE --out out/flow
Devices: CPU.
Result:  not trained to its end yet. In the first 300 steps the loss fell from 2.2 to 0.88, at 0.2 to
         0.44 steps a second on one core beside other work.

It is Wan's transformer in small, made from scratch: its 16 views are 17 pictures, because the clip ends with
view 0 again, and these are 5 frames of latents. In the place of Wan's autoencoder stand patches of pixels, of
which those of 4 pictures share a frame. It takes a picture and no text.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.weights = "runs/tiny_flow/weights.safetensors"
    config.clip.closed = True
    config.autoencoder = dict(name="patches", kwargs=dict(patch=4, frames=4))
    config.backbone = dict(
        name="wan",
        kwargs=dict(
            latent_shape=(16, 16, 256),
            num_attention_heads=6,
            attention_head_dim=32,
            num_layers=6,
            ffn_dim=512,
            in_channels=256,
            out_channels=256,
            num_text_tokens=0,
            text_dim=8,
            freq_dim=128,
        ),
    )
    config.text = dict(name="none", kwargs=dict())
    config.schedule = dict(kind="flow", num_steps=1000, shift=3.0)
    config.video.update(num_steps=20, spacing="flow_euler")
    config.train = base.training(
        streams=dict(turntable=dict(batch_size=8, keep_image=0.95, keep_text=0.0, random_start=1.0)),
        trainable=".*",
        num_steps=1500,
        warmup_steps=50,
        decay_steps=500,
        learning_rate=1e-3,
        ema_decay=0.995,
        checkpoint=dict(every=200, weights_every=500),
    )
    return config
