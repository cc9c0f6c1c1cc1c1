"""The backbone contract, `im3d_jax.backbones.Backbone`, as checks of a model: of ours or of a user's.

`check` runs them all. Each is a function of a `Subject`, whose name says what holds if it passes; it returns
a detail worth showing, or raises `Failed` or `Skipped` with the reason. `im3d check-backbone` prints the
table.
"""

from __future__ import annotations

import enum
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float
from safetensors.numpy import save_file

from im3d_jax import backbones, checkpoint, sharding
from im3d_jax.backbones import Backbone, Params, PublicBackbone
from im3d_jax.conditions import conditioning
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.diffusion.objective import PredictionType
from im3d_jax.registry import missing_members
from recon_torch.errors import first_line

NUM_DEVICES = 2
"""Devices over which the model is sharded; on a CPU they are virtual."""

TOLERANCE = 2e-4
"""The greatest difference, relative to the largest value, that counts as none: float32 sums in another
order.
"""

BFLOAT16_TOLERANCE = 5e-2
"""The same for models that compute in bfloat16."""

MAX_VIEWS = 4
"""Views that a model which takes any number is given."""

TIMESTEPS = np.array([0.3, 0.6], np.float32)
"""Noise levels of the two assets."""


class Outcome(enum.StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class Result(NamedTuple):
    """What came of one check; `detail` is a measurement, or the reason why it failed or was skipped."""

    check: str
    outcome: Outcome
    detail: str


class Failed(Exception):
    """The model breaks the contract; the message says how."""


class Skipped(Exception):
    """The check does not apply to the model; the message says why."""


@dataclass(frozen=True)
class Subject:
    """A model with weights and inputs to check it on.

    model: what is said to be a backbone. trainable: pattern of the parameters that the config trains.
    """

    model: Any
    trainable: str

    @cached_property
    def initial(self) -> Params:
        return backbones.init(self.model, jax.random.key(0, impl="rbg"))  # which compiles fastest

    @cached_property
    def params(self) -> Params:
        """The initial parameters moved a little, so that no layer that starts at zero hides a mistake."""
        rng = np.random.default_rng(1)

        def move(x: Array) -> Array:  # in NumPy, which has nothing to compile
            return jnp.asarray(np.asarray(x) + 0.02 * rng.standard_normal(x.shape).astype(x.dtype))

        return jax.tree.map(move, self.initial)

    @cached_property
    def flat(self) -> dict[str, Array]:
        """The initial parameters by their paths."""
        return traverse_util.flatten_dict(self.initial, sep="/")

    @property
    def num_views(self) -> int:
        return self.model.num_views or MAX_VIEWS

    @cached_property
    def noisy(self) -> Float[Array, "B K h w c"]:
        shape = (2, self.num_views, *self.model.latent_shape)
        return jax.random.normal(jax.random.key(2), shape)

    @cached_property
    def timestep(self) -> Float[Array, " B"]:
        return jnp.asarray(TIMESTEPS)

    @cached_property
    def given(self) -> Conditioning:
        """Conditions of two assets, each different and none empty."""
        empty = self.model.empty_conditioning(2)
        keys = jax.random.split(jax.random.key(3), 2)
        tokens = empty.image_tokens
        text = tuple(
            jnp.ones_like(each).at[1].set(2)  # two words that every vocabulary has
            if jnp.issubdtype(each.dtype, jnp.integer)
            else jax.random.normal(jax.random.fold_in(keys[0], i), each.shape)
            for i, each in enumerate(empty.text)
        )
        return empty._replace(
            image=jax.random.normal(keys[1], empty.image.shape),
            image_mask=jnp.ones(2),
            text=text,
            text_mask=tuple(jnp.ones_like(mask) for mask in empty.text_mask),
            # Two tokens: attention to a single one has no use for its queries, which gives no gradient.
            image_tokens=None if tokens is None else jax.random.normal(keys[0], (2, 2, tokens.shape[-1])),
            elevation_rad=None if empty.elevation_rad is None else jnp.array([0.1, 0.4]),
        )

    @cached_property
    def apply(self) -> Callable[..., Array]:
        return jax.jit(self.model.apply) if self.model.traceable else self.model.apply

    @cached_property
    def prediction(self) -> Array:
        return self.apply(self.params, self.noisy, self.timestep, self.given)

    @property
    def tolerance(self) -> float:
        return BFLOAT16_TOLERANCE if "bfloat16" in str(getattr(self.model, "dtype", "")) else TOLERANCE


# ---- What checks are made of ----


def same(subject: Subject, found: Array, expected: Array, what: str) -> str:
    """The relative difference, as text. Raises Failed if it is too large."""
    difference = float(jnp.abs(found - expected).max() / jnp.maximum(jnp.abs(expected).max(), 1e-12))
    if not difference <= subject.tolerance:
        raise Failed(f"{what}: relative difference {difference:.1e}, at most {subject.tolerance:.0e}")
    return f"{difference:.0e}"


def differs(found: Array, other: Array, what: str) -> str:
    """The absolute difference, as text. Raises Failed if there is none."""
    difference = float(jnp.abs(found - other).max())
    if not difference > 1e-6:
        raise Failed(f"{what} changes nothing in the prediction")
    return f"by {difference:.1e}"


def matching(subject: Subject, pattern: str) -> list[str]:
    """Paths of the parameters in which a pattern is found. Raises Skipped if the weights are elsewhere."""
    if not subject.flat:
        raise Skipped("its weights are not JAX arrays")
    return [path for path in subject.flat if re.search(pattern, path)]


def temporal(subject: Subject) -> list[str]:
    """Paths of the temporal parameters. Raises Skipped if there are none, or the weights are elsewhere."""
    if not subject.model.temporal_pattern:
        raise Skipped("it has no temporal layers: temporal_pattern is ''")
    return matching(subject, subject.model.temporal_pattern)


# ---- The checks ----


def members_are_those_of_the_contract(subject: Subject) -> str:
    if lacking := missing_members(subject.model, Backbone):
        raise Failed(f"it lacks {', '.join(lacking)}")
    shape, views = subject.model.latent_shape, subject.model.num_views
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise Failed(f"latent_shape {shape} is not (h, w, c)")
    if views is not None and not (isinstance(views, int) and views > 0):
        raise Failed(f"num_views {views!r} is neither None nor a number of views")
    if not isinstance(subject.model.traceable, bool):
        raise Failed(f"traceable {subject.model.traceable!r} is not a bool")
    return f"latents of {tuple(shape)}, {views or 'any number of'} views"


def prediction_has_the_views_shape(subject: Subject) -> str:
    found = subject.prediction
    if found.shape != subject.noisy.shape:
        raise Failed(f"apply returns {found.shape} for noisy {subject.noisy.shape}")
    if found.dtype != jnp.float32:
        raise Failed(f"apply returns {found.dtype}, must be float32")
    if not jnp.isfinite(found).all():
        raise Failed("apply returns NaN or infinity")
    return f"{subject.model.prediction_type} {found.shape}"


def prediction_type_is_known(subject: Subject) -> str:
    if subject.model.prediction_type not in list(PredictionType):
        known = ", ".join(PredictionType)
        raise Failed(f"prediction_type {subject.model.prediction_type!r} is none of {known}")
    return subject.model.prediction_type


def model_is_hashable(subject: Subject) -> str:
    try:
        hash(subject.model)
    except TypeError as error:
        raise Failed(f"{error}: a model is a static argument of jax.jit; hold lists as tuples") from None
    return ""


def same_inputs_same_prediction(subject: Subject) -> str:
    again = subject.apply(subject.params, subject.noisy, subject.timestep, subject.given)
    if not jnp.array_equal(again, subject.prediction):
        raise Failed("two calls with the same inputs differ; draw no random numbers in apply")
    return "bitwise"


def assets_do_not_see_each_other(subject: Subject) -> str:
    alone = [
        subject.apply(
            subject.params,
            subject.noisy[b : b + 1],
            subject.timestep[b : b + 1],
            jax.tree.map(lambda x, b=b: x[b : b + 1], subject.given),
        )
        for b in range(2)
    ]
    return same(subject, jnp.concatenate(alone), subject.prediction, "an asset alone and in a batch")


def noise_level_matters(subject: Subject) -> str:
    other = subject.apply(subject.params, subject.noisy, subject.timestep + 0.2, subject.given)
    return differs(other, subject.prediction, "the timestep")


def image_matters(subject: Subject) -> str:
    changed = subject.given._replace(image=-subject.given.image)
    other = subject.apply(subject.params, subject.noisy, subject.timestep, changed)
    return differs(other, subject.prediction, "the image")


def a_dropped_image_is_not_seen(subject: Subject) -> str:
    none, every = jnp.zeros(2), jnp.ones(2)
    one = conditioning.drop(subject.given, subject.model.empty_conditioning(1), none, every)
    other = one._replace(image=-one.image)
    found = [subject.apply(subject.params, subject.noisy, subject.timestep, each) for each in (one, other)]
    return same(subject, found[0], found[1], "with image_mask 0 two images")


def text_matters(subject: Subject) -> str:
    if not subject.given.text:
        raise Skipped("takes no text")
    changed = subject.given._replace(text=tuple(each[::-1] for each in subject.given.text))
    other = subject.apply(subject.params, subject.noisy, subject.timestep, changed)
    return differs(other, subject.prediction, "the text")


def jit_changes_nothing(subject: Subject) -> str:
    if not subject.model.traceable:
        raise Skipped("traceable is False")
    eager = subject.model.apply(subject.params, subject.noisy, subject.timestep, subject.given)
    return same(subject, subject.prediction, eager, "with and without jit")


def sharded_equals_unsharded(subject: Subject) -> str:
    if not subject.model.traceable:
        raise Skipped("traceable is False")
    if len(jax.devices()) < NUM_DEVICES:
        raise Skipped("there is one device")
    mesh = sharding.make_mesh(devices=jax.devices()[:NUM_DEVICES])
    batch = jax.device_put((subject.noisy, subject.timestep, subject.given), sharding.along_batch(mesh))
    params = jax.device_put(subject.params, sharding.replicated(mesh))
    return same(subject, subject.apply(params, *batch), subject.prediction, "over two devices and on one")


def temporal_pattern_matches(subject: Subject) -> str:
    paths = temporal(subject)
    if not paths:
        raise Failed(f"temporal_pattern {subject.model.temporal_pattern!r} matches no parameter")
    if len(paths) == len(subject.flat):
        raise Failed("every parameter is temporal; Sec. 3.1 trains a part of them")
    count = sum(subject.flat[path].size for path in paths)
    return f"{count / sum(x.size for x in subject.flat.values()):.0%} of the parameters"


def config_trains_what_there_is(subject: Subject) -> str:
    if not matching(subject, subject.trainable):
        instead = "" if subject.model.temporal_pattern else "; it has no temporal layers: train a LoRA of it"
        raise Failed(f"config.train.trainable {subject.trainable!r} matches no parameter{instead}")
    return repr(subject.trainable)


def starts_as_separate_images(subject: Subject) -> str:
    """With its temporal layers at the identity, a video is K images."""
    still = set(temporal(subject))
    if subject.given.elevation_rad is not None:
        raise Skipped("is told each view's camera")
    # Spatial layers that start at zero would hide a difference, so they are moved.
    moved = traverse_util.flatten_dict(subject.params, sep="/")
    params = {path: subject.flat[path] if path in still else x for path, x in moved.items()}
    params = traverse_util.unflatten_dict(params, sep="/")
    empty = subject.model.empty_conditioning(1)
    given = conditioning.drop(subject.given, empty, jnp.zeros(2), jnp.ones(2))
    video = subject.apply(params, subject.noisy, subject.timestep, given)
    alone = [
        subject.apply(params, subject.noisy[:, k : k + 1], subject.timestep, given)
        for k in range(subject.num_views)
    ]
    return same(subject, video, jnp.concatenate(alone, 1), "a video and its views one by one")


def gradients_reach_temporal_layers(subject: Subject) -> str:
    if not subject.model.traceable:
        raise Skipped("traceable is False")
    paths = temporal(subject)

    def loss(params):
        return jnp.square(subject.model.apply(params, subject.noisy, subject.timestep, subject.given)).mean()

    gradients = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(subject.params), sep="/")
    for path in paths:
        if not jnp.isfinite(gradients[path]).all():
            raise Failed(f"the gradient of {path} is not finite")
        if not gradients[path].any():
            raise Failed(f"the gradient of {path} is zero everywhere")
    return "finite, none zero"


def partition_rules_match(subject: Subject) -> str:
    matching(subject, "")
    for pattern, axes in subject.model.partition_rules:
        paths = matching(subject, pattern)
        if not paths:
            raise Failed(f"partition rule {pattern!r} matches no parameter")
        short = [path for path in paths if subject.flat[path].ndim < len(axes)]
        if short:
            raise Failed(f"partition rule {pattern!r} has {len(axes)} axes, {short[0]} fewer")
    return f"{len(subject.model.partition_rules)} rules"


def weights_files_go_there_and_back(subject: Subject) -> str:
    """The parameters that are read from a weights file are those that were written to it."""
    matching(subject, "")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "weights.safetensors"
        checkpoint.save_weights(file, subject.params, {}, np.float32)
        loaded, _ = backbones.load_weights(subject.model, file)
    back = traverse_util.flatten_dict(loaded, sep="/")
    for path, value in traverse_util.flatten_dict(subject.params, sep="/").items():
        if not np.array_equal(back[path], value):
            raise Failed(f"parameter {path} comes back changed")
    return f"{len(back)} parameters"


def checkpoints_go_there_and_back(subject: Subject) -> str:
    """A public checkpoint that is written and read again is written as the same."""
    if not isinstance(subject.model, PublicBackbone):
        raise Skipped("has no public ancestor")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.safetensors"
        tensors = subject.model.to_pretrained(subject.params)
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, file)
        back = subject.model.from_pretrained(file, subject.initial)
    again = subject.model.to_pretrained(back)
    for name, value in tensors.items():
        if not np.array_equal(again[name], value):
            raise Failed(f"tensor {name} comes back changed")
    return f"{len(tensors)} tensors"


CHECKS = (
    members_are_those_of_the_contract,
    model_is_hashable,
    prediction_type_is_known,
    prediction_has_the_views_shape,
    same_inputs_same_prediction,
    assets_do_not_see_each_other,
    noise_level_matters,
    image_matters,
    a_dropped_image_is_not_seen,
    text_matters,
    jit_changes_nothing,
    sharded_equals_unsharded,
    temporal_pattern_matches,
    config_trains_what_there_is,
    starts_as_separate_images,
    gradients_reach_temporal_layers,
    partition_rules_match,
    weights_files_go_there_and_back,
    checkpoints_go_there_and_back,
)
"""In the order in which `check` runs them."""


def check(model: Any, trainable: str) -> list[Result]:
    """Runs every check on a model. An error inside the model is a failure, with its first line.

    trainable: pattern of the parameters that the config trains, ".*" for all.
    """
    subject, results = Subject(model, trainable), []
    for run in CHECKS:
        name = run.__name__.replace("_", " ")
        try:
            results.append(Result(name, Outcome.PASSED, run(subject)))
        except Skipped as reason:
            results.append(Result(name, Outcome.SKIPPED, str(reason)))
        except Failed as reason:
            results.append(Result(name, Outcome.FAILED, str(reason)))
        except Exception as error:
            detail = f"{type(error).__name__}: {first_line(error, 120)}"
            results.append(Result(name, Outcome.FAILED, detail))
    return results
