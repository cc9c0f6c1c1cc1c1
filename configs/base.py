"""What all configs share: the sections of generation, and `training` for those that train.

A leaf calls `get_config` and changes what is its own; `autoencoder`, `backbone` and `text` it must name.
"""

from ml_collections import ConfigDict, config_dict

from recon_torch.settings import FitSettings, GateSettings, plain


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,  # of the objects and of training; `im3d generate --seed` is that of an asset
            weights="",
            size=64,
            num_views=16,
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
            # What these mean is told in recon_torch/settings.py.
            fit=plain(FitSettings()),
            gates=plain(GateSettings()),
            turntable=dict(num_frames=48, size=192, fps=24),
        )
    )


def training(streams: dict, **settings) -> ConfigDict:
    """The section `train`. Raises KeyError for a setting that does not exist."""
    config = ConfigDict(
        dict(
            task="turntable",  # a module of im3d_jax.tasks
            init_from="",  # weights to start from; "": random ones
            trainable=".*",  # pattern of the parameters that train
            frozen_dtype="float32",  # of the others; bfloat16 halves them
            mesh="data=-1",  # devices along data, fsdp and tensor; -1: the rest
            accumulate=1,  # parts of a batch whose gradients are computed after another
            num_steps=1000,
            warmup_steps=100,
            decay_steps=0,  # of a linear fall to zero, at the end
            learning_rate=1e-4,
            weight_decay=0.0,
            clip_norm=1.0,
            ema_decay=0.999,
            loss_weight="uniform",  # see diffusion.loss_weight
            max_skipped=0,  # steps with a loss or gradient that is not finite, before the run stops
            hang_timeout_s=0.0,  # a process that makes no step for so long ends; 0: never
            num_workers=0,  # processes that make procedural objects; 0: the threads of the loader do
            loader=dict(num_threads=2, buffer=2, max_corrupt=0),  # buffer: batches read ahead
            # keep: so many of the newest; keep_every: also each so many steps. 0: none.
            # weights_every: steps between the files for `config.weights`; always one at the end.
            checkpoint=dict(every=1000, keep=2, keep_every=0, weights_every=0),
            log_every=10,
            tensorboard=False,
            # Turntables of these prompts and pictures, to look at, every so many steps. 0: none.
            sample=dict(every=0, prompts=(), images=(), elevation_deg=20.0),
            profile=dict(at_step=0, num_steps=0),  # a trace of so many steps; 0: none
        )
    )
    unknown = settings.keys() - config.keys()
    if unknown:
        raise KeyError(f"no setting {min(unknown)} of training")
    config.update(settings)
    config.streams = {name: stream(**each) for name, each in streams.items()}
    return config


def stream(
    *,
    every: int = 1,
    batch_size: int,
    num_views: int = 16,
    path: str = "",
    split: str = "train",
    first_object: int = 0,
    keep_image: float = 0.9,
    keep_text: float = 0.9,
    timestep_shift: float = 1.0,
) -> ConfigDict:
    """One stream of batches; of several, a step has the one that is due and comes round least often.

    Args:
        every: it comes every so many steps. batch_size: over all processes.
        path, split: of a data set of `im3d dataset`; "": procedural objects from number `first_object` of
            the training split on.
        keep_image, keep_text, timestep_shift: see `im3d_jax.tasks.turntable.Stream`.
    """
    data = dict(path=path, split=split, first_object=first_object)
    drawn = dict(keep_image=keep_image, keep_text=keep_text, timestep_shift=timestep_shift)
    return ConfigDict(dict(every=every, batch_size=batch_size, num_views=num_views, **drawn, data=data))
