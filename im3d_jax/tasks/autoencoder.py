"""The task of training an autoencoder: frames to latents to the same frames (Rombach et al. 2022, Sec. 3.1).

IM-3D takes Emu Video's autoencoder, which is not public. This task trains the same architecture, from scratch
or from the weights of any public one. With `trainable="decoder|post_quant_conv"` it trains the decoder alone;
then latents, and diffusion models of them, stay what they are.

Rombach et al.: L1, LPIPS, a discriminator's loss and a slight KL. Here: L1, structural similarity and the KL,
because LPIPS needs weights that are not ours to ship, and a discriminator needs a loop of its own. Expect
softer textures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree
from ml_collections import ConfigDict

from im3d_jax import config_sections, costs, sharding
from im3d_jax.autoencoders import kl_network
from im3d_jax.autoencoders.kl import AutoencoderKL
from im3d_jax.backbones.layers import PARTITION_RULES
from im3d_jax.data import Example, input_pipeline
from im3d_jax.data.sources import open_source
from im3d_jax.trainable import WhatTrains
from im3d_jax.training_settings import AutoencoderLossSettings, TrainSettings, WeightsDtype
from recon_torch.errors import UserError

ENCODER = r"^(encoder|quant_conv)/"
"""A regular expression of the paths whose training changes the latents."""

LOG_VARIANCE = (-30.0, 20.0)
"""Bounds of the posterior's log variance, as in the public code of latent diffusion."""

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
"""In pixels (Wang et al. 2004)."""

SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
"""Wang et al. 2004, for values in [0, 1]."""

NUM_SAMPLES = 2
"""Turntables to look at."""

NUM_MEASURED = 16
"""Objects whose latents' standard deviation is measured."""

Images = Float[Array | np.ndarray, "B K H W C"]
"""Views in [0, 1] as an autoencoder takes them: RGB over white, and alpha where it is `rgba`."""

Views = tuple[Float[Array | np.ndarray, "B K H W 3"], Float[Array | np.ndarray, "B K H W 1"]]
"""RGB over white and alpha."""

FirstViews = Callable[[int], Views]
"""The views of so many objects, the same ones at every call and on every process."""


class Terms(NamedTuple):
    """The terms of the loss and the PSNR in dB of each of B examples; see `AutoencoderTask.terms`."""

    l1: Float[Array, " B"]
    chroma: Float[Array, " B"]
    ssim: Float[Array, " B"]
    kl: Float[Array, " B"]
    psnr: Float[Array, " B"]


class AutoencoderTask:
    """The task, see `im3d_jax.tasks.Task`. All its streams train alike."""

    partition_rules = PARTITION_RULES
    constants = ()

    def __init__(
        self,
        architecture: kl_network.Architecture,
        size: int,
        weights: AutoencoderLossSettings,
        trainable: str,
        first_views: FirstViews,
        weights_dtype: WeightsDtype = WeightsDtype.FLOAT32,
    ):
        """Makes the task of training an architecture on views of `size` pixels.

        Args:
            trainable: regular expression of the paths that train.
            first_views: objects to show samples of and to measure latents on.
            weights_dtype: of what is saved.

        Raises UserError for a size that the architecture or the loss does not take.
        """
        self.architecture, self.size, self.weights = architecture, size, weights
        self.trainable, self.first_views = trainable, first_views
        self.weights_dtype = weights_dtype
        self.network = kl_network.Network(architecture)
        architecture.latent_shape(size)
        if size < SSIM_WINDOW:
            raise UserError(f"config.size is {size}; the loss of an autoencoder needs {SSIM_WINDOW}")

    def init(self, key: PRNGKeyArray) -> dict:
        """Random parameters."""
        return self.architecture.init(key)

    def load(self, path: str) -> dict:
        """Parameters of a safetensors file in diffusers' layout. Raises UserError if they do not fit."""
        return kl_network.read_params(path, self.architecture)

    def stream(self, name: str) -> None:
        return None

    def collate(self, examples: Sequence[Example]) -> dict[str, Images]:
        """The views as images. Raises UserError for a data set that holds latents."""
        if any("latents" in example for example in examples):
            raise UserError("the data set holds latents, an autoencoder trains on views; build it with views")
        return {"images": self._images(input_pipeline.stack_views(examples))}

    def _images(self, views: Views) -> Images:
        return jnp.concatenate(views, -1) if self.architecture.rgba else views[0]

    def draw(self, key: PRNGKeyArray, num_examples: int, stream: None) -> Key[Array, " {num_examples}"]:
        """A key for each example's noise."""
        return jax.random.split(key, num_examples)

    def loss(
        self,
        params: PyTree,
        constants: tuple[()],
        batch: Mapping[str, Images],
        draws: Key[Array, " B"],
        stream: None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """w_l1 L1 + w_chroma chroma + w_ssim (1 - SSIM) + w_kl KL, and the sums over examples of each.

        The PSNR is among the sums as well.
        """
        terms = self.terms(params, jnp.asarray(batch["images"]), draws)
        weights = self.weights
        losses = weights.w_l1 * terms.l1 + weights.w_chroma * terms.chroma
        losses += weights.w_ssim * (1 - terms.ssim) + weights.w_kl * terms.kl
        return losses.mean(), {name: term.sum() for name, term in terms._asdict().items()}

    def terms(self, params: PyTree, images: Float[Array, "B K H W C"], keys: Key[Array, " B"]) -> Terms:
        """How the image that is decoded from a drawn latent differs from the image, which is in [0, 1].

        l1, chroma: the means over pixels and channels, of the images and of their `chroma`.
        kl: of the posterior from the unit normal, in nats, a sum over the latent divided by the number of the
            image's values.
        psnr: of the colours, in dB.
        """
        moments = self._apply(params, images * 2 - 1, "encode")
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        log_variance = jnp.clip(log_variance, *LOG_VARIANCE)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        made = self._apply(params, mean + jnp.exp(log_variance / 2) * noise, "decode") / 2 + 0.5
        kl = (mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2
        axes = (1, 2, 3, 4)
        return Terms(
            l1=jnp.abs(made - images).mean(axes),
            chroma=jnp.abs(chroma(made) - chroma(images)).mean(axes),
            ssim=jax.vmap(ssim)(made, images).mean(-1),
            kl=kl.sum(axes) / images[0].size,
            psnr=-10 * jnp.log10(((jnp.clip(made, 0, 1) - images)[..., :3] ** 2).mean(axes)),
        )

    def _apply(self, params: PyTree, arrays: Float[Array, "B K _ _ _"], method: str | None) -> Array:
        made = self.network.apply({"params": params}, arrays, method=method)
        return cast(Array, made)  # alone, because no collection is mutable

    def flops(self, trains: WhatTrains, num_examples: int, num_views: int) -> float:
        """FLOPs of the networks in a step, forward and backward."""
        key = jax.random.key(0)
        trained, frozen = jax.eval_shape(lambda key: trains.split(self.init(key), key), key)
        shape = (1, num_views, self.size, self.size, self.architecture.image_channels)

        def loss(trained, frozen, images):
            return trains.call(lambda params: self._apply(params, images, None).sum(), frozen, trained)

        program = costs.trace(jax.grad(loss), trained, frozen, jax.ShapeDtypeStruct(shape, jnp.float32))
        return float(costs.count_flops(program) * num_examples)

    def sample(self, params: PyTree, key: PRNGKeyArray) -> dict[str, Float[np.ndarray, "K H W2 3"]]:
        """The first turntables of the data, by number, each view beside what the autoencoder makes of it."""
        rgb, alpha = self.first_views(NUM_SAMPLES)
        codec = self._unscaled(params)
        made = sharding.to_host(codec.decode(codec.encode(rgb, alpha))[0])
        return {f"{number:02d}": each for number, each in enumerate(np.concatenate([rgb, made], axis=-2))}

    def save(self, directory: Path, params: PyTree, metadata: dict[str, Any]) -> Path:
        """Writes `directory`/autoencoder as diffusers does, for `config.autoencoder.kwargs.path`.

        Where the encoder trains, its scaling factor is measured, so that latents get a standard deviation of
        1 (Rombach et al. 2022, appendix G).
        """
        architecture = self.architecture
        if any(map(re.compile(self.trainable).search, self._encoder_paths())):
            latents = np.asarray(self._unscaled(params).encode(*self.first_views(NUM_MEASURED)), np.float64)
            architecture = dataclasses.replace(architecture, scaling_factor=float(1 / latents.std()))
        path = directory / "autoencoder"
        kl_network.write(path, params, architecture, self.weights_dtype)
        return path

    def _unscaled(self, params: PyTree) -> AutoencoderKL:
        architecture = dataclasses.replace(self.architecture, scaling_factor=1.0, shift_factor=0.0)
        return AutoencoderKL(params, architecture, "in training")

    def _encoder_paths(self) -> list[str]:
        params = traverse_util.flatten_dict(jax.eval_shape(self.init, jax.random.key(0)), sep="/")
        return [path for path in params if re.match(ENCODER, path)]


def chroma(images: Float[Array, "*_ C"]) -> Float[Array, "*_ 2"]:
    """What hue adds to brightness: red less green, and yellow, which is their mean, less blue."""
    red, green, blue = (images[..., channel] for channel in range(3))
    return jnp.stack([red - green, (red + green) / 2 - blue], -1)


def ssim(x: Float[Array, "N H W C"], y: Float[Array, "N H W C"]) -> Float[Array, " N"]:
    """The structural similarity (Wang et al. 2004) of images in [0, 1], which is 1 where they are equal.

    Windows stay inside the images.
    """
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    rows, columns = (_bands(window, length) for length in x.shape[1:3])

    def blur(images: Float[Array, "N H W C"]) -> Float[Array, "N h w C"]:
        # Variances are differences of nearly equal numbers, which the usual precision of a GPU or TPU loses.
        return jnp.einsum("nhwc,ih,jw->nijc", images, rows, columns, precision="highest")

    mean_x, mean_y = blur(x), blur(y)
    variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return (luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)).mean((1, 2, 3))


def _bands(window: Float[np.ndarray, " k"], length: int) -> Float[np.ndarray, "{length}-k+1 {length}"]:
    """The matrix that slides a window along `length` values, staying inside."""
    steps = np.arange(length) - np.arange(length - len(window) + 1)[:, None]
    return np.where((steps >= 0) & (steps < len(window)), window[steps % len(window)], 0).astype(np.float32)


def build(config: ConfigDict, mesh: Mesh) -> AutoencoderTask:
    """The task that a config describes.

    `config.autoencoder.kwargs` has the sizes of a `kl_network.Architecture`, and `config.train.init_from` may
    name a file of weights of those sizes in diffusers' layout.
    """
    _, arguments = config_sections.named(config, "autoencoder")
    sizes = {name: value for name, value in arguments.items() if name != "path"}
    settings = config_sections.settings(config, "train", TrainSettings)
    if settings.lora.rank:
        raise UserError(
            "config.train.lora adapts a backbone, and the task autoencoder trains none; set rank to 0"
        )
    if not settings.streams:
        raise UserError("config.train.streams is empty; give a stream of frames")
    stream = next(iter(settings.streams.values()))

    def first_views(count: int) -> Views:
        """Those of the first objects of the first stream."""
        source = open_source(stream.data, seed=config.seed, size=config.size, num_views=stream.num_views)
        examples = input_pipeline.open_stream(
            source,
            seed=config.seed,
            batch_size=count,
            shard=input_pipeline.Shard(0, 1),
            shuffle=bool(stream.data.path),
            **vars(settings.loader),
        )
        with contextlib.closing(examples):
            return input_pipeline.stack_views(next(examples))

    return AutoencoderTask(
        kl_network.read_architecture("", **sizes),
        config.size,
        settings.autoencoder or AutoencoderLossSettings(),
        settings.trainable,
        first_views,
        WeightsDtype(settings.weights_dtype),
    )
