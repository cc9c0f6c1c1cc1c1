"""A trained backbone that is ready to sample: from prompts and pictures to turntables (Sec. 3.1, 3.4)."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from im3d_jax import autoencoders, backbones, config_sections, sampling_checks, threads
from im3d_jax.autoencoders import Autoencoder
from im3d_jax.backbones import Backbone, StoredBackbone
from im3d_jax.clips import Clip, num_latents, padded_clip
from im3d_jax.conditions import conditioning
from im3d_jax.conditions import text as text_module
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.conditions.text import TextEncoder
from im3d_jax.diffusion import objective, sampler, schedules
from im3d_jax.diffusion.guidance import Branch, Guidance, predict
from im3d_jax.lora import files as lora_files
from im3d_jax.objects import copies
from im3d_jax.settings import (
    ClipSettings,
    ImageEncoderSettings,
    MaskSettings,
    RoundSettings,
    TextToImageSettings,
    VideoSettings,
)
from recon_torch.errors import UserError
from recon_torch.views import masks

ROOT = Path(__file__).parents[1]
"""The shipped weights are named relative to this directory."""

SHARPNESS = 6
"""Of the share that a further picture has in views beside its own. At 2 some objects come out worse than from
one picture, at 6 none of those on which it was chosen."""

BACKGROUND_ALPHA = 0.1
"""A decoded pixel whose coverage is below this is taken for background."""

Shown = tuple[
    Float[Array, "B H W 3"] | Float[np.ndarray, "B H W 3"],
    Float[Array, "B H W 1"] | Float[np.ndarray, "B H W 1"],
]
"""Pictures of B assets, (rgb over white, alpha) in [0, 1]."""

OnStep = Callable[[int, Array], Any]
"""Called after each denoising step as on_step(number of the step, its latents)."""


@runtime_checkable
class PictureEncoder(Protocol):
    """What turns the picture into tokens for a backbone that attends to them."""

    def encode(
        self, rgb: Float[Array, "B H W 3"] | Float[np.ndarray, "B H W 3"]
    ) -> Float[np.ndarray, "B L d"]:
        """Tokens of B pictures in [0, 1]."""


class CallCount:
    """Counts calls of the network. With guidance one call evaluates up to three conditions side by side.

    Attributes:
        calls: calls of the network.
        evaluations: the conditions that these evaluated, together.
    """

    def __init__(self) -> None:
        self.calls = self.evaluations = 0
        self._lock = threading.Lock()

    def add(self, num_evaluations: int) -> None:
        """Counts one call, also if several threads share this object."""
        with self._lock:
            self.calls += 1
            self.evaluations += num_evaluations


@dataclass(frozen=True, eq=False, repr=False)
class Generator:
    """Samples pictures and turntables from a loaded backbone. Make one with `load`.

    It is never changed: `with_params`, `counting` and `dataclasses.replace` make another one that shares the
    rest.

    Attributes:
        name: what the config calls the backbone; error messages use it.
        model: the backbone. params: its parameters, which lie at `place`.
        codec: the autoencoder. text: encodes prompts. image_encoder: encodes the picture for a backbone that
            attends to it, otherwise None.
        size: side of a view in pixels. clip: the pictures that a turntable is sampled as.
        count: counts this generator's network calls.
        turn: a lock to hold while sampling. Threads take turns at sampling: side by side they would need the
            memory of all of them, and would compile the same programs.
    """

    name: str
    model: Backbone
    params: Any
    codec: Autoencoder
    text: TextEncoder
    image_encoder: PictureEncoder | None
    schedule: schedules.Schedule
    size: int
    clip: Clip
    image: TextToImageSettings
    video: VideoSettings
    rounds: RoundSettings
    masks: MaskSettings
    place: Sharding
    count: CallCount = field(default_factory=CallCount)
    turn: AbstractContextManager[Any] = field(default_factory=threading.Lock)

    def __repr__(self) -> str:
        millions = sum(leaf.size for leaf in jax.tree.leaves(self.params)) / 1e6
        return (
            f"<Generator {self.name}: {millions:.1f} M parameters, {self.num_views} views of {self.size} px>"
        )

    @property
    def num_views(self) -> int:
        """K, of a turntable."""
        return self.clip.num_views

    @property
    def latents_are_views(self) -> bool:
        """Whether each view has a frame of latents of its own."""
        return self.clip.is_views and self.num_frames == self.num_views

    @property
    def num_frames(self) -> int:
        """F, the frames of latents of a turntable."""
        return num_latents(self.clip, self.codec)

    def counting(self) -> Generator:
        """This generator with a count of its own, which begins at 0."""
        return dataclasses.replace(self, count=CallCount())

    def with_params(self, params: Any) -> Generator:
        """This generator with other parameters, which lie at `place`."""
        return dataclasses.replace(self, params=params)

    def condition(
        self,
        prompts: list[str],
        rgb: Float[Array, "B H W 3"] | Float[np.ndarray, "B H W 3"] | None = None,
        alpha: Float[Array, "B H W 1"] | Float[np.ndarray, "B H W 1"] | None = None,
        elevation_rad: float | None = None,
        shown: Mapping[int, Shown] = MappingProxyType({}),
    ) -> Conditioning:
        """The conditions of B assets.

        Args:
            prompts: one for each asset, "" for none.
            rgb, alpha: pictures that are view 0, over white, in [0, 1].
            elevation_rad: of the cameras, which only some backbones are told.
            shown: pictures that are further views, by the numbers of these.

        Raises UserError for further views where the latents do not hold them apart.
        """
        if shown and not self.latents_are_views:
            raise UserError(
                f"{self.name} is shown one picture, because its {self.num_frames} frames of latents are not"
                f" {self.num_views} views; give one --image"
            )
        text, text_mask = jax.tree.map(jnp.asarray, self.text.encode(prompts))
        given = self.model.empty_conditioning(len(prompts))._replace(text=text, text_mask=text_mask)
        if elevation_rad is not None and given.elevation_rad is not None:
            given = given._replace(elevation_rad=jnp.full(len(prompts), elevation_rad))
        if rgb is None or alpha is None:
            return given
        if self.image_encoder:
            given = given._replace(image_tokens=jnp.asarray(self.image_encoder.encode(rgb)))
        latents = self.codec.encode(rgb[:, None], alpha[:, None])[:, 0]
        given = given._replace(image=latents, image_mask=jnp.ones(len(prompts)))
        if given.clip is not None:
            given = given._replace(clip=self.encode_padded(rgb, alpha))
        sides = {view: self.condition(prompts, *each, elevation_rad) for view, each in shown.items()}
        return given._replace(sides=sides or None)

    def encode_padded(
        self,
        rgb: Float[Array, "B H W 3"] | Float[np.ndarray, "B H W 3"],
        alpha: Float[Array, "B H W 1"] | Float[np.ndarray, "B H W 1"],
    ) -> Float[Array, "B F h w c"]:
        """Latents of a clip of these pictures and grey ones, see `Conditioning.clip`."""
        count = self.clip.num_pictures
        return self.codec.encode(*(padded_clip(jnp.asarray(each), count) for each in (rgb, alpha)))

    def encode(
        self, rgb: Float[Array, "B O H W 3"], alpha: Float[Array, "B O H W 1"]
    ) -> Float[Array, "B F h w c"]:
        """Latents of the pictures of an orbit, view 0 first, of which the clip's are taken (Sec. 3.4)."""
        return self.codec.encode(self.clip.pictures(rgb), self.clip.pictures(alpha))

    def text_to_image(
        self, prompts: list[str], key: PRNGKeyArray, on_step: OnStep | None = None
    ) -> tuple[Float[Array, "B H W 3"], Float[Array, "B H W 1"]]:
        """Pictures of the prompts, (rgb over white, alpha) in [0, 1]: the backbone on one frame without an
        image.

        Raises UserError if the backbone takes no text.
        """
        settings = self.image
        given = self.condition(prompts)
        if not given.text:
            raise UserError(f"{self.name} takes no prompts; give --image or config.text_to_image.pipeline")
        steps = sampler.make_steps(self.schedule, settings.num_steps, settings.spacing)
        noise = jax.random.normal(jax.random.fold_in(key, 0), (len(prompts), 1, *self.model.latent_shape))
        noise = jax.device_put(noise, self.place)
        guidance = Guidance.of_image(settings)
        denoise = self._denoiser(given, guidance, steps, settings.negative_prompt, tie_first_view=False)
        noise_key = jax.random.fold_in(key, 1)
        latents = sampler.sample(
            denoise, noise, steps, solver=settings.solver, key=noise_key, on_step=on_step
        )
        rgb, alpha = self.decode_clip(latents)
        return rgb[:, 0], alpha[:, 0]

    def turntable(
        self, given: Conditioning, key: PRNGKeyArray, on_step: OnStep | None = None
    ) -> Float[Array, "B F h w c"]:
        """The first video, denoised from pure noise in `video.num_steps` steps (Sec. 3.1)."""
        steps = sampler.make_steps(self.schedule, self.video.num_steps, self.video.spacing)
        shape = (given.image.shape[0], self.num_frames, *self.model.latent_shape)
        noise = jax.random.normal(jax.random.fold_in(key, 0), shape)
        return self._sample_video(noise, steps, given, jax.random.fold_in(key, 1), on_step)

    def refine(
        self,
        renders: Float[Array, "B F h w c"],
        given: Conditioning,
        key: PRNGKeyArray,
        on_step: OnStep | None = None,
    ) -> Float[Array, "B F h w c"]:
        """Latent renders, noised to `rounds.start_level` and denoised again (Sec. 3.4)."""
        num_steps, start_level = self.rounds.num_steps, self.rounds.start_level
        steps = sampler.make_steps(self.schedule, num_steps, self.video.spacing, start_level)
        noisy = sampler.renoise(jax.random.fold_in(key, 0), held(renders, given), steps)
        return self._sample_video(noisy, steps, given, jax.random.fold_in(key, 1), on_step)

    def decode(
        self, latents: Float[Array, "B F h w c"]
    ) -> tuple[Float[Array, "B K H W 3"], Float[Array, "B K H W 1"]]:
        """The views of `decode_clip`."""
        rgb, alpha = self.decode_clip(latents)
        return self.clip.views(rgb), self.clip.views(alpha)

    def decode_clip(
        self, latents: Float[Array, "B F h w c"]
    ) -> tuple[Float[Array, "B P H W 3"], Float[Array, "B P H W 1"]]:
        """(rgb over white, alpha) in [0, 1] of all pictures of the clip, without the haze that denoising
        leaves on the background."""
        rgb, alpha = self.codec.decode(latents)
        if alpha is None:
            alpha = self._masks(rgb)
        background = alpha < BACKGROUND_ALPHA
        return jnp.where(background, 1.0, rgb), jnp.where(background, 0.0, alpha)

    def _masks(self, rgb: Float[Array, "B P H W 3"]) -> Float[Array, "B P H W 1"]:
        """Foreground masks of decoded pictures, for an autoencoder without alpha (A.1)."""
        frames = np.asarray(rgb, np.float32).reshape(-1, *rgb.shape[2:])
        if self.masks.isnet:
            found = masks.isnet_masks(frames, self.masks.isnet)
        else:
            found = masks.threshold_masks(frames, tolerance=self.masks.tolerance)
        return jnp.asarray(found).reshape(*rgb.shape[:-1], 1)

    def _sample_video(
        self,
        noisy: Float[Array, "B F h w c"],
        steps: sampler.Steps,
        given: Conditioning,
        key: PRNGKeyArray,
        on_step: OnStep | None,
    ) -> Float[Array, "B F h w c"]:
        settings = self.video
        of_frames = partial(self.clip.of_frames, num_frames=self.num_frames)
        guidance = Guidance.of_video(settings).with_scales(of_frames)
        denoise = self._denoiser(given, guidance, steps, settings.negative_prompt, settings.tie_first_view)
        # Renders from the worker are bound to a device and noise is not; JAX would compile for each.
        noisy = jax.device_put(noisy, self.place)
        return sampler.sample(denoise, noisy, steps, solver=settings.solver, key=key, on_step=on_step)

    def _denoiser(
        self,
        given: Conditioning,
        guidance: Guidance,
        steps: sampler.Steps,
        negative_prompt: str,
        tie_first_view: bool,
    ) -> Callable[..., Float[Array, "B F h w c"]]:
        """The denoiser that `sampler.sample` calls once for each step in turn, and which counts its calls."""
        guided = compiled_denoise_guided if self.model.traceable else denoise_guided
        empty = conditioning.no_conditions(self.model.empty_conditioning(1), self.text, negative_prompt)
        # Known on the host: to read sigma from the device would wait for the step before.
        weights_of_steps = iter([guidance.weights(float(sigma)) for sigma in steps.sigmas[:-1]])
        given, empty = jax.device_put((given, empty), self.place)

        def denoise(noisy, timestep, alpha, sigma):
            weights = next(weights_of_steps)
            for _ in range(1 + len(given.sides or ())):
                self.count.add(len(weights))
            levels = timestep, alpha, sigma
            settings = self.model, guidance.rescale, tie_first_view
            return guided(self.params, self.codec, noisy, *levels, given, empty, weights, *settings)

        return denoise


def denoise_guided(
    params: Any,
    codec: Autoencoder,
    noisy: Float[Array, "B F h w c"],
    timestep: Float[Array, " B"],
    alpha: Array,
    sigma: Array,
    given: Conditioning,
    empty: Conditioning,
    weights: Mapping[Branch, Float[Array, "1 _ 1 1 1"] | Float[np.ndarray, "1 _ 1 1 1"]],
    model: Backbone,
    rescale: float,
    tie_first_view: bool,
) -> Float[Array, "B F h w c"]:
    """The guided estimate of the clean latents: one call of the network.

    Paper: frame 0 is about the conditioning image. Here, with `tie_first_view`, it is that image, because it
    is known and the other views hold on to it. So are the further views that pictures show (`held`), and each
    of these pictures is the network's view 0 once, for the views on its side (`side_shares`).
    """
    batch = noisy.shape[0]
    none, every = jnp.zeros(batch), jnp.ones(batch)

    def estimate(noisy: Float[Array, "B F h w c"], given: Conditioning) -> Float[Array, "B F h w c"]:
        conditions = {
            "null": conditioning.drop(given, empty, none, none),
            "image": conditioning.drop(given, empty, every, none),
            "full": given,
        }
        network = partial(model.apply, params)
        prediction = predict(network, noisy, timestep, conditions, weights, rescale)
        clean = codec.clip(objective.to_x0(model.prediction_type, prediction, noisy, alpha, sigma))
        return clean.at[:, 0].set(given.image) if tie_first_view else clean

    clean = front = estimate(noisy, given._replace(sides=None))
    sides = given.sides or {}
    for (view, side), share in zip(sides.items(), side_shares([*sides], noisy.shape[1]), strict=True):
        # A turntable that begins at another view is the same one, turned.
        turned = jnp.roll(estimate(jnp.roll(noisy, -view, 1), side), view, 1)
        clean += share[None, :, None, None, None] * (turned - front)
    return held(clean, given)


def side_shares(views: Sequence[int], num_views: int) -> Float[np.ndarray, "P K"]:
    """The share that each of P further pictures has in a view, by the numbers of their own views.

    By the cosine of the angle between the two to the power SHARPNESS, up to a quarter of a turn. What is left
    is the share of the picture that is view 0.
    """
    angles = 2 * np.pi * (np.arange(num_views) - np.reshape(views, (-1, 1)).astype(int)) / num_views
    shares = np.maximum(np.cos(angles), 0) ** SHARPNESS
    return (shares / np.maximum(shares.sum(0), 1)).astype(np.float32)


def held(views: Float[Array, "B F h w c"], given: Conditioning) -> Float[Array, "B F h w c"]:
    """The views with those in their place that further pictures show; the same where there are none.

    The solvers are linear: where the estimate of a clean view is the same in all steps, what they denoise is
    that view at the noise level of each step, with the noise that it began with (or, for an SDE, fresh
    noise). So a held view is to the network what it is in training, and the views beside it follow it. This
    is the replacement by which score-based models inpaint (Song et al. 2021, RePaint).
    """
    for view, side in (given.sides or {}).items():
        views = views.at[:, view].set(side.image)
    return views


compiled_denoise_guided = jax.jit(denoise_guided, static_argnames=("model", "rescale", "tie_first_view"))


# ---- From a config ----


def load(config: ConfigDict, params: Any = None, place: Sharding | None = None) -> Generator:
    """The generator that a config describes, with the weights that `config.weights` names.

    Args:
        params: parameters to take instead of `config.weights`.
        place: where the parameters lie; by default on the first device.

    Raises UserError for parts that do not go together, and for weights that are missing or do not fit.
    """
    config_sections.require(config, "num_views", "size", "seed", "weights", "schedule")
    threads.limit(config.get("num_threads", 0))
    name, arguments = config_sections.named(config, "backbone")
    model = backbones.build(name, arguments)
    if model.num_views not in (None, config.num_views):
        raise UserError(
            f"config.num_views is {config.num_views}, but {name} makes {model.num_views}; match them"
        )
    place = SingleDeviceSharding(jax.devices()[0]) if place is None else place
    codec = autoencoders.build(*config_sections.named(config, "autoencoder"), config.size, model.latent_shape)
    clip = Clip.of(clip_settings(config), config.num_views)
    num_latents(clip, codec)  # or raises
    text = text_module.build_text(*config_sections.named(config, "text"))
    _check_text(name, model, text)
    sampling_checks.check_negative_prompts(config, text)
    schedule = schedules.make_schedule(**config.schedule)
    objective.check_goes_with(model.prediction_type, schedule)
    return Generator(
        name=name,
        model=model,
        codec=jax.device_put(codec, place),
        schedule=schedule,
        text=text,
        image_encoder=_load_image_encoder(config, model, is_needed=params is None),
        params=_load_weights(config, model, text, place) if params is None else params,
        size=config.size,
        clip=clip,
        image=config_sections.settings(config, "text_to_image", TextToImageSettings),
        video=config_sections.settings(config, "video", VideoSettings),
        rounds=config_sections.settings(config, "rounds", RoundSettings),
        masks=config_sections.settings(config, "masks", MaskSettings),
        place=place,
    )


def clip_settings(config: ConfigDict) -> ClipSettings:
    """`config.clip`; the default where a config is older than this section."""
    return config_sections.settings(config, "clip", ClipSettings) if "clip" in config else ClipSettings()


def _check_text(name: str, model: Backbone, text: TextEncoder) -> None:
    """Raises UserError if the backbone attends to text of other widths than the encoders make."""
    taken = [each.shape[2:] for each in model.empty_conditioning(1).text]
    made = [each.shape[2:] for each in text.encode([""])[0]]
    if made != taken:
        raise UserError(f"config.text makes widths {made}, {name} attends to {taken}; name other encoders")


def _load_image_encoder(config: ConfigDict, model: Backbone, is_needed: bool) -> PictureEncoder | None:
    """The encoder of the picture's tokens, for a backbone that attends to them; otherwise None."""
    if model.empty_conditioning(1).image_tokens is None:
        return None
    path = config_sections.settings(config, "image_encoder", ImageEncoderSettings).path
    if not path:
        if not is_needed:
            return None
        raise UserError(f"{config.backbone.name} attends to an image encoder: set config.image_encoder.path")
    from im3d_jax.conditions.encoders import ImageEncoder  # needs the extra "hosted"

    return ImageEncoder(path)


def _load_weights(config: ConfigDict, model: Backbone, text: TextEncoder, place: Sharding) -> Any:
    """The parameters that `config.weights` names: a file, a URL, "random", or "" if it brings its own.

    It may name the directory of a public checkpoint, too, see `StoredBackbone`.
    """
    named = config.weights
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if not named and jax.tree.leaves(shapes):
        raise UserError("config.weights is empty; give a file, or 'random' to try things out")
    adapt = partial(lora_files.with_loras, config.get("lora", ""), model=model, name=config.backbone.name)
    if named in ("", "random"):
        return adapt(backbones.init(model, jax.random.key(config.seed)), base=None)
    with copies.local(named, keep=True) as file:
        is_there = file.is_file() or (file.is_dir() and isinstance(model, StoredBackbone))
        path = file if is_there else ROOT / named
        params, metadata = backbones.load_weights(model, path)
        # Another vocabulary of the same size has parameters of the same shapes, but means other words.
        if metadata.get("words", []) != list(text.words):
            raise UserError(f"weights {path} were trained on other words than config.text's; train again")
        params = adapt(params, base=path)
    return jax.device_put(params, place)
