"""A trained backbone ready to sample: prompts and images in, latent turntables out (Sec. 3.1, 3.4).

Holds the backbone, its weights and everything they were trained with, and counts its network calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from im3d_jax import autoencoder, backbones, checkpoint, conditioning, diffusion, sampler
from im3d_jax.conditioning import Conditioning
from recon_torch.errors import UserError

ROOT = Path(__file__).parents[1]  # shipped weights are named relative to it

BACKGROUND_ALPHA = 0.1  # coverage below which a decoded pixel is taken for background

OnStep = Callable[[int, Array], None]


class Generator:
    """Samples images and turntables from a config's backbone.

    Attributes:
        codec: the autoencoder. vocabulary: the words that prompts may use.
        num_calls, num_evaluations: of the network so far. Guidance makes one call on a batch of up to three
            evaluations (nothing, image, image and prompt).
    """

    def __init__(self, config, params=None):
        """Loads `config.weights`, unless `params` are given. Raises UserError if they do not fit."""
        self.config = config
        self.model = backbones.build(config.backbone.name, config.backbone.kwargs.to_dict())
        self.codec = autoencoder.build(
            **config.autoencoder, size=config.size, latent_shape=self.model.latent_shape
        )
        self.schedule = diffusion.make_schedule(**config.schedule)
        self.vocabulary = conditioning.Vocabulary(tuple(config.text.words), config.text.max_words)
        if params is None:
            path = Path(config.weights)
            path = path if path.is_file() else ROOT / path
            shapes = jax.eval_shape(self.model.init, jax.random.key(0))
            params, metadata = checkpoint.load_weights(path, shapes)
            if metadata.get("words") != list(
                self.vocabulary.words
            ):  # equally many fit, and mean other things
                raise UserError(
                    f"weights {path} were trained on other words than config.text.words; train again"
                )
        self.params = params
        self.num_calls = self.num_evaluations = 0

    def condition(self, prompts: list[str], image: Float[Array, "B h w c"] | None = None) -> Conditioning:
        """Conditions of B assets: their prompts ("" for none) and the latent of view 0 (None: no image)."""
        words, mask = (jnp.asarray(x) for x in self.vocabulary.encode(prompts))
        empty = self.model.empty_conditioning(len(prompts))
        given = empty._replace(text=(words,), text_mask=(mask,))
        return given if image is None else given._replace(image=image, image_mask=jnp.ones(len(prompts)))

    def text_to_image(
        self, prompts: list[str], key: PRNGKeyArray, on_step: OnStep | None = None
    ) -> Float[Array, "B 1 h w c"]:
        """Latent images of the prompts: the backbone on a single frame and without an image."""
        settings = self.config.text_to_image
        guidance = sampler.Guidance(settings.w_text, settings.w_text, settings.rescale)
        steps = sampler.make_steps(self.schedule, settings.num_steps, settings.spacing)
        noise = jax.random.normal(jax.random.fold_in(key, 0), (len(prompts), 1, *self.model.latent_shape))
        denoise = self._denoiser(self.condition(prompts), guidance, tie_first_view=False)
        noise_key = jax.random.fold_in(key, 1)
        return sampler.sample(denoise, noise, steps, solver=settings.solver, key=noise_key, on_step=on_step)

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
        background = alpha < BACKGROUND_ALPHA
        return jnp.where(background, 1.0, rgb), jnp.where(background, 0.0, alpha)

    def _sample_video(self, noisy, steps, given, key, on_step):
        settings = self.config.video
        guidance = sampler.Guidance(settings.w_image, settings.w_text, settings.rescale)
        denoise = self._denoiser(given, guidance, tie_first_view=settings.tie_first_view)
        # Renders from the worker are bound to a device and noise is not; JAX would compile for each.
        noisy = jax.device_put(noisy, jax.devices()[0])
        return sampler.sample(denoise, noisy, steps, solver=settings.solver, key=key, on_step=on_step)

    def _denoiser(self, given: Conditioning, guidance: sampler.Guidance, tie_first_view: bool):
        """The counted denoiser that `sampler.sample` calls."""

        def denoise(noisy, timestep, alpha, sigma):
            self.num_calls += 1
            self.num_evaluations += guidance.num_evaluations
            levels = timestep, alpha, sigma
            settings = self.model, self.codec, guidance, tie_first_view
            return _denoise(self.params, noisy, *levels, given, *settings)

        return denoise


@partial(jax.jit, static_argnames=("model", "codec", "guidance", "tie_first_view"))
def _denoise(params, noisy, timestep, alpha, sigma, given, model, codec, guidance, tie_first_view):
    """The guided estimate of the clean latents.

    Paper: frame 0 is about the conditioning image. Here, with `tie_first_view`: it is that image, because it
    is known and the other views hold on to it.
    """
    batch = noisy.shape[0]
    none, every = jnp.zeros(batch), jnp.ones(batch)
    conditions = {
        "null": conditioning.drop(given, none, none),
        "image": conditioning.drop(given, every, none),
        "full": given,
    }
    prediction = guidance.predict(partial(model.apply, params), noisy, timestep, conditions)
    clean = codec.clip(diffusion.to_x0(model.prediction_type, prediction, noisy, alpha, sigma))
    return clean.at[:, 0].set(given.image) if tie_first_view else clean
