"""A trained backbone ready to sample: prompts and images in, latent turntables out (Sec. 3.1, 3.4).

Holds the backbone, its weights and everything they were trained with, and counts its network calls.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, PRNGKeyArray

from im3d_jax import autoencoders, backbones, checkpoint
from im3d_jax.conditions import conditioning
from im3d_jax.conditions import text as text_module
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.diffusion import objective, sampler, schedules
from im3d_jax.diffusion.guidance import Guidance
from recon_torch.errors import UserError
from recon_torch.views import masks

ROOT = Path(__file__).parents[1]  # shipped weights are named relative to it

BACKGROUND_ALPHA = 0.1  # coverage below which a decoded pixel is taken for background

OnStep = Callable[[int, Array], None]


class Generator:
    """Samples images and turntables from a config's backbone.

    Attributes:
        codec: the autoencoder. text: encodes prompts, see `conditioning.build_text`.
        num_calls, num_evaluations: of the network so far. Guidance makes one call on a batch of up to three
            evaluations (nothing, image, image and prompt).
        turn: a lock to hold while sampling. Of several threads one samples at a time: side by side they would
            need the memory of all of them, and compile the same programs.
    """

    def __init__(self, config, params=None, place: Sharding | None = None):
        """Loads `config.weights`, unless `params` are given. Raises UserError if parts do not go together.

        place: where `params` lie, if not on the first device.
        """
        self.config = config
        self.model = backbones.build(config.backbone.name, config.backbone.kwargs.to_dict())
        if self.model.num_views not in (None, config.num_views):
            made = f"{config.backbone.name} makes {self.model.num_views}"
            raise UserError(f"config.num_views is {config.num_views}, but {made}; match them")
        self.place = SingleDeviceSharding(jax.devices()[0]) if place is None else place
        codec = autoencoders.build(
            **config.autoencoder, size=config.size, latent_shape=self.model.latent_shape
        )
        self.codec = jax.device_put(codec, self.place)
        self.schedule = schedules.make_schedule(**config.schedule)
        self.text = text_module.build_text(config.text.name, config.text.kwargs)
        self._check_text()
        self.image_encoder = self._image_encoder(is_needed=params is None)
        self.params = self._load_weights() if params is None else params
        self.num_calls = self.num_evaluations = 0
        self.turn = threading.Lock()

    def counting_anew(self) -> Generator:
        """This generator with counters of its own; everything else, `turn` too, is shared."""
        other = copy.copy(self)
        other.num_calls = other.num_evaluations = 0
        return other

    def _check_text(self):
        """Raises UserError if the backbone attends to text of other widths than the encoders make."""
        taken = [each.shape[2:] for each in self.model.empty_conditioning(1).text]
        made = [each.shape[2:] for each in self.text.encode([""])[0]]
        if made != taken:
            widths = f"config.text makes widths {made}, {self.config.backbone.name} attends to {taken}"
            raise UserError(f"{widths}; name other encoders")

    def _image_encoder(self, is_needed: bool):
        """What a backbone that attends to the image's tokens needs, unless something else makes them."""
        if self.model.empty_conditioning(1).image_tokens is None:
            return None
        if not self.config.image_encoder.path:
            if not is_needed:
                return None
            raise UserError(
                f"{self.config.backbone.name} attends to an image encoder: set config.image_encoder.path"
            )
        from im3d_jax.conditions.encoders import ImageEncoder  # needs the extra "hosted"

        return ImageEncoder(self.config.image_encoder.path)

    def _load_weights(self):
        """The parameters that `config.weights` names: a file, "random", or "" if the model brings its own."""
        named = self.config.weights
        shapes = jax.eval_shape(self.model.init, jax.random.key(0))
        if not named and jax.tree.leaves(shapes):
            raise UserError("config.weights is empty; give a file, or 'random' to try things out")
        if named in ("", "random"):
            return backbones.init(self.model, jax.random.key(self.config.seed))
        path = Path(named) if Path(named).is_file() else ROOT / named
        params, metadata = checkpoint.load_weights(path, shapes)
        # Equally many words fit the same parameters, and mean other things.
        if metadata.get("words", []) != list(self.text.words):
            raise UserError(f"weights {path} were trained on other words than config.text's; train again")
        return jax.device_put(params, self.place)

    def condition(
        self,
        prompts: list[str],
        rgb: Float[Array, "B H W 3"] | None = None,
        alpha: Float[Array, "B H W 1"] | None = None,
        elevation_rad: float | None = None,
    ) -> Conditioning:
        """Conditions of B assets: prompts ("" for none), the picture that is view 0, cameras' elevation."""
        text, text_mask = jax.tree.map(jnp.asarray, self.text.encode(prompts))
        given = self.model.empty_conditioning(len(prompts))._replace(text=text, text_mask=text_mask)
        if elevation_rad is not None and given.elevation_rad is not None:
            given = given._replace(elevation_rad=jnp.full(len(prompts), elevation_rad))
        if rgb is None:
            return given
        if self.image_encoder:
            given = given._replace(image_tokens=jnp.asarray(self.image_encoder.encode(rgb)))
        latents = self.codec.encode(rgb[:, None], alpha[:, None])[:, 0]
        return given._replace(image=latents, image_mask=jnp.ones(len(prompts)))

    def text_to_image(
        self, prompts: list[str], key: PRNGKeyArray, on_step: OnStep | None = None
    ) -> tuple[Float[Array, "B H W 3"], Float[Array, "B H W 1"]]:
        """Pictures (rgb over white, alpha) of the prompts: the backbone on one frame without an image.

        Raises UserError if the backbone takes no text.
        """
        settings = self.config.text_to_image
        given = self.condition(prompts)
        if not given.text:
            name = self.config.backbone.name
            raise UserError(f"{name} takes no prompts; give --image or config.text_to_image.pipeline")
        guidance = Guidance(settings.w_text, settings.w_text, settings.rescale)
        steps = sampler.make_steps(self.schedule, settings.num_steps, settings.spacing)
        noise = jax.random.normal(jax.random.fold_in(key, 0), (len(prompts), 1, *self.model.latent_shape))
        noise = jax.device_put(noise, self.place)
        denoise = self._denoiser(given, guidance, tie_first_view=False)
        noise_key = jax.random.fold_in(key, 1)
        latents = sampler.sample(
            denoise, noise, steps, solver=settings.solver, key=noise_key, on_step=on_step
        )
        rgb, alpha = self.decode(latents)
        return rgb[:, 0], alpha[:, 0]

    def turntable(
        self, given: Conditioning, key: PRNGKeyArray, on_step: OnStep | None = None
    ) -> Float[Array, "B K h w c"]:
        """The first video: `config.video.num_steps` steps from noise (Sec. 3.1)."""
        settings = self.config.video
        steps = sampler.make_steps(self.schedule, settings.num_steps, settings.spacing)
        shape = (given.image.shape[0], self.config.num_views, *self.model.latent_shape)
        noise = jax.random.normal(jax.random.fold_in(key, 0), shape)
        return self._sample_video(noise, steps, given, jax.random.fold_in(key, 1), on_step)

    def refine(
        self,
        renders: Float[Array, "B K h w c"],
        given: Conditioning,
        key: PRNGKeyArray,
        on_step: OnStep | None = None,
    ) -> Float[Array, "B K h w c"]:
        """Noises latent renders to `config.rounds.start_level` and denoises them again (Sec. 3.4)."""
        settings = self.config.rounds
        spacing = self.config.video.spacing
        steps = sampler.make_steps(self.schedule, settings.num_steps, spacing, settings.start_level)
        noisy = sampler.renoise(jax.random.fold_in(key, 0), renders, steps)
        return self._sample_video(noisy, steps, given, jax.random.fold_in(key, 1), on_step)

    def decode(
        self, latents: Float[Array, "B K h w c"]
    ) -> tuple[Float[Array, "B K H W 3"], Float[Array, "B K H W 1"]]:
        """(rgb over white, alpha) in [0, 1], without the haze that denoising leaves on the background."""
        rgb, alpha = self.codec.decode(latents)
        if alpha is None:
            alpha = self._masks(rgb)
        background = alpha < BACKGROUND_ALPHA
        return jnp.where(background, 1.0, rgb), jnp.where(background, 0.0, alpha)

    def _masks(self, rgb: Float[Array, "B K H W 3"]) -> Float[Array, "B K H W 1"]:
        """Foreground of decoded views, for an autoencoder without alpha (A.1)."""
        settings, frames = self.config.masks, np.asarray(rgb, np.float32).reshape(-1, *rgb.shape[2:])
        if settings.isnet:
            found = masks.isnet_masks(frames, settings.isnet)
        else:
            found = masks.threshold_masks(frames, tolerance=settings.tolerance)
        return jnp.asarray(found).reshape(*rgb.shape[:-1], 1)

    def _sample_video(self, noisy, steps, given, key, on_step):
        settings = self.config.video
        guidance = Guidance(settings.w_image, settings.w_text, settings.rescale)
        denoise = self._denoiser(given, guidance, tie_first_view=settings.tie_first_view)
        # Renders from the worker are bound to a device and noise is not; JAX would compile for each.
        noisy = jax.device_put(noisy, self.place)
        return sampler.sample(denoise, noisy, steps, solver=settings.solver, key=key, on_step=on_step)

    def _denoiser(self, given: Conditioning, guidance: Guidance, tie_first_view: bool):
        """The counted denoiser that `sampler.sample` calls."""

        guided = _denoise if self.model.traceable else _denoise.__wrapped__
        empty = conditioning.no_conditions(self.model, self.text, 1)
        given, empty = jax.device_put((given, empty), self.place)

        def denoise(noisy, timestep, alpha, sigma):
            self.num_calls += 1
            self.num_evaluations += guidance.num_evaluations
            levels = timestep, alpha, sigma
            settings = self.model, guidance, tie_first_view
            return guided(self.params, self.codec, noisy, *levels, given, empty, *settings)

        return denoise


@partial(jax.jit, static_argnames=("model", "guidance", "tie_first_view"))
def _denoise(params, codec, noisy, timestep, alpha, sigma, given, empty, model, guidance, tie_first_view):
    """The guided estimate of the clean latents.

    Paper: frame 0 is about the conditioning image. Here, with `tie_first_view`: it is that image, because it
    is known and the other views hold on to it.
    """
    batch = noisy.shape[0]
    none, every = jnp.zeros(batch), jnp.ones(batch)
    conditions = {
        "null": conditioning.drop(given, empty, none, none),
        "image": conditioning.drop(given, empty, every, none),
        "full": given,
    }
    prediction = guidance.predict(partial(model.apply, params), noisy, timestep, conditions)
    clean = codec.clip(objective.to_x0(model.prediction_type, prediction, noisy, alpha, sigma))
    return clean.at[:, 0].set(given.image) if tie_first_view else clean
