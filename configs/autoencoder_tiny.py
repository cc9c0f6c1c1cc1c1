"""A small autoencoder for frames of 64 px. Its latents of 16x16x4 are a twelfth of the numbers of a frame.

Command: im3d train --config=configs/autoencoder_tiny.py --workdir=runs/autoencoder_tiny
Devices: CPU. Measured: 13 minutes on one core, compilation included.
Result:  runs/autoencoder_tiny/autoencoder, which diffusers can read too. Measured on 4 views of each of 64
         validation objects: 28.2 dB and an SSIM of 0.965. The scaling factor, which gives latents a standard
         deviation of 1, was 1.01. It was a run of 500 steps (25.8 dB, SSIM 0.937, thin parts without colour)
         that was extended to 1500 steps.

To train the decoder alone of another autoencoder, put its sizes in `config.autoencoder.kwargs` and add
    --config.train.init_from=vae/diffusion_pytorch_model.safetensors
    --config.train.trainable="^(decoder|post_quant_conv)/"
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.autoencoder = dict(
        name="autoencoder_kl",
        kwargs=dict(
            path="",
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            mid_block_add_attention=False,
        ),
    )
    config.backbone = config.text = ConfigDict()
    config.train = base.training(
        task="autoencoder",
        streams=dict(frames=dict(batch_size=4, num_views=4)),
        num_steps=1500,
        decay_steps=500,
        learning_rate=1e-3,
        ema_decay=0.99,
        checkpoint=dict(every=250, keep=2, keep_every=0, weights_every=0),
    )
    # Rombach et al. weigh the sum over the latent by 1e-6 against a sum over pixel values in [-1, 1].
    config.train.autoencoder = dict(w_l1=1.0, w_chroma=0.0, w_ssim=0.2, w_kl=5e-7)
    return config
