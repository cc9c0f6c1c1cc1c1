"""The shipped 64 px model: from a prompt or an image to an asset on a CPU.

Command: im3d generate --prompt "a red mushroom with a beige stem" --out out/mushroom
Devices: two CPU cores are enough.
"""

from ml_collections import ConfigDict, config_dict

from im3d_jax.data import objects


def get_config() -> ConfigDict:
    words = tuple(objects.vocabulary())
    return ConfigDict(
        dict(
            seed=0,  # of the objects and of training; `im3d generate --seed` is that of an asset
            weights="im3d_jax/weights/tiny.safetensors",
            size=64,
            num_views=16,
            backbone=dict(
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
            ),
            autoencoder=dict(name="patches", kwargs=dict(patch=4)),
            text=dict(name="words", kwargs=dict(words=words, max_words=16)),
            image_encoder=dict(path=""),
            schedule=dict(
                kind="scaled_linear",
                num_steps=1000,
                beta_start=8.5e-4,
                beta_end=1.2e-2,
                zero_terminal_snr=True,
            ),
            # Guidance scales and solver: unspecified in the paper, chosen on validation objects.
            # pipeline: directory of a diffusers text-to-image pipeline that draws instead of the backbone.
            # It is asked for `template` with the prompt in the place of {}.
            text_to_image=dict(
                pipeline="",
                template="{}, one whole object, centred, on a plain white background",
                num_steps=40,
                spacing="trailing",
                solver="2m",
                w_text=2.0,
                rescale=0.0,
            ),
            video=dict(
                num_steps=40,
                spacing="trailing",
                solver="2m",
                w_image=1.0,
                w_text=1.0,
                rescale=0.0,
                tie_first_view=True,
            ),
            # Paper: at fit steps 500 and 1000, two runs of 10 denoising steps (A.1). Level: unspecified.
            rounds=dict(at_steps=(500, 1000), num_runs=2, num_steps=10, start_level=0.7),
            # deg: of all videos, for a generator that is told its cameras; otherwise it is estimated.
            elevation=dict(weights="", dino="", deg=config_dict.placeholder(float)),
            # Foreground where the autoencoder has no alpha: by IS-Net's file (A.1), else what is not white.
            masks=dict(isnet="", tolerance=0.04),
            # A user's picture: size of its object in view 0, and how to find it (`conditioning.place`).
            image=dict(fill=0.7, background_tolerance=0.06, mask_weights=""),
            # Fields of recon_torch.fit.FitSettings; those that are not named keep their defaults.
            fit=dict(num_gaussians=5000, num_steps=1200, w_lpips=10.0, w_ssim=0.2, w_mask=1.0),
            turntable=dict(num_frames=48, size=192, fps=24),
        )
    )
