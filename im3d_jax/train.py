"""`im3d train`: fine-tuning of a backbone (Sec. 3.1, A.1). Reads downwards; the step is `train_step`.

    im3d train --config=configs/tiny_text_to_image.py --workdir=runs/t2i
    im3d train --config=configs/tiny_turntable.py --workdir=runs/turntable --config.train.trainable=temporal

The objects of a step are a pure function of its number, so a resumed run sees what an uninterrupted one
would.
"""

from __future__ import annotations

import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from flax import traverse_util

from im3d_jax import autoencoder, backbones, checkpoint, conditioning, config_flags, diffusion, sharding
from im3d_jax.data import objects, procedural
from recon_torch import export
from recon_torch.errors import CommandParser, UserError

TRAINED_BY = ("seed", "size", "backbone", "autoencoder", "text", "schedule", "train")
"""Sections of the config that a run depends on: it cannot go on with others."""

MAY_CHANGE = ("num_steps", "decay_steps", "checkpoint_every", "log_every")
"""Keys of `config.train` that may change from one start of a run to the next, as when it is extended."""


class TrainState(NamedTuple):
    """What training changes: `trained` and `ema` hold the trained parameters, by path; the rest is frozen."""

    step: jax.Array
    trained: dict[str, jax.Array]
    ema: dict[str, jax.Array]
    opt_state: Any


class Batch(NamedTuple):
    """Views of B objects: rgb [B,K,H,W,3] and alpha [B,K,H,W,1] in [0, 1], and their captions, encoded."""

    rgb: jax.Array
    alpha: jax.Array
    text: tuple[jax.Array, ...]
    text_mask: tuple[jax.Array, ...]


@partial(
    jax.jit,
    static_argnames=(
        "model",
        "optimizer",
        "loss_weight",
        "keep_image",
        "keep_text",
        "timestep_shift",
    ),
    donate_argnums=0,
)
def train_step(
    state: TrainState,
    frozen: dict[str, jax.Array],
    codec,
    batch: Batch,
    empty: conditioning.Conditioning,
    key: jax.Array,
    schedule: diffusion.Schedule,
    ema_decay: float,
    *,
    model,
    optimizer,
    loss_weight: str,
    keep_image: float,
    keep_text: float,
    timestep_shift: float,
):
    """One step of the loss of Sec. 3.1. Returns the new state and metrics (0-d arrays).

    Args:
        frozen: parameters that do not train, by path; no gradient is computed for them.
        codec: the autoencoder. empty: one asset's conditions of nothing, which dropped ones become.
        keep_image, keep_text: probabilities that an asset keeps its conditions. Below 1, the network also
            learns to do without, which guidance needs.
        timestep_shift: see `diffusion.sample_timesteps`.
    """
    latents = codec.encode(batch.rgb, batch.alpha)
    num_assets = latents.shape[0]
    keys = jax.random.split(jax.random.fold_in(key, state.step), 4)
    number = diffusion.sample_timesteps(keys[0], num_assets, schedule.num_timesteps, shift=timestep_shift)
    alpha, sigma = diffusion.level(schedule, number)
    timestep = jnp.asarray(schedule.timesteps, jnp.float32)[number]
    noise = jax.random.normal(keys[1], latents.shape)
    noisy = diffusion.add_noise(latents, noise, alpha, sigma)
    kept_image = jax.random.bernoulli(keys[2], keep_image, (num_assets,))
    kept_text = jax.random.bernoulli(keys[3], keep_text, (num_assets,))
    given = conditioning.Conditioning(latents[:, 0], jnp.ones(num_assets), batch.text, batch.text_mask)
    given = conditioning.drop(given, empty, kept_image, kept_text)
    target = diffusion.target(model.prediction_type, latents, noise, alpha, sigma)
    weight = diffusion.loss_weight(loss_weight, model.prediction_type, alpha, sigma)

    def loss_of(trained):
        params = traverse_util.unflatten_dict({**frozen, **trained}, sep="/")
        return diffusion.loss(model.apply(params, noisy, timestep, given), target, weight)

    loss, grads = jax.value_and_grad(loss_of)(state.trained)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    # Early on the average follows closely, so that short runs are not dominated by their start.
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(lambda old, new: old * decay + new * (1 - decay), state.ema, trained)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, trained, ema, opt_state), metrics


def make_optimizer(settings) -> optax.GradientTransformation:
    """AdamW with clipping; warm-up, constant rate, and a linear decay over the last `decay_steps`."""
    warmup, decay = settings.warmup_steps, settings.decay_steps
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, settings.learning_rate, warmup),
            optax.constant_schedule(settings.learning_rate),
            optax.linear_schedule(settings.learning_rate, 0.0, decay),
        ],
        [warmup, max(warmup, settings.num_steps - decay)],
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=settings.weight_decay),
    )


def split_params(params, pattern: str) -> tuple[dict, dict]:
    """(trained, frozen) parameters by path, divided by a regex."""
    flat = traverse_util.flatten_dict(params, sep="/")
    trained = {path: value for path, value in flat.items() if re.search(pattern, path)}
    if not trained:
        raise UserError(f"config.train.trainable: {pattern!r} matches none of the {len(flat)} parameters")
    return trained, {path: value for path, value in flat.items() if path not in trained}


def load_batch(config, text, name: str, step: int) -> Batch:
    """The objects of one step of stream `name`: consecutive training objects, each met once.

    text: encodes captions, see `conditioning.build_text`.
    """
    stream = config.train.streams[name]
    first = objects.SPLITS["train"][0] + stream.first_object + step * stream.batch_size
    turntables = procedural.turntables(
        config.seed, range(first, first + stream.batch_size), size=config.size, num_views=stream.num_views
    )
    encoded = jax.tree.map(jnp.asarray, text.encode(turntables.captions))
    return Batch(turntables.views.rgb, turntables.views.alpha, *encoded)


def train(config, workdir: Path) -> TrainState:
    """Trains until `config.train.num_steps`, resuming from `workdir` if it holds a checkpoint."""
    settings = config.train
    mesh = sharding.make_mesh()
    check_streams(settings.streams, mesh.size)
    export.make_directory(workdir)

    # ---- Model ----
    model = backbones.build(config.backbone.name, config.backbone.kwargs.to_dict())
    codec = autoencoder.build(**config.autoencoder, size=config.size, latent_shape=model.latent_shape)
    schedule = diffusion.make_schedule(**config.schedule)
    text = conditioning.build_text(config.text.name, config.text.kwargs)
    empty = conditioning.no_conditions(model, text, 1)
    key = jax.random.key(config.seed)
    if settings.init_from:
        params, _ = checkpoint.load_weights(settings.init_from, jax.eval_shape(model.init, key))
    else:
        params = backbones.init(model, key)
    print(parameter_overview.get_parameter_overview(params, include_stats=False, max_lines=12))

    # ---- State ----
    codec = jax.device_put(codec, sharding.replicated(mesh))
    trained, frozen = jax.device_put(split_params(params, settings.trainable), sharding.replicated(mesh))
    optimizer = make_optimizer(settings)
    ema = jax.tree.map(jnp.copy, trained)
    state = TrainState(jnp.zeros((), jnp.int32), trained, ema, optimizer.init(trained))
    state = jax.device_put(state, sharding.replicated(mesh))
    manager = checkpoint.open_manager(workdir)
    restored = checkpoint.restore(manager, state, run_settings(config))
    state = state if restored is None else restored
    key = jax.random.key(config.seed + 1)

    # ---- Loop ----
    step = int(state.step)
    log = Log(workdir / "metrics.jsonl", step, settings.num_steps)
    while step < settings.num_steps:
        name = stream_of(settings.streams, step)
        stream = settings.streams[name]
        batch = jax.device_put(load_batch(config, text, name, step), sharding.along_batch(mesh))
        state, metrics = train_step(
            state,
            frozen,
            codec,
            batch,
            empty,
            key,
            schedule,
            settings.ema_decay,
            model=model,
            optimizer=optimizer,
            loss_weight=settings.loss_weight,
            keep_image=stream.keep_image,
            keep_text=stream.keep_text,
            timestep_shift=stream.timestep_shift,
        )
        step += 1
        log.add(name, metrics)
        is_saved = step % settings.checkpoint_every == 0 or step == settings.num_steps
        if is_saved or step % settings.log_every == 0:
            log.write(step)  # also before saving, because it stops at NaN
        if is_saved:
            checkpoint.save(manager, step, state, run_settings(config))
            weights = traverse_util.unflatten_dict({**frozen, **state.ema}, sep="/")
            digest = config_flags.config_digest(config)
            metadata = {"step": step, "words": list(text.words), "config_digest": digest}
            checkpoint.save_weights(workdir / "weights.safetensors", weights, metadata)
    manager.wait_until_finished()
    manager.close()
    return state


def run_settings(config) -> dict:
    """What a run depends on, by dotted key: a checkpoint is only resumed with the same."""
    config = config.to_dict()
    sections = {name: config[name] for name in TRAINED_BY}
    sections["train"] = {key: value for key, value in config["train"].items() if key not in MAY_CHANGE}
    return traverse_util.flatten_dict(sections, sep=".")


def check_streams(streams, num_devices: int) -> None:
    """Raises UserError for batches that do not split over the devices, and where a step would have none."""
    for name, stream in streams.items():
        if stream.batch_size % num_devices:
            key = f"config.train.streams.{name}.batch_size"
            raise UserError(f"{key} is {stream.batch_size}; give a multiple of the {num_devices} devices")
    if all(stream.every > 1 for stream in streams.values()):
        raise UserError("config.train.streams: some steps have no stream; set `every` of one to 1")


def stream_of(streams, step: int) -> str:
    """The stream of a step: of those whose turn it is, the one that comes round least often."""
    due = [name for name, stream in streams.items() if step % stream.every == stream.every - 1]
    return max(due, key=lambda name: streams[name].every)


class Log:
    """Means of the metrics since the last line, with rate and ETA, as printed lines and as JSON lines."""

    def __init__(self, path: Path, step: int, num_steps: int):
        self.path, self.num_steps = path, num_steps
        self.since, self.at, self.pending = step, time.monotonic(), {}

    def add(self, stream: str, metrics: dict) -> None:
        for name, value in metrics.items():
            self.pending.setdefault(f"{stream}_{name}", []).append(value)

    def write(self, step: int) -> None:
        """Raises FloatingPointError if a metric is not finite."""
        means = {name: float(np.mean(jax.device_get(values))) for name, values in self.pending.items()}
        if not np.isfinite(list(means.values())).all():
            raise FloatingPointError(f"not finite by step {step}: {means}; the last checkpoint still is")
        now = time.monotonic()
        rate = (step - self.since) / (now - self.at)
        self.since, self.at, self.pending = step, now, {}
        text = " ".join(f"{name}={value:.5g}" for name, value in means.items())
        eta = time.strftime("%H:%M:%S", time.gmtime((self.num_steps - step) / rate))
        print(f"step {step}/{self.num_steps} {text} {rate:.3g} steps/s ETA {eta}", flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "steps_per_second": rate, **means}) + "\n")


def main(argv: list[str]) -> None:
    parser = CommandParser("train", __doc__)
    parser.add_argument(
        "--workdir", type=Path, required=True, help="of checkpoints and weights; resumes there"
    )
    flags, config = config_flags.parse(argv, parser)
    if "train" not in config:
        raise UserError(f"{flags.config} has no `train` section; give configs/tiny_text_to_image.py")
    train(config, flags.workdir)
