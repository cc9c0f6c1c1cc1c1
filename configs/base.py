"""The sections that all configs share, and `training`, which makes the section of those that train.

A leaf config calls `get_config` and changes what is its own. It must name an autoencoder, a backbone and a
text encoder.
"""

from ml_collections import ConfigDict, config_dict

from recon_torch.settings import FitSettings, GateSettings, plain


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,  # for procedural objects and training; an asset's seed is `im3d generate --seed`
            weights="",
            # JAX's threads on a CPU, which decide the last bits of a sample. 0: as many as there are cores.
            num_threads=0,
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
            # Guidance scales and solver are unspecified in the paper. They were chosen on validation objects.
            # pipeline: the directory of a diffusers text-to-image pipeline that draws instead of the
            # backbone. Its prompt is `template`, with the asset's prompt in the place of {}.
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
            # Paper: at fit steps 500 and 1000, two runs of 10 denoising steps (A.1). The noise level of their
            # start is unspecified in the paper.
            rounds=dict(at_steps=(500, 1000), num_runs=2, num_steps=10, start_level=0.7),
            # deg: the elevation of all videos, for a generator that is told it. None: it is estimated.
            elevation=dict(weights="", dino="", deg=config_dict.placeholder(float)),
            # The foreground masks of an autoencoder without alpha: by the IS-Net model in this file (A.1), or
            # else all that differs from white by more than `tolerance`.
            masks=dict(isnet="", tolerance=0.04),
            # A user's picture: the object's size in view 0, and how it is found (`conditions.pictures`).
            image=dict(fill=0.7, background_tolerance=0.06, mask_weights=""),
            # recon_torch/settings.py explains these.
            fit=plain(FitSettings()),
            gates=plain(GateSettings()),
            turntable=dict(num_frames=48, size=192, fps=24),
        )
    )


def training(streams: dict, **settings) -> ConfigDict:
    """The section `train`, with the arguments of `stream` for each stream, and changes to what stands below.

    Raises KeyError for a setting that does not exist.
    """
    config = ConfigDict(
        dict(
            task="turntable",  # what is trained; see im3d_jax.tasks
            init_from="",  # the weights to start from; "" starts from random ones
            trainable=".*",  # a regular expression found in the paths of the parameters that train
            frozen_dtype="float32",  # of parameters that do not train; bfloat16 halves their memory
            mesh="data=-1",  # devices along data, fsdp and tensor; -1 stands for all that are left
            accumulate=1,  # a batch is divided into so many parts, whose gradients are computed in turn
            num_steps=1000,
            warmup_steps=100,
            decay_steps=0,  # so many steps at the end, in which the rate falls to zero linearly
            learning_rate=1e-4,
            weight_decay=0.0,
            clip_norm=1.0,
            ema_decay=0.999,
            loss_weight="uniform",  # see diffusion.objective.loss_weight
            max_skipped=0,  # so many steps may have a loss or gradient that is not finite
            hang_timeout_s=0.0,  # a process that makes no step for so long ends itself; 0: never
            num_workers=0,  # processes that make procedural objects; 0: the loader's threads make them
            loader=dict(num_threads=2, buffer=2, max_corrupt=0),  # buffer: batches that are read ahead
            # keep: how many of the newest checkpoints are kept; keep_every: one in so many steps is kept for
            # good; weights_every: steps between files for `config.weights`, of which the last step always
            # writes one. 0 stands for none.
            checkpoint=dict(every=1000, keep=2, keep_every=0, weights_every=0),
            log_every=10,
            tensorboard=False,
            # Every so many steps, turntables of these prompts and pictures are drawn to look at. 0: never.
            sample=dict(every=0, prompts=(), images=(), elevation_deg=20.0),
            profile=dict(at_step=0, num_steps=0),  # a profile of so many steps; 0: none
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
    mix: dict | None = None,
    keep_image: float = 0.9,
    keep_text: float = 0.9,
    timestep_shift: float = 1.0,
    random_start: float = 0.0,
) -> ConfigDict:
    """One stream of batches. A step takes one: of those that are due, the one that is due least often.

    Args:
        every: the stream is due every so many steps.
        batch_size: over all processes.
        path, split: of a data set of `im3d dataset`. A path of "" stands for procedural objects, from number
            `first_object` of the split on.
        mix: in their place, the parts of a mixture by name, each with a weight: every batch has examples of
            all parts, as in {"meshes": {"weight": 0.7, "path": "data/meshes"}, "shapes": {"weight": 0.3}}.
        keep_image, keep_text, timestep_shift, random_start: see `im3d_jax.tasks.turntable.Stream`.
    """
    data = dict(path=path, split=split, first_object=first_object) | (dict(mix=mix) if mix else {})
    drawn = dict(
        keep_image=keep_image, keep_text=keep_text, timestep_shift=timestep_shift, random_start=random_start
    )
    return ConfigDict(dict(every=every, batch_size=batch_size, num_views=num_views, **drawn, data=data))
